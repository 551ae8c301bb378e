//! Images made in memory, and what becomes of them.

mod configure;
mod erofs;
mod hostile;
mod images;
mod layers;
mod tar;

use std::fs::File;
use std::path::PathBuf;
use std::sync::atomic::{AtomicU32, Ordering};

use self::erofs::Listing;
#[cfg(feature = "registry")]
pub(super) use self::tar::Tar;
use super::ImageLimits;
use super::blob::Blob;
use super::digest::Digest;
use super::layer::{LayerFault, Packed};
use super::rootfs::{Build, Limits};

/// A directory that goes with the test.
pub(super) struct Scratch(pub(super) PathBuf);

impl Scratch {
    pub(super) fn new() -> Self {
        static COUNT: AtomicU32 = AtomicU32::new(0);
        let number = COUNT.fetch_add(1, Ordering::Relaxed);
        let name = format!("dormouse-image-{}-{number}", std::process::id());
        let path = std::env::temp_dir().join(name);
        let _ = std::fs::remove_dir_all(&path);
        std::fs::create_dir(&path).unwrap();
        Self(path)
    }

    pub(super) fn file(&self, name: &str, bytes: &[u8]) -> PathBuf {
        let path = self.0.join(name);
        std::fs::create_dir_all(path.parent().unwrap()).unwrap();
        std::fs::write(&path, bytes).unwrap();
        path
    }

    pub(super) fn blob(&self, bytes: &[u8]) -> Blob {
        Blob::whole(File::open(self.file("blob", bytes)).unwrap()).unwrap()
    }
}

impl Drop for Scratch {
    fn drop(&mut self) {
        let _ = std::fs::remove_dir_all(&self.0);
    }
}

fn limits() -> Limits {
    ImageLimits::default().0
}

/// The root file system of layers, as bytes.
fn root_of(layers: &[Vec<u8>], limits: Limits) -> Result<Vec<u8>, LayerFault> {
    let scratch = Scratch::new();
    let path = scratch.0.join("root");
    let file = File::options().read(true).write(true).create(true).truncate(true).open(&path);
    let mut build = Build::new(file.unwrap(), limits);
    for layer in layers {
        let blob = scratch.blob(layer);
        let digest = Some(Digest::of(layer));
        build.layer(Packed { blob, digest, max_ratio: limits.ratio }, &mut |_| Ok(()))?;
    }
    build.finish()?;
    Ok(std::fs::read(path).unwrap())
}

fn unpack(layers: &[Vec<u8>]) -> Result<Listing, LayerFault> {
    root_of(layers, limits()).map(|root| Listing::read(&root))
}

/// Why layers are refused.
#[track_caller]
fn refusal(layers: &[Vec<u8>]) -> String {
    let fault = unpack(layers).expect_err("it is refused");
    match std::error::Error::source(&fault) {
        Some(cause) => format!("{fault}: {cause}"),
        None => fault.to_string(),
    }
}

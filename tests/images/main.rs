//! Images of Debian's packages, from everywhere that images come from, with the programs that other people use:
//! skopeo, umoci and Docker's registry. No guest is run, so that they take a second where they run.

#[path = "../linux/debian_image.rs"]
#[expect(dead_code, reason = "each test has a cache of its own")]
mod debian_image;
#[path = "../../src/image/tests/erofs.rs"]
#[expect(dead_code, reason = "whole listings are compared")]
mod erofs;
mod overlays;
mod processes;
#[path = "../linux/programs.rs"]
#[expect(dead_code, reason = "nothing is put into a guest")]
mod programs;
#[path = "../linux/registry.rs"]
mod registry;
mod sources;
mod umoci;

use std::env;
use std::fs;
use std::path::{Path, PathBuf};

use dormouse::{Error, Image, ImageCache, ImageSource};

/// Where busybox and the other programs are.
pub fn guest_root() -> PathBuf {
    env::var_os("DORMOUSE_GUEST_ROOT").expect("run by tests/testbed").into()
}

/// A directory that goes with the test.
pub struct Scratch(pub PathBuf);

impl Scratch {
    pub fn new(name: &str) -> Self {
        let path = env::temp_dir().join(format!("dormouse-images-{name}-{}", std::process::id()));
        let _ = fs::remove_dir_all(&path);
        fs::create_dir(&path).unwrap();
        Self(path)
    }

    pub fn text(&self, name: &str) -> String {
        self.0.join(name).to_str().unwrap().to_owned()
    }
}

impl Drop for Scratch {
    fn drop(&mut self) {
        let _ = fs::remove_dir_all(&self.0);
    }
}

/// The image of this source, in a cache in this directory.
pub fn unpacked(source: ImageSource, cache: impl AsRef<Path>) -> Result<Image, Error> {
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap();
    runtime.block_on(source.unpack(&ImageCache::open(cache.as_ref()).unwrap()))
}

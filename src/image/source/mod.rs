//! Where images come from, when they are in files.

mod archive;
mod directory;
mod docker;
mod layout;

use std::io::Read;
use std::path::Path;

pub(super) use self::directory::Directory;
use super::ImageError;
use super::blob::Blob;
use super::config::ConfigFile;
use super::digest::Digest;
use super::manifest::{MAX_JSON_BYTES, Platform, json};
use crate::input_file;

/// An image whose layers nobody has looked at yet.
#[derive(Debug)]
pub(super) struct Found {
    pub(super) config: ConfigFile,
    /// Of the manifest, where there is one.
    pub(super) digest: Option<Digest>,
    /// The lowest first.
    pub(super) layers: Vec<FoundLayer>,
}

#[derive(Debug)]
pub(super) struct FoundLayer {
    pub(super) blob: Blob,
    pub(super) digest: Option<Digest>,
    /// Of its unpacked bytes.
    pub(super) diff_id: Digest,
}

/// The files of an image, by the names that they have in a layout.
pub(super) trait Files {
    /// Opens one; none if it is not there.
    fn open(&self, name: &str) -> Result<Option<Blob>, ImageError>;
}

/// What is looked for.
#[derive(Clone, Debug)]
pub(super) struct Wanted {
    pub(super) name: Option<String>,
    pub(super) platform: Platform,
}

/// Finds an image in a layout or in an archive.
pub(super) fn find(path: &Path, wanted: &Wanted) -> Result<Found, ImageError> {
    let opened = |source| ImageError::Open { path: path.to_owned(), source };
    let metadata = std::fs::metadata(path).map_err(opened)?;
    if metadata.is_dir() {
        let folder = layout::Folder::new(path);
        return match folder.open("index.json")? {
            Some(_) => layout::find(&folder, wanted),
            None => Err(ImageError::NoLayout { path: path.to_owned() }),
        };
    }
    let file = input_file::open(path).map_err(opened)?;
    let blob = Blob::whole(file).map_err(opened)?;
    let archive = archive::Archive::index(path, blob)?;
    // Newer Dockers write both. The layout has digests of everything.
    if archive.open("index.json")?.is_some() {
        return layout::find(&archive, wanted);
    }
    if archive.open("manifest.json")?.is_some() {
        return docker::find(&archive, wanted);
    }
    let what = "the archive has neither index.json nor manifest.json";
    Err(ImageError::NotAnImage { path: path.to_owned(), what })
}

/// Puts together what describes an image, and its layers.
pub(super) fn found(
    config: ConfigFile,
    digest: Option<Digest>,
    layers: Vec<(Blob, Option<Digest>)>,
    platform: &Platform,
) -> Result<Found, ImageError> {
    check_platform(&config, platform)?;
    let diff_ids = config.diff_ids()?;
    if diff_ids.len() != layers.len() {
        return Err(ImageError::Layers { layers: layers.len(), diff_ids: diff_ids.len() });
    }
    let layers = layers.into_iter().zip(diff_ids);
    let layers = layers.map(|((blob, digest), diff_id)| FoundLayer { blob, digest, diff_id });
    Ok(Found { config, digest, layers: layers.collect() })
}

/// Is an image for this platform? Only its index knows of variants.
pub(super) fn check_platform(config: &ConfigFile, platform: &Platform) -> Result<(), ImageError> {
    let own = Platform { variant: platform.variant.clone(), ..config.platform() };
    if own == *platform {
        return Ok(());
    }
    let (wanted, found) = (platform.to_string(), config.platform().to_string());
    Err(ImageError::Platform { wanted, found })
}

impl ConfigFile {
    fn platform(&self) -> Platform {
        let (os, architecture) = (self.os.clone(), self.architecture.clone());
        Platform { os, architecture, variant: None }
    }

    pub(super) fn parse(bytes: &[u8]) -> Result<Self, ImageError> {
        json(bytes, "the image's configuration")
    }
}

/// All bytes of a small file, which have this digest if it is known.
pub(super) fn read(blob: Blob, what: &str, digest: Option<Digest>) -> Result<Vec<u8>, ImageError> {
    let too_large = || ImageError::TooLarge { what: what.to_owned(), limit: MAX_JSON_BYTES };
    if blob.len() > MAX_JSON_BYTES {
        return Err(too_large());
    }
    let mut bytes = Vec::new();
    let read = blob.take(MAX_JSON_BYTES).read_to_end(&mut bytes);
    read.map_err(|source| ImageError::Read { what: what.to_owned(), source })?;
    if let Some(expected) = digest {
        check(&bytes, what, expected)?;
    }
    Ok(bytes)
}

pub(super) fn check(bytes: &[u8], what: &str, expected: Digest) -> Result<(), ImageError> {
    let found = Digest::of(bytes);
    if found == expected {
        return Ok(());
    }
    let (expected, found) = (expected.to_string(), found.to_string());
    Err(ImageError::Digest { what: what.to_owned(), expected, found })
}

//! The OCI image layout: index.json, and blobs by their digests.
//!
//! Source: OCI image specification, image-layout.md.

use std::path::{Path, PathBuf};

use super::{Files, Found, Wanted, found, read};
use crate::image::ImageError;
use crate::image::blob::Blob;
use crate::image::config::ConfigFile;
use crate::image::digest::Digest;
use crate::image::manifest::{Descriptor, Document, Manifest, choose};
use crate::input_file;

/// Indexes in one another: tools make two. A digest cannot be that of what it lies in, but an index.json has
/// none.
const MAX_DEPTH: usize = 5;

/// A layout in a directory.
pub(super) struct Folder(PathBuf);

impl Folder {
    pub(super) fn new(path: &Path) -> Self {
        Self(path.to_owned())
    }
}

impl Files for Folder {
    fn open(&self, name: &str) -> Result<Option<Blob>, ImageError> {
        let path = self.0.join(name);
        match input_file::open(&path).and_then(Blob::whole) {
            Ok(blob) => Ok(Some(blob)),
            Err(error) if error.kind() == std::io::ErrorKind::NotFound => Ok(None),
            Err(source) => Err(ImageError::Open { path, source }),
        }
    }
}

pub(super) fn find(files: &impl Files, wanted: &Wanted) -> Result<Found, ImageError> {
    let index = files.open("index.json")?.ok_or_else(|| missing("index.json"))?;
    let bytes = read(index, "index.json", None)?;
    let mut document = Document::parse(&bytes, None)?;
    let mut digest = Digest::of(&bytes);
    let mut name = wanted.name.as_deref();
    for _ in 0..MAX_DEPTH {
        match document {
            Document::Manifest(manifest) => return image(files, digest, &manifest, wanted),
            Document::Index(manifests) => {
                let chosen = choose(&manifests, name, &wanted.platform)?;
                // Only the outermost has names.
                name = None;
                digest = chosen.digest()?;
                let bytes = read(blob(files, chosen)?, "the manifest", Some(digest))?;
                document = Document::parse(&bytes, Some(&chosen.media_type))?;
            }
        }
    }
    Err(ImageError::Depth { limit: MAX_DEPTH })
}

fn image(
    files: &impl Files,
    digest: Digest,
    manifest: &Manifest,
    wanted: &Wanted,
) -> Result<Found, ImageError> {
    let config = blob(files, &manifest.config)?;
    let config = read(config, "the image's configuration", Some(manifest.config.digest()?))?;
    let config = ConfigFile::parse(&config)?;
    let layers = manifest.layers.iter();
    let layers = layers.map(|layer| Ok((blob(files, layer)?, Some(layer.digest()?))));
    found(config, Some(digest), layers.collect::<Result<_, ImageError>>()?, &wanted.platform)
}

/// What a descriptor describes, of the size that it says.
fn blob(files: &impl Files, descriptor: &Descriptor) -> Result<Blob, ImageError> {
    let name = format!("blobs/sha256/{}", descriptor.digest()?.hex());
    let blob = files.open(&name)?.ok_or_else(|| missing(&name))?;
    if blob.len() != descriptor.size {
        let (expected, found) = (descriptor.size, blob.len());
        return Err(ImageError::Size { what: name, expected, found });
    }
    Ok(blob)
}

fn missing(name: &str) -> ImageError {
    ImageError::Missing { name: name.to_owned() }
}

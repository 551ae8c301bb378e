//! From an image that was found to a root file system in the cache.

use std::path::Path;

use sha2::{Digest as _, Sha256};

use super::cache::{Cached, ImageCache, Reserved, Shelf};
use super::config::ImageConfig;
use super::digest::Digest;
use super::layer::{LayerFault, Packed};
use super::progress::{ImageStage, Reporter};
use super::rootfs::{Build, FORMAT, Limits};
use super::source::{self, Directory, Found, Wanted};
use super::{Image, ImageError};

/// What the work needs beside its source.
#[derive(Clone)]
pub(super) struct Work {
    pub(super) cache: ImageCache,
    pub(super) wanted: Wanted,
    pub(super) limits: Limits,
    pub(super) reporter: Reporter,
}

impl Work {
    /// The image of a layout or an archive.
    pub(super) fn open(&self, path: &Path) -> Result<Image, ImageError> {
        self.reporter.report(ImageStage::Find, 0, None)?;
        self.found(source::find(path, &self.wanted)?)
    }

    /// An image whose files are there.
    pub(super) fn found(&self, found: Found) -> Result<Image, ImageError> {
        let Found { config, digest, layers } = found;
        let config = config.run()?;
        let diff_ids: Vec<Digest> = layers.iter().map(|layer| layer.diff_id).collect();
        let root = self.root(&chain_id(&diff_ids), |build, reporter| {
            let count = layers.len();
            for (index, layer) in layers.into_iter().enumerate() {
                let (blob, digest) = (layer.blob, layer.digest);
                let (stage, size) = (ImageStage::Layer(index), blob.len());
                let packed = Packed { blob, digest, max_ratio: self.limits.ratio };
                let unpacked = build.layer(packed, &mut |bytes| reporter.part(stage, bytes, size));
                let unpacked = unpacked.and_then(|found| same(layer.diff_id, found));
                let number = index + 1;
                unpacked.map_err(|fault| ImageError::Layer { number, count, fault })?;
            }
            Ok(())
        })?;
        self.ready(config, digest, root)
    }

    /// A directory of the host.
    pub(super) fn directory(&self, path: &Path) -> Result<Image, ImageError> {
        self.reporter.report(ImageStage::Find, 0, None)?;
        let directory = Directory::open(path, &self.limits)?;
        let root = self.root(&directory.key(), |build, reporter| {
            let (mut sum, size) = (0, directory.bytes());
            directory.build(build, &mut |bytes| {
                sum += bytes;
                reporter.part(ImageStage::Copy, sum, size)
            })
        })?;
        self.ready(ImageConfig::default(), None, root)
    }

    /// The root file system with this content, from the cache or made by `fill`.
    fn root(
        &self,
        content: &Digest,
        fill: impl FnOnce(&mut Build, &Reporter) -> Result<(), ImageError>,
    ) -> Result<Cached, ImageError> {
        let name = root_name(content);
        let waiting = || self.reporter.report(ImageStage::Find, 0, None);
        let reserved: Reserved = match self.cache.reserve(Shelf::Roots, &name, waiting)? {
            Ok(found) => return Ok(found),
            Err(reserved) => reserved,
        };
        let file = reserved.file().map_err(ImageError::cache(self.cache.directory()))?;
        let mut build = Build::new(file, self.limits);
        fill(&mut build, &self.reporter)?;
        self.reporter.report(ImageStage::Write, 0, None)?;
        build.finish().map_err(ImageError::Root)?;
        reserved.commit(Shelf::Roots)
    }

    /// The root file system of layers with these digests, if it was made before.
    #[cfg(feature = "registry")]
    pub(super) fn find_root(&self, diff_ids: &[Digest]) -> Result<Option<Cached>, ImageError> {
        self.cache.find(Shelf::Roots, &root_name(&chain_id(diff_ids)))
    }

    pub(super) fn ready(
        &self,
        config: ImageConfig,
        digest: Option<Digest>,
        root: Cached,
    ) -> Result<Image, ImageError> {
        let bytes = root.file.metadata().map_err(ImageError::cache(&root.path))?.len();
        self.reporter.report(ImageStage::Ready, bytes, Some(bytes))?;
        Ok(Image::new(config, digest, root))
    }
}

fn root_name(content: &Digest) -> String {
    format!("{}-{FORMAT}.erofs", content.hex())
}

fn same(expected: Digest, found: Digest) -> Result<(), LayerFault> {
    if expected == found {
        return Ok(());
    }
    let (expected, found) = (expected.to_string(), found.to_string());
    Err(LayerFault::Digest { expected, found })
}

/// One digest for layers in their order. Source: OCI image specification, config.md, "Layer ChainID".
fn chain_id(diff_ids: &[Digest]) -> Digest {
    let chained = diff_ids.iter().copied().reduce(|chain, diff_id| {
        Digest::end(Sha256::new_with_prefix(format!("{chain} {diff_id}")))
    });
    chained.unwrap_or_else(|| Digest::of(b""))
}

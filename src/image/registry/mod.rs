//! Images from registries.
//!
//! Source: OCI distribution specification 1.1; Docker's token authentication. The client is hyper and a few
//! hundred lines, not the crate oci-client: that reads manifests, errors and tokens of any length into memory,
//! panics on a token that is no header, and brings a hundred crates and a second C library for TLS.

mod auth;
mod connection;
mod download;
mod error;
mod reference;
mod request;

use std::path::PathBuf;
use std::thread;
use std::time::Duration;

use tokio::runtime::Handle;

use self::auth::Credentials;
pub(crate) use self::error::RegistryError;
use self::reference::Reference;
use self::request::{Client, What};
use super::ImageError;
use super::cache::Shelf;
use super::config::ConfigFile;
use super::digest::Digest;
use super::manifest::{Descriptor, Document, MAX_JSON_BYTES, Manifest, choose};
use super::progress::ImageStage;
use super::source::{self, check};
use super::unpack::Work;
use super::{Image, blob::Blob};

/// Layers that are brought at the same time.
const AT_ONCE: usize = 3;
/// Indexes in one another.
const MAX_DEPTH: usize = 5;

/// How long a registry may say nothing in the middle of an exchange.
const PATIENCE: Duration = Duration::from_secs(30);

/// How a registry is asked.
#[derive(Clone, Debug)]
pub(super) struct Registry {
    pub(super) reference: String,
    /// Name and password; else those in Docker's configuration.
    pub(super) login: Option<(String, String)>,
    /// Docker's config.json; else the user's.
    pub(super) docker_config: Option<PathBuf>,
    patience: Duration,
}

impl Registry {
    pub(super) fn new(reference: String) -> Self {
        Self { reference, login: None, docker_config: None, patience: PATIENCE }
    }
}

impl Work {
    /// The image of a registry. It blocks, on a thread that may.
    pub(super) fn pull(&self, registry: &Registry, runtime: &Handle) -> Result<Image, ImageError> {
        self.reporter.report(ImageStage::Find, 0, None)?;
        let reference = Reference::parse(&registry.reference)?;
        let credentials = match &registry.login {
            Some((name, password)) => Credentials::login(name, password),
            None => Credentials::of_docker(&reference, registry.docker_config.as_deref())?,
        };
        let mut client = Client::new(reference, credentials, registry.patience)?;
        let (digest, manifest) = runtime.block_on(self.manifest(&mut client))?;
        let config = manifest.config.digest()?;
        let path = client.blob_path(&config);
        let what = What { name: "the image's configuration", accept: "*/*" };
        let bytes = runtime.block_on(client.small(&path, what, MAX_JSON_BYTES))?.bytes;
        check(&bytes, what.name, config)?;
        let config = ConfigFile::parse(&bytes)?;
        source::check_platform(&config, &self.wanted.platform)?;
        let diff_ids = config.diff_ids()?;
        if diff_ids.len() != manifest.layers.len() {
            let layers = manifest.layers.len();
            return Err(ImageError::Layers { layers, diff_ids: diff_ids.len() });
        }
        // What is there already is not brought.
        if let Some(root) = self.find_root(&diff_ids)? {
            return self.ready(config.run()?, Some(digest), root);
        }
        let blobs = self.layers(&client, &manifest.layers, runtime)?;
        self.found(source::found(config, Some(digest), blobs, &self.wanted.platform)?)
    }

    /// The manifest that is meant, and its digest.
    async fn manifest(&self, client: &mut Client) -> Result<(Digest, Manifest), ImageError> {
        let what = What { name: "the manifest", accept: super::manifest::ACCEPTED };
        let mut wanted = client.reference.digest;
        for _ in 0..MAX_DEPTH {
            let path = client.manifest_path(wanted.as_ref());
            let answer = client.small(&path, what, MAX_JSON_BYTES).await?;
            if let Some(expected) = wanted {
                check(&answer.bytes, what.name, expected)?;
            }
            let digest = Digest::of(&answer.bytes);
            match Document::parse(&answer.bytes, answer.media_type.as_deref())? {
                Document::Manifest(manifest) => return Ok((digest, manifest)),
                Document::Index(manifests) => {
                    wanted = Some(choose(&manifests, None, &self.wanted.platform)?.digest()?);
                }
            }
        }
        Err(ImageError::Depth { limit: MAX_DEPTH })
    }

    /// Brings layers into the cache, some at once.
    fn layers(
        &self,
        client: &Client,
        layers: &[Descriptor],
        runtime: &Handle,
    ) -> Result<Vec<(Blob, Option<Digest>)>, ImageError> {
        let limit = self.limits.bytes;
        let packed = layers.iter().fold(0u64, |sum, layer| sum.saturating_add(layer.size));
        // Before anything is brought: what layers are packed they are unpacked, and more.
        if packed > limit {
            return Err(ImageError::TooLarge { what: "the image".to_owned(), limit });
        }
        let mut blobs = Vec::new();
        for (group, descriptors) in layers.chunks(AT_ONCE).enumerate() {
            // Threads of their own: those of the runtime may all be taken by others who wait for theirs.
            let ended: Vec<_> = thread::scope(|scope| {
                let threads = descriptors.iter().enumerate().map(|(at, descriptor)| {
                    let stage = ImageStage::Download(group * AT_ONCE + at);
                    let client = client.clone();
                    let bring = move || self.layer(client, descriptor, stage, runtime);
                    thread::Builder::new()
                        .name("dormouse-image".to_owned())
                        .spawn_scoped(scope, bring)
                });
                // All have ended before one's error is told.
                let threads: Vec<_> = threads.collect();
                let ended = threads.into_iter().map(|thread| match thread {
                    Ok(thread) => thread.join().unwrap_or(Err(ImageError::Lost)),
                    Err(error) => Err(ImageError::Thread(error)),
                });
                ended.collect()
            });
            for blob in ended {
                blobs.push(blob?);
            }
        }
        Ok(blobs)
    }

    fn layer(
        &self,
        mut client: Client,
        descriptor: &Descriptor,
        stage: ImageStage,
        runtime: &Handle,
    ) -> Result<(Blob, Option<Digest>), ImageError> {
        let digest = descriptor.digest()?;
        let waiting = || self.reporter.report(stage, 0, Some(descriptor.size));
        let cached = match self.cache.reserve(Shelf::Blobs, &digest.hex(), waiting)? {
            Ok(found) => found,
            Err(reserved) => {
                let file = reserved.file().map_err(ImageError::cache(self.cache.directory()))?;
                let download = client.download(&digest, descriptor.size, file, |bytes| {
                    self.reporter.report(stage, bytes, Some(descriptor.size))
                });
                runtime.block_on(download)?;
                reserved.commit(Shelf::Blobs)?
            }
        };
        let blob = Blob::shared(cached.file).map_err(ImageError::cache(&cached.path))?;
        Ok((blob, Some(digest)))
    }
}

#[cfg(test)]
mod tests;

//! A layer, from its registry to a file.

use std::fs::File;
use std::io::Write;

use sha2::{Digest as _, Sha256};

use super::RegistryError;
use super::request::{Client, What};
use crate::image::ImageError;
use crate::image::digest::Digest;

impl Client {
    /// Writes a blob of so many bytes to a file, and checks it on the way.
    pub(super) async fn download(
        &mut self,
        digest: &Digest,
        size: u64,
        mut file: File,
        mut on_bytes: impl FnMut(u64) -> Result<(), ImageError>,
    ) -> Result<(), ImageError> {
        let name = "a layer";
        let path = self.blob_path(digest);
        let mut open = self.get(&path, What { name, accept: "*/*" }).await?;
        let host = open.host.clone();
        let wrong = |found| {
            let (host, what) = (host.clone(), name.to_owned());
            ImageError::from(RegistryError::Length { host, what, expected: size, found })
        };
        match open.length() {
            Some(length) if length != size => return Err(wrong(length)),
            _ => {}
        }
        let (mut count, mut hasher) = (0, Sha256::new());
        while let Some(bytes) = open.bytes().await? {
            count += bytes.len() as u64;
            if count > size {
                return Err(wrong(count));
            }
            hasher.update(&bytes);
            let written = file.write_all(&bytes);
            written.map_err(|source| ImageError::Read {
                what: "a layer into the cache".to_owned(),
                source,
            })?;
            on_bytes(count)?;
        }
        if count != size {
            return Err(wrong(count));
        }
        let found = Digest::end(hasher);
        if found != *digest {
            let (expected, found) = (digest.to_string(), found.to_string());
            return Err(ImageError::Digest {
                what: format!("a layer from {host}"),
                expected,
                found,
            });
        }
        Ok(())
    }
}

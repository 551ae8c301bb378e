//! What `docker save` and `podman save` write: manifest.json, and files that it names.
//!
//! Source: Docker's image specification 1.2, "Combined Image JSON + Filesystem Changeset Format".

use serde::Deserialize;

use super::{Files, Found, Wanted, check, found, read};
use crate::image::ImageError;
use crate::image::config::ConfigFile;
use crate::image::digest::Digest;
use crate::image::manifest::{MAX_LAYERS, is_named, json, listed};

#[derive(Deserialize)]
#[serde(rename_all = "PascalCase")]
struct Saved {
    config: String,
    #[serde(default)]
    repo_tags: Option<Vec<String>>,
    #[serde(default)]
    layers: Option<Vec<String>>,
}

impl Saved {
    fn tags(&self) -> impl Iterator<Item = &str> {
        self.repo_tags.iter().flatten().map(String::as_str)
    }
}

pub(super) fn find(files: &impl Files, wanted: &Wanted) -> Result<Found, ImageError> {
    let open = |name: &str| {
        let missing = || ImageError::Missing { name: name.to_owned() };
        files.open(name)?.ok_or_else(missing)
    };
    let bytes = read(open("manifest.json")?, "manifest.json", None)?;
    let images: Vec<Saved> = json(&bytes, "manifest.json")?;
    let image = choose(&images, wanted.name.as_deref())?;
    let bytes = read(open(&image.config)?, "the image's configuration", None)?;
    if let Some(digest) = named_digest(&image.config) {
        check(&bytes, "the image's configuration", digest)?;
    }
    let names = image.layers.as_deref().unwrap_or_default();
    if names.len() > MAX_LAYERS {
        return Err(ImageError::TooManyLayers { limit: MAX_LAYERS });
    }
    // Layers have the digests of their unpacked bytes in the configuration.
    let layers = names.iter().map(|name| Ok((open(name)?, None)));
    let layers = layers.collect::<Result<_, ImageError>>()?;
    found(ConfigFile::parse(&bytes)?, None, layers, &wanted.platform)
}

fn choose<'s>(images: &'s [Saved], name: Option<&str>) -> Result<&'s Saved, ImageError> {
    let names = || listed(images.iter().flat_map(Saved::tags));
    let Some(name) = name else {
        return match images {
            [] => Err(ImageError::Missing { name: "images in manifest.json".to_owned() }),
            [one] => Ok(one),
            _ => Err(ImageError::Several { names: names() }),
        };
    };
    let mut fitting = images.iter().filter(|image| image.tags().any(|tag| is_named(tag, name)));
    match (fitting.next(), fitting.next()) {
        (Some(one), None) => Ok(one),
        (None, _) => Err(ImageError::NoSuchName { name: name.to_owned(), names: names() }),
        _ => Err(ImageError::Several { names: names() }),
    }
}

/// A configuration is named `DIGEST.json`, or is a blob of a layout.
fn named_digest(name: &str) -> Option<Digest> {
    let name = name.strip_suffix(".json").unwrap_or(name);
    Digest::from_hex(name.rsplit('/').next().unwrap_or(name))
}

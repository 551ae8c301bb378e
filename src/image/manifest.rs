//! What images say of themselves: indexes, manifests, and the platforms that they are for.
//!
//! Source: OCI image specification, image-index.md, manifest.md, descriptor.md; Docker's image manifest
//! version 2, schema 2. They are read by types of our own: of what is in them a handful of fields is needed, and
//! real ones have null where the specification has none.

use std::collections::BTreeMap;
use std::fmt;

use serde::Deserialize;
use serde::de::DeserializeOwned;

use super::ImageError;
use super::digest::Digest;

/// A manifest, an index or a configuration: registries take up to 4 MiB.
pub(super) const MAX_JSON_BYTES: u64 = 4 << 20;
/// Docker has 127.
pub(super) const MAX_LAYERS: usize = 1024;

const INDEXES: [&str; 2] = [
    "application/vnd.oci.image.index.v1+json",
    "application/vnd.docker.distribution.manifest.list.v2+json",
];
const MANIFESTS: [&str; 2] = [
    "application/vnd.oci.image.manifest.v1+json",
    "application/vnd.docker.distribution.manifest.v2+json",
];
const CONFIGS: [&str; 2] =
    ["application/vnd.oci.image.config.v1+json", "application/vnd.docker.container.image.v1+json"];
const LAYERS: [&str; 9] = [
    "application/vnd.oci.image.layer.v1.tar",
    "application/vnd.oci.image.layer.v1.tar+gzip",
    "application/vnd.oci.image.layer.v1.tar+zstd",
    "application/vnd.oci.image.layer.nondistributable.v1.tar",
    "application/vnd.oci.image.layer.nondistributable.v1.tar+gzip",
    "application/vnd.oci.image.layer.nondistributable.v1.tar+zstd",
    "application/vnd.docker.image.rootfs.diff.tar",
    "application/vnd.docker.image.rootfs.diff.tar.gzip",
    "application/vnd.docker.image.rootfs.diff.tar.zstd",
];

/// The media types of indexes and manifests, as a registry is asked for them.
#[cfg(feature = "registry")]
pub(super) const ACCEPTED: &str = "application/vnd.oci.image.manifest.v1+json, \
    application/vnd.oci.image.index.v1+json, application/vnd.docker.distribution.manifest.v2+json, \
    application/vnd.docker.distribution.manifest.list.v2+json";

/// What an image runs on, as Go names it: an operating system, a processor, and perhaps a variant of that.
#[derive(Clone, Debug, PartialEq, Eq, Deserialize)]
pub(super) struct Platform {
    #[serde(default)]
    pub(super) os: String,
    #[serde(default)]
    pub(super) architecture: String,
    #[serde(default)]
    pub(super) variant: Option<String>,
}

impl Platform {
    /// Linux on x86-64: what guests are.
    pub(super) fn guest() -> Self {
        Self { os: "linux".to_owned(), architecture: "amd64".to_owned(), variant: None }
    }

    /// Reads `linux/amd64`, `linux/arm64/v8`.
    pub(super) fn parse(text: &str) -> Self {
        let mut parts = text.splitn(3, '/').map(str::to_owned);
        let os = parts.next().unwrap_or_default();
        let architecture = parts.next().unwrap_or_default();
        Self { os, architecture, variant: parts.next() }
    }

    /// Does an image for `other` run where this is wanted?
    fn takes(&self, other: &Self) -> bool {
        let variant = self.variant.is_none() || self.variant == other.variant;
        self.os == other.os && self.architecture == other.architecture && variant
    }
}

impl fmt::Display for Platform {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}/{}", self.os, self.architecture)?;
        match &self.variant {
            Some(variant) => write!(f, "/{variant}"),
            None => Ok(()),
        }
    }
}

/// What another file is.
#[derive(Clone, Debug, Deserialize)]
#[serde(rename_all = "camelCase")]
pub(super) struct Descriptor {
    pub(super) media_type: String,
    pub(super) digest: String,
    pub(super) size: u64,
    #[serde(default)]
    pub(super) platform: Option<Platform>,
    #[serde(default)]
    annotations: Option<BTreeMap<String, String>>,
}

/// An index, or a manifest.
pub(super) enum Document {
    Index(Vec<Descriptor>),
    Manifest(Manifest),
}

/// What an image is made of.
#[derive(Debug)]
pub(super) struct Manifest {
    pub(super) config: Descriptor,
    pub(super) layers: Vec<Descriptor>,
}

#[derive(Deserialize)]
#[serde(rename_all = "camelCase")]
struct Raw {
    schema_version: u32,
    #[serde(default)]
    media_type: Option<String>,
    #[serde(default)]
    manifests: Option<Vec<Descriptor>>,
    #[serde(default)]
    config: Option<Descriptor>,
    #[serde(default)]
    layers: Option<Vec<Descriptor>>,
}

impl Descriptor {
    pub(super) fn digest(&self) -> Result<Digest, ImageError> {
        Digest::parse(&self.digest)
            .ok_or_else(|| ImageError::NoDigest { text: self.digest.clone() })
    }

    /// The name that the image has in its layout.
    pub(super) fn names(&self) -> impl Iterator<Item = &str> {
        const NAMES: [&str; 2] = ["org.opencontainers.image.ref.name", "io.containerd.image.name"];
        let annotations = self.annotations.iter();
        annotations
            .flat_map(|all| NAMES.iter().filter_map(|name| all.get(*name)).map(String::as_str))
    }

    fn is_index(&self) -> bool {
        INDEXES.contains(&self.media_type.as_str())
    }

    fn is_manifest(&self) -> bool {
        MANIFESTS.contains(&self.media_type.as_str())
    }

    /// What builders say of how an image was built is listed beside it, for a platform `unknown`.
    fn is_attestation(&self) -> bool {
        let annotations = self.annotations.as_ref();
        annotations.is_some_and(|all| all.contains_key("vnd.docker.reference.type"))
            || self.platform.as_ref().is_some_and(|platform| platform.os == "unknown")
    }
}

impl Document {
    /// Reads what has this media type, if that is known.
    pub(super) fn parse(bytes: &[u8], media_type: Option<&str>) -> Result<Self, ImageError> {
        let raw: Raw = json(bytes, "the manifest")?;
        let stated = media_type.or(raw.media_type.as_deref());
        let is_index = match stated {
            Some(text) if INDEXES.contains(&text) => true,
            Some(text) if MANIFESTS.contains(&text) => false,
            Some(other) => return Err(media_type_error("the manifest", other)),
            None => raw.manifests.is_some(),
        };
        // What is an index in one place and a manifest in another is neither.
        let contradicts = raw.media_type.is_some() && raw.media_type.as_deref() != stated;
        if raw.schema_version != 2 || contradicts || (is_index && raw.layers.is_some()) {
            let value = format!(
                "of schema version {} and media type {}",
                raw.schema_version,
                raw.media_type.unwrap_or_default()
            );
            return Err(ImageError::Config { what: "manifest", value });
        }
        if is_index {
            return Ok(Self::Index(raw.manifests.unwrap_or_default()));
        }
        let missing =
            |name: &str| ImageError::Missing { name: format!("`{name}` in its manifest") };
        let config = raw.config.ok_or_else(|| missing("config"))?;
        let layers = raw.layers.ok_or_else(|| missing("layers"))?;
        if !CONFIGS.contains(&config.media_type.as_str()) {
            return Err(media_type_error("the image's configuration", &config.media_type));
        }
        if layers.len() > MAX_LAYERS {
            return Err(ImageError::TooManyLayers { limit: MAX_LAYERS });
        }
        let known = |layer: &&Descriptor| !LAYERS.contains(&layer.media_type.as_str());
        if let Some(layer) = layers.iter().find(known) {
            return Err(media_type_error("a layer", &layer.media_type));
        }
        Ok(Self::Manifest(Manifest { config, layers }))
    }
}

fn media_type_error(what: &'static str, media_type: &str) -> ImageError {
    ImageError::MediaType { what, media_type: media_type.to_owned() }
}

/// Of the images in an index, the one with this name and for this platform.
pub(super) fn choose<'d>(
    manifests: &'d [Descriptor],
    name: Option<&str>,
    wanted: &Platform,
) -> Result<&'d Descriptor, ImageError> {
    let all = manifests.iter().filter(|descriptor| !descriptor.is_attestation());
    let named: Vec<&Descriptor> = match name {
        Some(name) => all.filter(|d| d.names().any(|known| is_named(known, name))).collect(),
        None => all.collect(),
    };
    if named.is_empty() {
        return Err(match name {
            Some(name) if !manifests.is_empty() => {
                let names = listed(manifests.iter().flat_map(Descriptor::names));
                ImageError::NoSuchName { name: name.to_owned(), names }
            }
            _ => ImageError::Missing { name: "images in its index".to_owned() },
        });
    }
    if let Some(other) = named.iter().find(|d| !d.is_index() && !d.is_manifest()) {
        return Err(media_type_error("an image in the index", &other.media_type));
    }
    // Where nothing is said of the platform, the image's configuration will.
    let fits = |d: &&&Descriptor| d.platform.as_ref().is_none_or(|platform| wanted.takes(platform));
    let fitting: Vec<&Descriptor> = named.iter().filter(fits).copied().collect();
    let (first, rest) = match &fitting[..] {
        [] => {
            let found = named.iter().filter_map(|d| d.platform.as_ref()).map(Platform::to_string);
            let found: Vec<_> = found.collect();
            let found = listed(found.iter().map(String::as_str));
            return Err(ImageError::Platform { wanted: wanted.to_string(), found });
        }
        [first, rest @ ..] => (first, rest),
    };
    if rest.iter().all(|other| other.digest == first.digest) {
        return Ok(first);
    }
    // Variants of one processor, of which the plainest runs everywhere.
    if fitting.iter().all(|d| d.platform.is_some() && d.names().next().is_none()) {
        let plain = |d: &&&Descriptor| d.platform.as_ref().is_some_and(|p| p.variant.is_none());
        return Ok(fitting.iter().find(plain).unwrap_or(first));
    }
    let names = listed(fitting.iter().flat_map(|d| d.names()));
    Err(ImageError::Several { names })
}

/// Is an image that is listed as `known` asked for by `name`? By all of it, or by its tag.
pub(super) fn is_named(known: &str, name: &str) -> bool {
    known == name
        || known
            .strip_suffix(name)
            .is_some_and(|front| front.ends_with('/') || front.ends_with(':'))
}

pub(super) fn listed<'a>(names: impl Iterator<Item = &'a str>) -> String {
    const SHOWN: usize = 20;
    let mut names: Vec<&str> = names.take(SHOWN).collect();
    names.dedup();
    if names.is_empty() { "none with a name".to_owned() } else { names.join(", ") }
}

pub(super) fn json<T: DeserializeOwned>(bytes: &[u8], what: &str) -> Result<T, ImageError> {
    serde_json::from_slice(bytes)
        .map_err(|source| ImageError::Json { what: what.to_owned(), source })
}

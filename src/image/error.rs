//! What goes wrong with images.

use std::io;
use std::path::{Path, PathBuf};

use thiserror::Error as ThisError;

use super::layer::LayerFault;
use crate::error::{Error, ErrorKind, printable};

#[derive(Debug, ThisError)]
pub(crate) enum ImageError {
    #[error("cannot open the image {}", path.display())]
    Open { path: PathBuf, source: io::Error },
    #[error("cannot read {}", path.display())]
    Directory { path: PathBuf, source: io::Error },
    #[error("{} changed while it was read", path.display())]
    Changed { path: PathBuf },
    #[error("{} is no container image: {what}", path.display())]
    NotAnImage { path: PathBuf, what: &'static str },
    #[error("{} is no container image: the directory has no index.json", path.display())]
    NoLayout { path: PathBuf },
    #[error("the image's archive {}: {}", path.display(), chain(fault))]
    Archive { path: PathBuf, fault: LayerFault },
    #[error("the image lacks {}", printable(name))]
    Missing { name: String },
    #[error("{what} is no JSON of an image")]
    Json { what: String, source: serde_json::Error },
    #[error("{what} is larger than {limit} bytes")]
    TooLarge { what: String, limit: u64 },
    #[error("cannot read {what}")]
    Read { what: String, source: io::Error },
    #[error("{what} has the media type {:?}, which is not known", printable(media_type))]
    MediaType { what: &'static str, media_type: String },
    #[error("{:?} is no SHA-256 digest", printable(text))]
    NoDigest { text: String },
    #[error("{what} has the digest {found} instead of {expected}")]
    Digest { what: String, expected: String, found: String },
    #[error("{what} has {found} bytes instead of {expected}")]
    Size { what: String, expected: u64, found: u64 },
    #[error("the image has {layers} layers, and the digests of {diff_ids}")]
    Layers { layers: usize, diff_ids: usize },
    #[error("more than {limit} layers")]
    TooManyLayers { limit: usize },
    #[error("there are several images: {}", printable(names))]
    Several { names: String },
    #[error("there is no image named {:?}; there are: {}", printable(name), printable(names))]
    NoSuchName { name: String, names: String },
    #[error("there is no image for {wanted}; there are: {}", printable(found))]
    Platform { wanted: String, found: String },
    #[error("indexes of images lie in one another more than {limit} deep")]
    Depth { limit: usize },
    #[error("the layer {number} of {count}: {fault}", fault = chain(.fault))]
    Layer { number: usize, count: usize, fault: LayerFault },
    #[error("the root file system: {}", chain(.0))]
    Root(LayerFault),
    #[error("the image's {what} is {:?}", printable(value))]
    Config { what: &'static str, value: String },
    #[error("cannot use the cache {}", path.display())]
    Cache { path: PathBuf, source: io::Error },
    #[error("cannot make the disk {}", path.display())]
    Overlay { path: PathBuf, source: io::Error },
    #[error("a disk of {bytes} bytes; it takes {min} to {max}")]
    OverlaySize { bytes: u64, min: u64, max: u64 },
    #[cfg(feature = "registry")]
    #[error(transparent)]
    Registry(#[from] super::registry::RegistryError),
    #[error("the caller's progress ended the work on an image")]
    Interrupted,
    #[error("there is no tokio runtime here")]
    NoRuntime,
    #[error("the work on an image ended without a result")]
    Lost,
    #[cfg(feature = "registry")]
    #[error("cannot start a thread")]
    Thread(#[source] io::Error),
}

impl ImageError {
    pub(super) fn cache(path: &Path) -> impl FnOnce(io::Error) -> Self {
        let path = path.to_owned();
        move |source| Self::Cache { path, source }
    }
}

/// The fault with its causes, which `Error` would not find behind a message.
fn chain(fault: &LayerFault) -> String {
    let mut text = fault.to_string();
    let mut cause = std::error::Error::source(fault);
    while let Some(next) = cause {
        text = format!("{text}: {next}");
        cause = next.source();
    }
    printable(&text)
}

impl From<ImageError> for Error {
    fn from(error: ImageError) -> Self {
        use ImageError as E;
        let kind = match &error {
            E::Open { source, .. } | E::Directory { source, .. } => ErrorKind::File(source.kind()),
            E::Cache { source, .. } | E::Overlay { source, .. } => ErrorKind::File(source.kind()),
            E::Layer { fault: LayerFault::Interrupted, .. } | E::Interrupted => {
                ErrorKind::Interrupted
            }
            E::Layer { fault, .. } | E::Root(fault) | E::Archive { fault, .. } => fault_kind(fault),
            E::NoRuntime | E::OverlaySize { .. } => ErrorKind::Config,
            #[cfg(feature = "registry")]
            E::Registry(error) => error.kind(),
            _ => ErrorKind::Image,
        };
        let fix = match &error {
            E::NoLayout { .. } => {
                "it takes an OCI layout; of any other directory `Image::directory` makes an image"
            }
            E::NotAnImage { .. } | E::Archive { fault: LayerFault::Tar(_), .. } => {
                "it takes an OCI layout, an archive of one, or what `docker save` or `podman save` writes"
            }
            E::Several { .. } | E::NoSuchName { .. } => "choose one by `ImageSource::name`",
            E::Platform { .. } => "choose another by `ImageSource::platform`",
            E::Layer { fault: LayerFault::Limit { .. }, .. }
            | E::Root(LayerFault::Limit { .. }) => "raise the limit in `ImageLimits`",
            E::NoRuntime => "call it in `#[tokio::main]`, or in a task of a runtime",
            #[cfg(feature = "registry")]
            E::Registry(error) => error.fix(),
            _ => "",
        };
        let error = Self::new(kind, error);
        if fix.is_empty() { error } else { error.fix(fix) }
    }
}

fn fault_kind(fault: &LayerFault) -> ErrorKind {
    match fault {
        LayerFault::Write(source) => ErrorKind::File(source.kind()),
        LayerFault::Thread(_) => ErrorKind::Resources,
        LayerFault::Interrupted => ErrorKind::Interrupted,
        _ => ErrorKind::Image,
    }
}

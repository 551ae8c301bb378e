//! What is wrong with a layer.

use std::io;

use thiserror::Error as ThisError;

/// Why a layer cannot become part of a root file system.
#[derive(Debug, ThisError)]
pub(crate) enum LayerFault {
    #[error("it cannot be read")]
    Read(#[source] io::Error),
    #[error("it ends in the middle of an entry")]
    Truncated,
    #[error("{0}")]
    Tar(&'static str),
    #[error("it has an entry of the type {}, which is not known", .0.escape_ascii())]
    Type(u8),
    #[error("{}: {what}", name(path))]
    Entry { path: Vec<u8>, what: &'static str },
    #[error("more than {limit} {what}")]
    Limit { what: &'static str, limit: u64 },
    #[error("its content has the digest {found} instead of {expected}")]
    Digest { expected: String, found: String },
    #[error("the caller's progress ended it")]
    Interrupted,
    #[error("the root file system cannot be written")]
    Write(#[source] io::Error),
    #[error("the thread that unpacks it failed")]
    Thread(#[source] io::Error),
}

impl LayerFault {
    pub(in crate::image) fn entry(path: &[u8], what: &'static str) -> Self {
        Self::Entry { path: path.to_vec(), what }
    }
}

/// A name for the eyes of a person, not all of it where it is very long.
fn name(path: &[u8]) -> String {
    const SHOWN: usize = 256;
    let cut = if path.len() > SHOWN { "…" } else { "" };
    format!("{}{cut}", path[..path.len().min(SHOWN)].escape_ascii())
}

impl From<io::Error> for LayerFault {
    fn from(error: io::Error) -> Self {
        match error.kind() {
            io::ErrorKind::UnexpectedEof => Self::Truncated,
            _ => Self::Read(error),
        }
    }
}

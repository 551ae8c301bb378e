//! What goes wrong with registries.

use std::io;
use std::time::Duration;

use thiserror::Error as ThisError;

use crate::error::{ErrorKind, printable};

#[derive(Debug, ThisError)]
pub(crate) enum RegistryError {
    #[error("{:?} names no image: {what}", printable(text))]
    Reference { text: String, what: &'static str },
    #[error("cannot read the logins of Docker in {path}: {what}")]
    Logins { path: String, what: String },
    #[error("cannot connect to {host}")]
    Connect { host: String, source: io::Error },
    #[error("{host} did not {what} for {} s", patience.as_secs())]
    Silent { host: String, what: &'static str, patience: Duration },
    #[error("the exchange with {host} failed: {}", printable(what))]
    Exchange { host: String, what: String },
    #[error("{host} has not {what}")]
    NotFound { host: String, what: String },
    #[error("{host} refuses {what} ({status}){}", said(message))]
    Denied { host: String, what: String, status: u16, message: String },
    #[error("{host} answers {what} with {status}{}", said(message))]
    Status { host: String, what: String, status: u16, message: String },
    #[error("{host} sends {:?} instead of {what}", printable(media_type))]
    NotWhatWasAsked { host: String, what: String, media_type: String },
    #[error("{host} sends more than the {limit} bytes that {what} may have")]
    TooLong { host: String, what: String, limit: u64 },
    #[error("{host} sends {found} bytes of {what} instead of {expected}")]
    Length { host: String, what: String, expected: u64, found: u64 },
    #[error("{host} redirects {what} more than {limit} times")]
    Redirects { host: String, what: String, limit: usize },
    #[error("{host} redirects {what} to {:?}, which is not followed", printable(to))]
    Redirect { host: String, what: String, to: String },
    #[error("{host} wants a proof of identity that is not understood: {:?}", printable(challenge))]
    Challenge { host: String, challenge: String },
    #[error("there are no certificates of authorities on this machine to know {host} by")]
    NoRoots { host: String },
}

fn said(message: &str) -> String {
    if message.is_empty() { String::new() } else { format!(": {}", printable(message)) }
}

impl RegistryError {
    pub(in crate::image) fn kind(&self) -> ErrorKind {
        match self {
            Self::Silent { .. } => ErrorKind::Timeout,
            Self::Reference { .. } => ErrorKind::Config,
            _ => ErrorKind::Image,
        }
    }

    pub(in crate::image) fn fix(&self) -> &'static str {
        match self {
            Self::Reference { .. } => "it takes [HOST[:PORT]/]NAME[:TAG][@DIGEST]",
            Self::Denied { .. } => {
                "log in by `docker login`, or give a name and a password by `ImageSource::login`"
            }
            Self::NotFound { .. } => "look whether the name and the tag are right",
            Self::NoRoots { .. } => "install them (Debian's package is ca-certificates)",
            _ => "",
        }
    }
}

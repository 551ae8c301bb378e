//! Why there is no endpoint, or no token.

use std::net::SocketAddr;
use std::time::Duration;
use std::{fmt, io};

use thiserror::Error as ThisError;

use super::upstream::UpstreamError;
use crate::error::{Error, ErrorKind};

#[derive(Debug, ThisError)]
pub(super) enum EndpointError {
    #[error("an endpoint without tokens would serve everybody who reaches {address}")]
    Open { address: SocketAddr },
    #[error("the endpoint has no keys for tokens")]
    NoKeys,
    #[error("the endpoint's limit `{limit}` is nothing, with which it would serve nobody")]
    LimitOfNothing { limit: &'static str },
    #[error("{domain:?} is no name of a domain")]
    Domain { domain: String },
    #[error("{prefix:?} is no prefix of paths: it begins and ends with a slash")]
    Prefix { prefix: String },
    #[error("the endpoint cannot listen at {address}")]
    Listen { address: String, source: io::Error },
    #[error("there is no tokio runtime here")]
    NoRuntime,
    #[error("the certificate or its key cannot be used: {what}")]
    Certificate { what: String },
    #[error("there is no certificate to be made: {what}")]
    SelfSigned { what: String },
    #[error("{id:?} is no name for a key: it takes 1 to 64 of a-z, A-Z, 0-9, - and _")]
    KeyId { id: String },
    #[error("the key {id:?} makes the tokens, and cannot be removed")]
    CurrentKey { id: String },
    #[error("{id:?} is no name of a session")]
    SessionId { id: String },
    #[error("port 0 of a guest, at which nobody listens")]
    NoPort,
    #[error("a token for no port")]
    NoPorts,
    #[error("a token that lives for {lifetime:?} would live beyond the year 9999")]
    Lifetime { lifetime: Duration },
    #[error("a token cannot be made: {0:?}")]
    Mint(pasetors::errors::Error),
    #[error("there is no new token")]
    Renew(#[source] UpstreamError),
}

impl EndpointError {
    /// It cannot listen at this address, or these.
    pub(super) fn listen(address: impl fmt::Display) -> impl FnOnce(io::Error) -> Self {
        move |source| Self::Listen { address: address.to_string(), source }
    }
}

/// Addresses, of which one would do.
pub(super) struct Addresses<'a>(pub(super) &'a [SocketAddr]);

impl fmt::Display for Addresses<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let texts: Vec<_> = self.0.iter().map(SocketAddr::to_string).collect();
        f.write_str(&texts.join(" or "))
    }
}

impl From<EndpointError> for Error {
    fn from(error: EndpointError) -> Self {
        use EndpointError as E;
        let kind = match &error {
            E::Listen { source, .. } => ErrorKind::File(source.kind()),
            E::Lifetime { .. } | E::Mint(_) | E::Renew(_) => ErrorKind::Token,
            _ => ErrorKind::Config,
        };
        let fix = match &error {
            E::Open { .. } => {
                "give it keys with `EndpointOptions::tokens`, or listen at an address of this machine's own (127.0.0.1)"
            }
            E::NoKeys => {
                "give it some with `EndpointOptions::tokens`, or say `EndpointOptions::without_tokens`"
            }
            E::CurrentKey { .. } => "make another one current first, with `TokenKeys::rotate`",
            E::Listen { source, .. } => match source.kind() {
                io::ErrorKind::AddrInUse => {
                    "choose another port (0: one that is free), or end who listens there"
                }
                io::ErrorKind::AddrNotAvailable => "choose an address that this machine has",
                io::ErrorKind::PermissionDenied => "choose a port from 1024 on",
                _ => "",
            },
            E::NoRuntime => "call it in `#[tokio::main]`, or in a task of a runtime",
            _ => "",
        };
        let error = Self::new(kind, error);
        if fix.is_empty() { error } else { error.fix(fix) }
    }
}

//! How an endpoint serves.

use std::net::SocketAddr;
use std::time::Duration;

use super::error::EndpointError;
use super::port::DEFAULT_PORT;
use super::route::Routes;
use super::tls::TlsIdentity;
use super::token::TokenKeys;
use crate::session::is_label;

/// As much of a body as comes before anybody reads it: 256 KiB of one, and 16 MiB of all of a connection, so that it takes
/// 64 that are not read to stop the others.
pub(super) const STREAM_WINDOW: u32 = 256 << 10;
pub(super) const CONNECTION_WINDOW: u32 = 16 << 20;

/// How an [`Endpoint`](super::Endpoint) serves: by tokens, unless it is said that it needs none.
#[derive(Clone, Debug)]
pub struct EndpointOptions {
    domain: String,
    prefix: Option<String>,
    session: Option<String>,
    port: u16,
    tokens: Tokens,
    pub(super) tls: Option<TlsIdentity>,
    pub(super) limits: EndpointLimits,
}

#[derive(Clone, Debug)]
enum Tokens {
    Unsaid,
    Keys(TokenKeys),
    Off,
}

/// What clients may take of an endpoint. Each limit has a default that is meant for strangers.
#[derive(Clone, Debug)]
#[non_exhaustive]
pub struct EndpointLimits {
    /// Connections of clients at a time (4,096), those that have become something other than HTTP too. More wait until one
    /// ends.
    pub connections: usize,
    /// Requests at a time on one connection of HTTP/2 (256). More wait.
    pub streams: u32,
    /// Bytes of a request's line and headers (64 KiB). More are answered with 431.
    pub header_bytes: u32,
    /// Headers of a request over HTTP/1 (100). More are answered with 431.
    pub headers: usize,
    /// How long a connection may take for TLS, and for the line and headers of each request; so it is also how long
    /// one is kept that asks for nothing (30 s). Then it is closed. This often it is looked whether a client is still
    /// there from whom nothing is read.
    pub header_timeout: Duration,
    /// Requests and open streams of one session at a time (1,024). More are answered with 429.
    pub session_requests: usize,
    /// Requests of one session that wait for it to wake (256). More are answered with 503.
    pub session_held: usize,
    /// How long a request waits for its session to wake (60 s). Then it is answered with 503, and the session goes on waking.
    pub wake_timeout: Duration,
    /// How long a connection to the application may take (10 s). Then the request is answered with 502.
    pub connect_timeout: Duration,
    /// How long the application may take for the head of its answer, from the last byte of the request that it took
    /// (5 min). Then the request is answered with 504. Bodies and streams may take for ever.
    pub answer_timeout: Duration,
}

impl EndpointLimits {
    /// Times that can be added to now, and room for somebody.
    pub(super) fn checked(&self) -> Result<Self, EndpointError> {
        const LONGEST: Duration = Duration::from_secs(100 * 365 * 86_400);
        let nothing = [
            ("connections", self.connections == 0),
            ("streams", self.streams == 0),
            ("header_bytes", self.header_bytes == 0),
            ("headers", self.headers == 0),
            ("header_timeout", self.header_timeout.is_zero()),
            ("session_requests", self.session_requests == 0),
            ("connect_timeout", self.connect_timeout.is_zero()),
            ("answer_timeout", self.answer_timeout.is_zero()),
        ];
        if let Some((limit, _)) = nothing.into_iter().find(|(_, is_nothing)| *is_nothing) {
            return Err(EndpointError::LimitOfNothing { limit });
        }
        Ok(Self {
            header_timeout: self.header_timeout.min(LONGEST),
            wake_timeout: self.wake_timeout.min(LONGEST),
            connect_timeout: self.connect_timeout.min(LONGEST),
            answer_timeout: self.answer_timeout.min(LONGEST),
            ..self.clone()
        })
    }
}

impl Default for EndpointLimits {
    fn default() -> Self {
        Self {
            connections: 4096,
            streams: 256,
            header_bytes: 64 << 10,
            headers: 100,
            header_timeout: Duration::from_secs(30),
            session_requests: 1024,
            session_held: 256,
            wake_timeout: Duration::from_secs(60),
            connect_timeout: Duration::from_secs(10),
            answer_timeout: Duration::from_secs(300),
        }
    }
}

impl EndpointOptions {
    /// The domain `localhost`, paths below `/sessions/`, no session that need not be named, port 8080, no TLS.
    pub fn new() -> Self {
        Self {
            domain: "localhost".to_owned(),
            prefix: Some("/sessions/".to_owned()),
            session: None,
            port: DEFAULT_PORT,
            tokens: Tokens::Unsaid,
            tls: None,
            limits: EndpointLimits::default(),
        }
    }

    /// Lets in who has a token of these keys. The endpoint sees what is done to the keys later.
    #[must_use]
    pub fn tokens(mut self, keys: TokenKeys) -> Self {
        self.tokens = Tokens::Keys(keys);
        self
    }

    /// Lets in everybody who reaches it: each user and program of this machine, and each page in a browser on it. It is
    /// refused at an address that is no loopback address.
    #[must_use]
    pub fn without_tokens(mut self) -> Self {
        self.tokens = Tokens::Off;
        self
    }

    /// The domain that sessions are names below, `<id>.<domain>`. Names below `localhost` mean this machine
    /// to browsers and to curl, without any DNS; others have to be made to mean it.
    #[must_use]
    pub fn domain(mut self, domain: impl Into<String>) -> Self {
        self.domain = domain.into();
        self
    }

    /// What paths begin with that lead to sessions at the domain itself, or at an address: `/sessions/<id>/…`. None: by names
    /// alone. Pages of all sessions have one origin there, so that browsers let one see what another keeps; names are for those.
    #[must_use]
    pub fn path_prefix(mut self, prefix: impl Into<Option<String>>) -> Self {
        self.prefix = prefix.into();
        self
    }

    /// The session that a request is for which names none, at the domain itself or at an address: all of its paths but those
    /// below the [prefix](Self::path_prefix). With it and [`default_port`](Self::default_port), one application is
    /// served at a plain port of the host, `http://localhost:8000/`. None unless set.
    ///
    /// To browsers its pages are of one origin with those that other sessions have below the prefix: where there are
    /// others, set the prefix to `None`. It cannot be `/`.
    #[must_use]
    pub fn default_session(mut self, id: impl Into<String>) -> Self {
        self.session = Some(id.into());
        self
    }

    /// The port of the guest that a request is for which names none; 8080 unless set.
    #[must_use]
    pub fn default_port(mut self, port: u16) -> Self {
        self.port = port;
        self
    }

    /// Serves by TLS alone.
    #[must_use]
    pub fn tls(mut self, identity: TlsIdentity) -> Self {
        self.tls = Some(identity);
        self
    }

    /// What clients may take.
    #[must_use]
    pub fn limits(mut self, limits: EndpointLimits) -> Self {
        self.limits = limits;
        self
    }

    /// The keys, or none where everybody may come in.
    pub(super) fn keys(&self, address: SocketAddr) -> Result<Option<TokenKeys>, EndpointError> {
        match &self.tokens {
            Tokens::Keys(keys) => Ok(Some(keys.clone())),
            Tokens::Unsaid => Err(EndpointError::NoKeys),
            Tokens::Off if address.ip().is_loopback() => Ok(None),
            Tokens::Off => Err(EndpointError::Open { address }),
        }
    }

    pub(super) fn routes(&self) -> Result<Routes, EndpointError> {
        let domain = self.domain.to_ascii_lowercase();
        let domain = domain.trim_end_matches('.');
        if !domain.split('.').all(is_label) {
            return Err(EndpointError::Domain { domain: self.domain.clone() });
        }
        if let Some(prefix) = &self.prefix {
            let is_plain =
                |byte: u8| byte.is_ascii_alphanumeric() || matches!(byte, b'-' | b'_' | b'/');
            let is_prefix = prefix.starts_with('/')
                && prefix.ends_with('/')
                && prefix.bytes().all(is_plain)
                && !prefix.contains("//");
            // One that is all there is leaves nothing to a session that need not be named.
            if !is_prefix || (prefix == "/" && self.session.is_some()) {
                return Err(EndpointError::Prefix { prefix: prefix.clone() });
            }
        }
        if let Some(id) = self.session.as_ref().filter(|id| !is_label(id)) {
            return Err(EndpointError::SessionId { id: id.clone() });
        }
        if self.port == 0 {
            return Err(EndpointError::NoPort);
        }
        let (prefix, session) = (self.prefix.clone(), self.session.clone());
        Ok(Routes { domain: domain.to_owned(), prefix, session, port: self.port })
    }
}

impl Default for EndpointOptions {
    fn default() -> Self {
        Self::new()
    }
}

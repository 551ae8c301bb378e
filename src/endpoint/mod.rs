//! An HTTP server in front of sessions: each is reached at a name of its own, by those who have a token, and sleeps when
//! nobody asks.
//!
//! The path of a request is forward.rs, from top to bottom. HTTP itself is hyper's, on both sides; this module says for
//! whom a request is, who may ask, how long who waits for whom, and what is told to whom. Headers, ports and statuses are
//! those of AWS Lambda's MicroVMs (2026), so that clients of those work with it.

mod alarm;
mod authority;
mod body;
mod connections;
mod error;
mod fault;
mod forward;
#[cfg(fuzzing)]
pub(crate) mod fuzzing;
mod guest;
mod headers;
mod options;
mod place;
mod port;
mod preface;
mod route;
mod server;
mod sessions;
mod shared;
mod signal;
mod streams;
mod tasks;
mod tls;
mod token;
mod token_client;
mod tunnel;
mod upload;
mod upstream;

pub use self::options::{EndpointLimits, EndpointOptions};
pub use self::tls::TlsIdentity;
pub use self::token::{Token, TokenKeys, TokenPorts};
pub use self::token_client::TokenClient;
pub use self::upstream::{
    Awake, Upstream, UpstreamError, UpstreamFuture, UpstreamStream, Upstreams,
};

use std::fmt;
use std::net::{SocketAddr, TcpListener};
use std::sync::Arc;
use std::time::Duration;

use tokio::net::ToSocketAddrs;
use tokio::time::timeout;

use self::error::{Addresses, EndpointError};
use self::guest::Guests;
use self::server::Server;
use self::shared::Shared;
use self::signal::{Signal, SignalOnDrop};
use self::tasks::Tasks;
use crate::error::Error;

/// A server that gives requests to sessions, and wakes them for it.
///
/// A request names its session by its host, `<id>.localhost` (or [another domain](EndpointOptions::domain)), or by
/// its path, `/sessions/<id>/…`; [`default_session`](EndpointOptions::default_session) serves one at a plain port of the host. It
/// names a port of the guest by the header `X-aws-proxy-port`, or a WebSocket by the subprotocol `lambda-microvms.port.N`;
/// else it is 8080, or [another](EndpointOptions::default_port). It has a [`Token`] in the header `X-aws-proxy-auth`, unless the
/// endpoint is [without](EndpointOptions::without_tokens). A page in a browser, which can give a WebSocket no headers, sends the
/// token as the subprotocol `lambda-microvms.authentication.TOKEN`, and `lambda-microvms` beside it, which is chosen where the
/// application chooses none. No header `x-aws-proxy-…` and no such subprotocol reaches the application.
///
/// HTTP/1.1 and HTTP/2 are spoken on the same port, with TLS and without; WebSockets (over both), server-sent events and gRPC go
/// through, and bodies in both directions as fast as who reads them. The application is asked by HTTP/1.1; by HTTP/2
/// for gRPC, and where the header `X-aws-proxy-force-h2` says so. It is told where the request came from by `Forwarded` and
/// `X-Forwarded-…`, which say nothing that the client made up.
///
/// An idempotent request without a body is sent again where the application closes a connection that was kept just as it comes.
/// No other request reaches the application twice.
///
/// A session that sleeps is woken, once for however many ask, and the requests are held meanwhile. It stays awake until
/// the last of them is over, bodies and WebSockets included; connections that are kept for later do not keep it awake.
///
/// What does not reach the application is answered with JSON: `{"error": …, "stage": …, "session": …}`.
///
/// | status | stage | |
/// | --- | --- | --- |
/// | 400 | `request` | it is malformed, or could be understood in two ways; the connection is closed |
/// | 403 | `token` | there is no token, or it is forged, expired, for another session, or for other ports |
/// | 404 | `route` | there is no such session |
/// | 408 | `request` | the client did not send the rest of it |
/// | 429 | `request` | the session has [as many requests](EndpointLimits::session_requests) as it may; `Retry-After` |
/// | 502 | `wake`, `connect`, `response` | the session does not wake; nobody listens at the port; the application closed early, or does not speak HTTP |
/// | 503 | `wake` | it has not woken [in time](EndpointLimits::wake_timeout), or [too many](EndpointLimits::session_held) wait for it; `Retry-After` |
/// | 504 | `response` | the application has not answered [in time](EndpointLimits::answer_timeout) |
///
/// 431, for headers that are too large, comes without a body. An answer that breaks off in the middle ends the client's
/// connection, or its stream of HTTP/2, and never passes for a whole one. Answers 1xx of the application end here, but for 100.
///
/// With its drop everything ends at once; [`close`](Self::close) lets what goes on come to its end.
///
/// ```no_run
/// use std::time::Duration;
/// use dormouse::{Endpoint, EndpointOptions, Error, Sessions, TokenKeys};
///
/// # async fn example(sessions: Sessions) -> Result<(), Error> {
/// let keys = TokenKeys::generate()?;
/// let options = EndpointOptions::new().tokens(keys.clone());
/// let endpoint = Endpoint::bind("127.0.0.1:8000", sessions, options).await?;
/// let token = keys.mint("my-session", 8080, Duration::from_secs(3600))?;
/// println!("curl -H 'X-aws-proxy-auth: {}' {}", token.as_str(), endpoint.url("my-session"));
/// # Ok(())
/// # }
/// ```
#[must_use = "dropping it ends the endpoint"]
pub struct Endpoint {
    address: SocketAddr,
    scheme: &'static str,
    domain: String,
    shared: Arc<Shared>,
    /// What is done with guests.
    guests: Tasks,
    closing: Signal,
    /// Ends everything.
    _end: SignalOnDrop,
}

impl Endpoint {
    /// Listens at an address and serves. What it leads to is [`Sessions`](crate::Sessions), or anything else that finds
    /// something [to lead to](Upstream).
    ///
    /// # Errors
    ///
    /// [`ErrorKind::Config`](crate::ErrorKind::Config) where neither tokens nor their absence was asked for, where there would
    /// be none at an address that others reach, where a name or a limit is refused, or outside of a tokio runtime;
    /// [`ErrorKind::File`](crate::ErrorKind::File) where it cannot listen.
    pub async fn bind(
        address: impl ToSocketAddrs,
        upstreams: impl Upstreams,
        options: EndpointOptions,
    ) -> Result<Self, Error> {
        check_runtime()?;
        let addresses = tokio::net::lookup_host(address).await;
        let addresses: Vec<_> =
            addresses.map_err(EndpointError::listen("an address by its name"))?.collect();
        let listener = tokio::net::TcpListener::bind(&addresses[..]).await;
        let listener = listener.and_then(tokio::net::TcpListener::into_std);
        let listener = listener.map_err(EndpointError::listen(Addresses(&addresses)))?;
        Self::serve(listener, upstreams, options)
    }

    /// As [`bind`](Self::bind), with a socket that listens already: one that a service manager passes on.
    ///
    /// # Errors
    ///
    /// As that one.
    pub fn serve(
        listener: TcpListener,
        upstreams: impl Upstreams,
        options: EndpointOptions,
    ) -> Result<Self, Error> {
        check_runtime()?;
        let address = listener.local_addr().map_err(EndpointError::listen("a socket"))?;
        let (keys, routes) = (options.keys(address)?, options.routes()?);
        let limits = Arc::new(options.limits.checked()?);
        listener.set_nonblocking(true).map_err(EndpointError::listen(address))?;
        let listener = tokio::net::TcpListener::from_std(listener);
        let listener = listener.map_err(EndpointError::listen(address))?;
        let (end, closing) = (Signal::default(), Signal::default());
        let guests = Tasks::new(end.clone());
        let domain = routes.domain.clone();
        let shared = Arc::new(Shared {
            upstreams: Box::new(upstreams),
            routes,
            keys,
            guests: Guests::new(guests.clone(), Arc::clone(&limits)),
            limits,
            clients: Tasks::new(end.clone()),
        });
        let sweeper = Arc::clone(&shared);
        guests.spawn(async move { sweeper.guests.sweep().await });
        let scheme = if options.tls.is_some() { "https" } else { "http" };
        let tls = options.tls.map(|identity| identity.acceptor());
        let server = Server { shared: Arc::clone(&shared), tls, closing: closing.clone() };
        shared.clients.spawn(server.accept(listener));
        Ok(Self { address, scheme, domain, shared, guests, closing, _end: SignalOnDrop(end) })
    }

    /// Where it listens.
    pub fn address(&self) -> SocketAddr {
        self.address
    }

    /// Where a session is reached: `http://<id>.localhost:8000/`.
    pub fn url(&self, id: &str) -> String {
        format!("{}://{id}.{}:{}/", self.scheme, self.domain, self.address.port())
    }

    /// Takes nothing new, lets requests and streams go on for so long, then ends what is left. Clients that keep
    /// connections are told.
    ///
    /// A process that ends closes its endpoint first, so that no request wakes what was put to sleep:
    ///
    /// ```no_run
    /// # use std::time::Duration;
    /// # use dormouse::{Endpoint, Error, Sessions};
    /// async fn end(endpoint: Endpoint, sessions: Sessions, for_good: bool) -> Result<(), Error> {
    ///     endpoint.close(Duration::from_secs(10)).await;
    ///     if !for_good {
    ///         return sessions.suspend_all().await; // `Sessions::open` finds them again
    ///     }
    ///     for session in sessions.list() {
    ///         session.terminate().await?;
    ///         sessions.remove(session.id()).await?;
    ///     }
    ///     Ok(())
    /// }
    /// ```
    pub async fn close(self, grace: Duration) {
        self.closing.give();
        let Self { shared, guests, _end, .. } = self;
        let _ = timeout(grace, shared.clients.over()).await;
        drop(_end);
        shared.clients.over().await;
        guests.over().await;
    }
}

/// tokio's sockets panic without one.
fn check_runtime() -> Result<(), EndpointError> {
    tokio::runtime::Handle::try_current().map(drop).map_err(|_| EndpointError::NoRuntime)
}

impl fmt::Debug for Endpoint {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let address = format!("{}://{}", self.scheme, self.address);
        f.debug_struct("Endpoint").field("address", &address).finish_non_exhaustive()
    }
}

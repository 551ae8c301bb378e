//! What an endpoint leads to.
//!
//! The endpoint needs no more of a session than that it wakes and that its ports can be reached, so anything else that
//! does so can stand behind it.

use std::any::Any;
use std::error::Error as StdError;
use std::fmt;
use std::io;
use std::pin::Pin;
use std::sync::Arc;
use std::task::{Context, Poll};

use tokio::io::{AsyncRead, AsyncWrite, ReadBuf};

/// Why an [`Upstream`] does not do what is asked. Clients do not see it; it is told to `tracing`.
pub type UpstreamError = Box<dyn StdError + Send + Sync>;

/// What an [`Upstream`] is asked for.
pub type UpstreamFuture<'a, T> =
    Pin<Box<dyn Future<Output = Result<T, UpstreamError>> + Send + 'a>>;

/// One of the things behind an [`Endpoint`](super::Endpoint): a [`Session`](crate::Session), or what a program puts in its place.
pub trait Upstream: Send + Sync + 'static {
    /// Resolves when it serves: one that sleeps is woken, once for however many requests ask. It stays awake until what
    /// this gives is dropped, which is when the request or stream is over. Is called once for each request.
    fn wake(&self) -> UpstreamFuture<'_, Awake>;

    /// Connects to a TCP port of it, while it is awake. The connection may be kept for a later request, and is not to hold
    /// it awake by itself; it ends when it sleeps.
    fn connect(&self, port: u16) -> UpstreamFuture<'_, UpstreamStream>;

    /// Whether it still runs. It is asked when an answer ends by the end of its connection, which is also how one ends
    /// whose server died with all that is around it.
    fn is_up(&self) -> bool {
        true
    }
}

/// Finds what requests are for, by its name: 1 to 63 of `a-z`, `0-9` and `-`, but not `-` at an end. It is asked
/// for each request.
pub trait Upstreams: Send + Sync + 'static {
    /// The one of this name.
    fn find(&self, id: &str) -> Option<Arc<dyn Upstream>>;
}

impl<F> Upstreams for F
where
    F: Fn(&str) -> Option<Arc<dyn Upstream>> + Send + Sync + 'static,
{
    fn find(&self, id: &str) -> Option<Arc<dyn Upstream>> {
        self(id)
    }
}

/// Keeps an [`Upstream`] awake until it is dropped.
#[must_use = "what it keeps awake may sleep when it is dropped"]
pub struct Awake {
    _guard: Box<dyn Any + Send + Sync>,
}

impl Awake {
    /// One that drops `guard` when it is dropped.
    pub fn new(guard: impl Any + Send + Sync) -> Self {
        Self { _guard: Box::new(guard) }
    }
}

impl fmt::Debug for Awake {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("Awake")
    }
}

trait Duplex: AsyncRead + AsyncWrite + Send + Unpin {}

impl<T: AsyncRead + AsyncWrite + Send + Unpin> Duplex for T {}

/// A connection to a port of an [`Upstream`].
pub struct UpstreamStream(Box<dyn Duplex>);

impl UpstreamStream {
    /// One of any kind.
    pub fn new(stream: impl AsyncRead + AsyncWrite + Send + Unpin + 'static) -> Self {
        Self(Box::new(stream))
    }
}

impl fmt::Debug for UpstreamStream {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("UpstreamStream")
    }
}

impl AsyncRead for UpstreamStream {
    fn poll_read(
        mut self: Pin<&mut Self>,
        context: &mut Context<'_>,
        buffer: &mut ReadBuf<'_>,
    ) -> Poll<io::Result<()>> {
        Pin::new(&mut self.0).poll_read(context, buffer)
    }
}

impl AsyncWrite for UpstreamStream {
    fn poll_write(
        mut self: Pin<&mut Self>,
        context: &mut Context<'_>,
        bytes: &[u8],
    ) -> Poll<io::Result<usize>> {
        Pin::new(&mut self.0).poll_write(context, bytes)
    }

    fn poll_write_vectored(
        mut self: Pin<&mut Self>,
        context: &mut Context<'_>,
        buffers: &[io::IoSlice<'_>],
    ) -> Poll<io::Result<usize>> {
        Pin::new(&mut self.0).poll_write_vectored(context, buffers)
    }

    fn is_write_vectored(&self) -> bool {
        self.0.is_write_vectored()
    }

    fn poll_flush(mut self: Pin<&mut Self>, context: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.0).poll_flush(context)
    }

    fn poll_shutdown(mut self: Pin<&mut Self>, context: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.0).poll_shutdown(context)
    }
}

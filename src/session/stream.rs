//! What keeps a session awake, and the streams that do.

use std::fmt;
use std::io;
use std::pin::Pin;
use std::task::{Context, Poll};

use tokio::io::{AsyncRead, AsyncWrite, ReadBuf};

use crate::agent::{GuestStream, Ongoing};

/// Keeps a session from being idle, until it is dropped: see [`Session::wake`](super::Session::wake) and
/// [`Session::keep_awake`](super::Session::keep_awake). It does not keep it from being suspended or ended by name, nor
/// from the end of its lifetime.
#[must_use = "the session may sleep when it is dropped"]
pub struct KeepAwake {
    _ongoing: Ongoing,
}

impl KeepAwake {
    pub(super) fn new(ongoing: Ongoing) -> Self {
        Self { _ongoing: ongoing }
    }
}

impl fmt::Debug for KeepAwake {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("KeepAwake")
    }
}

/// A connection to a TCP port of a session's guest, which keeps the session awake while it is open: see
/// [`Session::connect`](super::Session::connect). Shutting down one direction shuts that of the TCP connection; it ends
/// with the guest, and when the session is suspended by name.
#[derive(Debug)]
pub struct SessionStream {
    stream: GuestStream,
    _awake: Option<KeepAwake>,
}

impl SessionStream {
    /// One that counts as activity, where it has what keeps its session awake.
    pub(super) fn new(stream: GuestStream, awake: Option<KeepAwake>) -> Self {
        Self { stream, _awake: awake }
    }
}

impl AsyncRead for SessionStream {
    fn poll_read(
        mut self: Pin<&mut Self>,
        context: &mut Context<'_>,
        buffer: &mut ReadBuf<'_>,
    ) -> Poll<io::Result<()>> {
        Pin::new(&mut self.stream).poll_read(context, buffer)
    }
}

impl AsyncWrite for SessionStream {
    fn poll_write(
        mut self: Pin<&mut Self>,
        context: &mut Context<'_>,
        bytes: &[u8],
    ) -> Poll<io::Result<usize>> {
        Pin::new(&mut self.stream).poll_write(context, bytes)
    }

    fn poll_write_vectored(
        mut self: Pin<&mut Self>,
        context: &mut Context<'_>,
        buffers: &[io::IoSlice<'_>],
    ) -> Poll<io::Result<usize>> {
        Pin::new(&mut self.stream).poll_write_vectored(context, buffers)
    }

    fn is_write_vectored(&self) -> bool {
        self.stream.is_write_vectored()
    }

    fn poll_flush(mut self: Pin<&mut Self>, context: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.stream).poll_flush(context)
    }

    fn poll_shutdown(mut self: Pin<&mut Self>, context: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.stream).poll_shutdown(context)
    }
}

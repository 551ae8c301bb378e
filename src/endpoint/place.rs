//! A client's place among all that may be connected, and whether the client is still there.

use std::io;
use std::pin::Pin;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::task::{Context, Poll};
use std::time::Duration;

use rustix::event::{PollFd, PollFlags, Timespec, poll};
use tokio::io::{AsyncRead, AsyncWrite, ReadBuf};
use tokio::net::TcpStream;
use tokio::net::tcp::{OwnedReadHalf, OwnedWriteHalf};
use tokio::sync::OwnedSemaphorePermit;
use tokio::time::sleep;

/// Held as long as anything goes on for the client.
#[derive(Clone)]
pub(super) struct Place {
    stream: Arc<Mutex<OwnedWriteHalf>>,
    /// How often it is looked whether the client is there.
    often: Duration,
    _permit: Arc<OwnedSemaphorePermit>,
}

/// The stream of a client that has a place.
pub(super) struct ClientStream {
    from: OwnedReadHalf,
    to: Arc<Mutex<OwnedWriteHalf>>,
}

/// The stream of a client, and its place; it is looked this often whether the client is there.
pub(super) fn of(
    stream: TcpStream,
    permit: OwnedSemaphorePermit,
    often: Duration,
) -> (ClientStream, Place) {
    let (from, to) = stream.into_split();
    let to = Arc::new(Mutex::new(to));
    let place = Place { stream: Arc::clone(&to), often, _permit: Arc::new(permit) };
    (ClientStream { from, to }, place)
}

impl Place {
    /// Waits until the client is gone: it has reset its connection, or does not answer. One that has said all is not gone.
    pub(super) async fn gone(&self) {
        loop {
            sleep(self.often).await;
            if self.is_gone() {
                return;
            }
        }
    }

    fn is_gone(&self) -> bool {
        let stream = lock(&self.stream);
        let mut fds = [PollFd::new(stream.as_ref(), PollFlags::empty())];
        let _ = poll(&mut fds, Some(&Timespec::default()));
        // It is hung up where both have said all, too, and not all that was said has been read.
        fds[0].revents().contains(PollFlags::ERR)
    }
}

fn lock(stream: &Mutex<OwnedWriteHalf>) -> MutexGuard<'_, OwnedWriteHalf> {
    stream.lock().unwrap_or_else(PoisonError::into_inner)
}

impl AsyncRead for ClientStream {
    fn poll_read(
        mut self: Pin<&mut Self>,
        context: &mut Context<'_>,
        buffer: &mut ReadBuf<'_>,
    ) -> Poll<io::Result<()>> {
        Pin::new(&mut self.from).poll_read(context, buffer)
    }
}

impl AsyncWrite for ClientStream {
    fn poll_write(
        self: Pin<&mut Self>,
        context: &mut Context<'_>,
        bytes: &[u8],
    ) -> Poll<io::Result<usize>> {
        Pin::new(&mut *lock(&self.to)).poll_write(context, bytes)
    }

    fn poll_write_vectored(
        self: Pin<&mut Self>,
        context: &mut Context<'_>,
        buffers: &[io::IoSlice<'_>],
    ) -> Poll<io::Result<usize>> {
        Pin::new(&mut *lock(&self.to)).poll_write_vectored(context, buffers)
    }

    fn is_write_vectored(&self) -> bool {
        lock(&self.to).is_write_vectored()
    }

    fn poll_flush(self: Pin<&mut Self>, context: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut *lock(&self.to)).poll_flush(context)
    }

    fn poll_shutdown(self: Pin<&mut Self>, context: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut *lock(&self.to)).poll_shutdown(context)
    }
}

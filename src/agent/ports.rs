//! TCP ports of the guest, and services of the host.

use std::fmt;
use std::io;
use std::pin::Pin;
use std::task::{Context, Poll};

use tokio::io::{AsyncRead, AsyncWrite, ReadBuf};
use tokio::net::UnixStream;

use super::activity::Ongoing;
use super::{Agent, AgentError};
use crate::error::Error;
use crate::protocol::{Call, Reply};

impl Agent {
    /// Connects to a TCP port of the guest's loopback: 127.0.0.1, then ::1. A program that listens
    /// there, or at all addresses, needs to know nothing of this crate. Many connections may be
    /// open at once, each with its own flow control. What was written before the stream was dropped reaches
    /// the program, if that reads some of it once in ten minutes; else it finds a reset, and so may one that still talks
    /// when nobody is there any more.
    ///
    /// # Errors
    ///
    /// [`ErrorKind::Refused`](crate::ErrorKind::Refused) where nobody listens; else as
    /// [every call](crate::Agent#errors-of-every-call).
    pub async fn connect_tcp(&self, port: u16) -> Result<GuestStream, Error> {
        let mut connection = self.calls().call(&Call::Connect(port)).await?;
        match connection.reply(self.calls().vsock()).await? {
            Reply::Done => {
                let (stream, ongoing) = connection.into_stream()?;
                Ok(GuestStream { stream, _ongoing: ongoing })
            }
            other => Err(AgentError::refused(other).into()),
        }
    }
}

/// A connection to a TCP port of the guest. Shutting down one direction shuts that of the TCP
/// connection; it ends with the VM, and when the VM is suspended.
pub struct GuestStream {
    stream: UnixStream,
    _ongoing: Option<Ongoing>,
}

impl GuestStream {
    /// The socket underneath, a UNIX stream socket of this process. The socket alone no longer keeps a session
    /// awake.
    pub fn into_inner(self) -> UnixStream {
        self.stream
    }
}

impl AsyncRead for GuestStream {
    fn poll_read(
        mut self: Pin<&mut Self>,
        context: &mut Context<'_>,
        buffer: &mut ReadBuf<'_>,
    ) -> Poll<io::Result<()>> {
        Pin::new(&mut self.stream).poll_read(context, buffer)
    }
}

impl AsyncWrite for GuestStream {
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

impl fmt::Debug for GuestStream {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("GuestStream")
    }
}

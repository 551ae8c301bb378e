//! The first bytes of a connection, by which HTTP/2 is told from HTTP/1.
//!
//! Source: RFC 9113 §3.4, the connection preface.

use std::io;
use std::pin::Pin;
use std::task::{Context, Poll};

use tokio::io::{AsyncRead, AsyncReadExt, AsyncWrite, ReadBuf};

const PREFACE: &[u8; 24] = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n";

/// A connection of which some bytes were read ahead.
pub(super) struct Ahead<S> {
    stream: S,
    bytes: [u8; PREFACE.len()],
    taken: u8,
    len: u8,
}

/// Reads as much as is needed to know. Whether it is HTTP/2.
pub(super) async fn read<S: AsyncRead + Unpin>(mut stream: S) -> io::Result<(Ahead<S>, bool)> {
    let mut bytes = [0; PREFACE.len()];
    let mut len = 0;
    while len < PREFACE.len() && bytes[..len] == PREFACE[..len] {
        match stream.read(&mut bytes[len..]).await? {
            0 => break,
            count => len += count,
        }
    }
    let is_h2 = len == PREFACE.len() && bytes == *PREFACE;
    Ok((Ahead { stream, bytes, taken: 0, len: len as u8 }, is_h2))
}

impl<S: AsyncRead + Unpin> AsyncRead for Ahead<S> {
    fn poll_read(
        mut self: Pin<&mut Self>,
        context: &mut Context<'_>,
        buffer: &mut ReadBuf<'_>,
    ) -> Poll<io::Result<()>> {
        let (taken, len) = (usize::from(self.taken), usize::from(self.len));
        if taken == len {
            return Pin::new(&mut self.stream).poll_read(context, buffer);
        }
        let count = buffer.remaining().min(len - taken);
        buffer.put_slice(&self.bytes[taken..taken + count]);
        self.taken += count as u8;
        Poll::Ready(Ok(()))
    }
}

impl<S: AsyncWrite + Unpin> AsyncWrite for Ahead<S> {
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

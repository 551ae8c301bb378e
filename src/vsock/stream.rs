//! A connection.

use std::io::{self, IoSlice, IoSliceMut, Read, Write};
use std::net::Shutdown;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd, RawFd};
use std::os::unix::net::UnixStream;
use std::time::Duration;

/// A connection between this process and a program in the guest: a stream of bytes each way.
///
/// Underneath is one end of a UNIX stream socket pair, the other of which is the VM's device:
/// everything that works with such a socket works with this one, and it turns into a
/// [`UnixStream`] for those who want that (an async runtime, say).
///
/// When the guest closes its end, or ends itself, what was received can still be read; then comes
/// the end of the stream, whatever of what was written the guest had not taken: an end is no receipt.
/// Where the guest resets the connection, or is over, it may be `ConnectionReset` instead.
/// Writes fail with `BrokenPipe`. Once the VM is dropped or
/// over, what is in the socket can be read (some 200 KiB), and up to 128 KiB behind it is lost.
/// Like any socket of Rust's library, it relies on SIGPIPE being ignored, as in Rust programs.
#[derive(Debug)]
pub struct VsockStream(UnixStream);

impl VsockStream {
    pub(super) fn new(socket: UnixStream) -> Self {
        Self(socket)
    }

    /// One to no guest.
    #[cfg(all(test, feature = "agent"))]
    pub(crate) fn from_socket(socket: UnixStream) -> Self {
        Self(socket)
    }

    /// Closes a direction or both, for all clones. The guest sees the end of the stream, or its
    /// writes fail.
    ///
    /// # Errors
    ///
    /// As [`UnixStream::shutdown`].
    pub fn shutdown(&self, how: Shutdown) -> io::Result<()> {
        self.0.shutdown(how)
    }

    /// Another handle of the same connection, which ends when all of them are dropped.
    ///
    /// # Errors
    ///
    /// The limit of open files is reached.
    pub fn try_clone(&self) -> io::Result<Self> {
        self.0.try_clone().map(Self)
    }

    /// Whether reads and writes fail with `WouldBlock` instead of waiting.
    ///
    /// # Errors
    ///
    /// As [`UnixStream::set_nonblocking`].
    pub fn set_nonblocking(&self, nonblocking: bool) -> io::Result<()> {
        self.0.set_nonblocking(nonblocking)
    }

    /// How long a read waits before it fails with `WouldBlock`; for ever if `None`.
    ///
    /// # Errors
    ///
    /// `InvalidInput` for a timeout of zero.
    pub fn set_read_timeout(&self, timeout: Option<Duration>) -> io::Result<()> {
        self.0.set_read_timeout(timeout)
    }

    /// How long a write waits before it fails with `WouldBlock`; for ever if `None`.
    ///
    /// # Errors
    ///
    /// `InvalidInput` for a timeout of zero.
    pub fn set_write_timeout(&self, timeout: Option<Duration>) -> io::Result<()> {
        self.0.set_write_timeout(timeout)
    }
}

impl From<VsockStream> for UnixStream {
    fn from(stream: VsockStream) -> Self {
        stream.0
    }
}

impl From<VsockStream> for OwnedFd {
    fn from(stream: VsockStream) -> Self {
        stream.0.into()
    }
}

impl Read for VsockStream {
    fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        (&self.0).read(buffer)
    }

    fn read_vectored(&mut self, buffers: &mut [IoSliceMut<'_>]) -> io::Result<usize> {
        (&self.0).read_vectored(buffers)
    }
}

impl Write for VsockStream {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        (&self.0).write(bytes)
    }

    fn write_vectored(&mut self, buffers: &[IoSlice<'_>]) -> io::Result<usize> {
        (&self.0).write_vectored(buffers)
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

impl Read for &VsockStream {
    fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        (&self.0).read(buffer)
    }

    fn read_vectored(&mut self, buffers: &mut [IoSliceMut<'_>]) -> io::Result<usize> {
        (&self.0).read_vectored(buffers)
    }
}

impl Write for &VsockStream {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        (&self.0).write(bytes)
    }

    fn write_vectored(&mut self, buffers: &[IoSlice<'_>]) -> io::Result<usize> {
        (&self.0).write_vectored(buffers)
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

impl AsFd for VsockStream {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.0.as_fd()
    }
}

impl AsRawFd for VsockStream {
    fn as_raw_fd(&self) -> RawFd {
        self.0.as_raw_fd()
    }
}

//! A connection that the guest has been asked for.

use std::io::{ErrorKind as Io, Read};
use std::os::fd::{AsFd, BorrowedFd};
use std::os::unix::net::UnixStream;
use std::time::{Duration, Instant};

use super::{CONNECT_TIMEOUT, GLANCE, Vsock, VsockError, VsockStream};
use crate::error::Error;
use crate::virtio::{ACCEPTED, REFUSED};

/// A connection that the guest has been asked for, and has not answered. Dropping it takes the
/// question back.
///
/// Its descriptor is readable when the answer is there; [`finish`](Self::finish) then returns at
/// once. So it fits any event loop.
#[derive(Debug)]
#[must_use = "dropping it ends the connection"]
pub struct Connecting {
    socket: UnixStream,
    port: u32,
    vsock: Vsock,
}

impl Connecting {
    pub(super) fn new(socket: UnixStream, port: u32, vsock: Vsock) -> Self {
        Self { socket, port, vsock }
    }

    /// Waits for the guest's answer, for at most 10 s.
    ///
    /// # Errors
    ///
    /// As [`Vsock::connect`].
    pub fn finish(self) -> Result<VsockStream, Error> {
        self.finish_timeout(CONNECT_TIMEOUT)
    }

    /// Waits for the guest's answer, for at most `timeout`.
    ///
    /// # Errors
    ///
    /// As [`Vsock::connect`].
    pub fn finish_timeout(self, timeout: Duration) -> Result<VsockStream, Error> {
        let Self { mut socket, port, vsock } = self;
        let begin = Instant::now();
        let mut answer = [REFUSED];
        loop {
            let left = timeout.saturating_sub(begin.elapsed());
            // Zero would mean for ever.
            let glance = left.clamp(Duration::from_millis(1), GLANCE);
            socket.set_read_timeout(Some(glance)).map_err(VsockError::Socket)?;
            match socket.read(&mut answer) {
                Ok(0) => return Err(vsock.over().into()),
                Ok(_) if answer == [ACCEPTED] => {
                    socket.set_read_timeout(None).map_err(VsockError::Socket)?;
                    return Ok(VsockStream::new(socket));
                }
                Ok(_) => return Err(VsockError::Refused { port }.into()),
                Err(error) if matches!(error.kind(), Io::WouldBlock | Io::Interrupted) => {}
                Err(error) => return Err(VsockError::Socket(error).into()),
            }
            if let Some(ended) = vsock.ended() {
                return Err(ended.into());
            }
            if left.is_zero() {
                let seconds = timeout.as_secs_f64();
                return Err(VsockError::ConnectTimeout { port, seconds }.into());
            }
        }
    }
}

#[cfg(feature = "agent")]
impl Connecting {
    /// The socket, from which one byte is read before all others: see [`Self::accepted`].
    pub(crate) fn into_socket(self) -> UnixStream {
        self.socket
    }

    /// Whether the guest has accepted, by the first byte that was read.
    pub(crate) fn accepted(answer: u8) -> bool {
        answer == ACCEPTED
    }
}

impl AsFd for Connecting {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.socket.as_fd()
    }
}

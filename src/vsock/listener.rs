//! A port of the host that the guest connects to.

use std::os::fd::{AsFd, BorrowedFd};
use std::sync::Arc;
use std::time::{Duration, Instant};

use super::{GLANCE, Vsock, VsockError, VsockStream};
use crate::error::Error;
use crate::virtio::{Arrival, Backlog};

/// A port of the host that the guest connects to. Dropping it ends the listening, and closes the
/// connections that nobody has accepted.
///
/// Its descriptor is readable while a connection waits, and when the VM is over.
#[derive(Debug)]
#[must_use = "dropping it ends the listening"]
pub struct VsockListener {
    backlog: Arc<Backlog>,
    port: u32,
    vsock: Vsock,
    /// Whether connections wait for another listener when this one is dropped.
    kept: bool,
}

impl VsockListener {
    pub(super) fn new(backlog: Arc<Backlog>, port: u32, vsock: Vsock) -> Self {
        Self { backlog, port, vsock, kept: false }
    }

    /// A listener for connections that wait with it and without it.
    pub(crate) fn kept(backlog: Arc<Backlog>, port: u32, vsock: Vsock) -> Self {
        Self { backlog, port, vsock, kept: true }
    }

    /// The port.
    pub fn port(&self) -> u32 {
        self.port
    }

    /// Waits for the guest to connect, for as long as that takes.
    ///
    /// # Errors
    ///
    /// [`ErrorKind::GuestEnded`](crate::ErrorKind::GuestEnded) where the VM is over, and no
    /// connection waits.
    pub fn accept(&self) -> Result<VsockStream, Error> {
        loop {
            if let Some((stream, _)) = self.wait(GLANCE)? {
                return Ok(stream);
            }
        }
    }

    /// As [`accept`](Self::accept), but waits for at most `timeout`.
    ///
    /// # Errors
    ///
    /// As [`accept`](Self::accept), and [`ErrorKind::Timeout`](crate::ErrorKind::Timeout).
    pub fn accept_timeout(&self, timeout: Duration) -> Result<VsockStream, Error> {
        let begin = Instant::now();
        loop {
            let left = timeout.saturating_sub(begin.elapsed());
            if let Some((stream, _)) = self.wait(left.min(GLANCE))? {
                return Ok(stream);
            }
            if left.is_zero() {
                let (port, seconds) = (self.port, timeout.as_secs_f64());
                return Err(VsockError::AcceptTimeout { port, seconds }.into());
            }
        }
    }

    /// The connection that waits, if one does; never waits itself.
    ///
    /// # Errors
    ///
    /// As [`accept`](Self::accept).
    pub fn try_accept(&self) -> Result<Option<VsockStream>, Error> {
        Ok(self.wait(Duration::ZERO)?.map(|(stream, _)| stream))
    }

    /// As [`try_accept`](Self::try_accept), with the port of the guest that it came from.
    #[cfg(feature = "agent")]
    pub(crate) fn try_accept_from(&self) -> Result<Option<(VsockStream, u32)>, Error> {
        self.wait(Duration::ZERO)
    }

    fn wait(&self, timeout: Duration) -> Result<Option<(VsockStream, u32)>, Error> {
        match (self.backlog.wait(timeout), self.vsock.ended()) {
            (Arrival::Connection(socket, port), _) => Ok(Some((VsockStream::new(socket), port))),
            (Arrival::Nothing, None) => Ok(None),
            (Arrival::Nothing, Some(ended)) => Err(ended.into()),
            (Arrival::Closed, _) => Err(self.vsock.over().into()),
        }
    }
}

impl Drop for VsockListener {
    fn drop(&mut self) {
        if !self.kept {
            self.vsock.unlisten(self.port);
        }
    }
}

impl AsFd for VsockListener {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.backlog.as_fd()
    }
}

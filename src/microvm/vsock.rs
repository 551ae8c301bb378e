//! A VM's sockets to its guest.

use std::time::Duration;

use super::{Created, MicroVm, Running};
use crate::error::Error;
use crate::vsock::{Vsock, VsockListener, VsockStream};

impl MicroVm<Created> {
    /// See [`MicroVm<Running>::vsock`](MicroVm::vsock): a handle to listen by, for a guest that
    /// connects as soon as it runs.
    ///
    /// # Errors
    ///
    /// As that one.
    pub fn vsock(&self) -> Result<Vsock, Error> {
        self.state.stopped.machine.vsock()
    }

    /// Listens at a port of the host, before the guest runs: see [`Vsock::listen`].
    ///
    /// # Errors
    ///
    /// As [`Vsock::listen`] and [`vsock`](Self::vsock).
    pub fn listen(&self, port: u32) -> Result<VsockListener, Error> {
        self.vsock()?.listen(port)
    }
}

impl MicroVm<Running> {
    /// The host's side of the vsock device: a handle for other threads, which does not keep the
    /// VM.
    ///
    /// # Errors
    ///
    /// [`ErrorKind::Config`](crate::ErrorKind::Config) where the configuration has none.
    pub fn vsock(&self) -> Result<Vsock, Error> {
        self.state.machine.vsock()
    }

    /// Connects to a port of the guest: see [`Vsock::connect`].
    ///
    /// # Errors
    ///
    /// As [`Vsock::connect`] and [`vsock`](Self::vsock).
    pub fn connect(&self, port: u32) -> Result<VsockStream, Error> {
        self.vsock()?.connect(port)
    }

    /// Connects to a port of the guest: see [`Vsock::connect_timeout`].
    ///
    /// # Errors
    ///
    /// As [`Vsock::connect`] and [`vsock`](Self::vsock).
    pub fn connect_timeout(&self, port: u32, timeout: Duration) -> Result<VsockStream, Error> {
        self.vsock()?.connect_timeout(port, timeout)
    }

    /// Listens at a port of the host: see [`Vsock::listen`].
    ///
    /// # Errors
    ///
    /// As [`Vsock::listen`] and [`vsock`](Self::vsock).
    pub fn listen(&self, port: u32) -> Result<VsockListener, Error> {
        self.vsock()?.listen(port)
    }
}

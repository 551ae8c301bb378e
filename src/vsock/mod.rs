//! Sockets to a guest, from this process: connecting to its ports, listening at those of the host.
//!
//! Everything blocks, or can be polled: no async runtime is needed, and none is in the way. A
//! [`Vsock`] keeps nothing of its VM alive.

mod connecting;
mod listener;
mod stream;

pub use self::connecting::Connecting;
pub use self::listener::VsockListener;
pub use self::stream::VsockStream;

use std::io;
use std::sync::Arc;
use std::time::Duration;

use thiserror::Error as ThisError;

use crate::console::Console;
use crate::error::{Error, ErrorKind};
use crate::exit::{ExitLatch, ExitStatus};
use crate::virtio::{self, Backlog, NO_PORT, OpenError, WeakDeviceHandle};

/// How long [`Vsock::connect`] waits for the guest's answer.
const CONNECT_TIMEOUT: Duration = Duration::from_secs(10);
/// Connections that wait to be accepted, at most; one more is refused.
pub(crate) const BACKLOG: usize = 128;
/// How often those who wait look whether the guest has ended.
const GLANCE: Duration = Duration::from_millis(100);

/// Why a socket to a guest cannot be had.
#[derive(Debug, ThisError)]
pub(crate) enum VsockError {
    #[error("the VM has no vsock device")]
    NoDevice,
    #[error("the VM is over: {status}")]
    Over { status: ExitStatus },
    #[error("the VM was suspended, or dropped")]
    Gone,
    #[error("nobody listens at port {port} of the guest")]
    Refused { port: u32 },
    #[error("the guest did not answer a connection to its port {port} within {seconds} s")]
    ConnectTimeout { port: u32, seconds: f64 },
    #[error("the guest made no connection to port {port} within {seconds} s")]
    AcceptTimeout { port: u32, seconds: f64 },
    #[error("there are as many vsock connections as the configuration allows")]
    TooMany,
    #[error("port {port} of the host has a listener already")]
    PortInUse { port: u32 },
    #[error("{port} is not a port")]
    NoPort { port: u32 },
    #[error("cannot make a socket")]
    Socket(#[source] io::Error),
}

impl From<VsockError> for Error {
    fn from(error: VsockError) -> Self {
        let (kind, fix) = match &error {
            VsockError::NoDevice => (
                ErrorKind::Config,
                Some("add `.vsock(VsockConfig::default())` to the VM's configuration"),
            ),
            VsockError::Over { status } => (ErrorKind::GuestEnded(status.clone()), None),
            VsockError::Gone => (
                ErrorKind::GuestEnded(ExitStatus::Terminated),
                Some("where it was suspended, ask the VM that `resume` gives"),
            ),
            VsockError::Refused { .. } => (
                ErrorKind::Refused,
                Some("connect again when the program in the guest listens, or let it connect"),
            ),
            VsockError::ConnectTimeout { .. } => (
                ErrorKind::Timeout,
                Some(
                    "give it more time, or see that the guest has loaded its driver (virtio_vsock)",
                ),
            ),
            VsockError::AcceptTimeout { .. } => (ErrorKind::Timeout, None),
            VsockError::TooMany => {
                (ErrorKind::Resources, Some("close some, or raise `VsockConfig::max_connections`"))
            }
            VsockError::PortInUse { .. } => {
                (ErrorKind::PortInUse, Some("drop the other listener, or take another port"))
            }
            VsockError::NoPort { .. } => (ErrorKind::Config, None),
            VsockError::Socket(_) => {
                (ErrorKind::Resources, Some("raise the limit of open files (ulimit -n)"))
            }
        };
        let error = Error::new(kind, error);
        match fix {
            Some(fix) => error.fix(fix),
            None => error,
        }
    }
}

/// The host's side of a VM's vsock device: a handle that clones and crosses threads.
///
/// It works while another thread is in [`wait`](crate::MicroVm::wait), keeps nothing of the VM
/// alive, and says so when the VM is over. While the VM is paused nothing moves; what was begun
/// goes on when it is resumed.
///
/// ```no_run
/// use std::io::{BufRead, BufReader, Write};
/// use dormouse::{Kernel, MicroVm, VmConfig, VsockConfig};
///
/// let config = VmConfig::new(Kernel::installed()?).vsock(VsockConfig::default());
/// let vm = MicroVm::create(config)?;
/// let listener = vm.listen(1024)?; // before the guest runs, so that it finds it
/// let vm = vm.start()?;
///
/// let mut stream = listener.accept()?;
/// writeln!(stream, "hello guest").unwrap();
/// let mut answer = String::new();
/// BufReader::new(stream).read_line(&mut answer).unwrap();
/// # Ok::<(), dormouse::Error>(())
/// ```
#[derive(Clone)]
pub struct Vsock {
    device: WeakDeviceHandle<virtio::Vsock>,
    exit: Arc<ExitLatch>,
    console: Console,
}

impl Vsock {
    pub(crate) fn new(
        device: WeakDeviceHandle<virtio::Vsock>,
        exit: Arc<ExitLatch>,
        console: Console,
    ) -> Self {
        Self { device, exit, console }
    }

    /// Connects to a port of the guest. Returns when the guest has accepted: some 100 µs where a
    /// program listens. It waits for up to 10 s, which a guest needs that is still booting: one
    /// whose driver is not loaded answers nothing.
    ///
    /// # Errors
    ///
    /// [`ErrorKind::Refused`] where nobody listens there, [`ErrorKind::Timeout`],
    /// [`ErrorKind::GuestEnded`] where the VM is over, [`ErrorKind::Resources`] where there are
    /// too many connections or descriptors, [`ErrorKind::Config`] for 4,294,967,295, which is no port.
    pub fn connect(&self, port: u32) -> Result<VsockStream, Error> {
        self.begin_connect(port)?.finish()
    }

    /// As [`connect`](Self::connect), but waits for at most `timeout`.
    ///
    /// # Errors
    ///
    /// As [`connect`](Self::connect).
    pub fn connect_timeout(&self, port: u32, timeout: Duration) -> Result<VsockStream, Error> {
        self.begin_connect(port)?.finish_timeout(timeout)
    }

    /// Asks the guest for a connection, and does not wait for its answer.
    ///
    /// # Errors
    ///
    /// [`ErrorKind::GuestEnded`], [`ErrorKind::Resources`] and [`ErrorKind::Config`], as
    /// [`connect`](Self::connect).
    pub fn begin_connect(&self, port: u32) -> Result<Connecting, Error> {
        self.check(port)?;
        let socket = self.with_device(|device| device.open(port))?;
        let socket = socket.map_err(|error| match error {
            OpenError::Over => self.over(),
            OpenError::TooMany => VsockError::TooMany,
            OpenError::Socket(error) => VsockError::Socket(error),
        })?;
        Ok(Connecting::new(socket, port, self.clone()))
    }

    /// Listens at a port of the host. Up to 128 connections of the guest wait to be accepted;
    /// one more is refused, as all are once the listener is dropped.
    ///
    /// # Errors
    ///
    /// [`ErrorKind::PortInUse`] where there is a listener, [`ErrorKind::GuestEnded`] where the VM
    /// is over, [`ErrorKind::Resources`] where there are too many descriptors, [`ErrorKind::Config`]
    /// for 4,294,967,295, which is no port.
    pub fn listen(&self, port: u32) -> Result<VsockListener, Error> {
        self.check(port)?;
        let backlog = Arc::new(Backlog::new(BACKLOG).map_err(VsockError::Socket)?);
        match self.with_device(|device| device.listen(port, &backlog))? {
            true => Ok(VsockListener::new(backlog, port, self.clone())),
            false => Err(VsockError::PortInUse { port }.into()),
        }
    }

    fn unlisten(&self, port: u32) {
        let _ = self.with_device(|device| device.unlisten(port));
    }

    /// Ends the device as the end of its VM does.
    #[cfg(test)]
    pub(crate) fn close(&self) {
        if let Some(device) = self.device.upgrade() {
            device.close();
        }
    }

    fn check(&self, port: u32) -> Result<(), VsockError> {
        match (port, self.exit.get()) {
            (NO_PORT, _) => Err(VsockError::NoPort { port }),
            (_, Some(_)) => Err(self.over()),
            (_, None) => Ok(()),
        }
    }

    fn with_device<R>(&self, act: impl FnOnce(&mut virtio::Vsock) -> R) -> Result<R, VsockError> {
        let device = self.device.upgrade().ok_or_else(|| self.over())?;
        // The queues stay as they are, so that there is no error of theirs.
        device.call(|device, _| Ok(act(device))).map_err(|_| self.over())
    }

    /// That the VM is over, if it is.
    #[cfg(feature = "agent")]
    pub(crate) fn ended_error(&self) -> Option<Error> {
        let gone = self.device.upgrade().is_none();
        self.ended().or_else(|| gone.then(|| self.over())).map(Error::from)
    }

    /// Whether nothing moves because the VM is paused.
    #[cfg(feature = "agent")]
    pub(crate) fn is_paused(&self) -> bool {
        self.device.upgrade().is_some_and(|device| device.is_paused())
    }

    /// How the guest ended, where it has.
    fn ended(&self) -> Option<VsockError> {
        self.exit.get().map(|_| self.over())
    }

    /// Why the VM is not there any more.
    fn over(&self) -> VsockError {
        match self.exit.get() {
            Some(status) => VsockError::Over { status: self.console.explain(status.clone()) },
            None => VsockError::Gone,
        }
    }
}

impl std::fmt::Debug for Vsock {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Vsock").finish_non_exhaustive()
    }
}

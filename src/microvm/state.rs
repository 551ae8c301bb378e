//! The states of a [`MicroVm`](super::MicroVm), and what each holds.

use super::asleep::Asleep;
use super::stopped::{Origin, Stopped};
use crate::error::Error;
use crate::exit::ExitStatus;
use crate::machine::{self, Machine, NotRun};

mod sealed {
    pub trait Sealed {}
}

/// A state of a [`MicroVm`](super::MicroVm). The set is closed.
pub trait State: sealed::Sealed + Send {
    /// The state's name.
    const NAME: &'static str;
}

/// Assembled and loaded; no instruction has run.
#[derive(Debug)]
pub struct Created {
    pub(super) stopped: Stopped,
}

/// The vCPUs are with their threads. The guest may have ended by itself: calls then say so, and
/// [`wait`](super::MicroVm::wait) returns at once.
#[derive(Debug)]
pub struct Running {
    pub(super) run: machine::Running,
    pub(super) machine: Box<Machine>,
    pub(super) origin: Box<Origin>,
}

impl Running {
    /// Gives the vCPUs to their threads, or everything back.
    pub(super) fn of(stopped: Stopped) -> Result<Self, (Stopped, Error)> {
        let Stopped { vcpus, machine, origin, kept: _ } = stopped;
        match machine.run(vcpus) {
            Ok(run) => Ok(Self { run, machine, origin }),
            Err(NotRun { vcpus, error }) => {
                Err((Stopped::new(vcpus, machine, origin), error.into()))
            }
        }
    }
}

/// Stopped between two instructions; nothing of the guest runs, its memory is kept.
#[derive(Debug)]
pub struct Paused {
    pub(super) stopped: Stopped,
}

/// Asleep: in files, or in memory that no VM has. No guest code can run, and no thread or
/// descriptor of the VM is left.
#[derive(Debug)]
pub struct Suspended {
    pub(super) asleep: Box<Asleep>,
}

/// Over. The console, the timings and the exit status are left to look at.
#[derive(Debug)]
pub struct Terminated {
    pub(super) status: ExitStatus,
}

macro_rules! states {
    ($($state:ident)*) => { $(
        impl sealed::Sealed for $state {}
        impl State for $state {
            const NAME: &'static str = stringify!($state);
        }
    )* };
}

states! { Created Running Paused Suspended Terminated }

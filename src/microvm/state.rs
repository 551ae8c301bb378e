//! The states of a [`MicroVm`](super::MicroVm), and what each holds.

use crate::error::Error;
use crate::exit::ExitStatus;
use crate::kvm::Vcpu;
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
}

/// Stopped between two instructions; nothing of the guest runs, its memory is kept.
#[derive(Debug)]
pub struct Paused {
    pub(super) stopped: Stopped,
}

/// Over. The console, the timings and the exit status are left to look at.
#[derive(Debug)]
pub struct Terminated {
    pub(super) status: ExitStatus,
}

/// A machine whose vCPUs no thread has.
#[derive(Debug)]
pub(super) struct Stopped {
    // The vCPUs go first, so that the machine's threads are the last to hold the VM.
    pub(super) vcpus: Vec<Vcpu>,
    pub(super) machine: Box<Machine>,
}

impl Stopped {
    /// Gives the vCPUs to their threads, or everything back.
    pub(super) fn run(self) -> Result<Running, (Self, Error)> {
        let Self { vcpus, machine } = self;
        match machine.run(vcpus) {
            Ok(run) => Ok(Running { run, machine }),
            Err(NotRun { vcpus, error }) => Err((Self { vcpus, machine }, error.into())),
        }
    }
}

macro_rules! states {
    ($($state:ident)*) => { $(
        impl sealed::Sealed for $state {}
        impl State for $state {
            const NAME: &'static str = stringify!($state);
        }
    )* };
}

states! { Created Running Paused Terminated }

//! The states of a [`MicroVm`](super::MicroVm), and what each holds.

use std::time::Duration;

use super::agent::Agent;
use super::asleep::Asleep;
use crate::config::RestoreOptions;
use crate::console::Console;
use crate::error::Error;
use crate::exit::ExitStatus;
use crate::kvm::Vcpu;
use crate::machine::{self, Machine, NotRun, Shell};
use crate::snapshot::{Disks, Sleeper, Snapshot, WakeLock};
use crate::timings::Recorder;

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

/// A machine whose vCPUs no thread has.
#[derive(Debug)]
pub(super) struct Stopped {
    // The vCPUs go first, so that the machine's threads are the last to hold the VM.
    pub(super) vcpus: Vec<Vcpu>,
    pub(super) machine: Box<Machine>,
    pub(super) origin: Box<Origin>,
    /// It as a snapshot in memory, once somebody wanted one: nothing of it changes until it runs.
    pub(super) kept: Option<Snapshot>,
}

/// Where a VM comes from, and who wants to know of its end.
#[derive(Debug, Default)]
pub(super) struct Origin {
    /// The snapshot that its memory stands on.
    pub(super) snapshot: Option<Snapshot>,
    /// That nobody else wakes it, where it was woken from files.
    pub(super) lock: Option<WakeLock>,
    pub(super) lease: Option<Lease>,
    pub(super) agent: Agent,
    /// What vCPUs have used that it had before it slept.
    pub(super) cpu_time: Duration,
}

/// Calls somebody when a VM is over, in whatever state it was.
pub(crate) struct Lease(Option<Box<dyn FnOnce() + Send + Sync>>);

impl Lease {
    pub(crate) fn new(end: impl FnOnce() + Send + Sync + 'static) -> Self {
        Self(Some(Box::new(end)))
    }
}

impl Drop for Lease {
    fn drop(&mut self) {
        if let Some(end) = self.0.take() {
            end();
        }
    }
}

impl std::fmt::Debug for Lease {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str("Lease")
    }
}

impl super::MicroVm<Paused> {
    /// Tells somebody of the VM's end.
    pub(crate) fn lease(&mut self, lease: Lease) {
        self.state.stopped.origin.lease = Some(lease);
    }
}

impl Stopped {
    pub(super) fn new(vcpus: Vec<Vcpu>, machine: Box<Machine>, origin: Box<Origin>) -> Self {
        Self { vcpus, machine, origin, kept: None }
    }

    /// Gives the vCPUs to their threads, or everything back.
    pub(super) fn run(self) -> Result<Running, (Self, Error)> {
        let Self { vcpus, machine, origin, kept: _ } = self;
        match machine.run(vcpus) {
            Ok(run) => Ok(Running { run, machine, origin }),
            Err(NotRun { vcpus, error }) => Err((Self::new(vcpus, machine, origin), error.into())),
        }
    }

    /// Notes what the guest has written, where nobody did before it.
    pub(super) fn note_written(&self) {
        if let Some(snapshot) = &self.origin.snapshot {
            snapshot.note_written(self.machine.ram());
        }
    }

    /// What its vCPUs have used, since the VM was made.
    pub(super) fn cpu_time(&self) -> Duration {
        self.origin.cpu_time + self.machine.cpu_time()
    }

    /// What saves it.
    pub(super) fn sleeper(&self) -> Sleeper<'_> {
        let Self { vcpus, machine, origin, .. } = self;
        let clone = origin.agent.untold_names();
        Sleeper { machine, vcpus, origin: origin.snapshot.as_ref(), clone }
    }

    /// A machine as it was when it was saved.
    pub(super) fn restored(
        snapshot: &Snapshot,
        options: &RestoreOptions,
        disks: Disks,
        (shell, console): (Option<Shell>, Option<&Console>),
        recorder: &mut Recorder,
    ) -> Result<Self, Error> {
        let (machine, vcpus) = snapshot.machine(shell, options, disks, console, recorder)?;
        let agent = match disks {
            Disks::Copy => Agent::of_clone(options),
            Disks::InPlace => Agent::default(),
        };
        let snapshot = Some(snapshot.clone());
        let origin = Box::new(Origin { snapshot, agent, ..Origin::default() });
        Ok(Self::new(vcpus, Box::new(machine), origin))
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

states! { Created Running Paused Suspended Terminated }

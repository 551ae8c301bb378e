//! A machine that does not run, and what is known of where it comes from.

use std::time::Duration;

use super::agent::AgentContact;
use super::slept::Slept;
use crate::config::{Clock, RestoreOptions};
use crate::console::Console;
use crate::error::Error;
use crate::kvm::Vcpu;
use crate::machine::{Machine, Shell};
use crate::snapshot::{Purpose, Sleeper, Snapshot, WakeLock};
use crate::timings::Recorder;

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
    pub(super) on_end: Option<OnEnd>,
    pub(super) agent: AgentContact,
    /// What vCPUs have used that it had before it slept.
    pub(super) cpu_time: Duration,
    /// What its clocks say when it wakes, where that was chosen.
    pub(super) clock: Option<Clock>,
    /// How it slept, where that was in files.
    pub(super) slept: Option<Slept>,
}

/// Calls somebody when a VM is over, in whatever state it was.
pub(crate) struct OnEnd(Option<Box<dyn FnOnce() + Send + Sync>>);

impl OnEnd {
    pub(crate) fn new(end: impl FnOnce() + Send + Sync + 'static) -> Self {
        Self(Some(Box::new(end)))
    }
}

impl Drop for OnEnd {
    fn drop(&mut self) {
        if let Some(end) = self.0.take() {
            end();
        }
    }
}

impl std::fmt::Debug for OnEnd {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str("OnEnd")
    }
}

impl Stopped {
    pub(super) fn new(vcpus: Vec<Vcpu>, machine: Box<Machine>, origin: Box<Origin>) -> Self {
        Self { vcpus, machine, origin, kept: None }
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
        purpose: Purpose,
        (shell, console): (Option<Shell>, Option<&Console>),
        recorder: &mut Recorder,
    ) -> Result<Self, Error> {
        let (machine, vcpus) = snapshot.machine(shell, options, purpose, console, recorder)?;
        let agent = match purpose {
            Purpose::Clones => AgentContact::of_clone(options),
            Purpose::Sleep => AgentContact::default(),
        };
        let snapshot = Some(snapshot.clone());
        let origin =
            Box::new(Origin { snapshot, agent, clock: options.clock, ..Origin::default() });
        Ok(Self::new(vcpus, Box::new(machine), origin))
    }
}

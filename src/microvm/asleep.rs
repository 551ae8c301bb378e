//! A VM that sleeps: falling asleep, waking.

use std::path::Path;
use std::sync::Arc;
use std::time::Duration;

use super::agent::{AgentContact, CloneIdentity};
use super::slept::{self, Place, Slept};
use super::stopped::{OnEnd, Origin, Stopped};
use crate::config::RestoreOptions;
use crate::console::Console;
use crate::error::Error;
use crate::snapshot::{Purpose, Snapshot};
use crate::timings::Recorder;

/// A VM in its sleep.
#[derive(Debug)]
pub(super) struct Asleep {
    slept: Slept,
    on_end: Option<OnEnd>,
    /// What its vCPUs had used when it fell asleep, as far as this process knows.
    cpu_time: Duration,
}

impl Asleep {
    /// A machine that lies in this snapshot, in files or in memory.
    pub(super) fn new(snapshot: Snapshot, stopped: Stopped) -> Self {
        let mut options = slept::as_before(&stopped.machine.config_now());
        let cpu_time = stopped.cpu_time();
        let Origin { on_end, agent, clock, .. } = *stopped.origin;
        options.clock = clock;
        let slept = Slept { place: Place::of(snapshot), options, identity: agent.into_untold() };
        Self { slept, on_end, cpu_time }
    }

    /// A machine that did not go on after all, as it slept in its files before it woke.
    ///
    /// # Errors
    ///
    /// The machine, which did not wake from files.
    #[cfg(feature = "session")]
    pub(super) fn again(mut stopped: Stopped) -> Result<Self, Stopped> {
        let Some(slept) = stopped.origin.slept.take() else { return Err(stopped) };
        let (on_end, cpu_time) = (stopped.origin.on_end.take(), stopped.cpu_time());
        Ok(Self { slept, on_end, cpu_time })
    }

    /// The machine that lies in a directory, whoever put it there; and its console, which is empty.
    pub(super) fn open(
        directory: &Path,
        options: &RestoreOptions,
    ) -> Result<(Self, Console), Error> {
        let snapshot = Snapshot::open(directory)?;
        let (sleep, options) = snapshot.sleep(options)?;
        let identity = sleep.clone.map(|names| Arc::new(CloneIdentity::new(names)));
        let console = Console::new(snapshot.console_tail_bytes());
        let slept = Slept { place: Place::of(snapshot), options, identity };
        Ok((Self { slept, on_end: None, cpu_time: Duration::ZERO }, console))
    }

    pub(super) fn wake(
        &mut self,
        console: &Console,
        recorder: &mut Recorder,
    ) -> Result<Stopped, Error> {
        let snapshot = self.snapshot()?;
        let lock = snapshot.wake_lock()?;
        let from = (None, Some(console));
        let mut stopped =
            Stopped::restored(&snapshot, &self.slept.options, Purpose::Sleep, from, recorder)?;
        stopped.origin.lock = lock;
        stopped.origin.on_end = self.on_end.take();
        stopped.origin.agent = AgentContact::woken(self.slept.identity.clone());
        // What is in memory is not kept for that.
        let is_in_files = matches!(self.slept.place, Place::Directory { .. });
        stopped.origin.slept = is_in_files.then(|| self.slept.clone());
        stopped.origin.cpu_time = self.cpu_time;
        Ok(stopped)
    }

    pub(super) fn snapshot(&self) -> Result<Snapshot, Error> {
        match &self.slept.place {
            Place::Directory { path, id } => Snapshot::open_same(path, *id),
            Place::Memory(snapshot) => Ok(snapshot.clone()),
        }
    }

    /// The snapshot that it lies in, where that is in files.
    #[cfg(feature = "session")]
    pub(super) fn snapshot_id(&self) -> Option<[u8; 16]> {
        match &self.slept.place {
            Place::Directory { id, .. } => Some(*id),
            Place::Memory(_) => None,
        }
    }

    /// The VM did not go on after all, and who waits for its end has to be told of that one.
    pub(super) fn take_back(&mut self, woken: &mut Stopped) {
        self.on_end = woken.origin.on_end.take();
    }

    /// Removes the files that the VM lies in.
    pub(super) fn remove(self) {
        if let Place::Directory { path, id } = &self.slept.place {
            Snapshot::remove(path, *id);
        }
    }
}

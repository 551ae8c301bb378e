//! Where a VM lies that sleeps, and what it gets of the host when it wakes.

use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Duration;

use super::agent::{AgentContact, CloneIdentity};
use super::stopped::{OnEnd, Origin, Stopped};
use crate::config::{MachineConfig, RestoreOptions};
use crate::console::Console;
use crate::error::Error;
use crate::snapshot::{Purpose, Snapshot};
use crate::timings::Recorder;

/// A VM in its sleep.
#[derive(Debug)]
pub(super) struct Asleep {
    place: Place,
    options: RestoreOptions,
    on_end: Option<OnEnd>,
    /// Who it is, where it is a clone that has not been told so.
    identity: Option<Arc<CloneIdentity>>,
    /// What its vCPUs had used when it fell asleep, as far as this process knows.
    cpu_time: Duration,
}

#[derive(Debug)]
enum Place {
    Directory { path: PathBuf, id: [u8; 16] },
    Memory(Snapshot),
}

impl Asleep {
    /// A machine that lies in this snapshot, in files or in memory.
    pub(super) fn new(snapshot: Snapshot, stopped: Stopped) -> Self {
        let options = as_before(&stopped.machine.config_now());
        let cpu_time = stopped.cpu_time();
        let Origin { on_end, agent, .. } = *stopped.origin;
        let identity = agent.into_untold();
        Self { place: Place::of(snapshot), options, on_end, identity, cpu_time }
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
        let (place, cpu_time) = (Place::of(snapshot), Duration::ZERO);
        Ok((Self { place, options, on_end: None, identity, cpu_time }, console))
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
            Stopped::restored(&snapshot, &self.options, Purpose::Sleep, from, recorder)?;
        stopped.origin.lock = lock;
        stopped.origin.on_end = self.on_end.take();
        stopped.origin.agent = AgentContact::woken(self.identity.clone());
        stopped.origin.cpu_time = self.cpu_time;
        Ok(stopped)
    }

    pub(super) fn snapshot(&self) -> Result<Snapshot, Error> {
        match &self.place {
            Place::Directory { path, id } => Snapshot::open_same(path, *id),
            Place::Memory(snapshot) => Ok(snapshot.clone()),
        }
    }

    /// The snapshot that it lies in, where that is in files.
    #[cfg(feature = "session")]
    pub(super) fn snapshot_id(&self) -> Option<[u8; 16]> {
        match &self.place {
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
        if let Place::Directory { path, id } = &self.place {
            Snapshot::remove(path, *id);
        }
    }
}

impl Place {
    fn of(snapshot: Snapshot) -> Self {
        match snapshot.directory() {
            Some(path) => Self::Directory { path: path.to_owned(), id: snapshot.id() },
            None => Self::Memory(snapshot),
        }
    }
}

/// All that a machine had of the host, also what no file keeps.
pub(super) fn as_before(config: &MachineConfig) -> RestoreOptions {
    let mut options = RestoreOptions::default()
        .console_output(config.console_writer.clone())
        .kvm_device(&config.kvm_device)
        .outside_paths(true);
    for (index, network) in config.networks.iter().enumerate() {
        if network.has_descriptor() {
            options = options.network(index, network.clone());
        }
    }
    options
}

//! Saving a VM: snapshots, suspended VMs, clones.

use std::path::Path;

use super::asleep::Asleep;
use super::stopped::Stopped;
use super::{LifecycleError, MicroVm, Paused, PreparedShell, Running, Suspended, TransitionError};
use crate::config::RestoreOptions;
use crate::error::Error;
use crate::exit::ExitStatus;
use crate::kvm::FreshState;
use crate::machine::{Shell, ShellConfig};
#[cfg(feature = "session")]
use crate::metrics::DeviceMetrics;
use crate::phase::Phase;
use crate::snapshot::{Purpose, Snapshot, SnapshotOptions};
use crate::timings::Recorder;

impl MicroVm<Paused> {
    /// Writes memory, disks and registers to a directory, and leaves the VM as it is. The format is
    /// in docs/snapshot-format.md.
    ///
    /// Of the memory, what is present and not zero is written, at the speed of the file system;
    /// of a VM that came from a snapshot, only what it has written since: the rest is shared with
    /// that one's files. Disks that the guest writes are copied (by reference, where the file system can).
    /// The directory appears whole, or not at all; a snapshot that is there is replaced.
    ///
    /// # Errors
    ///
    /// [`ErrorKind::Snapshot`](crate::ErrorKind::Snapshot) where it cannot be written, and
    /// [`ErrorKind::Disk`](crate::ErrorKind::Disk) where a disk is not copied; what was there stays.
    pub fn snapshot(&self, directory: impl AsRef<Path>) -> Result<Snapshot, Error> {
        self.snapshot_with(directory, &SnapshotOptions::default())
    }

    /// As [`snapshot`](Self::snapshot), in a way of one's own.
    ///
    /// # Errors
    ///
    /// As `snapshot`; [`ErrorKind::Interrupted`](crate::ErrorKind::Interrupted) where the progress says so.
    pub fn snapshot_with(
        &self,
        directory: impl AsRef<Path>,
        options: &SnapshotOptions,
    ) -> Result<Snapshot, Error> {
        let sleeper = self.state.stopped.sleeper();
        let saved = sleeper.save(directory.as_ref(), Purpose::Clones, options);
        saved.map_err(|error| self.error(Phase::Save, error))
    }

    /// Writes the VM to a directory, and ends it here: what is left is files. Its disks stay where
    /// they are, and it goes on with them in [`resume`](MicroVm::<Suspended>::resume); what would be
    /// gone with the VM, a delta without a name, or with the snapshot that it came from, is saved. Takes as long as a
    /// [`snapshot`](Self::snapshot) does for the memory. The files stay when the `Suspended` is
    /// dropped: [`MicroVm::<Suspended>::open`] finds the VM again, in this process or another, and
    /// [`Snapshot::open`] what clones are made of.
    ///
    /// # Errors
    ///
    /// As [`snapshot`](Self::snapshot), with the VM as it was.
    pub fn suspend(
        self,
        directory: impl AsRef<Path>,
    ) -> Result<MicroVm<Suspended>, TransitionError<Paused>> {
        self.suspend_with(directory, &SnapshotOptions::default())
    }

    /// As [`suspend`](Self::suspend), in a way of one's own.
    ///
    /// # Errors
    ///
    /// As `suspend`; [`ErrorKind::Interrupted`](crate::ErrorKind::Interrupted) where the progress says so.
    pub fn suspend_with(
        mut self,
        directory: impl AsRef<Path>,
        options: &SnapshotOptions,
    ) -> Result<MicroVm<Suspended>, TransitionError<Paused>> {
        let directory = directory.as_ref();
        let stopped = &self.state.stopped;
        let saved = self
            .recorder
            .timed(Phase::Save, || stopped.sleeper().save(directory, Purpose::Sleep, options));
        match saved {
            Ok(snapshot) => Ok(self.asleep(snapshot)),
            Err(error) => {
                let error = self.error(Phase::Save, error);
                Err(TransitionError { vm: self, error })
            }
        }
    }

    /// Puts the VM to sleep in memory: its RAM stays, in a sealed memfd, and everything else goes.
    /// Of fresh memory nothing is copied; of a VM that was restored, what it has written since. The
    /// memory goes when the `Suspended` is dropped.
    ///
    /// # Errors
    ///
    /// [`ErrorKind::Snapshot`](crate::ErrorKind::Snapshot) or [`ErrorKind::Disk`](crate::ErrorKind::Disk), with the VM
    /// as it was.
    pub fn suspend_in_memory(mut self) -> Result<MicroVm<Suspended>, TransitionError<Paused>> {
        let stopped = &self.state.stopped;
        let kept = self.recorder.timed(Phase::Save, || stopped.sleeper().keep(Purpose::Sleep));
        match kept {
            Ok(snapshot) => Ok(self.asleep(snapshot)),
            Err(error) => {
                let error = self.error(Phase::Save, error);
                Err(TransitionError { vm: self, error })
            }
        }
    }

    /// Makes `count` clones, each with the memory of this VM, which is shared until one of them
    /// writes, and with disks of its own, over a copy of this VM's. This VM goes on as it likes: no one sees
    /// what another writes. Each clone is told that it is one (VMGenID), before it runs.
    ///
    /// A clone takes about a millisecond. Before the first after a pause, fresh memory takes some 60 µs for
    /// each MiB that was touched, whose page tables are given back; memory of a VM that was restored or
    /// forked, a copy of the pages that it has written since. Disks that the guest writes are copied
    /// to the folder for temporary files, once for all clones until it runs on.
    ///
    /// # Errors
    ///
    /// [`ErrorKind::Snapshot`](crate::ErrorKind::Snapshot) where the memory cannot be shared,
    /// [`ErrorKind::Disk`](crate::ErrorKind::Disk) where a disk cannot; else those of [`Snapshot::restore_with`]. No clone is left then.
    pub fn fork(&mut self, count: usize) -> Result<Vec<MicroVm<Paused>>, Error> {
        self.fork_with(count, |_| RestoreOptions::default())
    }

    /// As [`fork`](Self::fork), with options for each clone, counted from 0: two cannot have the
    /// same tap.
    ///
    /// # Errors
    ///
    /// As `fork`.
    pub fn fork_with(
        &mut self,
        count: usize,
        options: impl FnMut(usize) -> RestoreOptions,
    ) -> Result<Vec<MicroVm<Paused>>, Error> {
        self.keep()?.fork_with(count, options)
    }

    /// Makes what a clone of this VM needs of the kernel, but for its memory and its devices, so
    /// that [`fork_on`](Self::fork_on) is left with a third of the work.
    ///
    /// # Errors
    ///
    /// As [`Snapshot::prepare`].
    pub fn prepare(&self) -> Result<PreparedShell, Error> {
        let Stopped { vcpus, machine, .. } = &self.state.stopped;
        let shell = machine.profile(vcpus).and_then(|profile| {
            let ram = machine.ram().reserve_alike()?;
            let config = ShellConfig::as_shown(&profile, machine.config())?;
            let shell = Shell::new(&config, ram, &mut Recorder::new())?;
            shell.look_ahead(&FreshState::new())?;
            Ok(shell)
        });
        Ok(PreparedShell { shell: shell.map_err(|error| self.error(Phase::Kvm, error))? })
    }

    /// As [`fork`](Self::fork): a clone on each of these shells.
    ///
    /// # Errors
    ///
    /// As `fork`, and as [`Snapshot::restore_on`].
    pub fn fork_on(
        &mut self,
        shells: Vec<PreparedShell>,
        mut options: impl FnMut(usize) -> RestoreOptions,
    ) -> Result<Vec<MicroVm<Paused>>, Error> {
        let snapshot = self.keep()?;
        let clones = shells.into_iter().enumerate();
        clones.map(|(index, shell)| snapshot.restore_on(shell, &options(index))).collect()
    }

    /// This VM as a snapshot in memory, that its clones come from, all until it runs on.
    fn keep(&mut self) -> Result<Snapshot, Error> {
        let stopped = &self.state.stopped;
        if let Some(kept) = &stopped.kept {
            return Ok(kept.clone());
        }
        let kept = self.recorder.timed(Phase::Save, || stopped.sleeper().keep(Purpose::Clones));
        let kept = kept.map_err(|error| self.error(Phase::Save, error))?;
        self.state.stopped.kept = Some(kept.clone());
        Ok(kept)
    }

    /// Ends the VM, which sleeps again in the files that it woke from, and wakes from there with what it had.
    ///
    /// # Errors
    ///
    /// The VM, which did not wake from files.
    #[cfg(feature = "session")]
    pub(crate) fn back_to_sleep(self) -> Result<MicroVm<Suspended>, Self> {
        let Self { state: Paused { stopped }, console, recorder } = self;
        match Asleep::again(stopped) {
            Ok(asleep) => {
                let state = Suspended { asleep: Box::new(asleep) };
                Ok(MicroVm { state, console, recorder })
            }
            Err(stopped) => Err(Self { state: Paused { stopped }, console, recorder }),
        }
    }

    /// Whether its guest has written, since it is awake, to a disk that stays when the VM is gone. What else it had may be.
    #[cfg(feature = "session")]
    pub(crate) fn has_written(&self) -> bool {
        let machine = &self.state.stopped.machine;
        let disks = machine.config().blocks.iter().zip(machine.metrics());
        disks.filter(|(disk, _)| disk.outlives_its_vm()).any(|(_, metrics)| match metrics {
            DeviceMetrics::Block(block) => block.writes + block.clears + block.errors > 0,
            _ => false,
        })
    }

    fn asleep(self, snapshot: Snapshot) -> MicroVm<Suspended> {
        let Self { state: Paused { stopped }, console, recorder } = self;
        let asleep = Box::new(Asleep::new(snapshot, stopped));
        MicroVm { state: Suspended { asleep }, console, recorder }
    }
}

impl MicroVm<Running> {
    /// Stops its vCPUs, also those of a guest that has ended; and says how it has, where it has.
    pub(crate) fn stop(self) -> (MicroVm<Paused>, Option<ExitStatus>) {
        let Self { state: Running { run, machine, origin }, console, mut recorder } = self;
        let vcpus = recorder.timed(Phase::Pause, || machine.stop(run));
        let ended = machine.exit_status();
        let stopped = Stopped::new(vcpus, machine, origin);
        (MicroVm { state: Paused { stopped }, console, recorder }, ended)
    }

    /// Pauses the VM, writes it to a directory, and ends it here: see
    /// [`MicroVm<Paused>::suspend`](MicroVm::<Paused>::suspend).
    ///
    /// # Errors
    ///
    /// As that one, with the VM running on. [`ErrorKind::GuestEnded`](crate::ErrorKind::GuestEnded)
    /// where the guest has ended by itself.
    pub fn suspend(
        self,
        directory: impl AsRef<Path>,
    ) -> Result<MicroVm<Suspended>, TransitionError<Running>> {
        self.suspend_with(directory, &SnapshotOptions::default())
    }

    /// As [`suspend`](Self::suspend), in a way of one's own.
    ///
    /// # Errors
    ///
    /// As `suspend`; [`ErrorKind::Interrupted`](crate::ErrorKind::Interrupted) where the progress says so.
    pub fn suspend_with(
        self,
        directory: impl AsRef<Path>,
        options: &SnapshotOptions,
    ) -> Result<MicroVm<Suspended>, TransitionError<Running>> {
        let (paused, ended) = self.stop();
        let suspended = match ended {
            None => paused.suspend_with(directory, options),
            Some(status) => {
                let error = LifecycleError::Ended { attempt: "suspend", status };
                let error = paused.error(Phase::Pause, error);
                Err(TransitionError { vm: paused, error })
            }
        };
        suspended.map_err(|TransitionError { vm, error }| run_on(vm, error))
    }
}

/// A VM that could not be suspended goes on.
fn run_on(vm: MicroVm<Paused>, error: Error) -> TransitionError<Running> {
    let MicroVm { state: Paused { stopped }, console, recorder } = vm;
    let Stopped { vcpus, machine, origin, .. } = stopped;
    for vcpu in &vcpus {
        vcpu.forgive_pause();
    }
    let run = machine.run_or_end(vcpus);
    let state = Running { run, machine, origin };
    TransitionError { vm: MicroVm { state, console, recorder }, error }
}

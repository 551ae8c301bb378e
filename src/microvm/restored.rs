//! VMs that come from a snapshot.

use super::state::Stopped;
use super::{MicroVm, Paused};
use crate::config::RestoreOptions;
use crate::error::Error;
use crate::snapshot::{Disks, Snapshot};
use crate::timings::Recorder;

impl Snapshot {
    /// A VM as it was when it was saved, paused, in about a millisecond at any size of its
    /// memory: see [`restore_with`](Self::restore_with).
    ///
    /// # Errors
    ///
    /// As that one.
    pub fn restore(&self) -> Result<MicroVm<Paused>, Error> {
        self.restore_with(&RestoreOptions::default())
    }

    /// A VM as it was when it was saved, paused. Its memory is mapped, and a page is read when
    /// the guest, or a device, first touches it; what it writes is its own. It has a new VMGenID;
    /// connections of its vsock device are reset.
    ///
    /// # Errors
    ///
    /// [`ErrorKind::Snapshot`](crate::ErrorKind::Snapshot) where it does not fit this host, or
    /// names files of it without leave; else as [`MicroVm::create`].
    pub fn restore_with(&self, options: &RestoreOptions) -> Result<MicroVm<Paused>, Error> {
        let mut recorder = Recorder::new();
        let stopped = Stopped::restored(self, options, Disks::Copy, None, &mut recorder)?;
        let console = stopped.machine.console().clone();
        Ok(MicroVm { state: Paused { stopped }, console, recorder })
    }

    /// `count` VMs as [`restore`](Self::restore) makes them.
    ///
    /// # Errors
    ///
    /// As `restore`. None is left then.
    pub fn fork(&self, count: usize) -> Result<Vec<MicroVm<Paused>>, Error> {
        self.fork_with(count, |_| RestoreOptions::default())
    }

    /// As [`fork`](Self::fork), with options for each VM, counted from 0: two cannot have the
    /// same tap.
    ///
    /// # Errors
    ///
    /// As `restore`.
    pub fn fork_with(
        &self,
        count: usize,
        mut options: impl FnMut(usize) -> RestoreOptions,
    ) -> Result<Vec<MicroVm<Paused>>, Error> {
        (0..count).map(|index| self.restore_with(&options(index))).collect()
    }
}

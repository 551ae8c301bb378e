//! VMs that come from a snapshot.

use super::stopped::Stopped;
use super::{MicroVm, Paused};
use crate::config::RestoreOptions;
use crate::error::Error;
use crate::machine::Shell;
use crate::snapshot::{Purpose, Snapshot};
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
    /// names files of it without leave; [`ErrorKind::Config`](crate::ErrorKind::Config) for an option that does not fit
    /// it; else as [`MicroVm::create`].
    pub fn restore_with(&self, options: &RestoreOptions) -> Result<MicroVm<Paused>, Error> {
        self.restored(None, options, Recorder::new())
    }

    /// Makes what a VM of this snapshot needs of the kernel, but for its memory and its devices, so
    /// that [`restore_on`](Self::restore_on) is left with a third of the work.
    ///
    /// # Errors
    ///
    /// As [`restore_with`](Self::restore_with).
    pub fn prepare(&self) -> Result<PreparedShell, Error> {
        self.prepare_with(&RestoreOptions::default())
    }

    /// As [`prepare`](Self::prepare), with the KVM device and the confinement that these options say.
    ///
    /// # Errors
    ///
    /// As that one.
    pub fn prepare_with(&self, options: &RestoreOptions) -> Result<PreparedShell, Error> {
        let shell = self.shell(options, &mut Recorder::new())?;
        Ok(PreparedShell { shell })
    }

    /// As [`restore_with`](Self::restore_with), in about a third of a millisecond, on a shell that
    /// was prepared for it; its seccomp and its KVM device are those that the shell was made with.
    ///
    /// # Errors
    ///
    /// As that one, and [`ErrorKind::Snapshot`](crate::ErrorKind::Snapshot) for a shell that was
    /// prepared for another kind of VM. The shell is gone then.
    pub fn restore_on(
        &self,
        shell: PreparedShell,
        options: &RestoreOptions,
    ) -> Result<MicroVm<Paused>, Error> {
        self.restored(Some(shell.shell), options, Recorder::new())
    }

    fn restored(
        &self,
        shell: Option<Shell>,
        options: &RestoreOptions,
        mut recorder: Recorder,
    ) -> Result<MicroVm<Paused>, Error> {
        let from = (shell, None);
        let stopped = Stopped::restored(self, options, Purpose::Clones, from, &mut recorder)?;
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

/// What a VM needs of the kernel, made ahead by [`Snapshot::prepare`] or
/// [`MicroVm::<Paused>::prepare`]: a VM of KVM with its vCPUs and their threads, without memory and
/// devices. It holds some descriptors and a thread for each vCPU until it is used or dropped, and
/// serves any VM with as much memory and the same CPUs.
#[derive(Debug)]
#[must_use = "dropping it throws away what it took to make"]
pub struct PreparedShell {
    pub(super) shell: Shell,
}

//! A suspended VM: waking it, making others of it, ending it.

use std::path::Path;

use super::asleep::Asleep;
use super::{MicroVm, Running, Suspended, Terminated, TransitionError};
use crate::config::RestoreOptions;
use crate::error::Error;
use crate::exit::ExitStatus;
use crate::phase::Phase;
use crate::snapshot::Snapshot;
use crate::timings::Recorder;

impl MicroVm<Suspended> {
    /// Finds a VM again that [`suspend`](MicroVm::<Running>::suspend) put to sleep in a directory, in this
    /// process or in one that is no more: not a clone, but the VM that it was, on its own disks and with its
    /// own names. [`resume`](Self::resume) wakes it. Its console begins anew. Takes some 100 µs, and holds nothing.
    ///
    /// It wakes with what its files name of this host: disks that the guest writes, taps, paths of
    /// sockets, services of its agent. So they are to be files that this program, or one that it trusts, wrote;
    /// [`open_with`](Self::open_with) takes nothing of the host unasked. They stay what they are while the VM is
    /// awake, see [`Snapshot`](crate::Snapshot).
    ///
    /// # Errors
    ///
    /// [`ErrorKind::Snapshot`](crate::ErrorKind::Snapshot) for files that are damaged, or a snapshot's and no
    /// suspended VM's; where the VM is awake already; and where it had a descriptor that no file keeps.
    /// [`ErrorKind::Disk`](crate::ErrorKind::Disk) where a disk of it has changed since.
    ///
    /// ```no_run
    /// use dormouse::{MicroVm, RestoreOptions, Running, Suspended};
    ///
    /// # fn example(vm: MicroVm<Running>) -> Result<(), dormouse::Error> {
    /// drop(vm.suspend("vm-7")?); // the process may end here
    ///
    /// let vm = MicroVm::<Suspended>::open("vm-7")?.resume()?;
    /// # drop(vm.suspend("vm-7")?);
    /// // The same, with a writer for its console:
    /// let options = RestoreOptions::new().console(std::io::stdout()).outside_paths(true);
    /// let vm = MicroVm::<Suspended>::open_with("vm-7", &options)?.resume()?;
    /// # Ok(())
    /// # }
    /// ```
    pub fn open(directory: impl AsRef<Path>) -> Result<Self, Error> {
        Self::open_with(directory, &RestoreOptions::new().outside_paths(true))
    }

    /// As [`open`](Self::open), with what the VM gets of this host: a writer for its console, networks
    /// that had a descriptor, disks that lie elsewhere now; and, without
    /// [`outside_paths`](RestoreOptions::outside_paths), nothing that is not given. Its hostname, its
    /// addresses and its deltas cannot be others.
    ///
    /// # Errors
    ///
    /// As `open`; [`ErrorKind::Snapshot`](crate::ErrorKind::Snapshot) for what the files name of the
    /// host without leave; [`ErrorKind::Config`](crate::ErrorKind::Config) for an option that does not fit.
    pub fn open_with(directory: impl AsRef<Path>, options: &RestoreOptions) -> Result<Self, Error> {
        let opened = Asleep::open(directory.as_ref(), options);
        let (asleep, console) = opened.map_err(|error| error.at(Phase::Restore))?;
        let state = Suspended { asleep: Box::new(asleep) };
        Ok(Self { state, console, recorder: Recorder::new() })
    }

    /// What the files are known by that it lies in.
    #[cfg(feature = "session")]
    pub(crate) fn snapshot_id(&self) -> Option<[u8; 16]> {
        self.state.asleep.snapshot_id()
    }

    /// Wakes the guest where it was suspended, in about a millisecond at any size of its memory,
    /// which is mapped and not read. Its clocks are as [`Clock`](crate::Clock) has them; its disks and its console
    /// are as before. What it needs of the host, a tap or a path, has to be free.
    ///
    /// The files stay, and are locked until the VM is over, or sleeps again: nobody else wakes it meanwhile,
    /// in this process or another. Afterwards they wake it as it was then, unless the guest has
    /// written to a disk that is not in them: then they are refused. So whoever does not want that removes them;
    /// the VM that woke does not need them.
    ///
    /// # Errors
    ///
    /// Those of [`Snapshot::restore_with`], and [`ErrorKind::Snapshot`](crate::ErrorKind::Snapshot)
    /// where it is awake, with the VM as it was.
    pub fn resume(self) -> Result<MicroVm<Running>, TransitionError<Suspended>> {
        let Self { mut state, console, mut recorder } = self;
        let woken = state.asleep.wake(&console, &mut recorder);
        match woken {
            Ok(stopped) => {
                for vcpu in &stopped.vcpus {
                    vcpu.forgive_pause();
                }
                match Running::of(stopped) {
                    Ok(state) => Ok(MicroVm { state, console, recorder }),
                    Err((mut stopped, error)) => {
                        state.asleep.take_back(&mut stopped);
                        drop(stopped);
                        let vm = MicroVm { state, console, recorder };
                        let error = vm.error(Phase::Resume, error);
                        Err(TransitionError { vm, error })
                    }
                }
            }
            Err(error) => {
                let vm = MicroVm { state, console, recorder };
                let error = vm.error(Phase::Restore, error);
                Err(TransitionError { vm, error })
            }
        }
    }

    /// The files, or the memory, as something that any number of VMs come from. The VM itself is
    /// one of them no more: its disks are never written again.
    ///
    /// # Errors
    ///
    /// [`ErrorKind::Snapshot`](crate::ErrorKind::Snapshot) where the files are gone or damaged, with
    /// the VM as it was.
    pub fn into_snapshot(self) -> Result<Snapshot, TransitionError<Suspended>> {
        self.state.asleep.snapshot().map_err(|error| {
            let error = self.error(Phase::Save, error);
            TransitionError { vm: self, error }
        })
    }

    /// Ends the guest, and removes the files of its sleep, but not those of a VM that another process has
    /// woken; its disks stay. Files that cannot be removed stay too, without a word.
    pub fn terminate(self) -> MicroVm<Terminated> {
        let Self { state, console, mut recorder } = self;
        recorder.timed(Phase::Terminate, || state.asleep.remove());
        let state = Terminated { status: ExitStatus::Terminated };
        MicroVm { state, console, recorder }
    }
}

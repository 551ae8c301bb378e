//! A suspended VM: waking it, making others of it, ending it.

use super::{MicroVm, Running, Suspended, Terminated, TransitionError};
use crate::exit::ExitStatus;
use crate::phase::Phase;
use crate::snapshot::Snapshot;

impl MicroVm<Suspended> {
    /// Wakes the guest where it was suspended, in about a millisecond at any size of its memory,
    /// which is mapped and not read. Its clocks have gone on meanwhile; its disks and its console
    /// are as before. What it needs of the host, a tap or a path, has to be free.
    ///
    /// The files stay, and are of use until the guest writes to a disk that is not in them.
    ///
    /// # Errors
    ///
    /// Those of [`Snapshot::restore_with`], with the VM as it was.
    pub fn resume(self) -> Result<MicroVm<Running>, TransitionError<Suspended>> {
        let Self { mut state, console, mut recorder } = self;
        let woken = state.asleep.wake(&console, &mut recorder);
        match woken {
            Ok(stopped) => {
                for vcpu in &stopped.vcpus {
                    vcpu.forgive_pause();
                }
                match stopped.run() {
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

    /// Ends the guest, and removes the files of its sleep; its disks stay.
    pub fn terminate(self) -> MicroVm<Terminated> {
        let Self { state, console, mut recorder } = self;
        recorder.timed(Phase::Terminate, || state.asleep.remove());
        let state = Terminated { status: ExitStatus::Terminated };
        MicroVm { state, console, recorder }
    }
}

//! A paused VM: letting it run on, ending it.

use std::time::Duration;

use super::stopped::OnEnd;
use super::{MicroVm, Paused, Running, Terminated, TransitionError};
use crate::exit::ExitStatus;
use crate::phase::Phase;

impl MicroVm<Paused> {
    /// Lets the guest run on, in some 10 µs. Its TSC and wall clock went on during the pause;
    /// its watchdogs are told about it (KVM_KVMCLOCK_CTRL).
    ///
    /// # Errors
    ///
    /// [`ErrorKind::Resources`](crate::ErrorKind::Resources) where a vCPU's thread is gone.
    pub fn resume(self) -> Result<MicroVm<Running>, TransitionError<Paused>> {
        let Self { state: Paused { stopped }, console, mut recorder } = self;
        let resumed = recorder.timed(Phase::Resume, || {
            for vcpu in &stopped.vcpus {
                vcpu.forgive_pause();
            }
            Running::of(stopped)
        });
        match resumed {
            Ok(state) => Ok(MicroVm { state, console, recorder }),
            Err((stopped, error)) => {
                let vm = MicroVm { state: Paused { stopped }, console, recorder };
                let error = vm.error(Phase::Resume, error);
                Err(TransitionError { vm, error })
            }
        }
    }

    /// Tells somebody of the VM's end.
    pub(crate) fn on_end(&mut self, on_end: OnEnd) {
        self.state.stopped.origin.on_end = Some(on_end);
    }

    /// As [`cpu_time`](MicroVm::<Running>::cpu_time) of a VM that runs.
    pub fn cpu_time(&self) -> Duration {
        self.state.stopped.cpu_time()
    }

    /// Ends the guest where it is.
    pub fn terminate(self) -> MicroVm<Terminated> {
        let Self { state, console, mut recorder } = self;
        recorder.timed(Phase::Terminate, || drop(state));
        let state = Terminated { status: ExitStatus::Terminated };
        MicroVm { state, console, recorder }
    }
}

//! A running VM: pausing it, waiting for its end, ending it, typing into its console.

use std::time::{Duration, Instant};

use super::stopped::Stopped;
use super::{LifecycleError, MicroVm, Paused, Running, Terminated, TransitionError};
use crate::error::Error;
use crate::exit::ExitStatus;
use crate::kvm::Vcpu;
use crate::machine::Machine;
use crate::phase::Phase;

impl MicroVm<Running> {
    /// Stops every vCPU between two instructions, in some 100 µs, or as long as a console writer
    /// blocks, or a request takes that a disk is at: for ever, where its file hangs.
    ///
    /// # Errors
    ///
    /// [`ErrorKind::GuestEnded`](crate::ErrorKind::GuestEnded), with the VM `Terminated`, where
    /// the guest has ended by itself.
    pub fn pause(self) -> Result<MicroVm<Paused>, TransitionError<Terminated>> {
        let Self { state: Running { run, machine, origin }, console, mut recorder } = self;
        let vcpus = recorder.timed(Phase::Pause, || machine.stop(run));
        match machine.exit_status() {
            None => {
                let stopped = Stopped::new(vcpus, machine, origin);
                stopped.note_written();
                Ok(MicroVm { state: Paused { stopped }, console, recorder })
            }
            Some(status) => {
                // Who waits for its end may want what it had.
                drop((vcpus, machine));
                let state = Terminated { status: status.clone() };
                let vm = MicroVm { state, console, recorder };
                let error =
                    vm.error(Phase::Pause, LifecycleError::Ended { attempt: "pause", status });
                Err(TransitionError { vm, error })
            }
        }
    }

    /// Waits until the guest ends by itself, for as long as that takes.
    pub fn wait(self) -> MicroVm<Terminated> {
        let Self { state: Running { run, machine, .. }, console, mut recorder } = self;
        let vcpus = recorder.timed(Phase::Wait, || machine.wait(run));
        MicroVm { state: terminated(vcpus, *machine), console, recorder }
    }

    /// Waits until the guest ends by itself, for at most `timeout`.
    ///
    /// # Errors
    ///
    /// [`ErrorKind::Timeout`](crate::ErrorKind::Timeout), with the VM, where it is still
    /// running. [`ErrorKind::GuestEnded`](crate::ErrorKind::GuestEnded), with the VM, where the
    /// guest has ended but a console writer still blocks a vCPU's thread.
    pub fn wait_timeout(
        self,
        timeout: Duration,
    ) -> Result<MicroVm<Terminated>, TransitionError<Running>> {
        let Self { state: Running { run, machine, origin }, console, mut recorder } = self;
        let start = Instant::now();
        match machine.wait_timeout(run, timeout) {
            Ok(vcpus) => {
                // A wait that ran out is no phase: a loop of them would fill the list.
                recorder.passed(Phase::Wait, start);
                Ok(MicroVm { state: terminated(vcpus, *machine), console, recorder })
            }
            Err((run, ended)) => {
                let why = match ended {
                    None => LifecycleError::Timeout { seconds: timeout.as_secs_f64() },
                    Some(status) => LifecycleError::NotBack { status },
                };
                let vm = MicroVm { state: Running { run, machine, origin }, console, recorder };
                let error = vm.error(Phase::Wait, why);
                Err(TransitionError { vm, error })
            }
        }
    }

    /// Ends the guest as if its power was cut, in some 100 µs, or as long as a console writer
    /// blocks. Requests of its disks that wait are given up; those that the host's kernel has begun are waited for,
    /// for five seconds at most: a file that hangs keeps its lock until they end. A guest that ended by itself
    /// before keeps its own exit status.
    pub fn terminate(self) -> MicroVm<Terminated> {
        let Self { state: Running { run, mut machine, .. }, console, mut recorder } = self;
        let vcpus = recorder.timed(Phase::Terminate, || {
            machine.end();
            machine.stop(run)
        });
        MicroVm { state: terminated(vcpus, *machine), console, recorder }
    }

    /// How the guest ended, where it has: [`wait`](Self::wait) would then return at once, or when
    /// a console writer that blocks lets it.
    pub fn exit_status(&self) -> Option<ExitStatus> {
        self.state.machine.exit_status()
    }

    /// A descriptor that is readable once the guest has ended: for whoever waits for many at once.
    #[cfg(feature = "session")]
    pub(crate) fn ended(&self) -> std::io::Result<std::os::fd::OwnedFd> {
        self.state.machine.ended()
    }

    /// How much processor time of the host the guest has used since the VM was made: that of its vCPUs'
    /// threads, with what the host's kernel and the devices do on them. A guest that waits uses next to
    /// none; one that computes, a second each second on every vCPU. What the device thread does, which all
    /// VMs share, is not in it. It never falls: over a pause, and over a sleep that this process wakes it
    /// from, it stays as it is. A clone begins anew, and so does a VM that [`open`](MicroVm::<super::Suspended>::open) found.
    ///
    /// Costs a system call for each vCPU, less than a microsecond.
    pub fn cpu_time(&self) -> Duration {
        self.state.origin.cpu_time + self.state.machine.cpu_time()
    }

    /// Types `bytes` into the guest's serial port. They wait in a queue of 64 KiB until the
    /// guest reads them; this call never waits.
    ///
    /// # Errors
    ///
    /// [`ErrorKind::ConsoleFull`](crate::ErrorKind::ConsoleFull) where they do not all fit (none
    /// of them is queued), [`ErrorKind::GuestEnded`](crate::ErrorKind::GuestEnded) where the
    /// guest has ended.
    pub fn console_input(&self, bytes: impl AsRef<[u8]>) -> Result<(), Error> {
        let bytes = bytes.as_ref();
        if let Some(status) = self.exit_status() {
            let error = LifecycleError::Ended { attempt: "feed the console", status };
            return Err(self.error(Phase::Console, error));
        }
        if self.state.machine.serial_input().feed(bytes) {
            return Ok(());
        }
        Err(self.error(Phase::Console, LifecycleError::ConsoleFull { bytes: bytes.len() }))
    }
}

/// The end of a machine: its vCPUs go, then its devices, and its threads end by themselves.
fn terminated(vcpus: Vec<Vcpu>, machine: Machine) -> Terminated {
    drop(vcpus);
    // Threads only give all vCPUs back unasked when the guest has ended.
    let status = machine.exit_status().unwrap_or(ExitStatus::Terminated);
    Terminated { status }
}

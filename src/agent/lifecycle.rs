//! What the agent does when its VM is suspended, and when it ends.

use std::future::pending;
use std::panic::resume_unwind;
use std::time::Duration;

use tokio::runtime::Handle;
use tokio::task::JoinError;

use super::Agent;
use super::link::check_runtime;
use super::patience::within;
use crate::config::HookName;
use crate::error::{Error, ErrorKind};
use crate::exit::ExecFailure;
use crate::microvm::{MicroVm, Running, Terminated};
use crate::protocol::Call;

/// What unmounting and switching off may take beyond the grace of the processes.
const SWITCH_OFF: Duration = Duration::from_secs(30);

impl Agent {
    /// Makes the guest ready to be saved: runs the hook `suspend`, writes file systems to their disks, and stops
    /// all processes in the cgroup of the agent's programs, `/sys/fs/cgroup/guest`, and below it; what the guest's root
    /// takes out of that, as a container engine does, goes on. To be followed by
    /// [`MicroVm::suspend`](MicroVm::<Running>::suspend), a snapshot or clones: each VM that comes of it gets its own clock,
    /// entropy, machine-id, hostname and addresses before its processes go on, which they do when [`MicroVm::agent`] has
    /// found it.
    /// A VM that goes on as it is needs [`thaw`](Self::thaw). Until then no program is started
    /// ([`ExecFailure::Frozen`](crate::ExecFailure::Frozen)); files can be read and written.
    ///
    /// # Errors
    ///
    /// [`ErrorKind::Hook`](crate::ErrorKind::Hook) where the hook failed, and
    /// [`ErrorKind::ExecFailed`](crate::ErrorKind::ExecFailed) where its program could not be run, as in a guest that is
    /// frozen already; the guest stays as it was. Else as [every call](crate::Agent#errors-of-every-call).
    pub async fn freeze(&self) -> Result<(), Error> {
        self.run_hook(HookName::Suspend, "").await?;
        self.stop_processes().await
    }

    /// As [`freeze`](Self::freeze), without the hook.
    pub(crate) async fn stop_processes(&self) -> Result<(), Error> {
        // Connections that wait for calls are not for the VMs that come of this one.
        let calls = self.link.calls();
        calls.forget();
        let mut connection = calls.call(&Call::Freeze).await?;
        Self::check_done(connection.reply(calls.vsock()).await?)
    }

    /// Lets the processes go on, after a [`freeze`](Self::freeze) of which nothing came, or in the
    /// VM that the clones came from.
    ///
    /// # Errors
    ///
    /// As [every call](crate::Agent#errors-of-every-call).
    pub async fn thaw(&self) -> Result<(), Error> {
        self.uncounted().done(&Call::Thaw).await
    }

    /// Asks the guest to end, and waits until it has.
    async fn shut_down(&self, grace: Duration) -> Result<(), Error> {
        let grace_ms = u32::try_from(grace.as_millis()).unwrap_or(u32::MAX);
        let calls = self.link.calls();
        let mut asked = calls.call(&Call::Shutdown(grace_ms)).await?;
        tokio::select! {
            // Held until the end: only a guest that does not end answers.
            Ok(refused) = asked.reply(calls.vsock()) => Self::check_done(refused),
            () = self.link.over() => Ok(()),
        }
    }
}

impl MicroVm<Running> {
    /// Ends the guest as `poweroff` would: runs the hook `terminate`, for as long as its own deadline says, then
    /// SIGTERM to all its processes, or to the entrypoint its own [signal](crate::Entrypoint::stop_signal), SIGKILL to
    /// those that are left after `grace`, file systems unmounted, power off. A guest whose agent is not ready within
    /// `grace` and 30 s, or that is not off 30 s after the grace of its processes, is
    /// [terminated](MicroVm::<Running>::terminate); the exit status tells which it was. One that slept and was not asked
    /// for its agent since runs the hook `resume` before all that; where that fails, it ends all the same. No thread of the
    /// runtime waits for the end, but one of those for work that blocks.
    pub async fn shutdown(self, grace: Duration) -> MicroVm<Terminated> {
        // A timer needs a runtime. Without one nobody talks to the agent.
        let ready = match check_runtime() {
            Ok(()) => within(grace.saturating_add(SWITCH_OFF), self.ready_agent()).await,
            Err(_) => None,
        };
        if let Some(Ok(agent)) = ready {
            // One that woke to end: what its hook `resume` says does not matter any more.
            let _ = agent.has_woken().await;
            // A hook that fails does not save its VM; one that takes long takes nothing of the others' time.
            let hook = agent.run_hook(HookName::Terminate, "").await;
            let frozen = ErrorKind::ExecFailed(ExecFailure::Frozen);
            if hook.is_err_and(|error| error.kind() == &frozen) && agent.thaw().await.is_ok() {
                let _ = agent.run_hook(HookName::Terminate, "").await;
            }
            let off = grace.saturating_add(SWITCH_OFF);
            let _ = within(off, agent.shut_down(grace)).await;
        }
        end(self).await
    }
}

/// Ends a VM, or takes the end that it has come to. Both wait for its threads and give its memory back, which
/// would hold up a thread of the runtime.
async fn end(vm: MicroVm<Running>) -> MicroVm<Terminated> {
    let end = || match vm.exit_status() {
        Some(_) => vm.wait(),
        None => vm.terminate(),
    };
    let Ok(runtime) = Handle::try_current() else { return end() };
    let ended = runtime.spawn_blocking(end);
    match ended.await.map_err(JoinError::try_into_panic) {
        Ok(vm) => vm,
        Err(Ok(panic)) => resume_unwind(panic),
        // The runtime ends, and this with it: the VM is over by being dropped.
        Err(Err(_)) => pending().await,
    }
}

#[cfg(test)]
mod tests {
    use std::io::{self, Write};
    use std::sync::Arc;

    use tokio::sync::watch;

    use super::*;
    use crate::agent::link::{Knowledge, Link};
    use crate::agent::tests::{calls, heard, pair};
    use crate::config::AgentConfig;
    use crate::protocol::{Channel, Failure, FailureKind, Frame, Reply, Wire};

    #[tokio::test(flavor = "multi_thread")]
    async fn a_guest_that_refuses_to_end_is_not_waited_for() {
        let calls = calls();
        let (connection, mut guest) = pair();
        calls.keep(connection);
        // Who knows of the agent is there to the end: the VM goes on.
        let (_report, knowledge) = watch::channel(Knowledge::Ready);
        let link = Link::of_calls(calls, AgentConfig::new(), knowledge);
        let agent = Agent::new(Arc::new(link));
        let refusing = std::thread::spawn(move || {
            let asked = (Channel::Call as u8, Call::Shutdown(1500).to_bytes());
            assert_eq!(heard(&mut guest), asked);
            let what = "end the guest".to_owned();
            let refusal = Failure { kind: FailureKind::NotAllowed, errno: 0, what };
            guest.write_all(&Frame::message(&Reply::Failed(refusal))).unwrap();
            guest
        });
        let error = agent.shut_down(Duration::from_millis(1500)).await.unwrap_err();
        assert_eq!(error.kind(), &ErrorKind::File(io::ErrorKind::PermissionDenied));
        assert_eq!(error.to_string(), "end the guest");
        drop(refusing.join().unwrap());
    }
}

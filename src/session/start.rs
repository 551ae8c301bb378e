//! How a VM becomes a session: it runs, its agent is ready, its hook `run` is done.

use std::sync::Arc;
use std::time::{Duration, Instant};

use tokio::sync::oneshot;

use super::error::SessionError;
use super::keeper::{Keeper, blocking};
use super::metering::Counts;
use super::shared::Shared;
use super::state::{SessionReason, SessionState};
use crate::agent::Agent;
use crate::config::HookName;
use crate::error::Error;
use crate::microvm::{AnyMicroVm, MicroVm, Running};

/// A session that is to be.
pub(super) struct Start {
    pub(super) vm: AnyMicroVm,
    /// What the hook `run` is given, as JSON.
    pub(super) payload: String,
    pub(super) within: Option<Duration>,
    pub(super) started: oneshot::Sender<Result<(), Error>>,
}

/// What is to be done with a guest until it is reached.
struct Guest {
    /// It has just been started, so its application may not be up.
    boots: bool,
    payload: String,
    within: Option<Duration>,
}

impl Keeper {
    /// Keeps a session that is new.
    pub(super) async fn start(mut self, start: Start) {
        Box::pin(self.begin(start)).await;
        self.keep().await;
    }

    /// Makes the VM a session that runs, or ends it.
    async fn begin(&mut self, start: Start) {
        let Start { vm, payload, within, started } = start;
        let begin = Instant::now();
        let shared = Arc::clone(&self.shared);
        let done = match blocking(move || run(vm, &shared)).await {
            Ok((vm, boots)) => {
                let guest = Guest { boots, payload, within };
                self.begin_with(vm, guest).await
            }
            Err(error) => Err(error),
        };
        let done = match done {
            Ok(()) => {
                let shared = Arc::clone(&self.shared);
                let written = blocking(move || shared.write(SessionState::Running)).await;
                written.map_err(Error::from)
            }
            Err(error) => Err(error),
        };
        match &done {
            Ok(()) => {
                let took = Some(begin.elapsed());
                self.not_idle();
                self.publish(SessionState::Running, SessionReason::Started, None, took);
            }
            Err(error) => {
                let message = Some(error.to_string());
                self.terminate(SessionReason::StartFailed, message).await;
            }
        }
        let _ = started.send(done);
    }

    async fn begin_with(&mut self, vm: MicroVm<Running>, guest: Guest) -> Result<(), Error> {
        self.shared.meter().begin(Counts::Running, vm.cpu_time());
        let id = self.shared.id.clone();
        let agent = tokio::select! {
            agent = ready(&vm, guest) => agent,
            () = self.calls.until_terminate() => Err(SessionError::Interrupted { id }.into()),
        };
        let (agent, failed) = match agent {
            Ok(agent) => (agent, None),
            Err(error) => (None, Some(error)),
        };
        // Also of one that failed: it is ended as every other.
        if let Err((vm, error)) = self.has_woken(vm, agent) {
            blocking(move || drop(vm.terminate())).await;
            return Err(failed.unwrap_or(error.into()));
        }
        failed.map_or(Ok(()), Err)
    }
}

/// Waits until the guest is ready, and does its hook `run`.
async fn ready(vm: &MicroVm<Running>, guest: Guest) -> Result<Option<Agent>, Error> {
    if vm.agent_config().is_none() {
        return Ok(None);
    }
    let agent = match guest.within {
        Some(within) => vm.agent_timeout(within).await?,
        None => vm.agent().await?,
    };
    // What comes from a template, or ran before, has been asked.
    if guest.boots {
        agent.run_hook(HookName::Ready, "").await?;
    }
    agent.run_hook(HookName::Run, &guest.payload).await?;
    Ok(Some(agent))
}

/// Has the VM run, in whatever state it is, and says whether it boots.
fn run(vm: AnyMicroVm, shared: &Shared) -> Result<(MicroVm<Running>, bool), Error> {
    let boots = matches!(vm, AnyMicroVm::Created(_));
    let vm = match vm {
        AnyMicroVm::Created(vm) => vm.start()?,
        AnyMicroVm::Running(vm) => vm,
        AnyMicroVm::Paused(vm) => vm.resume()?,
        AnyMicroVm::Suspended(vm) => vm.resume()?,
        AnyMicroVm::Terminated(_) => return Err(SessionError::VmOver.into()),
    };
    let hooks = vm.agent_config().map(|agent| &agent.hooks);
    let has_terminate_hook = hooks.is_some_and(|hooks| hooks.contains_key(&HookName::Terminate));
    shared.lasting().has_terminate_hook = has_terminate_hook;
    Ok((vm, boots))
}

//! How a session ends.

use std::fs;
use std::sync::Arc;
use std::time::{Duration, Instant};

use super::keeper::{Body, Keeper, blocking};
use super::metering::Counts;
use super::shared::Shared;
use super::sleep::wake;
use super::state::{SessionReason, SessionState};
use crate::microvm::{MicroVm, Running};

impl Keeper {
    /// Ends the session: hook `terminate`, the guest's processes, its files. One that sleeps is woken where it has
    /// that hook.
    pub(super) async fn terminate(&mut self, reason: SessionReason, message: Option<String>) {
        let begin = Instant::now();
        self.publish(SessionState::Terminating, reason, message.clone(), None);
        if self.shared.lasting().has_terminate_hook {
            // One that cannot be woken is removed all the same.
            self.wake_to_end().await;
        }
        if matches!(std::mem::replace(&mut self.body, Body::Over), Body::Awake { .. }) {
            self.shared.settle();
            let vm = self.shared.vm().take();
            let grace = self.shared.lasting().grace;
            if let Some(vm) = vm {
                end(vm, grace).await;
            }
        }
        self.over(reason, message, Some(begin.elapsed())).await;
    }

    /// The guest has ended by itself.
    pub(super) async fn guest_ended(&mut self) {
        self.body = Body::Over;
        self.shared.settle();
        let vm = self.shared.vm().take();
        let ended = match vm {
            Some(vm) => Some(blocking(move || vm.wait().exit_status().to_string()).await),
            None => None,
        };
        self.over(SessionReason::GuestEnded, ended, None).await;
    }

    pub(super) async fn over(
        &mut self,
        reason: SessionReason,
        message: Option<String>,
        took: Option<Duration>,
    ) {
        self.shared.meter().begin(Counts::Nothing, Duration::ZERO);
        self.body = Body::Over;
        let event = self.shared.event(SessionState::Terminated, reason, message, took);
        let shared = Arc::clone(&self.shared);
        blocking(move || {
            if let Err(error) = shared.write_over(&event, || remove_files(&shared)) {
                tracing::warn!(session = %shared.id, %error, "cannot write down the session");
            }
            shared.publish(event, None);
        })
        .await;
    }

    /// Wakes it for its hook `terminate`. What its hook `resume` says does not matter any more.
    async fn wake_to_end(&mut self) {
        let asleep = match &mut self.body {
            Body::Asleep(asleep) => asleep.take(),
            Body::Awake { .. } | Body::Over => return,
        };
        let shared = Arc::clone(&self.shared);
        let woken = blocking(move || wake(&shared, asleep)).await;
        if let Ok(vm) = woken
            && let Err((vm, _)) = self.has_woken(vm, None)
        {
            blocking(move || drop(vm.terminate())).await;
        }
    }
}

/// Ends a guest that runs.
async fn end(vm: MicroVm<Running>, grace: Duration) {
    if vm.agent_config().is_some() {
        drop(vm.shutdown(grace).await);
    } else {
        blocking(move || drop(vm.terminate())).await;
    }
}

/// Removes the files that it slept in: nothing comes of them any more.
fn remove_files(shared: &Shared) {
    let _ = fs::remove_dir_all(shared.asleep());
}

//! The keeper of a session: the one task that has its VM, and does with it what is asked and what is due.
//!
//! Everything is done one after the other, so a state is never changed by two. What is asked meanwhile waits: a
//! hundred calls to wake a session are answered by one resume. A session that sleeps is a task that waits for a call
//! or a timer, and holds neither a thread nor a descriptor.

use std::collections::VecDeque;
use std::future::pending;
use std::os::fd::{AsRawFd, OwnedFd, RawFd};
use std::panic::resume_unwind;
use std::sync::Arc;
use std::time::{Duration, Instant};

use tokio::io::unix::AsyncFd;
use tokio::sync::{mpsc, oneshot};
use tokio::task::JoinError;

use super::error::SessionError;
use super::idle::{Idle, Seen, Verdict};
use super::policy::after;
use super::shared::Shared;
use super::state::{SessionReason, SessionState};
use crate::agent::{Activity, Agent};
use crate::error::{Error, ErrorKind};
use crate::microvm::{MicroVm, Running, Suspended};

/// A file of the guest that keeps it awake while it is there.
const LEASE: &str = "/run/dormouse/keep-awake";
/// How long the guest's agent may take to look for it; a guest that is as busy as that is not idle.
const LEASE_PATIENCE: Duration = Duration::from_secs(5);

/// What is asked of a session.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Wish {
    Suspend,
    /// Asked by name, or since somebody wants something of it.
    Resume,
    Wake,
    Terminate,
    /// It has another policy: what was due may not be any more.
    Look,
}

impl Wish {
    /// Whether one answer serves both.
    fn is_like(self, other: Self) -> bool {
        let wakes = |wish| matches!(wish, Self::Resume | Self::Wake);
        self == other || wakes(self) && wakes(other)
    }
}

/// A call, and who waits for the answer.
#[derive(Debug)]
pub(super) struct Call {
    pub(super) wish: Wish,
    pub(super) answer: oneshot::Sender<Result<(), Error>>,
}

/// The keeper of a session.
pub(super) struct Keeper {
    pub(super) shared: Arc<Shared>,
    pub(super) calls: Calls,
    pub(super) body: Body,
    idle: Idle,
    /// A handle of its own, to wait by.
    activity: Activity,
}

/// What is asked, in order.
pub(super) struct Calls {
    calls: mpsc::UnboundedReceiver<Call>,
    /// Taken, and not looked at.
    waiting: VecDeque<Call>,
}

/// Where the VM is.
pub(super) enum Body {
    /// It is in `shared`.
    Awake {
        ended: AsyncFd<Ended>,
        agent: Option<Agent>,
    },
    /// It is in its files: with what this process knows of it beyond them, if it put it there.
    Asleep(Option<Box<MicroVm<Suspended>>>),
    Over,
}

/// A descriptor that is readable when a guest has ended.
pub(super) struct Ended(pub(super) OwnedFd);

impl AsRawFd for Ended {
    fn as_raw_fd(&self) -> RawFd {
        self.0.as_raw_fd()
    }
}

/// What a keeper does next.
enum Next {
    Call(Call),
    Ended,
    /// Something that was open has ended.
    Quiet,
    Idle,
    End(SessionReason),
}

impl Keeper {
    pub(super) fn new(
        shared: Arc<Shared>,
        calls: mpsc::UnboundedReceiver<Call>,
        body: Body,
    ) -> Self {
        let activity = shared.activity.clone();
        let calls = Calls { calls, waiting: VecDeque::new() };
        let idle = Idle::new(Instant::now(), Duration::ZERO);
        Self { shared, calls, body, idle, activity }
    }

    /// Keeps the session until it is over, or nobody has a handle of it.
    pub(super) async fn keep(mut self) {
        while !matches!(self.body, Body::Over) {
            // What is done in a state is large, and waiting, which most sessions do, is to be small.
            match self.next().await {
                None => return,
                Some(Next::Call(call)) => Box::pin(self.answer(call)).await,
                Some(Next::Ended) => Box::pin(self.guest_ended()).await,
                Some(Next::Quiet) => drop(self.look()),
                Some(Next::Idle) => Box::pin(self.idle()).await,
                Some(Next::End(reason)) => Box::pin(self.terminate(reason, None)).await,
            }
        }
        self.calls.calls.close();
        while let Some(call) = self.calls.take() {
            let over = match call.wish {
                Wish::Terminate => Ok(()),
                _ => Err(self.shared.ended()),
            };
            let _ = call.answer.send(over);
        }
    }

    async fn next(&mut self) -> Option<Next> {
        if let Some(call) = self.calls.waiting.pop_front() {
            return Some(Next::Call(call));
        }
        let due = self.due();
        let is_held = matches!(self.body, Body::Awake { .. }) && self.idle.is_held();
        let Self { calls, body, activity, .. } = self;
        tokio::select! {
            biased;
            () = has_ended(body) => Some(Next::Ended),
            call = calls.calls.recv() => call.map(Next::Call),
            () = activity.changed(), if is_held => Some(Next::Quiet),
            next = until(due) => Some(next),
        }
    }

    /// What is due first, and when.
    fn due(&self) -> Option<(Instant, Next)> {
        let policy = self.shared.policy();
        let now = Instant::now();
        let meter = self.shared.meter();
        let left =
            |limit: Option<Duration>, passed| limit.map(|limit| limit.saturating_sub(passed));
        let lifetime = after(now, left(policy.lifetime, meter.age()));
        let lifetime = lifetime.map(|due| (due, Next::End(SessionReason::Lifetime)));
        let other = match &self.body {
            Body::Awake { .. } => self.idle.due(&policy).map(|due| (due, Next::Idle)),
            Body::Asleep(_) => after(now, left(policy.suspended_at_most, meter.for_how_long()))
                .map(|due| (due, Next::End(SessionReason::SuspendedAtMost))),
            Body::Over => None,
        };
        [lifetime, other].into_iter().flatten().min_by_key(|(due, _)| *due)
    }

    /// Does what is asked.
    async fn answer(&mut self, call: Call) {
        let done = match (call.wish, &self.body) {
            (Wish::Look, _) => {
                self.idle.try_again();
                Ok(())
            }
            // Whoever wanted something has gone away.
            (Wish::Wake, _) if call.answer.is_closed() => return,
            (Wish::Suspend, Body::Awake { .. }) => {
                self.suspend(SessionReason::Requested, None).await
            }
            (Wish::Wake, Body::Asleep(_)) => self.resume(SessionReason::Traffic).await,
            (Wish::Resume, Body::Asleep(_)) => self.resume(SessionReason::Requested).await,
            (Wish::Terminate, _) => {
                self.terminate(SessionReason::Requested, None).await;
                Ok(())
            }
            (_, Body::Over) => Err(self.shared.ended()),
            (Wish::Suspend, Body::Asleep(_)) | (Wish::Resume | Wish::Wake, Body::Awake { .. }) => {
                Ok(())
            }
        };
        if let Err(error) = &done {
            self.calls.answer_alike(call.wish, error);
        }
        let _ = call.answer.send(done);
    }

    /// Looks whether it is idle.
    fn look(&mut self) -> Verdict {
        let cpu = self.shared.cpu_time().unwrap_or_default();
        let (open, last) = (self.activity.open(), self.activity.last());
        let policy = self.shared.policy();
        self.idle.look(&policy, Instant::now(), Seen { open, last, cpu })
    }

    /// Suspends it if it is idle.
    async fn idle(&mut self) {
        let Verdict::Idle(since) = self.look() else { return };
        if self.guest_keeps_awake().await {
            return self.not_idle();
        }
        if self.suspend(SessionReason::Idle, Some(since)).await.is_err() {
            let policy = self.shared.policy();
            self.idle.failed(&policy, Instant::now());
        }
    }

    /// It is awake from now on, or shown to be busy.
    pub(super) fn not_idle(&mut self) {
        let cpu = self.shared.cpu_time().unwrap_or_default();
        self.idle.restart(Instant::now(), cpu);
    }

    /// Whether something in the guest holds the lease.
    async fn guest_keeps_awake(&self) -> bool {
        let Body::Awake { agent: Some(agent), .. } = &self.body else { return false };
        match tokio::time::timeout(LEASE_PATIENCE, agent.metadata(LEASE)).await {
            Ok(Ok(_)) => true,
            Ok(Err(error)) => !matches!(error.kind(), ErrorKind::File(_)),
            Err(_) => true,
        }
    }

    /// Has the VM run in this session from now on.
    pub(super) fn has_woken(
        &mut self,
        vm: MicroVm<Running>,
        agent: Option<Agent>,
    ) -> Result<(), (Box<MicroVm<Running>>, SessionError)> {
        #[expect(
            deprecated,
            reason = "what replaces it is unsafe; this descriptor is owned, and stays the same"
        )]
        let ended = vm.ended().map(Ended).and_then(AsyncFd::new);
        let ended = match ended {
            Ok(ended) => ended,
            Err(error) => return Err((Box::new(vm), SessionError::Watch(error))),
        };
        *self.shared.console() = Some(vm.console().clone());
        *self.shared.vm() = Some(vm);
        self.body = Body::Awake { ended, agent };
        self.idle.try_again();
        self.not_idle();
        Ok(())
    }

    /// Tells everybody, and has it written down. What must not be lost was written before.
    pub(super) fn publish(
        &self,
        state: SessionState,
        reason: SessionReason,
        message: Option<String>,
        took: Option<Duration>,
    ) {
        let agent = match (&self.body, state) {
            (Body::Awake { agent, .. }, SessionState::Running) => agent.clone(),
            _ => None,
        };
        self.shared.publish(self.shared.event(state, reason, message, took), agent);
        let shared = Arc::clone(&self.shared);
        // Nobody waits for it: who comes later writes what is so by then.
        drop(tokio::task::spawn_blocking(move || shared.note()));
    }
}

impl Calls {
    fn take(&mut self) -> Option<Call> {
        self.waiting.pop_front().or_else(|| self.calls.try_recv().ok())
    }

    /// Waits until somebody wants the session to end, or nobody has it any more.
    pub(super) async fn until_terminate(&mut self) {
        if self.waiting.iter().any(|call| call.wish == Wish::Terminate) {
            return;
        }
        while let Some(call) = self.calls.recv().await {
            let ends = call.wish == Wish::Terminate;
            self.waiting.push_back(call);
            if ends {
                return;
            }
        }
    }

    /// What failed for one has failed for all who asked for it meanwhile: nobody tries it once for each.
    fn answer_alike(&mut self, wish: Wish, error: &Error) {
        while let Ok(call) = self.calls.try_recv() {
            self.waiting.push_back(call);
        }
        let waiting = std::mem::take(&mut self.waiting);
        for call in waiting {
            if call.wish.is_like(wish) {
                let _ = call.answer.send(Err(error.again()));
            } else {
                self.waiting.push_back(call);
            }
        }
    }
}

/// Waits until the guest has ended, where there is one that runs.
async fn has_ended(body: &Body) {
    match body {
        // Where it cannot be watched any more the runtime ends, and this with it.
        Body::Awake { ended, .. } => match ended.readable().await {
            Ok(_) => {}
            Err(_) => pending().await,
        },
        Body::Asleep(_) | Body::Over => pending().await,
    }
}

async fn until(due: Option<(Instant, Next)>) -> Next {
    match due {
        Some((due, next)) => {
            tokio::time::sleep_until(due.into()).await;
            next
        }
        None => pending().await,
    }
}

/// Does what goes on to its end although nobody waits for it any more.
pub(super) async fn detached<T: Send + 'static>(
    work: impl Future<Output = T> + Send + 'static,
) -> T {
    outcome(tokio::spawn(work).await).await
}

/// Does what blocks, on a thread for that.
pub(super) async fn blocking<T: Send + 'static>(work: impl FnOnce() -> T + Send + 'static) -> T {
    outcome(tokio::task::spawn_blocking(work).await).await
}

async fn outcome<T>(done: Result<T, JoinError>) -> T {
    match done.map_err(JoinError::try_into_panic) {
        Ok(done) => done,
        Err(Ok(panic)) => resume_unwind(panic),
        // The runtime ends, and this with it.
        Err(Err(_)) => pending().await,
    }
}

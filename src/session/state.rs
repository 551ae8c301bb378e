//! The states of a session at run time, the reasons of their changes, and who is told of them.
//!
//! The six names and the transitions between them are those of AWS Lambda's MicroVMs (2026).

use std::fmt;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, SystemTime};

use serde::{Deserialize, Serialize};
use tokio::sync::{mpsc, watch};

use crate::agent::Agent;

/// Events that wait for somebody who does not read them; later ones are lost to it.
const BACKLOG: usize = 256;

/// In which state a session is. Source: the states of AWS Lambda's MicroVMs (2026).
///
/// ```text
/// Pending ──▶ Running ──▶ Suspending ──▶ Suspended ──▶ Running …
///    │           │ ▲──────────┘              │
///    ▼           ▼                           ▼
///    └──────▶ Terminating ◀──────────────────┘
///                 ▼
///             Terminated
/// ```
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum SessionState {
    /// Its guest boots, or its hook `run` is under way: nobody reaches it.
    Pending,
    /// It serves. Behind [`Suspended`](Self::Suspended) it has woken: by [`Traffic`](SessionReason::Traffic), or because
    /// the host [asked for it](SessionReason::Requested).
    Running,
    /// Its hook `suspend` is under way, or it is written to files.
    Suspending,
    /// It is files. It stays so while it wakes, until its hook `resume` is done.
    Suspended,
    /// Its hook `terminate` is under way.
    Terminating,
    /// It is over, and stays so.
    Terminated,
}

impl SessionState {
    /// The name, in lower case.
    pub fn as_str(self) -> &'static str {
        match self {
            Self::Pending => "pending",
            Self::Running => "running",
            Self::Suspending => "suspending",
            Self::Suspended => "suspended",
            Self::Terminating => "terminating",
            Self::Terminated => "terminated",
        }
    }
}

impl fmt::Display for SessionState {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.pad(self.as_str())
    }
}

/// Why a session came to its state.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
#[non_exhaustive]
pub enum SessionReason {
    /// It was made, or its guest is ready and the hook `run` done.
    Started,
    /// The host asked for it.
    Requested,
    /// Nothing went on in it for as long as its policy says.
    Idle,
    /// Somebody wants something of it: a request, a command.
    Traffic,
    /// It has lived for as long as its policy allows.
    Lifetime,
    /// It was suspended for as long as its policy allows.
    SuspendedAtMost,
    /// Its guest did not come up, or its hook `run` failed.
    StartFailed,
    /// It could not be suspended, and runs on: its hook `suspend` failed, the disk is full.
    SuspendFailed,
    /// It could not be woken, and is suspended as before: its hook `resume` failed, its files are damaged. It is over where
    /// its guest had written to its disks by then, and could not be saved again.
    ResumeFailed,
    /// Its guest ended by itself.
    GuestEnded,
    /// The process that it ran in ended before it did.
    Lost,
    /// The process that it ran in ended, and it is again what it was when it was suspended the last time.
    Restored,
    /// What is written down of it cannot be read.
    Damaged,
}

impl SessionReason {
    /// The name in words, in lower case: `start failed`, where serde writes `start_failed`.
    pub fn as_str(self) -> &'static str {
        match self {
            Self::Started => "started",
            Self::Requested => "requested",
            Self::Idle => "idle",
            Self::Traffic => "traffic",
            Self::Lifetime => "lifetime",
            Self::SuspendedAtMost => "suspended at most",
            Self::StartFailed => "start failed",
            Self::SuspendFailed => "suspend failed",
            Self::ResumeFailed => "resume failed",
            Self::GuestEnded => "guest ended",
            Self::Lost => "lost",
            Self::Restored => "restored",
            Self::Damaged => "damaged",
        }
    }
}

impl fmt::Display for SessionReason {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.pad(self.as_str())
    }
}

/// A change of a session's state, or an attempt at one that failed.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[non_exhaustive]
pub struct SessionEvent {
    /// The session's name.
    pub session: String,
    /// Counts the session's events, from 1, also over a restart of the process: where one is missing, it was lost to
    /// whoever was slow to read.
    pub number: u64,
    /// The state that the session is in now.
    pub state: SessionState,
    /// Why.
    pub reason: SessionReason,
    /// What is to be said of it beyond that: an error, how the guest ended. Parts of it are the guest's own words.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub message: Option<String>,
    /// When, by the host's wall clock.
    pub at: SystemTime,
    /// How long the work took that is over with this event, hooks and all.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub took: Option<Duration>,
}

impl fmt::Display for SessionEvent {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}: {} ({}", self.session, self.state, self.reason)?;
        if let Some(message) = &self.message {
            write!(f, ": {}", crate::error::printable(message))?;
        }
        match self.took {
            Some(took) => write!(f, ") after {:.1} ms", took.as_secs_f64() * 1e3),
            None => f.write_str(")"),
        }
    }
}

/// What is known of a session now.
#[derive(Clone, Debug)]
pub(super) struct Status {
    pub(super) event: SessionEvent,
    /// The guest's agent, while the session runs and has one. Nobody counts its calls.
    pub(super) agent: Option<Agent>,
}

/// Sees in which state a session is, and waits for changes: see [`Session::watch`](super::Session::watch).
/// Changes that follow one another at once are seen as one; [`SessionEvents`] has each of them.
#[derive(Clone, Debug)]
pub struct SessionWatch(pub(super) watch::Receiver<Status>);

impl SessionWatch {
    /// The state now.
    pub fn state(&self) -> SessionState {
        self.0.borrow().event.state
    }

    /// The event that led to it.
    pub fn event(&self) -> SessionEvent {
        self.0.borrow().event.clone()
    }

    /// Waits for an event since the last that this call gave, or since the watch was made. None when the session
    /// is over, or nobody has it any more.
    pub async fn changed(&mut self) -> Option<SessionEvent> {
        if self.state() == SessionState::Terminated
            && !self.0.has_changed().is_ok_and(|is_new| is_new)
        {
            return None;
        }
        self.0.changed().await.ok()?;
        Some(self.0.borrow_and_update().event.clone())
    }

    /// Waits until the session is in this state, and gives the event that led to it. None where it never will be:
    /// the session is over, or nobody has it any more.
    pub async fn wait_for(&mut self, state: SessionState) -> Option<SessionEvent> {
        let there = self.0.wait_for(|status| {
            status.event.state == state || status.event.state == SessionState::Terminated
        });
        let event = there.await.ok()?.event.clone();
        (event.state == state).then_some(event)
    }
}

/// Events as they come: see [`Session::events`](super::Session::events) and
/// [`Sessions::events`](super::Sessions::events). Who does not read loses events beyond 256, which shows in their
/// numbers.
#[derive(Debug)]
pub struct SessionEvents(mpsc::Receiver<SessionEvent>);

impl SessionEvents {
    /// The next event. None when there will be no other, and all were read: the session is over; or, of all sessions,
    /// nobody has them open any more. Dropping the future loses no event, so it may stand in a `select!`.
    pub async fn next(&mut self) -> Option<SessionEvent> {
        self.0.recv().await
    }

    /// The next event, if there is one by now.
    pub fn try_next(&mut self) -> Option<SessionEvent> {
        self.0.try_recv().ok()
    }
}

/// Who is told of events. It costs nothing while that is nobody.
#[derive(Debug, Default)]
pub(super) struct Listeners(Mutex<Told>);

#[derive(Debug, Default)]
struct Told {
    listeners: Vec<mpsc::Sender<SessionEvent>>,
    /// There are no more events.
    is_over: bool,
}

impl Listeners {
    pub(super) fn subscribe(&self) -> SessionEvents {
        let (sender, receiver) = mpsc::channel(BACKLOG);
        let mut told = self.told();
        // Where nothing is ever told, this is where those are seen that listen no more.
        told.listeners.retain(|listener| !listener.is_closed());
        if !told.is_over {
            told.listeners.push(sender);
        }
        SessionEvents(receiver)
    }

    pub(super) fn tell(&self, event: &SessionEvent) {
        self.told().listeners.retain(|listener| {
            !matches!(listener.try_send(event.clone()), Err(mpsc::error::TrySendError::Closed(_)))
        });
    }

    /// There are no more.
    pub(super) fn close(&self) {
        *self.told() = Told { listeners: Vec::new(), is_over: true };
    }

    fn told(&self) -> MutexGuard<'_, Told> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// The listeners of a session, and those of all sessions.
#[derive(Debug, Default)]
pub(super) struct Audience {
    pub(super) own: Listeners,
    pub(super) all: Arc<Listeners>,
}

impl Audience {
    pub(super) fn tell(&self, event: &SessionEvent) {
        self.own.tell(event);
        self.all.tell(event);
        if event.state == SessionState::Terminated {
            self.own.close();
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn event(number: u64) -> SessionEvent {
        SessionEvent {
            session: "one".into(),
            number,
            state: SessionState::Suspended,
            reason: SessionReason::Idle,
            message: Some("\u{1b}[2J".into()),
            at: SystemTime::UNIX_EPOCH,
            took: Some(Duration::from_micros(1500)),
        }
    }

    #[test]
    fn an_event_is_json_with_names_in_lower_case_and_a_line_that_steers_no_terminal() {
        let event = event(7);
        let text = serde_json::to_string(&event).unwrap();
        assert!(text.contains(r#""state":"suspended","reason":"idle""#), "{text}");
        assert_eq!(serde_json::from_str::<SessionEvent>(&text).unwrap(), event);
        assert_eq!(event.to_string(), "one: suspended (idle: \u{fffd}[2J) after 1.5 ms");
    }

    #[tokio::test]
    async fn who_does_not_read_loses_events_and_holds_up_nobody() {
        let audience = Audience::default();
        let (mut slow, gone) = (audience.own.subscribe(), audience.own.subscribe());
        drop(gone);
        for number in 1..=300 {
            audience.tell(&event(number));
        }
        assert_eq!(slow.next().await.unwrap().number, 1);
        audience.tell(&event(301));
        let numbers: Vec<_> = std::iter::from_fn(|| slow.try_next()).map(|e| e.number).collect();
        assert_eq!(numbers.len(), BACKLOG);
        assert_eq!(numbers[BACKLOG - 2..], [256, 301]);
        audience.tell(&SessionEvent { state: SessionState::Terminated, ..event(302) });
        assert_eq!(slow.next().await.unwrap().number, 302);
        assert!(slow.next().await.is_none());
        assert!(audience.own.subscribe().next().await.is_none());
    }
}

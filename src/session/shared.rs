//! What the handles of a session and its keeper share.

use std::path::PathBuf;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, SystemTime};

use tokio::sync::watch;

use super::error::SessionError;
use super::home::Home;
use super::metering::{Meter, Metering};
use super::policy::SessionPolicy;
use super::record::{Lasting, MAX_MESSAGE_CHARS, Record};
use super::state::{Audience, SessionEvent, SessionReason, SessionState, Status};
use crate::agent::{Activity, Agent};
use crate::console::Console;
use crate::error::Error;
use crate::microvm::{MicroVm, Running};

/// What is written down that is not known to all yet.
#[derive(Clone, Copy, Default)]
struct News<'a> {
    state: Option<SessionState>,
    event: Option<&'a SessionEvent>,
    policy: Option<&'a SessionPolicy>,
}

/// What is known of a session, for whoever asks. Its keeper alone changes its state.
#[derive(Debug)]
pub(super) struct Shared {
    pub(super) id: String,
    /// Keeps the lock of the directory of sessions.
    pub(super) home: Arc<Home>,
    pub(super) status: watch::Sender<Status>,
    pub(super) activity: Activity,
    pub(super) audience: Audience,
    policy: Mutex<SessionPolicy>,
    meter: Mutex<Meter>,
    lasting: Mutex<Lasting>,
    vm: Mutex<Option<MicroVm<Running>>>,
    console: Mutex<Option<Console>>,
    /// The state that is written down, or is to be with the next note; held while something is written.
    written: Mutex<SessionState>,
}

impl Shared {
    pub(super) fn new(
        home: Arc<Home>,
        event: SessionEvent,
        policy: SessionPolicy,
        meter: Meter,
        lasting: Lasting,
    ) -> Self {
        let audience = Audience { all: Arc::clone(&home.listeners), ..Audience::default() };
        if event.state == SessionState::Terminated {
            audience.own.close();
        }
        Self {
            id: event.session.clone(),
            home,
            written: Mutex::new(event.state),
            status: watch::Sender::new(Status { event, agent: None }),
            activity: Activity::new(),
            audience,
            policy: Mutex::new(policy),
            meter: Mutex::new(meter),
            lasting: Mutex::new(lasting),
            vm: Mutex::default(),
            console: Mutex::default(),
        }
    }

    /// The session's own directory.
    pub(super) fn directory(&self) -> PathBuf {
        self.home.session(&self.id)
    }

    /// Where it sleeps.
    pub(super) fn asleep(&self) -> PathBuf {
        self.home.asleep(&self.id)
    }

    pub(super) fn state(&self) -> SessionState {
        self.status.borrow().event.state
    }

    pub(super) fn policy(&self) -> MutexGuard<'_, SessionPolicy> {
        lock(&self.policy)
    }

    pub(super) fn meter(&self) -> MutexGuard<'_, Meter> {
        lock(&self.meter)
    }

    pub(super) fn lasting(&self) -> MutexGuard<'_, Lasting> {
        lock(&self.lasting)
    }

    pub(super) fn vm(&self) -> MutexGuard<'_, Option<MicroVm<Running>>> {
        lock(&self.vm)
    }

    pub(super) fn console(&self) -> MutexGuard<'_, Option<Console>> {
        lock(&self.console)
    }

    /// The processor time that its VM says it has used, where there is one that runs.
    pub(super) fn cpu_time(&self) -> Option<Duration> {
        self.vm().as_ref().map(MicroVm::<Running>::cpu_time)
    }

    /// What it has used up to now.
    pub(super) fn settle(&self) -> Metering {
        // Held, so that the time is not counted once more when the VM has gone to sleep meanwhile.
        let vm = self.vm();
        let cpu = vm.as_ref().map(MicroVm::<Running>::cpu_time);
        self.meter().settle(cpu)
    }

    /// What it has used, written down before it is said: so nobody who was told sees less after a restart.
    pub(super) fn metering(&self) -> Metering {
        let (metering, written) = self.write_news(News::default());
        // A disk that is full does not make it unknown.
        drop(written);
        metering
    }

    /// An event that nobody has been told of yet.
    pub(super) fn event(
        &self,
        state: SessionState,
        reason: SessionReason,
        message: Option<String>,
        took: Option<Duration>,
    ) -> SessionEvent {
        let number = self.status.borrow().event.number.saturating_add(1);
        let message = message.map(|message| message.chars().take(MAX_MESSAGE_CHARS).collect());
        let (session, at) = (self.id.clone(), SystemTime::now());
        SessionEvent { session, number, state, reason, message, at, took }
    }

    /// Tells everybody. The agent is that of a session that runs.
    pub(super) fn publish(&self, event: SessionEvent, agent: Option<Agent>) {
        tracing::info!(
            session = %event.session, state = %event.state, reason = %event.reason,
            message = event.message.as_deref(), took = event.took.map(|took| took.as_secs_f64()),
            "session"
        );
        // Both at once: whoever was told of it finds it so, and whoever finds it so was told.
        self.status.send_modify(|status| {
            self.audience.tell(&event);
            *status = Status { event, agent };
        });
    }

    /// Writes down in which state its guest may be from now on.
    pub(super) fn write(&self, state: SessionState) -> Result<(), SessionError> {
        self.write_news(News { state: Some(state), ..News::default() }).1
    }

    /// Writes down that it is over, and why, and then has its files removed: whoever finds them half removed knows. To be
    /// told after that, since whoever was told may remove it all. Nothing else is written down of it from then on.
    pub(super) fn write_over(
        &self,
        event: &SessionEvent,
        remove_files: impl FnOnce(),
    ) -> Result<(), SessionError> {
        let over = News { state: Some(SessionState::Terminated), event: Some(event), policy: None };
        let written = self.write_news(over).1;
        remove_files();
        let mut state = lock(&self.written);
        // There may be room for it now.
        let written = written.or_else(|_| self.write_held(&mut state, over).1);
        *state = SessionState::Terminated;
        written
    }

    /// Writes down what is known now.
    pub(super) fn note(&self) {
        if let Err(error) = self.write_news(News::default()).1 {
            tracing::warn!(session = %self.id, %error, "cannot write down the session");
        }
    }

    /// Has it another policy, which is written down before anybody goes by it.
    pub(super) fn set_policy(&self, policy: SessionPolicy) -> Result<(), Error> {
        if matches!(self.state(), SessionState::Terminating | SessionState::Terminated) {
            return Err(self.ended());
        }
        let mut written = lock(&self.written);
        let news = News { policy: Some(&policy), ..News::default() };
        self.write_held(&mut written, news).1?;
        *self.policy() = policy;
        Ok(())
    }

    /// Writes down in which state its guest is. Where that cannot be done now, it is with the next note.
    pub(super) fn has_become(&self, state: SessionState) {
        self.has_come_to(&mut lock(&self.written), state);
    }

    /// The same, of one that sleeps in this snapshot. Both are known at once: who finds "suspending" and another snapshot
    /// than the record's knows that it was finished.
    pub(super) fn has_gone_to_sleep(&self, snapshot: Option<[u8; 16]>) {
        let mut written = lock(&self.written);
        self.lasting().snapshot = snapshot;
        self.has_come_to(&mut written, SessionState::Suspended);
    }

    /// Writes down what became of it while no process had it.
    pub(super) fn note_found(&self, state: SessionState) {
        let mut written = lock(&self.written);
        *written = SessionState::Pending;
        self.has_come_to(&mut written, state);
    }

    fn has_come_to(&self, written: &mut SessionState, state: SessionState) {
        let news = News { state: Some(state), ..News::default() };
        if let Err(error) = self.write_held(written, news).1 {
            tracing::warn!(session = %self.id, %error, "cannot write down the session");
            *written = state;
        }
    }

    /// A request was given to it.
    pub(super) fn count_request(&self) {
        let mut meter = self.meter();
        meter.totals.requests = meter.totals.requests.saturating_add(1);
    }

    /// Writes down what is known now, what it has used included.
    fn write_news(&self, news: News<'_>) -> (Metering, Result<(), SessionError>) {
        // One after the other, so that what is written never is less than before.
        self.write_held(&mut lock(&self.written), news)
    }

    fn write_held(
        &self,
        written: &mut SessionState,
        News { state, event, policy }: News<'_>,
    ) -> (Metering, Result<(), SessionError>) {
        let metering = self.settle();
        // Of one that is over nothing changes; what is damaged is left as it is.
        if *written == SessionState::Terminated {
            return (metering, Ok(()));
        }
        let state = state.unwrap_or(*written);
        let policy = policy.cloned().unwrap_or_else(|| self.policy().clone());
        // While it goes to sleep the snapshot is what counts.
        let sync = policy.sync && state != SessionState::Running;
        let for_how_long = self.meter().for_how_long();
        let event = event.cloned().unwrap_or_else(|| self.status.borrow().event.clone());
        let lasting = self.lasting().clone();
        let record = Record::new(state, event, policy, (metering, for_how_long), lasting);
        let done = record.write(&self.directory(), sync);
        if done.is_ok() {
            *written = state;
        }
        (metering, done)
    }

    /// Why nothing is to be had of a session that is over, or about to be.
    pub(super) fn ended(&self) -> Error {
        let status = self.status.borrow();
        let (reason, message) = (status.event.reason, status.event.message.clone());
        SessionError::Ended { id: self.id.clone(), reason, message }.into()
    }
}

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

#[cfg(test)]
mod tests {
    use std::fs;

    use vmm_sys_util::tempdir::TempDir;

    use super::*;
    use crate::config::RestoreOptions;
    use crate::session::home::Given;
    use crate::session::metering::Counts;

    #[test]
    fn what_a_session_has_come_to_is_written_later_where_it_cannot_be_now() {
        let dir = TempDir::new().unwrap();
        let home = Arc::new(
            Home::open(dir.as_path(), Given(Box::new(|_| RestoreOptions::new()))).unwrap(),
        );
        home.make("one").unwrap();
        let event = SessionEvent {
            session: "one".to_owned(),
            number: 1,
            state: SessionState::Running,
            reason: SessionReason::Started,
            message: None,
            at: SystemTime::UNIX_EPOCH,
            took: None,
        };
        let meter = Meter::new(Metering::default(), Counts::Running, Duration::ZERO);
        let (policy, lasting) = (SessionPolicy::default(), Lasting::default());
        let shared = Shared::new(home, event, policy, meter, lasting);
        let written = || {
            let record = Record::read(&shared.directory(), "one").unwrap();
            (record.state, record.lasting.snapshot)
        };
        shared.write(SessionState::Suspending).unwrap();
        // What keeps a record from being written.
        let obstacle = shared.directory().join("session.json.part");
        fs::create_dir(&obstacle).unwrap();
        shared.has_gone_to_sleep(Some([9; 16]));
        shared.note();
        // Other files than the record's: whoever finds this takes it for one that sleeps.
        assert_eq!(written(), (SessionState::Suspending, None));
        fs::remove_dir(&obstacle).unwrap();
        shared.note();
        assert_eq!(written(), (SessionState::Suspended, Some([9; 16])));

        // It wakes in vain.
        shared.write(SessionState::Running).unwrap();
        fs::create_dir(&obstacle).unwrap();
        shared.has_become(SessionState::Suspended);
        assert_eq!(written().0, SessionState::Running);
        fs::remove_dir(&obstacle).unwrap();
        shared.metering();
        assert_eq!(written(), (SessionState::Suspended, Some([9; 16])));
    }
}

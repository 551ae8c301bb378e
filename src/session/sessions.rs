//! The sessions of a directory: starting them, finding them again.

use std::collections::BTreeMap;
use std::path::Path;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::SystemTime;
use std::{fmt, io};

use tokio::runtime::Handle;
use tokio::sync::{mpsc, oneshot};

use super::clock::Stamp;
use super::error::SessionError;
use super::home::{Given, Home, check_id};
use super::keeper::{Body, Call, Keeper, blocking, detached};
use super::metering::{Counts, Meter, Metering};
use super::policy::{Lost, SessionPolicy};
use super::record::{Lasting, Record};
use super::shared::Shared;
use super::start::Start;
use super::state::{SessionEvent, SessionEvents, SessionReason, SessionState};
use super::{Session, SessionOptions};
use crate::config::RestoreOptions;
use crate::error::{Error, ErrorKind};
use crate::microvm::AnyMicroVm;
use crate::random::random;
use crate::snapshot::Snapshot;

/// The sessions of a directory, which one process has at a time: a handle that clones.
///
/// What is suspended costs files and some KiB of memory, and outlives this process, however it ends. See [`Session`]
/// for an example.
#[derive(Clone)]
pub struct Sessions(Arc<Inner>);

struct Inner {
    home: Arc<Home>,
    sessions: Mutex<BTreeMap<String, Session>>,
    /// It keeps the sessions, whoever starts them.
    runtime: Handle,
}

impl Sessions {
    /// Opens a directory of sessions, which is made where there is none, and finds those that are there: suspended
    /// ones as they were, others as [`SessionPolicy::lost`](field@SessionPolicy::lost) says. One whose record is
    /// damaged is over, with [`SessionReason::Damaged`]; whether what a session sleeps in is sound is seen when it is
    /// woken. Reads a file for each session.
    ///
    /// Nothing is woken by this. Sessions are kept by tasks of the runtime that this is called on. Whoever can write to
    /// the directory decides what VMs run, and with which files of this host.
    ///
    /// # Errors
    ///
    /// [`ErrorKind::Session`](crate::ErrorKind::Session) where the directory is open already, in this process or another,
    /// [`ErrorKind::File`](crate::ErrorKind::File) where it cannot be made or read,
    /// [`ErrorKind::Config`](crate::ErrorKind::Config) outside of a tokio runtime.
    pub async fn open(directory: impl AsRef<Path>) -> Result<Self, Error> {
        Self::open_with(directory, |_| RestoreOptions::new().outside_paths(true)).await
    }

    /// As [`open`](Self::open), with what of this host a session that wakes from its files gets, by its name: a writer for its
    /// console, networks that had a descriptor, disks that lie elsewhere now; and, without
    /// [`outside_paths`](RestoreOptions::outside_paths), nothing that is not given. A session that this process put to sleep
    /// itself wakes with what it had. `given` is called when a session wakes, also in vain, and where its files are looked at
    /// before; not in tasks.
    ///
    /// # Errors
    ///
    /// As that one.
    pub async fn open_with(
        directory: impl AsRef<Path>,
        given: impl Fn(&str) -> RestoreOptions + Send + Sync + 'static,
    ) -> Result<Self, Error> {
        let runtime = Handle::try_current().map_err(|_| SessionError::NoRuntime)?;
        let directory = directory.as_ref().to_owned();
        let found = blocking(move || {
            let home = Arc::new(Home::open(&directory, Given(Box::new(given)))?);
            let ids = home.ids()?;
            let found: Vec<_> = ids.iter().filter_map(|id| find(&home, id)).collect();
            Ok::<_, SessionError>((home, found))
        });
        let (home, found) = found.await?;
        let mut sessions = BTreeMap::new();
        for shared in found {
            let shared = Arc::new(shared);
            let (sender, calls) = mpsc::unbounded_channel();
            if shared.state() == SessionState::Suspended {
                let keeper = Keeper::new(Arc::clone(&shared), calls, Body::Asleep(None));
                runtime.spawn(keeper.keep());
            }
            sessions.insert(shared.id.clone(), Session { shared, calls: sender });
        }
        Ok(Self(Arc::new(Inner { home, sessions: Mutex::new(sessions), runtime })))
    }

    /// Makes a VM a session, in whatever state it is, and waits until it is reached: it is started or woken, its agent
    /// is ready, where it boots its hook `ready` is done, and then its hook `run`. A VM without an agent has no hooks and no
    /// ports, and is ready at once.
    ///
    /// Nothing but these hooks waits for the application of a VM that boots: without them its entrypoint has been
    /// started, and may not listen yet. A VM from a `Template` has its application up, as its `Ready` says.
    ///
    /// The VM's disks, and what else its configuration names of the host, stay where they are, and have to be there
    /// when it wakes. What no file keeps goes with this process, a console's writer or the descriptor of a network
    /// ([`NetConfig::tap_fd`](crate::NetConfig::tap_fd), `socket`, `pair`): another one gives them by
    /// [`open_with`](Self::open_with). Where the future is dropped, the session starts all the same.
    ///
    /// # Errors
    ///
    /// [`ErrorKind::Session`](crate::ErrorKind::Session) where the name is taken,
    /// [`ErrorKind::Config`](crate::ErrorKind::Config) where it, the policy or the payload is refused, or the VM is over: the
    /// VM is ended. Those of starting and waking a VM, of [`MicroVm::agent`](crate::MicroVm::agent), and [`ErrorKind::Hook`](crate::ErrorKind::Hook):
    /// the session is over, with that as its reason.
    pub async fn start(
        &self,
        vm: impl Into<AnyMicroVm>,
        options: SessionOptions,
    ) -> Result<Session, Error> {
        let id = options.id.clone().map_or_else(random_id, Ok)?;
        check_id(&id)?;
        options.policy.check()?;
        let payload = options.run_body(&id)?;
        let vm = vm.into();
        if let AnyMicroVm::Terminated(_) = vm {
            return Err(SessionError::VmOver.into());
        }
        let (started, has_started) = oneshot::channel();
        let start = Start { vm, payload, within: options.within, started };
        let sessions = self.clone();
        let begun = detached(async move {
            let (session, calls) = sessions.make(id, &options).await?;
            let keeper = Keeper::new(Arc::clone(&session.shared), calls, Body::Over);
            sessions.0.runtime.spawn(keeper.start(start));
            Ok::<_, Error>(session)
        });
        let session = begun.await?;
        match has_started.await {
            Ok(started) => started.map(|()| session),
            Err(_) => Err(SessionError::RuntimeOver { id: session.id().to_owned() }.into()),
        }
    }

    /// As [`start`](Self::start), with a name: see [`SessionOptions::id`].
    ///
    /// # Errors
    ///
    /// As that one.
    pub async fn start_with_id(
        &self,
        id: impl Into<String>,
        vm: impl Into<AnyMicroVm>,
        options: SessionOptions,
    ) -> Result<Session, Error> {
        self.start(vm, options.id(id)).await
    }

    /// The session of this name.
    pub fn get(&self, id: &str) -> Option<Session> {
        self.sessions().get(id).cloned()
    }

    /// All sessions, by their names; also those that are over, until they are [removed](Self::remove).
    pub fn list(&self) -> Vec<Session> {
        self.sessions().values().cloned().collect()
    }

    /// The events of all sessions from now on.
    pub fn events(&self) -> SessionEvents {
        self.0.home.listeners.subscribe()
    }

    /// Puts all sessions to sleep that run, side by side, as a process does before it ends.
    ///
    /// # Errors
    ///
    /// That of the first that could not be: all others sleep.
    pub async fn suspend_all(&self) -> Result<(), Error> {
        let running = self.list().into_iter().filter(|session| {
            !matches!(session.state(), SessionState::Terminating | SessionState::Terminated)
        });
        let asked: Vec<_> =
            running.map(|session| tokio::spawn(async move { session.suspend().await })).collect();
        let mut first = Ok(());
        for asked in asked {
            // One that is over by now needs no sleep.
            let is_over = |error: &Error| error.kind() == &ErrorKind::SessionEnded;
            if let Ok(Err(error)) = asked.await
                && !is_over(&error)
                && first.is_ok()
            {
                first = Err(error);
            }
        }
        first
    }

    /// Forgets a session that is over, and removes all that is left of it. Its name is free again.
    ///
    /// # Errors
    ///
    /// [`ErrorKind::Session`](crate::ErrorKind::Session) where there is none, or it is not over;
    /// [`ErrorKind::File`](crate::ErrorKind::File) where its files cannot be removed.
    pub async fn remove(&self, id: &str) -> Result<(), Error> {
        let session = self.take_ended(id)?;
        let (sessions, id) = (self.clone(), id.to_owned());
        // Nobody has its name before its directory is gone.
        Ok(blocking(move || {
            sessions.0.home.remove(&id).inspect_err(|_| {
                sessions.sessions().insert(id, session);
            })
        })
        .await?)
    }

    /// Takes a session that is over from the list: one caller has it.
    fn take_ended(&self, id: &str) -> Result<Session, SessionError> {
        let mut sessions = self.sessions();
        let session =
            sessions.get(id).ok_or_else(|| SessionError::Unknown { id: id.to_owned() })?;
        if session.state() != SessionState::Terminated {
            return Err(SessionError::NotOver { id: id.to_owned() });
        }
        sessions.remove(id).ok_or_else(|| SessionError::Unknown { id: id.to_owned() })
    }

    /// A session that is to be: its directory, its record, its name in the list.
    async fn make(
        &self,
        id: String,
        options: &SessionOptions,
    ) -> Result<(Session, mpsc::UnboundedReceiver<Call>), Error> {
        let event = event(&id, 1, SessionState::Pending, SessionReason::Started, None);
        let meter = Meter::new(Metering::default(), Counts::Nothing, Default::default());
        let lasting = Lasting { grace: options.grace, ..Lasting::default() };
        let (home, policy) = (Arc::clone(&self.0.home), options.policy.clone());
        let shared = Arc::new(Shared::new(home, event.clone(), policy, meter, lasting));
        let made = Arc::clone(&shared);
        blocking(move || {
            made.home.make(&made.id)?;
            made.write(SessionState::Pending).inspect_err(|_| {
                let _ = made.home.remove(&made.id);
            })
        })
        .await?;
        let (sender, calls) = mpsc::unbounded_channel();
        let session = Session { shared, calls: sender };
        {
            // Whoever finds it has been told of it.
            let mut sessions = self.sessions();
            session.shared.audience.tell(&event);
            sessions.insert(id, session.clone());
        }
        Ok((session, calls))
    }

    fn sessions(&self) -> MutexGuard<'_, BTreeMap<String, Session>> {
        self.0.sessions.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl fmt::Debug for Sessions {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_list().entries(self.list()).finish()
    }
}

/// A session that another process left here, if the directory of this name is that of one.
fn find(home: &Arc<Home>, id: &str) -> Option<Shared> {
    match Record::read(&home.session(id), id) {
        Ok(record) => Some(found(home, id, record)),
        Err(SessionError::Io { source, .. })
            if source.kind() == io::ErrorKind::NotFound && !home.is_rest(id) =>
        {
            None
        }
        Err(error) => {
            let message = Some(error.to_string());
            let event = event(id, 1, SessionState::Terminated, SessionReason::Damaged, message);
            let meter = Meter::new(Metering::default(), Counts::Nothing, Default::default());
            let (policy, lasting) = (SessionPolicy::default(), Lasting::default());
            Some(Shared::new(Arc::clone(home), event, policy, meter, lasting))
        }
    }
}

/// What has become of it since its record was written.
fn found(home: &Arc<Home>, id: &str, mut record: Record) -> Shared {
    let passed = record.stamp.until(&Stamp::now());
    let number = record.event.number.saturating_add(1);
    let mut is_news = false;
    let (state, event) = match record.state {
        SessionState::Terminated => (SessionState::Terminated, record.event.clone()),
        SessionState::Suspended => {
            // The last event may be that of an attempt to wake it, or of the way to here.
            let last = record.event.clone();
            (SessionState::Suspended, SessionEvent { state: SessionState::Suspended, ..last })
        }
        before => {
            let fate = lost(home, id, &record, before);
            let Fate { state, reason, message, snapshot, .. } = fate;
            is_news = fate.is_final;
            // What it sleeps in from now on tells what it is saved to later from this.
            record.lasting.snapshot = snapshot.or(record.lasting.snapshot);
            (state, self::event(id, number, state, reason, message))
        }
    };
    let slept = record.state == SessionState::Suspended;
    let mut metering = record.metering;
    let (counts, for_how_long) = match state {
        SessionState::Suspended if slept => {
            metering.suspended = metering.suspended.saturating_add(passed);
            (Counts::Suspended, record.for_how_long.saturating_add(passed))
        }
        SessionState::Suspended => (Counts::Suspended, Default::default()),
        _ => (Counts::Nothing, Default::default()),
    };
    let meter = Meter::new(metering, counts, for_how_long);
    let before = Shared::new(Arc::clone(home), event, record.policy, meter, record.lasting);
    if is_news {
        before.note_found(state);
    }
    before
}

/// What becomes of a session.
struct Fate {
    state: SessionState,
    reason: SessionReason,
    message: Option<String>,
    /// The snapshot that it sleeps in.
    snapshot: Option<[u8; 16]>,
    /// Whether that is so for whoever opens the sessions next, too.
    is_final: bool,
}

impl Fate {
    fn asleep(reason: SessionReason, files: &Snapshot) -> Self {
        let snapshot = Some(files.id());
        let state = SessionState::Suspended;
        Self { state, reason, message: None, snapshot, is_final: true }
    }

    fn over(message: String) -> Self {
        let (state, reason) = (SessionState::Terminated, SessionReason::Lost);
        Self { state, reason, message: Some(message), snapshot: None, is_final: true }
    }
}

/// What becomes of one that ran when its process ended.
fn lost(home: &Home, id: &str, record: &Record, before: SessionState) -> Fate {
    let ran = matches!(before, SessionState::Running | SessionState::Suspending);
    let is_restored = ran && record.policy.lost == Lost::Restore;
    match Snapshot::find(&home.asleep(id)) {
        // Its files were finished, and nobody was there to write that down.
        Ok(Some(files))
            if before == SessionState::Suspending
                && Some(files.id()) != record.lasting.snapshot =>
        {
            Fate::asleep(record.event.reason, &files)
        }
        // What else there is to be said against it, its wake says.
        Ok(Some(files)) if is_restored => match files.changed_disk(&home.given(id)) {
            None => Fate::asleep(SessionReason::Restored, &files),
            Some(disk) => Fate::over(format!(
                "the process ended while the session was {before}, and its disk {} may have changed since it slept",
                disk.display()
            )),
        },
        Err(error) if is_restored || before == SessionState::Suspending => {
            Fate { is_final: false, ..Fate::over(error.to_string()) }
        }
        _ => Fate::over(format!("the process ended while the session was {before}")),
    }
}

fn event(
    id: &str,
    number: u64,
    state: SessionState,
    reason: SessionReason,
    message: Option<String>,
) -> SessionEvent {
    let (session, at) = (id.to_owned(), SystemTime::now());
    SessionEvent { session, number, state, reason, message, at, took: None }
}

fn random_id() -> Result<String, SessionError> {
    let bytes = random::<12>().map_err(SessionError::Random)?;
    Ok(bytes.iter().map(|byte| format!("{byte:02x}")).collect())
}

//! Sessions: a VM whatever its state, that sleeps when nobody needs it and wakes when somebody does.
//!
//! A [`Session`] is a handle; its keeper (keeper.rs) is the one task that has the VM. What is known of it is written
//! down (record.rs), so that [`Sessions::open`] finds it again. The states, hooks and the body of `run` are those of
//! AWS Lambda's MicroVMs (2026).

mod clock;
mod end;
mod error;
mod home;
mod idle;
mod keeper;
mod metering;
mod options;
mod policy;
mod record;
mod request;
mod sessions;
mod shared;
mod sleep;
mod start;
mod state;
mod stream;

#[cfg(feature = "endpoint")]
pub(crate) use self::home::is_label;
pub use self::metering::Metering;
pub use self::options::SessionOptions;
pub use self::policy::{Lost, SessionPolicy};
pub use self::request::SessionBody;
pub use self::sessions::Sessions;
pub use self::state::{SessionEvent, SessionEvents, SessionReason, SessionState, SessionWatch};
pub use self::stream::{KeepAwake, SessionStream};

use std::ffi::OsStr;
use std::fmt;
use std::sync::Arc;

use tokio::sync::{mpsc, oneshot};

use self::error::SessionError;
use self::keeper::{Call, Wish};
use self::shared::Shared;
use crate::agent::{Agent, Output};
use crate::console::Console;
use crate::error::{Error, ErrorKind};
use crate::exit::ExecFailure;
use crate::microvm::{MicroVm, Running};

/// A microVM that sleeps and wakes: a handle that clones and crosses threads.
///
/// Everything that is asked of it is done once, however many ask, and asking for what is so already does
/// nothing. A call that is dropped before it is answered goes on, but for [`wake`](Self::wake) and what uses it. What runs
/// ends with the last handle, that of [`Sessions`] included; what sleeps is found again.
///
/// ```no_run
/// use std::time::Duration;
/// use dormouse::{Error, Running, MicroVm, SessionOptions, SessionPolicy, Sessions};
///
/// # async fn example(vm: MicroVm<Running>) -> Result<(), Error> {
/// let sessions = Sessions::open("sessions").await?;
/// let policy = SessionPolicy::new().idle_after(Duration::from_secs(60));
/// let session = sessions.start(vm, SessionOptions::new().policy(policy)).await?;
///
/// let output = session.exec("uname", ["-r"]).await?.check()?; // wakes it, if it sleeps
/// session.suspend().await?; // or by itself, after a minute in which nothing went on
/// let mut stream = session.connect(8080).await?; // wakes it; holds it awake while it is open
/// println!("{:?}", session.metering());
/// # Ok(())
/// # }
/// ```
#[derive(Clone)]
pub struct Session {
    shared: Arc<Shared>,
    calls: mpsc::UnboundedSender<Call>,
}

impl Session {
    /// Its name.
    pub fn id(&self) -> &str {
        &self.shared.id
    }

    /// The state that it is in.
    pub fn state(&self) -> SessionState {
        self.shared.state()
    }

    /// Sees its state, and waits for changes.
    pub fn watch(&self) -> SessionWatch {
        SessionWatch(self.shared.status.subscribe())
    }

    /// Its events from now on.
    pub fn events(&self) -> SessionEvents {
        self.shared.audience.own.subscribe()
    }

    /// What it does by itself.
    pub fn policy(&self) -> SessionPolicy {
        self.shared.policy().clone()
    }

    /// Changes what it does by itself, from now on: what is due by the new policy is done at once. It is written down
    /// before it counts.
    ///
    /// # Errors
    ///
    /// [`ErrorKind::Config`](crate::ErrorKind::Config) for what makes no sense,
    /// [`ErrorKind::File`](crate::ErrorKind::File) where it cannot be written, and
    /// [`ErrorKind::SessionEnded`](crate::ErrorKind::SessionEnded). The policy is as before then.
    pub async fn set_policy(&self, policy: SessionPolicy) -> Result<(), Error> {
        policy.check()?;
        let (session, shared) = (self.clone(), Arc::clone(&self.shared));
        keeper::detached(async move {
            keeper::blocking(move || shared.set_policy(policy)).await?;
            session.ask(Wish::Look).await
        })
        .await
    }

    /// Puts it to sleep, now and whatever goes on in it: hook `suspend`, then its memory and disks to files. Its
    /// streams end.
    ///
    /// # Errors
    ///
    /// The hook's, or those of [`MicroVm::suspend`](MicroVm::<Running>::suspend): it runs on as before.
    /// [`ErrorKind::SessionEnded`](crate::ErrorKind::SessionEnded) for one that is over, and
    /// [`ErrorKind::Session`](crate::ErrorKind::Session) where the runtime that it was opened on has ended, in this and
    /// all other calls.
    pub async fn suspend(&self) -> Result<(), Error> {
        self.ask(Wish::Suspend).await
    }

    /// Wakes it, also where its policy lets no request do so: its memory is mapped and not read, then its hook `resume`
    /// is run.
    ///
    /// # Errors
    ///
    /// The hook's, or those of [`MicroVm::resume`](MicroVm::<crate::Suspended>::resume): it sleeps as before, or, where its
    /// guest has written to its disks by then, as it was when that failed; or it is over, where that cannot be.
    /// [`ErrorKind::SessionEnded`](crate::ErrorKind::SessionEnded) for one that is over.
    pub async fn resume(&self) -> Result<(), Error> {
        self.ask(Wish::Resume).await
    }

    /// As [`MicroVm::shutdown`], not as [`MicroVm::terminate`](MicroVm::<Running>::terminate): hook `terminate`, for
    /// which one that sleeps is woken; SIGTERM and SIGKILL to the guest's processes; then its files are removed. A
    /// guest without an agent is cut off. What is known of it stays until [`Sessions::remove`].
    ///
    /// # Errors
    ///
    /// [`ErrorKind::Session`](crate::ErrorKind::Session) where the runtime that it was opened on has ended.
    pub async fn terminate(&self) -> Result<(), Error> {
        match self.ask(Wish::Terminate).await {
            Err(_) if self.state() == SessionState::Terminated => Ok(()),
            terminated => terminated,
        }
    }

    /// Waits until it runs and is reached, and keeps it awake until what this returns is dropped. One that sleeps is
    /// woken, one that goes to sleep afterwards; of any number of calls, one does it and all wait.
    ///
    /// # Errors
    ///
    /// As [`resume`](Self::resume); [`ErrorKind::SessionSuspended`](crate::ErrorKind::SessionSuspended) where it
    /// sleeps, and its policy has no [`auto_resume`](field@SessionPolicy::auto_resume).
    pub async fn wake(&self) -> Result<KeepAwake, Error> {
        self.wake_with_agent().await.map(|(awake, _)| awake)
    }

    /// Keeps it awake until what this returns is dropped, but does not wake it.
    pub fn keep_awake(&self) -> KeepAwake {
        KeepAwake::new(self.shared.activity.begin())
    }

    /// Connects to a TCP port of the guest's loopback: [`wake`](Self::wake), then
    /// [`Agent::connect_tcp`].
    ///
    /// # Errors
    ///
    /// As those.
    pub async fn connect(&self, port: u16) -> Result<SessionStream, Error> {
        let (awake, agent) = self.wake_with_agent().await?;
        let stream = self.agent_of(agent)?.connect_tcp(port).await?;
        self.count_request();
        Ok(SessionStream::new(stream, Some(awake)))
    }

    /// As [`connect`](Self::connect), but neither wakes the session nor keeps it awake: for connections that are kept
    /// for later. It ends when the session sleeps.
    ///
    /// # Errors
    ///
    /// As [`Agent::connect_tcp`], and [`ErrorKind::SessionSuspended`](crate::ErrorKind::SessionSuspended)
    /// where it does not run.
    pub async fn connect_unheld(&self, port: u16) -> Result<SessionStream, Error> {
        let (state, agent) = {
            let status = self.shared.status.borrow();
            (status.event.state, status.agent.clone())
        };
        match state {
            SessionState::Running => {
                let stream = self.agent_of(agent)?.connect_tcp(port).await?;
                Ok(SessionStream::new(stream, None))
            }
            SessionState::Terminating | SessionState::Terminated => Err(self.shared.ended()),
            state => {
                let (id, state) = (self.id().to_owned(), state.as_str());
                Err(SessionError::NotRunning { id, state }.into())
            }
        }
    }

    /// The guest's agent: [`wake`](Self::wake), then a handle whose calls keep the session awake, and all that they open
    /// for as long as it is open. Once the session has slept, that handle's calls fail: ask for another.
    ///
    /// # Errors
    ///
    /// As [`wake`](Self::wake), and [`ErrorKind::Config`](crate::ErrorKind::Config) where the guest has none.
    pub async fn agent(&self) -> Result<Agent, Error> {
        let (_awake, agent) = self.wake_with_agent().await?;
        Ok(self.agent_of(agent)?.with_activity(self.shared.activity.clone()))
    }

    /// Runs a program in the guest to its end: [`wake`](Self::wake), then [`Agent::exec`]. One that was to be started
    /// just as the session went to sleep is started when it has woken.
    ///
    /// # Errors
    ///
    /// As those.
    pub async fn exec<S: AsRef<OsStr>>(
        &self,
        program: impl AsRef<OsStr>,
        args: impl IntoIterator<Item = S>,
    ) -> Result<Output, Error> {
        let args: Vec<S> = args.into_iter().collect();
        let run = async || {
            let (_awake, agent) = self.wake_with_agent().await?;
            self.agent_of(agent)?.exec(&program, &args).await
        };
        match run().await {
            Err(error) if error.kind() == &ErrorKind::ExecFailed(ExecFailure::Frozen) => {
                let mut status = self.shared.status.subscribe();
                let slept = status.wait_for(|now| now.event.state != SessionState::Suspending);
                tokio::select! {
                    biased;
                    slept = slept => drop(slept),
                    () = self.calls.closed() => return Err(self.keeper_gone()),
                }
                run().await
            }
            ran => ran,
        }
    }

    /// What it has used up to now. No number ever falls, also not over a restart: what is said is written down
    /// before, which takes some 100 µs. Of a session that runs when its process is killed, what was used
    /// since it was written down the last time is not counted.
    pub fn metering(&self) -> Metering {
        self.shared.metering()
    }

    /// A request was given to it otherwise than by [`connect`](Self::connect).
    pub(crate) fn count_request(&self) {
        self.shared.count_request();
    }

    /// Looks at its VM, or does something with it, if it runs: `None` if not. Meanwhile it cannot be suspended, and calls to
    /// it wait: what blocks, or asks the session itself for anything, is to be done elsewhere.
    pub fn with_vm<T>(&self, work: impl FnOnce(&MicroVm<Running>) -> T) -> Option<T> {
        self.shared.vm().as_ref().map(work)
    }

    /// What its guest wrote to its serial port. None before it runs for the first time in this process.
    pub fn console(&self) -> Option<Console> {
        self.shared.console().clone()
    }

    async fn wake_with_agent(&self) -> Result<(KeepAwake, Option<Agent>), Error> {
        // First, so that it does not go to sleep between the look and the use.
        let awake = self.keep_awake();
        let mut status = self.shared.status.subscribe();
        loop {
            let (state, agent) = {
                let status = status.borrow_and_update();
                (status.event.state, status.agent.clone())
            };
            match state {
                SessionState::Running => return Ok((awake, agent)),
                SessionState::Suspended => {
                    if !self.shared.policy().auto_resume {
                        return Err(SessionError::StaysSuspended { id: self.id().into() }.into());
                    }
                    self.ask(Wish::Wake).await?;
                }
                SessionState::Pending | SessionState::Suspending => {
                    tokio::select! {
                        biased;
                        // The other end is in `self`.
                        _ = status.changed() => {}
                        () = self.calls.closed() => return Err(self.keeper_gone()),
                    }
                }
                SessionState::Terminating | SessionState::Terminated => {
                    return Err(self.shared.ended());
                }
            }
        }
    }

    /// Its agent, where it has one.
    fn agent_of(&self, agent: Option<Agent>) -> Result<Agent, Error> {
        agent.ok_or_else(|| SessionError::NoAgent { id: self.id().to_owned() }.into())
    }

    async fn ask(&self, wish: Wish) -> Result<(), Error> {
        let (answer, answered) = oneshot::channel();
        let _ = self.calls.send(Call { wish, answer });
        match answered.await {
            Ok(done) => done,
            Err(_) => Err(self.keeper_gone()),
        }
    }

    /// Why nobody answers any more.
    fn keeper_gone(&self) -> Error {
        match self.state() {
            SessionState::Terminated => self.shared.ended(),
            _ => SessionError::RuntimeOver { id: self.id().to_owned() }.into(),
        }
    }
}

impl fmt::Debug for Session {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Session").field("id", &self.id()).field("state", &self.state()).finish()
    }
}

const _: () = {
    const fn assert_threads<T: Send + Sync>() {}
    assert_threads::<Session>();
    assert_threads::<Sessions>();
    assert_threads::<KeepAwake>();
    assert_threads::<SessionStream>();
};

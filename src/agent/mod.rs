//! The agent in the guest: running commands, moving files, reaching ports, from async code.
//!
//! The agent is the guest's PID 1, part of this crate, and talks over vsock as `protocol` says.
//! Every call has a connection to itself, so a slow one holds up no other, and what a guest can
//! make the host keep is bounded by the windows of the streams that are open. The next call takes the
//! connection of one that is over.

#[cfg_attr(
    all(not(test), not(feature = "session")),
    expect(dead_code, reason = "for what decides when a VM sleeps")
)]
mod activity;
mod calls;
mod command;
mod connection;
mod error;
mod files;
#[cfg(any(test, fuzzing))]
pub(crate) mod fuzzing;
mod hooks;
mod lifecycle;
mod link;
mod metadata;
mod open_files;
mod patience;
mod ports;
mod process;
mod pulse;
mod relay;
mod streams;
mod tree;

#[cfg(test)]
mod tests;

#[cfg(feature = "session")]
pub(crate) use self::activity::{Activity, Ongoing};
pub use self::command::{Command, Output};
pub(crate) use self::error::AgentError;
pub use self::metadata::{DirEntry, FileType, Metadata};
pub use self::open_files::{FileReader, FileWriter, WriteOptions};
pub(crate) use self::patience::within;
pub use self::ports::GuestStream;
pub use self::process::Process;
#[cfg(feature = "endpoint")]
pub(crate) use self::relay::{Caller, pass_on};
pub use self::streams::{ProcessInput, ProcessOutput};
pub use self::tree::{Copied, CopyLimits};

use std::ffi::OsStr;
use std::sync::Arc;
use std::time::Duration;

use self::calls::Calls;
use self::link::Link;
use crate::config::HookName;
use crate::error::Error;
use crate::microvm::{MicroVm, Running};
use crate::phase::Phase;
use crate::protocol::{Call, Reply};

/// The agent in a guest: a handle that clones and crosses threads. Calls on it run side by side.
///
/// It keeps nothing of its VM alive. While the VM is paused calls wait, each for a minute at most, and
/// programs that run for as long as it lasts; when it is over, or was suspended, they fail and say so. A VM
/// that was resumed from files has another: [`MicroVm::agent`] again.
///
/// # Errors of every call
///
/// - [`GuestEnded`](crate::ErrorKind::GuestEnded) where the VM is over, or was suspended or dropped.
/// - [`Agent`](crate::ErrorKind::Agent) where the agent is not there, or says what makes no sense, or the connection
///   to it ended in the middle of the call.
/// - [`Timeout`](crate::ErrorKind::Timeout) where the agent has said nothing for 60 s: it hangs, or the VM is
///   paused. A program may be silent for as long as it likes.
/// - [`Resources`](crate::ErrorKind::Resources) where no socket can be made, for want of descriptors or of
///   [vsock connections](crate::VsockConfig::max_connections), and where the call is longer than 1 MiB, as a command
///   can be by its arguments and environment.
///
/// # Panics
///
/// All calls have to be made within a tokio runtime with I/O and time, and panic elsewhere. [`MicroVm::agent`]
/// is refused outside of a runtime, with [`ErrorKind::Config`](crate::ErrorKind::Config).
///
/// # Example
///
/// ```no_run
/// # async fn example(vm: dormouse::MicroVm<dormouse::Running>) -> Result<(), dormouse::Error> {
/// let agent = vm.agent().await?;
/// agent.write("/tmp/job.py", "print(6 * 7)").await?;
/// let output = agent.exec("python3", ["/tmp/job.py"]).await?.check()?;
/// assert_eq!(output.stdout, b"42\n");
/// # Ok(())
/// # }
/// ```
#[derive(Clone, Debug)]
pub struct Agent {
    link: Arc<Link>,
    calls: Calls,
}

impl Agent {
    /// Runs a program to its end, as root, without input, and collects what it writes.
    ///
    /// The time is that of a fork and an exec in the guest and two round trips. See
    /// [`command`](Self::command) for all that can be set.
    ///
    /// # Errors
    ///
    /// As [`Command::output`].
    pub async fn exec<S: AsRef<OsStr>>(
        &self,
        program: impl AsRef<OsStr>,
        args: impl IntoIterator<Item = S>,
    ) -> Result<Output, Error> {
        self.command(program).args(args).output().await
    }

    /// A program to run in the guest; without a `/` in its name, it is looked for in `PATH`.
    pub fn command(&self, program: impl AsRef<OsStr>) -> Command {
        Command::new(self.clone(), program.as_ref())
    }

    /// How much of the guest's memory the agent itself takes, in bytes: its own memory, not that of the guest or
    /// of its programs.
    ///
    /// # Errors
    ///
    /// As [every call](crate::Agent#errors-of-every-call).
    pub async fn memory_bytes(&self) -> Result<u64, Error> {
        match self.ask(&Call::Usage).await? {
            Reply::Usage(usage) => Ok(usage.resident_bytes),
            other => Err(AgentError::refused(other).into()),
        }
    }

    fn new(link: Arc<Link>) -> Self {
        let calls = link.calls().clone();
        Self { link, calls }
    }

    /// A handle whose calls nobody counts, for what is not asked for by a user.
    fn uncounted(&self) -> Self {
        Self::new(Arc::clone(&self.link))
    }

    fn calls(&self) -> &Calls {
        &self.calls
    }

    /// The one answer to a call.
    async fn ask(&self, call: &Call) -> Result<Reply, Error> {
        let mut connection = self.calls().call(call).await?;
        let reply = connection.reply(self.calls().vsock()).await?;
        // An agent that has too many calls says so, and closes.
        if !matches!(reply, Reply::Failed(_)) {
            self.calls().keep(connection);
        }
        Ok(reply)
    }

    /// A call that is answered by `Done`.
    async fn done(&self, call: &Call) -> Result<(), Error> {
        Self::check_done(self.ask(call).await?)
    }

    /// Runs the hook `resume` of a guest that slept and woke as itself; once.
    async fn has_woken(&self) -> Result<(), Error> {
        self.link.on_waking(self.run_hook(HookName::Resume, "")).await
    }

    fn check_done(reply: Reply) -> Result<(), Error> {
        match reply {
            Reply::Done => Ok(()),
            other => Err(AgentError::refused(other).into()),
        }
    }
}

impl MicroVm<Running> {
    /// The agent in the guest, when it is ready: root file system mounted, network up, and in a
    /// clone, clock, entropy, machine-id and hostname its own. A guest that has just been started
    /// boots meanwhile; of one that was restored the agent answers within milliseconds. One that
    /// slept and woke as itself has run its hook `resume`.
    ///
    /// Waits for as long as the guest lives; see [`agent_timeout`](Self::agent_timeout).
    ///
    /// # Errors
    ///
    /// [`ErrorKind::GuestEnded`](crate::ErrorKind::GuestEnded), with the console's last lines,
    /// where the guest ends first. [`ErrorKind::Agent`](crate::ErrorKind::Agent) where the agent
    /// could not make the guest ready, a disk is missing, say, or is of another version.
    /// [`ErrorKind::Config`](crate::ErrorKind::Config) where the configuration has none, and outside of a tokio
    /// runtime.
    pub async fn agent(&self) -> Result<Agent, Error> {
        let awake = async {
            let agent = self.ready_agent().await?;
            agent.has_woken().await?;
            Ok(agent)
        };
        awake.await.map_err(|error: Error| self.agent_error(error))
    }

    /// The agent when it is ready, whose guest may not have been told yet that it woke.
    async fn ready_agent(&self) -> Result<Agent, Error> {
        let link = Link::of(self)?;
        link.ready().await?;
        Ok(Agent::new(link))
    }

    /// As [`agent`](Self::agent), for at most `timeout`, of which time in which this process stands still is a
    /// twelfth at most.
    ///
    /// # Errors
    ///
    /// As that one, and [`ErrorKind::Timeout`](crate::ErrorKind::Timeout), with the console's last
    /// lines, where the guest lives and its agent has not called.
    pub async fn agent_timeout(&self, timeout: Duration) -> Result<Agent, Error> {
        // A timer needs one, and says so by a panic.
        link::check_runtime().map_err(|error| self.agent_error(error))?;
        match within(timeout, self.agent()).await {
            Some(agent) => agent,
            None => {
                let seconds = timeout.as_secs_f64();
                Err(self.agent_error(AgentError::NotReady { seconds }))
            }
        }
    }

    fn agent_error(&self, error: impl Into<Error>) -> Error {
        self.error(Phase::Agent, error)
    }
}

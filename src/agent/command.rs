//! What to run in the guest, and how.

use std::ffi::OsStr;
use std::os::unix::ffi::OsStrExt;
use std::time::Duration;

use super::process::{Process, read_all};
use super::{Agent, AgentError};
use crate::error::{Error, ErrorKind};
use crate::exit::ProcessStatus;
use crate::protocol::{Bytes, Exec, Program, WindowSize};

/// As much of a program's output as [`Command::output`] takes, unless told otherwise.
const OUTPUT_LIMIT: usize = 16 << 20;
/// As much of the standard error as an error shows.
const SHOWN_BYTES: usize = 1024;

/// A program to run in the guest: its arguments, environment, user, streams. Made by
/// [`Agent::command`].
///
/// It runs as root in `/`, without input, in a process group of its own, unless set otherwise. Its environment is
/// `PATH=/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin`, `TERM=xterm`, and `HOME`: `/root`, or where a user
/// is set that one's home directory in the guest's /etc/passwd (`/root` for root and `/` for others, where it is not there).
///
/// ```no_run
/// # async fn example(agent: dormouse::Agent) -> Result<(), dormouse::Error> {
/// use std::time::Duration;
///
/// let output = agent
///     .command("python3")
///     .args(["-c", "import os; print(os.getcwd())"])
///     .current_dir("/tmp")
///     .user("nobody")
///     .env("LANG", "C.UTF-8")
///     .timeout(Duration::from_secs(10))
///     .output()
///     .await?
///     .check()?;
/// assert_eq!(output.stdout, b"/tmp\n");
/// # Ok(())
/// # }
/// ```
#[derive(Clone, Debug)]
#[must_use = "it runs by `output`, `status` or `spawn`"]
pub struct Command {
    agent: Agent,
    exec: Exec,
    input: Option<Vec<u8>>,
    output_limit: usize,
    truncates: bool,
}

impl Command {
    pub(super) fn new(agent: Agent, program: &OsStr) -> Self {
        let program = Program {
            argv: vec![Bytes::from(program.as_bytes())],
            env: Vec::new(),
            home: true,
            cwd: None,
            user: None,
        };
        let exec = Exec { program, stdin: false, terminal: None, timeout_ms: None };
        let command =
            Self { agent, exec, input: None, output_limit: OUTPUT_LIMIT, truncates: false };
        command
            .env("PATH", "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin")
            .env("TERM", "xterm")
    }

    /// One more argument.
    pub fn arg(mut self, arg: impl AsRef<OsStr>) -> Self {
        self.exec.program.argv.push(Bytes::from(arg.as_ref().as_bytes()));
        self
    }

    /// More arguments.
    pub fn args<S: AsRef<OsStr>>(self, args: impl IntoIterator<Item = S>) -> Self {
        args.into_iter().fold(self, Self::arg)
    }

    /// Sets a variable of the environment.
    pub fn env(mut self, name: impl AsRef<OsStr>, value: impl AsRef<OsStr>) -> Self {
        let name = Bytes::from(name.as_ref().as_bytes());
        let env = &mut self.exec.program.env;
        env.retain(|(other, _)| *other != name);
        env.push((name, Bytes::from(value.as_ref().as_bytes())));
        self
    }

    /// Empties the environment, of HOME too.
    pub fn env_clear(mut self) -> Self {
        self.exec.program.env.clear();
        self.exec.program.home = false;
        self
    }

    /// The working directory; `/` unless set.
    pub fn current_dir(mut self, path: impl AsRef<OsStr>) -> Self {
        self.exec.program.cwd = Some(Bytes::from(path.as_ref().as_bytes()));
        self
    }

    /// The user, as `name`, `uid`, `name:group` or `uid:gid`, of the guest's /etc/passwd and
    /// /etc/group; root unless set. A user by name has its supplementary groups.
    pub fn user(mut self, user: impl Into<String>) -> Self {
        self.exec.program.user = Some(user.into());
        self
    }

    /// What the program reads at its standard input, to the end.
    pub fn stdin(mut self, input: impl Into<Vec<u8>>) -> Self {
        self.exec.stdin = true;
        self.input = Some(input.into());
        self
    }

    /// Leaves the standard input open: [`Process::stdin`] of what is [spawned](Self::spawn) writes to it. Where
    /// nobody can, in [`output`](Self::output) and [`status`](Self::status), it is at its end.
    pub fn stdin_piped(mut self) -> Self {
        self.exec.stdin = true;
        self.input = None;
        self
    }

    /// Gives the program a terminal of this size, its controlling one, in place of the three
    /// streams: what it shows comes as standard output, what is typed goes to its input.
    pub fn terminal(mut self, rows: u16, columns: u16) -> Self {
        self.exec.terminal = Some(WindowSize { rows, columns });
        self.exec.stdin = true;
        self
    }

    /// How long the program may run, by the guest's clock; then its whole process group is killed, and
    /// its status is [`ProcessStatus::TimedOut`]. No limit unless set; to a millisecond.
    ///
    /// What it wrote before is in the [`Output`]. Children that left its process group, by `setsid` say, are not
    /// killed: they are there until the guest is [shut down](crate::MicroVm::shutdown) or ends.
    pub fn timeout(mut self, timeout: Duration) -> Self {
        self.exec.timeout_ms = Some(u64::try_from(timeout.as_millis()).unwrap_or(u64::MAX));
        self
    }

    /// How much [`output`](Self::output) takes of standard output and error together, as they come: 16 MiB
    /// unless set. A program that writes more is killed, and what it wrote is gone with the error, unless it is
    /// [truncated](Self::truncate_output).
    ///
    /// [`spawn`](Self::spawn) has no limit: its caller reads as much as it likes.
    ///
    /// ```no_run
    /// # async fn example(agent: dormouse::Agent) -> Result<(), Box<dyn std::error::Error>> {
    /// use tokio::io::AsyncReadExt;
    ///
    /// let mut process = agent.command("yes").spawn().await?;
    /// let mut head = Vec::new();
    /// if let Some(stdout) = process.stdout.take() {
    ///     stdout.take(1024).read_to_end(&mut head).await?;
    /// }
    /// drop(process); // kills it
    /// # Ok(())
    /// # }
    /// ```
    pub fn output_limit(mut self, bytes: usize) -> Self {
        self.output_limit = bytes;
        self
    }

    /// Whether [`output`](Self::output) throws away what is beyond the [limit](Self::output_limit), and keeps what came
    /// before: [`Output::truncated`] says so. The program runs on to its end, or [timeout](Self::timeout).
    /// Off unless set.
    pub fn truncate_output(mut self, on: bool) -> Self {
        self.truncates = on;
        self
    }

    /// Starts the program, and returns when it has started: a round trip to the guest, and a fork.
    ///
    /// # Errors
    ///
    /// [`ErrorKind::ExecFailed`] where it cannot be run; else as [every call](Agent#errors-of-every-call).
    pub async fn spawn(self) -> Result<Process, Error> {
        let mut process = Process::start(self.agent.calls(), self.exec).await?;
        if let Some(input) = self.input
            && let Some(stdin) = process.stdin.take()
        {
            process.feed(stdin, input);
        }
        Ok(process)
    }

    /// Runs the program to its end, and collects what it writes, also where it fails or its time is over. Dropping the
    /// future kills the program, and what it wrote is gone: see [`timeout`](Self::timeout) for a deadline that keeps it.
    ///
    /// # Errors
    ///
    /// As [`spawn`](Self::spawn); [`ErrorKind::Resources`] where it wrote more than
    /// [`output_limit`](Self::output_limit). A program that fails, or whose time is over, is no error:
    /// see [`Output::check`].
    pub async fn output(self) -> Result<Output, Error> {
        let (program, limit, cut) = (self.name(), self.output_limit, self.truncates);
        let mut process = self.spawn().await?;
        // Nobody will write to it: a program that reads it comes to its end.
        drop(process.stdin.take());
        let streams = (process.stdout.take(), process.stderr.take());
        let (stdout, stderr) = read_all(streams, limit, cut).await?;
        let status = process.wait().await?;
        let truncated = stdout.is_cut || stderr.is_cut;
        Ok(Output { status, stdout: stdout.bytes, stderr: stderr.bytes, truncated, program })
    }

    /// Runs the program to its end, and throws away what it writes. Dropping the future kills the program.
    ///
    /// # Errors
    ///
    /// As [`spawn`](Self::spawn).
    pub async fn status(self) -> Result<ProcessStatus, Error> {
        let mut process = self.spawn().await?;
        drop((process.stdin.take(), process.stdout.take(), process.stderr.take()));
        process.wait().await
    }

    fn name(&self) -> String {
        let name = self.exec.program.argv.first().map(|name| &name.0[..]).unwrap_or_default();
        String::from_utf8_lossy(name).into_owned()
    }
}

/// What a program wrote, and how it ended.
#[derive(Clone, PartialEq, Eq)]
pub struct Output {
    /// How it ended.
    pub status: ProcessStatus,
    /// What it wrote to its standard output, or terminal.
    pub stdout: Vec<u8>,
    /// What it wrote to its standard error.
    pub stderr: Vec<u8>,
    /// Whether it wrote more: see [`Command::truncate_output`].
    pub truncated: bool,
    program: String,
}

impl Output {
    /// The output of a program that succeeded. Of any other what it wrote is gone with this, but for what the error
    /// shows: look at `status` before, where that is wanted.
    ///
    /// # Errors
    ///
    /// [`ErrorKind::ProcessFailed`] for every status but the exit code 0, with the end of what
    /// it wrote to its standard error.
    pub fn check(self) -> Result<Self, Error> {
        if self.status.success() {
            return Ok(self);
        }
        let shown = self.stderr.len().saturating_sub(SHOWN_BYTES);
        let stderr = String::from_utf8_lossy(&self.stderr[shown..]);
        let failed = AgentError::Process {
            program: self.program,
            status: self.status,
            stderr: crate::error::printable(stderr.trim_end()),
        };
        Err(Error::new(ErrorKind::ProcessFailed(self.status), failed))
    }

    /// The standard output as text; invalid UTF-8 is replaced.
    pub fn text(&self) -> String {
        String::from_utf8_lossy(&self.stdout).into_owned()
    }
}

impl std::fmt::Debug for Output {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Output")
            .field("status", &self.status)
            .field("stdout", &String::from_utf8_lossy(&self.stdout))
            .field("stderr", &String::from_utf8_lossy(&self.stderr))
            .field("truncated", &self.truncated)
            .finish()
    }
}

#[cfg(test)]
mod tests {
    use std::io::Write;

    use super::*;
    use crate::agent::tests::{agent_of, exited, heard};
    use crate::config::AgentConfig;
    use crate::protocol::{Channel, Frame, Reply};

    /// Only a test that fails waits for it.
    const PATIENCE: Duration = Duration::from_secs(60);

    #[tokio::test(flavor = "multi_thread")]
    async fn input_that_nobody_can_write_to_is_at_its_end() {
        let (agent, mut guests) = agent_of(AgentConfig::new(), 1);
        let mut guest = guests.remove(0);
        guest.set_read_timeout(Some(PATIENCE)).unwrap();
        // It ends when its input does.
        let cat = std::thread::spawn(move || {
            for _ in 0..2 {
                heard(&mut guest);
                guest.write_all(&Frame::message(&Reply::Started(7))).unwrap();
                assert_eq!(heard(&mut guest), (Channel::Data as u8, Vec::new()));
                guest.write_all(&exited(0)).unwrap();
            }
        });
        let command = || agent.command("cat").stdin_piped();
        let output = command().output().await.unwrap();
        assert!(output.status.success() && output.stdout.is_empty(), "{output:?}");
        assert!(command().status().await.unwrap().success());
        cat.join().unwrap();
    }
}

//! A program that runs in the guest: its streams, signals, its end.
//!
//! A task serves it: it reads frames and hands pieces to the streams, and writes what they say. What a
//! stream holds is bounded by the window that its reader has opened, and an agent that sends more breaks
//! the protocol.

use std::future::{pending, poll_fn};
use std::sync::{Arc, Mutex, PoisonError};

use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::sync::{mpsc, oneshot};
use tokio::task::JoinHandle;

use super::AgentError;
use super::calls::Calls;
use super::connection::{Connection, FrameWriter, lost};
use super::pulse::Beat;
use super::streams::{Outbox, Outgoing, Pipe, ProcessInput, ProcessOutput, Window};
use crate::error::Error;
use crate::exit::ProcessStatus;
use crate::protocol::{Call, Channel, Control, Exec, Exit, ExitCode, Reply, WindowSize, Wire};

/// A program that runs in the guest.
///
/// Its streams apply back-pressure: a program whose output nobody reads waits, after 256 KiB. Dropping a
/// `Process` kills the program's process group, as does the end of this process. A program whose
/// VM is suspended and restored goes on in the guest without its streams, and calls here fail with
/// [`ErrorKind::Agent`](crate::ErrorKind::Agent).
#[derive(Debug)]
#[must_use = "dropping it kills the program"]
pub struct Process {
    /// The standard input, where it is open: shutting it down, or dropping it, is the end of the
    /// input.
    pub stdin: Option<ProcessInput>,
    /// The standard output, or what the terminal shows.
    pub stdout: Option<ProcessOutput>,
    /// The standard error; empty for a program with a terminal.
    pub stderr: Option<ProcessOutput>,
    id: u32,
    outbox: Outbox,
    end: oneshot::Receiver<Result<ProcessStatus, Error>>,
    /// What `end` said: it says it once.
    ended: Option<ProcessStatus>,
    tasks: Vec<AbortOnDrop>,
}

#[derive(Debug)]
struct AbortOnDrop(JoinHandle<()>);

impl Drop for AbortOnDrop {
    fn drop(&mut self) {
        self.0.abort();
    }
}

impl Process {
    pub(super) async fn start(calls: &Calls, exec: Exec) -> Result<Self, Error> {
        let has_input = exec.stdin || exec.terminal.is_some();
        let program = exec.program.argv.first().map(|name| name.0.clone()).unwrap_or_default();
        let mut connection = calls.call(&Call::Exec(exec)).await?;
        match connection.reply(calls.vsock()).await? {
            Reply::Started(id) => Ok(Self::serve(connection, calls, id, has_input)),
            Reply::Failed(failure) => Err(AgentError::exec(&program, failure)),
            _ => Err(AgentError::Unexpected.into()),
        }
    }

    /// A program that has been started.
    pub(super) fn serve(connection: Connection, calls: &Calls, id: u32, has_input: bool) -> Self {
        let (outbox, outgoing) = mpsc::unbounded_channel();
        let (at_end, end) = oneshot::channel();
        let pipe = |channel| Arc::new(Pipe::new(channel, outbox.clone()));
        let (stdout, stderr) = (pipe(Channel::Stdout), pipe(Channel::Stderr));
        let window = Arc::new(Window::default());
        let session = Session {
            stdout: Arc::clone(&stdout),
            stderr: Arc::clone(&stderr),
            window: Arc::clone(&window),
            beat: calls.pulse().begin(),
            calls: calls.clone(),
        };
        let tasks = vec![AbortOnDrop(tokio::spawn(session.run(connection, outgoing, at_end)))];
        Self {
            stdin: has_input.then(|| ProcessInput::new(window, outbox.clone())),
            stdout: Some(ProcessOutput::new(stdout)),
            stderr: Some(ProcessOutput::new(stderr)),
            id,
            outbox,
            end,
            ended: None,
            tasks,
        }
    }

    /// Its process id in the guest, which is that of its process group too.
    pub fn id(&self) -> u32 {
        self.id
    }

    /// Sends a signal to its process group. Nothing happens where it has ended.
    pub fn signal(&self, signal: i32) {
        self.send(Control::Signal(signal));
    }

    /// Kills its process group.
    pub fn kill(&self) {
        self.signal(9);
    }

    /// Tells its terminal another size.
    pub fn resize(&self, rows: u16, columns: u16) {
        self.send(Control::Resize(WindowSize { rows, columns }));
    }

    /// Waits for its end. All that it has written has come then, and can still be read; what it
    /// left behind in the background may go on running.
    ///
    /// A program that writes more than 256 KiB waits for a reader: read, or drop, `stdout` and
    /// `stderr` meanwhile. One that is killed while it waits has its end nevertheless, unless it
    /// made its pipe larger (F_SETPIPE_SZ).
    ///
    /// # Errors
    ///
    /// [`ErrorKind::GuestEnded`](crate::ErrorKind::GuestEnded) and
    /// [`ErrorKind::Agent`](crate::ErrorKind::Agent), where the guest or the connection ended before
    /// the program; [`ErrorKind::Timeout`](crate::ErrorKind::Timeout) where the agent does not answer any more,
    /// which is found within 75 s. A VM that is paused may be so for as long as it likes.
    pub async fn wait(&mut self) -> Result<ProcessStatus, Error> {
        if let Some(status) = self.ended {
            return Ok(status);
        }
        if self.end.is_terminated() {
            return Err(AgentError::Lost.into());
        }
        match (&mut self.end).await {
            Ok(status) => {
                let status = status?;
                self.ended = Some(status);
                Ok(status)
            }
            // The runtime is going down.
            Err(_) => Err(AgentError::Lost.into()),
        }
    }

    /// Writes this input, and ends it, whoever waits for what meanwhile.
    pub(super) fn feed(&mut self, mut stdin: ProcessInput, input: Vec<u8>) {
        let feeding = async move {
            // A program need not read its input.
            let _ = stdin.write_all(&input).await;
        };
        self.tasks.push(AbortOnDrop(tokio::spawn(feeding)));
    }

    fn send(&self, control: Control) {
        // The connection may have ended: so has the program, or `wait` will say so.
        let _ = self.outbox.send(Outgoing::Control(control));
    }
}

/// Collects both streams, to their ends, or to the limit where what is beyond is to be cut off.
pub(super) async fn read_all(
    (stdout, stderr): (Option<ProcessOutput>, Option<ProcessOutput>),
    limit: usize,
    cut: bool,
) -> Result<(Collected, Collected), Error> {
    let left = Mutex::new(limit);
    tokio::try_join!(collect(stdout, &left, cut), collect(stderr, &left, cut))
        .map_err(|TooMuch| AgentError::Output { limit }.into())
}

/// What a stream brought.
#[derive(Default)]
pub(super) struct Collected {
    pub(super) bytes: Vec<u8>,
    /// There was more.
    pub(super) is_cut: bool,
}

struct TooMuch;

async fn collect(
    stream: Option<ProcessOutput>,
    left: &Mutex<usize>,
    cut: bool,
) -> Result<Collected, TooMuch> {
    let mut collected = Vec::new();
    let Some(mut stream) = stream else { return Ok(Collected::default()) };
    loop {
        let before = collected.len();
        collected.reserve(32 << 10);
        // The end of the connection is the end of the stream; `wait` says why.
        let Ok(bytes @ 1..) = stream.read_buf(&mut collected).await else {
            return Ok(Collected { bytes: collected, is_cut: false });
        };
        debug_assert_eq!(before + bytes, collected.len());
        let mut left = left.lock().unwrap_or_else(PoisonError::into_inner);
        match left.checked_sub(bytes) {
            Some(rest) => *left = rest,
            // With the stream all that comes is thrown away.
            None if cut => {
                collected.truncate(before + std::mem::take(&mut *left));
                return Ok(Collected { bytes: collected, is_cut: true });
            }
            None => return Err(TooMuch),
        }
    }
}

/// What goes to the agent, one frame after the other.
struct Outflow {
    outgoing: mpsc::UnboundedReceiver<Outgoing>,
    current: Option<Outgoing>,
    /// The frame that `current` is, and how much of it was written.
    frame: Vec<u8>,
    written: usize,
}

impl Outflow {
    fn new(outgoing: mpsc::UnboundedReceiver<Outgoing>) -> Self {
        Self { outgoing, current: None, frame: Vec::new(), written: 0 }
    }

    /// Writes what comes next, and gives it back when the connection has taken it. Whoever stops waiting goes on
    /// by the next call.
    async fn write(&mut self, writer: &mut FrameWriter) -> Outgoing {
        loop {
            while let Some(rest @ [_, ..]) = self.frame.get(self.written..) {
                match poll_fn(|context| writer.poll_raw(context, rest)).await {
                    Ok(count) => self.written += count,
                    // What is read says why.
                    Err(_) => pending().await,
                }
            }
            if let Some(written) = self.current.take() {
                return written;
            }
            match self.outgoing.recv().await {
                Some(next) => {
                    (self.frame, self.written) = (next.to_frame(), 0);
                    self.current = Some(next);
                }
                None => pending().await,
            }
        }
    }

    /// Whether the connection is between two frames.
    fn is_between(&self) -> bool {
        self.written == 0 || self.written == self.frame.len()
    }
}

/// The host's side of a program that runs.
struct Session {
    stdout: Arc<Pipe>,
    stderr: Arc<Pipe>,
    window: Arc<Window>,
    beat: Beat,
    calls: Calls,
}

impl Drop for Session {
    /// Where the process is dropped, this ends wherever it stands; who has its streams is not to wait for ever.
    fn drop(&mut self) {
        self.end_streams();
    }
}

impl Session {
    async fn run(
        mut self,
        mut connection: Connection,
        outgoing: mpsc::UnboundedReceiver<Outgoing>,
        at_end: oneshot::Sender<Result<ProcessStatus, Error>>,
    ) {
        let mut outflow = Outflow::new(outgoing);
        let end = self.serve(&mut connection, &mut outflow).await;
        self.end_streams();
        let kept = match end {
            Ok(_) if outflow.is_between() => {
                self.calls.keep(connection);
                None
            }
            Ok(_) => None,
            Err(_) => {
                connection.end_call();
                Some(connection)
            }
        };
        // Whoever started it may be gone.
        let _ = at_end.send(end);
        if kept.is_some() {
            // Until the process is dropped: the end of the connection kills the program.
            pending().await
        }
    }

    fn end_streams(&self) {
        self.stdout.end();
        self.stderr.end();
        self.window.close();
    }

    async fn serve(
        &mut self,
        connection: &mut Connection,
        outflow: &mut Outflow,
    ) -> Result<ProcessStatus, Error> {
        loop {
            let frame = tokio::select! {
                biased;
                frame = connection.reader.next() => frame,
                silent = self.beat.stops() => {
                    return Err(AgentError::Hangs { silent }.into());
                }
                written = outflow.write(&mut connection.writer) => {
                    self.was_written(&written);
                    continue;
                }
            };
            let vsock = self.calls.vsock();
            let Some((channel, bytes)) = frame.map_err(|error| error.explain(vsock))? else {
                return Err(lost(vsock));
            };
            match channel {
                Channel::Stdout => self.stdout.push(bytes)?,
                Channel::Stderr => self.stderr.push(bytes)?,
                Channel::Data | Channel::Call => return Err(AgentError::Unexpected.into()),
                Channel::Message => {
                    if let Some(status) = self.message(&bytes)? {
                        return Ok(status);
                    }
                }
            }
        }
    }

    fn was_written(&self, written: &Outgoing) {
        match written {
            Outgoing::Control(_) => {}
            Outgoing::Input(bytes) => self.window.was_written(bytes.len()),
            Outgoing::Credit(Channel::Stderr, bytes) => self.stderr.was_told(*bytes),
            Outgoing::Credit(_, bytes) => self.stdout.was_told(*bytes),
        }
    }

    /// A message: more room for the input, or the program's end.
    fn message(&self, bytes: &[u8]) -> Result<Option<ProcessStatus>, Error> {
        match Reply::from_bytes(bytes).map_err(AgentError::Malformed)? {
            Reply::Credit(credit) => {
                self.window.open(credit.bytes as usize);
                Ok(None)
            }
            Reply::Exited(exit) => Ok(Some(status(&exit))),
            _ => Err(AgentError::Unexpected.into()),
        }
    }
}

fn status(exit: &Exit) -> ProcessStatus {
    match exit.status {
        _ if exit.timed_out => ProcessStatus::TimedOut,
        ExitCode::Code(code) => ProcessStatus::Code(code),
        ExitCode::Signal(signal) => ProcessStatus::Signal(signal),
    }
}

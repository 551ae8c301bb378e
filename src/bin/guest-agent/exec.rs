//! A program that the host runs: its streams on one connection, its end the last message.

use std::collections::VecDeque;
use std::fs::{File, OpenOptions};
use std::io::{self, Read, Write};
use std::iter;
use std::os::fd::{AsFd, OwnedFd};
use std::os::unix::fs::{OpenOptionsExt, fchown};
use std::os::unix::net::UnixStream;
use std::time::{Duration, Instant};

use crate::accounts::Account;
use crate::children::Child;
use crate::connection::{Connection, invalid};
use crate::output::{Output, Outputs};
use crate::program;
use crate::protocol::{
    Channel, Control, Credit, Decoder, Exec, Exit, ExitCode, Failure, Frame, HEADER_BYTES, Reply,
    WINDOW_BYTES, WindowSize,
};
use crate::sys::{self, POLLIN, POLLOUT, PollFd, WaitStatus};

const SIGKILL: i32 = 9;
const O_NOCTTY: i32 = 0o400;

/// Input that is taken is made known when it is so much.
const CREDIT_BYTES: usize = WINDOW_BYTES / 4;

/// How long the end of a stream waits for that of the program, to go to the host with it. The kernel
/// closes what a program has open just before it is ended.
const HOLD: Duration = Duration::from_millis(5);

/// What a program that ends its input with a terminal reads: Ctrl-D.
const END_OF_TRANSMISSION: u8 = 4;

/// Runs a program until its end. The connection comes back where the host still has it.
pub(crate) fn serve(mut connection: Connection, exec: &Exec) -> io::Result<Option<Connection>> {
    let started = Instant::now();
    match start(exec) {
        Err(failure) => {
            connection.answer(Err(failure))?;
            Ok(Some(connection))
        }
        Ok((child, streams)) => {
            connection.send(&Reply::Started(child.pid as u32))?;
            let stream = connection.into_stream();
            stream.set_nonblocking(true)?;
            let timeout = exec.timeout_ms.map(Duration::from_millis);
            let deadline = timeout.and_then(|timeout| started.checked_add(timeout));
            Session::new(stream, child, streams, deadline).run()
        }
    }
}

/// Whether a stream that takes nothing any more was reset, not closed: what is read of it says so.
fn is_reset(stream: &mut UnixStream) -> bool {
    let mut buffer = vec![0; 4096];
    loop {
        match stream.read(&mut buffer) {
            Ok(0) => return false,
            Ok(_) => {}
            Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
            Err(error) => return error.kind() != io::ErrorKind::WouldBlock,
        }
    }
}

/// The agent's ends of a program's streams.
struct Streams {
    stdin: Option<File>,
    outputs: Outputs,
    is_terminal: bool,
}

fn start(exec: &Exec) -> Result<(Child, Streams), Failure> {
    let account = program::account(&exec.program)?;
    let made = match &exec.terminal {
        Some(size) => open_terminal(size, account.as_ref()),
        None => open_pipes(exec.stdin),
    };
    let (theirs, streams) =
        made.map_err(|error| Failure::of("make the program's streams", &error))?;
    let child = program::start(&exec.program, account, theirs, streams.is_terminal)?;
    Ok((child, streams))
}

fn open_pipes(stdin: bool) -> io::Result<([OwnedFd; 3], Streams)> {
    let (stdin_theirs, stdin) = if stdin {
        let (theirs, ours) = io::pipe()?;
        sys::set_nonblocking(&ours)?;
        (OwnedFd::from(theirs), Some(File::from(OwnedFd::from(ours))))
    } else {
        (File::open("/dev/null")?.into(), None)
    };
    let (stdout, stdout_theirs) = io::pipe()?;
    let (stderr, stderr_theirs) = io::pipe()?;
    let outputs = Outputs(vec![
        Output::new(Channel::Stdout, OwnedFd::from(stdout))?,
        Output::new(Channel::Stderr, OwnedFd::from(stderr))?,
    ]);
    let theirs = [stdin_theirs, stdout_theirs.into(), stderr_theirs.into()];
    Ok((theirs, Streams { stdin, outputs, is_terminal: false }))
}

fn open_terminal(
    size: &WindowSize,
    account: Option<&Account>,
) -> io::Result<([OwnedFd; 3], Streams)> {
    let mut options = OpenOptions::new();
    options.read(true).write(true).custom_flags(O_NOCTTY);
    let master = options.open("/dev/ptmx")?;
    let peer = sys::open_terminal_peer(&master)?;
    sys::set_terminal_size(&master, size.rows, size.columns)?;
    if let Some(account) = account {
        fchown(&peer, Some(account.uid), None)?;
    }
    let theirs = [peer.try_clone()?, peer.try_clone()?, peer];
    let stdin = Some(master.try_clone()?);
    let outputs = Outputs(vec![Output::terminal(master.into())?]);
    Ok((theirs, Streams { stdin, outputs, is_terminal: true }))
}

/// A program that runs, and its connection.
struct Session {
    /// None when the host has closed it, or it was reset.
    stream: Option<UnixStream>,
    decoder: Decoder,
    /// Frames that are to be written, the first of them from `sent` on.
    out: Vec<u8>,
    sent: usize,
    /// Until when ends of streams, where they are all that is to be written, wait for the program's. It
    /// stays when that is over, so that none waits twice.
    held: Option<Instant>,
    input: Input,
    outputs: Outputs,
    child: Child,
    status: Option<WaitStatus>,
    deadline: Option<Instant>,
    timed_out: bool,
}

/// What goes to the program's standard input.
struct Input {
    file: Option<File>,
    is_terminal: bool,
    queue: VecDeque<u8>,
    /// How much more the host may send.
    window: usize,
    /// What was taken since the host was last told.
    taken: usize,
    ended: bool,
    /// Of a terminal: the last byte ends no line, and an end behind it would only end that.
    is_in_line: bool,
}

impl Session {
    fn new(stream: UnixStream, child: Child, streams: Streams, deadline: Option<Instant>) -> Self {
        let input = Input {
            file: streams.stdin,
            is_terminal: streams.is_terminal,
            queue: VecDeque::new(),
            window: WINDOW_BYTES,
            taken: 0,
            ended: false,
            is_in_line: false,
        };
        Self {
            stream: Some(stream),
            decoder: Decoder::default(),
            out: Vec::new(),
            sent: 0,
            held: None,
            input,
            outputs: streams.outputs,
            child,
            status: None,
            deadline,
            timed_out: false,
        }
    }

    fn run(mut self) -> io::Result<Option<Connection>> {
        let mut buffer = Vec::new();
        while !self.is_over() {
            self.step(&mut buffer)?;
        }
        self.outputs.drain_rest();
        if let Some(status) = self.status {
            let status = match status.signal() {
                Some(signal) => ExitCode::Signal(signal),
                None => ExitCode::Code(status.code()),
            };
            let exit = Exit { status, timed_out: self.timed_out };
            self.out.extend(Frame::message(&Reply::Exited(exit)));
        }
        // Nothing is left to do beside this: it may wait.
        let Some(mut stream) = self.stream else { return Ok(None) };
        stream.set_nonblocking(false)?;
        stream.write_all(self.out.get(self.sent..).unwrap_or_default())?;
        Ok(Some(Connection::with_unread(stream, self.decoder.into_rest())))
    }

    /// Whether it has ended, and all that it wrote before was taken.
    fn is_over(&self) -> bool {
        self.status.is_some() && (self.stream.is_none() || self.outputs.are_over())
    }

    /// Waits for something to do, and does it.
    fn step(&mut self, buffer: &mut Vec<u8>) -> io::Result<()> {
        let now = Instant::now();
        let is_full = self.is_full(now);
        let mut fds = vec![
            PollFd::new(
                self.stream.as_ref().map(AsFd::as_fd),
                if is_full { POLLIN | POLLOUT } else { POLLIN },
            ),
            PollFd::new(self.status.is_none().then(|| self.child.end()), POLLIN),
            PollFd::new(self.input.to_write().map(AsFd::as_fd), POLLOUT),
        ];
        let outputs = self.outputs.0.iter();
        fds.extend(outputs.map(|output| PollFd::new(output.to_read(is_full), POLLIN)));
        sys::poll(&mut fds, self.timeout(now))?;
        let now = Instant::now();
        // One that has ended by itself has done so in time, as far as anybody can tell: the guest may have stood still.
        let has_ended = self.status.is_some() || fds[1].is_ready();
        if self.deadline.is_some_and(|deadline| now >= deadline) && !has_ended {
            self.deadline = None;
            self.timed_out = true;
            let _ = self.child.signal(SIGKILL);
        }
        // The end first: what is in the pipes then is all that the program has written.
        if fds[1].is_ready() {
            self.status = Some(self.child.wait()?);
            self.outputs.end_with(now);
        }
        for (output, fd) in self.outputs.0.iter_mut().zip(&fds[3..]) {
            let out = self.stream.as_ref().map(|_| &mut self.out);
            output.advance(fd.is_ready(), is_full, now, out, buffer);
        }
        if fds[2].is_ready() {
            self.input.write();
            self.grant();
        }
        if fds[0].is(POLLIN) {
            self.receive(buffer);
        }
        self.send(now);
        Ok(())
    }

    /// Whether so much waits to be written that no more output is read.
    fn is_full(&self, now: Instant) -> bool {
        self.stream.is_some() && self.sent < self.out.len() && self.until(now).is_none()
    }

    /// How long nothing is written, to go to the host with what comes next.
    fn until(&self, now: Instant) -> Option<Instant> {
        self.held.filter(|until| now < *until)
    }

    fn timeout(&self, now: Instant) -> Option<Duration> {
        let deadline = self.deadline.filter(|_| self.status.is_none());
        let quiet = self.outputs.deadline().filter(|_| !self.is_full(now));
        let first = [deadline, quiet, self.until(now)].into_iter().flatten().min();
        first.map(|deadline| deadline.saturating_duration_since(now))
    }

    /// Reads what the host says.
    fn receive(&mut self, buffer: &mut Vec<u8>) {
        let Some(stream) = &mut self.stream else { return };
        buffer.resize(64 << 10, 0);
        let result = match stream.read(buffer) {
            // The host wants no more of it.
            Ok(0) => Err(io::ErrorKind::UnexpectedEof.into()),
            Ok(count) => self.take(&buffer[..count]),
            Err(error) => Err(error),
        };
        let Err(error) = result else { return };
        match error.kind() {
            io::ErrorKind::WouldBlock | io::ErrorKind::Interrupted => {}
            // Closed, or no host of ours.
            io::ErrorKind::UnexpectedEof | io::ErrorKind::InvalidData => {
                let _ = self.child.signal(SIGKILL);
                self.detach();
            }
            // Reset: this VM was restored, and its program goes on.
            _ => self.detach(),
        }
    }

    /// Goes on without a connection, as far as the program does.
    fn detach(&mut self) {
        self.stream = None;
        self.outputs.credit_all();
        self.out = Vec::new();
        self.sent = 0;
        self.held = None;
        self.input.queue = VecDeque::new();
        self.input.file = None;
    }

    fn take(&mut self, bytes: &[u8]) -> io::Result<()> {
        self.decoder.feed(bytes);
        while let Some(frame) = self.decoder.next().map_err(invalid)? {
            if frame.channel == Channel::Data {
                self.input.take(frame.bytes)?;
                continue;
            }
            match frame.parse().map_err(invalid)? {
                Control::Credit(Credit { channel, bytes }) => {
                    self.outputs.credit(channel, bytes as usize);
                }
                Control::Signal(signal) => {
                    // A number that is no signal is an error of the host that nobody waits for.
                    let _ = self.child.signal(signal);
                }
                Control::Resize(size) => {
                    if let Some(file) = self.input.file.as_ref().filter(|_| self.input.is_terminal)
                    {
                        let _ = sys::set_terminal_size(file, size.rows, size.columns);
                    }
                }
            }
        }
        self.input.write();
        self.grant();
        Ok(())
    }

    /// Lets the host send as much input as was taken.
    fn grant(&mut self) {
        if self.input.taken >= CREDIT_BYTES && !self.input.ended {
            let bytes = self.input.taken;
            self.input.window += bytes;
            self.input.taken = 0;
            let credit = Credit { channel: Channel::Data as u8, bytes: bytes as u32 };
            self.out.extend(Frame::message(&Reply::Credit(credit)));
        }
    }

    /// Whether what is to be written had better wait for what comes next.
    fn is_held(&mut self, now: Instant) -> bool {
        // The program's end is all that is missing, and comes next.
        if self.is_over() {
            return true;
        }
        let mut frames = self.out.chunks(HEADER_BYTES);
        let is_ends = !self.out.is_empty() && frames.all(|frame| frame.starts_with(&[0; 4]));
        if !is_ends || self.status.is_some() || self.sent > 0 {
            self.held = None;
            return false;
        }
        self.held.get_or_insert(now + HOLD);
        self.until(now).is_some()
    }

    /// Writes as much as goes.
    fn send(&mut self, now: Instant) {
        if self.is_held(now) {
            return;
        }
        while self.sent < self.out.len() {
            let Some(stream) = &mut self.stream else { return };
            match stream.write(&self.out[self.sent..]) {
                Ok(count) => self.sent += count,
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => return,
                Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
                Err(error) if error.kind() == io::ErrorKind::BrokenPipe => {
                    if !is_reset(stream) {
                        let _ = self.child.signal(SIGKILL);
                    }
                    return self.detach();
                }
                Err(_) => return self.detach(),
            }
        }
        self.out.clear();
        self.sent = 0;
        self.held = None;
    }
}

impl Input {
    /// The file, if there is something for it.
    fn to_write(&self) -> Option<&File> {
        self.file.as_ref().filter(|_| !self.queue.is_empty())
    }

    fn take(&mut self, bytes: &[u8]) -> io::Result<()> {
        let left = self.window.checked_sub(bytes.len()).filter(|_| !self.ended);
        self.window = left.ok_or(io::ErrorKind::InvalidData)?;
        self.ended = bytes.is_empty();
        match self.file {
            Some(_) => self.queue.extend(bytes),
            None => self.taken += bytes.len(),
        }
        if let Some(last) = bytes.last() {
            self.is_in_line = !matches!(*last, b'\n' | b'\r' | END_OF_TRANSMISSION);
        }
        if self.ended && self.is_terminal && self.file.is_some() {
            let count = if self.is_in_line { 2 } else { 1 };
            self.queue.extend(iter::repeat_n(END_OF_TRANSMISSION, count));
        }
        Ok(())
    }

    /// Writes as much as goes.
    fn write(&mut self) {
        while let Some(file) = &mut self.file {
            let (front, _) = self.queue.as_slices();
            if front.is_empty() {
                // A terminal's input ends with its output.
                if self.ended && !self.is_terminal {
                    self.file = None;
                }
                return;
            }
            match file.write(front) {
                Ok(count) => {
                    self.queue.drain(..count);
                    self.taken += count;
                }
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => return,
                Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
                // Nobody reads it: the host sends it for nothing.
                Err(_) => {
                    self.taken += self.queue.len();
                    self.queue.clear();
                    self.file = None;
                }
            }
        }
    }
}

#[cfg(test)]
#[path = "tests/exec.rs"]
pub(crate) mod tests;

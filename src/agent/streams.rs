//! The streams of a program in the guest, bounded by windows: output that came and was not read,
//! and the room that is left for input.

use std::collections::VecDeque;
use std::fmt;
use std::io;
use std::pin::Pin;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::task::{Context, Poll, Waker};

use tokio::io::{AsyncRead, AsyncWrite, ReadBuf};
use tokio::sync::mpsc;

use super::AgentError;
use crate::error::Error;
use crate::protocol::{Channel, Control, Credit, Frame, LAST_BYTES, MAX_DATA_BYTES, WINDOW_BYTES};

/// The agent is told of room again when this much was read: a message for a quarter of a window.
const CREDIT_BYTES: usize = WINDOW_BYTES / 4;

/// Small pieces are kept as one up to this.
const JOINED_BYTES: usize = 4 << 10;

/// What is on its way to the agent. Its reader's credit and its input count until the connection has taken
/// them, so that a guest that takes nothing, whatever else it says, makes the host keep no more.
#[derive(Debug)]
pub(super) enum Outgoing {
    /// A signal, or another size of the terminal.
    Control(Control),
    /// A piece of the input; an empty one is its end.
    Input(Vec<u8>),
    /// So much of an output was read.
    Credit(Channel, usize),
}

/// To the task that writes it.
pub(super) type Outbox = mpsc::UnboundedSender<Outgoing>;

impl Outgoing {
    pub(super) fn to_frame(&self) -> Vec<u8> {
        match self {
            Self::Control(control) => Frame::message(control),
            Self::Input(bytes) => {
                [&Frame::header(Channel::Data, bytes.len())[..], &bytes[..]].concat()
            }
            Self::Credit(channel, bytes) => {
                let credit = Credit { channel: *channel as u8, bytes: *bytes as u32 };
                Frame::message(&Control::Credit(credit))
            }
        }
    }
}

/// Output that came and was not read: at most a window of it, and the last of its program's.
pub(super) struct Pipe {
    channel: Channel,
    outbox: Outbox,
    state: Mutex<PipeState>,
}

#[derive(Default)]
struct PipeState {
    pieces: VecDeque<Vec<u8>>,
    /// Of the first piece, what was read.
    read: usize,
    /// What the agent takes for unread: what came, less what it was told of.
    charged: usize,
    /// What was read, and nobody was asked to tell the agent of.
    untold: usize,
    ended: bool,
    /// Nobody will read: what comes is thrown away.
    abandoned: bool,
    waker: Option<Waker>,
}

impl PipeState {
    /// Behind the last piece, where both are small: what a piece takes beside its bytes is more than those, and
    /// a guest can send many.
    fn keep(&mut self, piece: Vec<u8>) {
        match self.pieces.back_mut() {
            Some(last) if last.len() + piece.len() <= JOINED_BYTES => last.extend(piece),
            _ => self.pieces.push_back(piece),
        }
    }
}

impl Pipe {
    pub(super) fn new(channel: Channel, outbox: Outbox) -> Self {
        Self { channel, outbox, state: Mutex::default() }
    }

    /// Takes a piece that came; an empty one is the end.
    pub(super) fn push(&self, piece: Vec<u8>) -> Result<(), Error> {
        let mut state = self.lock();
        let bytes = piece.len();
        state.charged += bytes;
        if state.charged > WINDOW_BYTES + LAST_BYTES {
            return Err(AgentError::Window.into());
        }
        if bytes == 0 {
            state.ended = true;
        } else if state.abandoned {
            self.was_read(&mut state, bytes);
        } else {
            state.keep(piece);
        }
        wake(&mut state.waker);
        Ok(())
    }

    /// The agent was told that so much was read.
    pub(super) fn was_told(&self, bytes: usize) {
        self.lock().charged -= bytes;
    }

    /// Nothing more will come.
    pub(super) fn end(&self) {
        let mut state = self.lock();
        state.ended = true;
        wake(&mut state.waker);
    }

    fn read(&self, context: &Context<'_>, buffer: &mut ReadBuf<'_>) -> Poll<()> {
        let mut state = self.lock();
        let mut taken = 0;
        while let Some(piece) = state.pieces.front() {
            let rest = piece.get(state.read..).unwrap_or_default();
            let now = rest.len().min(buffer.remaining());
            buffer.put_slice(&rest[..now]);
            taken += now;
            if now < rest.len() {
                state.read += now;
                break;
            }
            state.pieces.pop_front();
            state.read = 0;
        }
        if taken == 0 && !state.ended && buffer.remaining() > 0 {
            state.waker = Some(context.waker().clone());
            return Poll::Pending;
        }
        self.was_read(&mut state, taken);
        Poll::Ready(())
    }

    fn abandon(&self) {
        let mut state = self.lock();
        let (read, pieces) = (state.read, std::mem::take(&mut state.pieces));
        state.abandoned = true;
        let left = pieces.iter().map(Vec::len).sum::<usize>() - read;
        self.was_read(&mut state, left);
    }

    fn was_read(&self, state: &mut PipeState, bytes: usize) {
        state.untold += bytes;
        if state.untold >= CREDIT_BYTES && !state.ended {
            let bytes = std::mem::take(&mut state.untold);
            // The connection may have ended.
            let _ = self.outbox.send(Outgoing::Credit(self.channel, bytes));
        }
    }

    fn lock(&self) -> MutexGuard<'_, PipeState> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

fn wake(waker: &mut Option<Waker>) {
    if let Some(waker) = waker.take() {
        waker.wake();
    }
}

/// The standard output or error of a [`Process`](super::Process), for tokio's `AsyncReadExt`. It
/// ends when the program and all that it left behind have closed it, or when the program has
/// ended. Dropping it throws away what the program writes.
pub struct ProcessOutput {
    pipe: Arc<Pipe>,
}

impl ProcessOutput {
    pub(super) fn new(pipe: Arc<Pipe>) -> Self {
        Self { pipe }
    }
}

impl AsyncRead for ProcessOutput {
    fn poll_read(
        self: Pin<&mut Self>,
        context: &mut Context<'_>,
        buffer: &mut ReadBuf<'_>,
    ) -> Poll<io::Result<()>> {
        self.pipe.read(context, buffer).map(Ok)
    }
}

impl Drop for ProcessOutput {
    fn drop(&mut self) {
        self.pipe.abandon();
    }
}

impl fmt::Debug for ProcessOutput {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("ProcessOutput")
    }
}

/// The room that the agent has for a program's input.
pub(super) struct Window(Mutex<WindowState>);

struct WindowState {
    room: usize,
    /// What waits to be written: never more than a window, whatever the agent says that it has room for.
    waiting: usize,
    closed: bool,
    waker: Option<Waker>,
}

impl Default for Window {
    fn default() -> Self {
        let state = WindowState { room: WINDOW_BYTES, waiting: 0, closed: false, waker: None };
        Self(Mutex::new(state))
    }
}

impl Window {
    /// There is more room; never more than a window of it.
    pub(super) fn open(&self, bytes: usize) {
        let mut state = self.lock();
        state.room = state.room.saturating_add(bytes).min(WINDOW_BYTES);
        wake(&mut state.waker);
    }

    /// So much input was written.
    pub(super) fn was_written(&self, bytes: usize) {
        let mut state = self.lock();
        state.waiting -= bytes;
        wake(&mut state.waker);
    }

    /// Nobody reads any more.
    pub(super) fn close(&self) {
        let mut state = self.lock();
        state.closed = true;
        wake(&mut state.waker);
    }

    /// Takes room for up to `bytes`.
    fn take(&self, context: &Context<'_>, bytes: usize) -> Poll<io::Result<usize>> {
        let mut state = self.lock();
        if state.closed {
            return Poll::Ready(Err(io::ErrorKind::BrokenPipe.into()));
        }
        let room = state.room.min(WINDOW_BYTES - state.waiting);
        let taken = bytes.min(room).min(MAX_DATA_BYTES);
        if taken == 0 && bytes > 0 {
            state.waker = Some(context.waker().clone());
            return Poll::Pending;
        }
        state.room -= taken;
        state.waiting += taken;
        Poll::Ready(Ok(taken))
    }

    fn lock(&self) -> MutexGuard<'_, WindowState> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// The standard input of a [`Process`](super::Process), for tokio's `AsyncWriteExt`. Its
/// `shutdown`, and dropping it, is the end of the input. Writes fail with `BrokenPipe` when the
/// program has ended.
pub struct ProcessInput {
    window: Arc<Window>,
    outbox: Outbox,
    open: bool,
}

impl ProcessInput {
    pub(super) fn new(window: Arc<Window>, outbox: Outbox) -> Self {
        Self { window, outbox, open: true }
    }

    fn send(&self, bytes: &[u8]) -> io::Result<()> {
        let sent = self.outbox.send(Outgoing::Input(bytes.to_vec()));
        sent.map_err(|_| io::ErrorKind::BrokenPipe.into())
    }

    fn end(&mut self) {
        if std::mem::take(&mut self.open) {
            let _ = self.send(&[]);
        }
    }
}

impl AsyncWrite for ProcessInput {
    fn poll_write(
        self: Pin<&mut Self>,
        context: &mut Context<'_>,
        bytes: &[u8],
    ) -> Poll<io::Result<usize>> {
        if !self.open {
            return Poll::Ready(Err(io::ErrorKind::BrokenPipe.into()));
        }
        self.window.take(context, bytes.len()).map(|taken| {
            let taken = taken?;
            // An empty frame would be the end.
            if taken > 0 {
                self.send(&bytes[..taken])?;
            }
            Ok(taken)
        })
    }

    fn poll_flush(self: Pin<&mut Self>, _: &mut Context<'_>) -> Poll<io::Result<()>> {
        Poll::Ready(Ok(()))
    }

    fn poll_shutdown(mut self: Pin<&mut Self>, _: &mut Context<'_>) -> Poll<io::Result<()>> {
        self.end();
        Poll::Ready(Ok(()))
    }
}

impl Drop for ProcessInput {
    fn drop(&mut self) {
        self.end();
    }
}

impl fmt::Debug for ProcessInput {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("ProcessInput")
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn many_tiny_pieces_take_little_more_than_their_bytes_and_come_in_order() {
        let (outbox, _outgoing) = mpsc::unbounded_channel();
        let pipe = Pipe::new(Channel::Stdout, outbox);
        let bytes: Vec<u8> = (0..WINDOW_BYTES + LAST_BYTES).map(|at| (at % 251) as u8).collect();
        let mut read = Vec::new();
        let context = Context::from_waker(Waker::noop());
        for (at, piece) in bytes.chunks(3).enumerate() {
            pipe.push(piece.to_vec()).unwrap();
            // In the middle of a piece that still grows.
            if at % 1000 == 0 {
                let mut buffer = [0; 2];
                let mut buffer = ReadBuf::new(&mut buffer);
                assert!(pipe.read(&context, &mut buffer).is_ready());
                read.extend_from_slice(buffer.filled());
            }
        }
        pipe.push(vec![0; MAX_DATA_BYTES]).unwrap_err();
        let kept = pipe
            .lock()
            .pieces
            .iter()
            .map(|piece| size_of_val(piece) + piece.capacity())
            .sum::<usize>();
        assert!(kept < 3 * bytes.len(), "{kept}");
        pipe.end();
        loop {
            let mut buffer = [0; 1000];
            let mut buffer = ReadBuf::new(&mut buffer);
            assert!(pipe.read(&context, &mut buffer).is_ready());
            if buffer.filled().is_empty() {
                break;
            }
            read.extend_from_slice(buffer.filled());
        }
        assert!(read == bytes);
    }
}

//! What a program writes, on its way to the host.

use std::fs::File;
use std::io::{self, Read};
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::time::{Duration, Instant};

use crate::drain::drain;
use crate::protocol::{Channel, Frame, LAST_BYTES, MAX_DATA_BYTES, WINDOW_BYTES};
use crate::sys;

/// What a terminal shows after its program's end comes within this time, or never.
const TERMINAL_PATIENCE: Duration = Duration::from_millis(20);

/// What is read of a program's output at first.
const FIRST_BYTES: usize = 4 << 10;

/// A pipe, or a terminal.
pub(crate) struct Output {
    channel: Channel,
    file: Option<File>,
    is_terminal: bool,
    /// How much the host takes.
    credit: usize,
    /// How much is to come of what the program has written, when it has ended.
    left: Option<usize>,
    quiet_at: Option<Instant>,
    is_over: bool,
}

pub(crate) struct Outputs(pub(crate) Vec<Output>);

impl Outputs {
    pub(crate) fn are_over(&self) -> bool {
        self.0.iter().all(|output| output.is_over)
    }

    /// The program has ended: what comes after this is of others.
    pub(crate) fn end_with(&mut self, now: Instant) {
        for output in &mut self.0 {
            let Some(file) = &output.file else { continue };
            output.left = Some(match output.is_terminal {
                true => 4 * WINDOW_BYTES,
                false => sys::bytes_to_read(file).unwrap_or(0),
            });
            output.quiet_at = output.is_terminal.then(|| now + TERMINAL_PATIENCE);
            output.credit = output.credit.saturating_add(LAST_BYTES);
        }
    }

    /// When to look again, though nothing came.
    pub(crate) fn deadline(&self) -> Option<Instant> {
        let waiting = self.0.iter().filter(|output| !output.is_over && output.credit > 0);
        waiting.filter_map(|output| output.quiet_at).min()
    }

    pub(crate) fn credit(&mut self, channel: u8, bytes: usize) {
        let found = self.0.iter_mut().find(|output| output.channel as u8 == channel);
        if let Some(output) = found {
            output.credit = output.credit.saturating_add(bytes);
        }
    }

    /// Nobody waits for it any more: it is read as it comes.
    pub(crate) fn credit_all(&mut self) {
        self.0.iter_mut().for_each(|output| output.credit = usize::MAX);
    }

    /// Leaves what other processes still hold to be read to nowhere.
    pub(crate) fn drain_rest(&mut self) {
        for output in &mut self.0 {
            // A terminal hangs up instead, as when its window is closed.
            if let Some(file) = output.file.take().filter(|_| !output.is_terminal) {
                drain(file);
            }
        }
    }
}

impl Output {
    pub(crate) fn new(channel: Channel, fd: OwnedFd) -> io::Result<Self> {
        sys::set_nonblocking(&fd)?;
        Ok(Self {
            channel,
            file: Some(File::from(fd)),
            is_terminal: false,
            credit: WINDOW_BYTES,
            left: None,
            quiet_at: None,
            is_over: false,
        })
    }

    pub(crate) fn terminal(fd: OwnedFd) -> io::Result<Self> {
        Ok(Self { is_terminal: true, ..Self::new(Channel::Stdout, fd)? })
    }

    /// What to wait for: nothing while the host takes no more.
    pub(crate) fn to_read(&self, is_full: bool) -> Option<BorrowedFd<'_>> {
        let waits = is_full || self.credit == 0 || self.is_over;
        self.file.as_ref().filter(|_| !waits).map(AsFd::as_fd)
    }

    /// Reads, if there is something to read, and puts it into frames; to nowhere without `out`. Puts
    /// the stream's end behind the last of it.
    pub(crate) fn advance(
        &mut self,
        is_ready: bool,
        is_full: bool,
        now: Instant,
        out: Option<&mut Vec<u8>>,
        buffer: &mut Vec<u8>,
    ) {
        if self.is_over {
            return;
        }
        let mut nowhere = Vec::new();
        let out = out.unwrap_or(&mut nowhere);
        if is_ready && self.left != Some(0) {
            self.read(now, out, buffer);
        }
        let is_quiet = self.quiet_at.is_some_and(|quiet_at| now >= quiet_at);
        let is_quiet = is_quiet && self.credit > 0 && !is_full && !is_ready;
        if self.file.is_none() || self.left == Some(0) || is_quiet {
            self.is_over = true;
            out.extend(Frame::header(self.channel, 0));
        }
    }

    fn read(&mut self, now: Instant, out: &mut Vec<u8>, buffer: &mut Vec<u8>) {
        let Some(file) = &mut self.file else { return };
        // Most programs write little: the buffer grows with those that do not.
        if buffer.len() < FIRST_BYTES {
            buffer.resize(FIRST_BYTES, 0);
        }
        let max = self.credit.min(self.left.unwrap_or(usize::MAX)).min(buffer.len());
        match file.read(&mut buffer[..max.min(MAX_DATA_BYTES)]) {
            Ok(count) if count > 0 => {
                out.extend(Frame::header(self.channel, count));
                out.extend_from_slice(&buffer[..count]);
                if count == buffer.len() {
                    buffer.resize(MAX_DATA_BYTES, 0);
                }
                self.credit -= count;
                self.left = self.left.map(|left| left - count);
                if self.quiet_at.is_some() {
                    self.quiet_at = Some(now + TERMINAL_PATIENCE);
                }
            }
            Err(error)
                if matches!(
                    error.kind(),
                    io::ErrorKind::WouldBlock | io::ErrorKind::Interrupted
                ) => {}
            // Its end: a terminal's is an error (EIO).
            _ => self.file = None,
        }
    }
}

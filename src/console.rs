//! What a guest writes to its serial port: the last bytes of it, and a copy to a writer.
//!
//! The library never opens, reads or changes a terminal by itself. A writer runs on the thread
//! of the vCPU that wrote, so one that blocks stops that vCPU; one that fails is let go of.

use std::collections::VecDeque;
use std::io::{self, Write};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use crate::error::printable;
use crate::exit::ExitStatus;

/// A writer that a guest's console output is copied to.
pub(crate) type ConsoleWriter = Arc<Mutex<dyn Write + Send>>;

/// What a kernel writes when it panics, before its message.
const PANIC: &str = "Kernel panic - not syncing: ";
/// As much of a line as is looked at for a panic.
const MAX_LINE_BYTES: usize = 512;
/// As much of a panic's message as is kept.
const MAX_MESSAGE_CHARS: usize = 256;
/// As much of the tail as an error carries.
const MAX_ERROR_BYTES: usize = 4096;

/// The console of a guest, read side. Clones show the same console, also after the VM is gone.
#[derive(Clone)]
pub struct Console {
    tail: Arc<Mutex<Tail>>,
}

struct Tail {
    bytes: VecDeque<u8>,
    capacity: usize,
    /// Bytes that were dropped at the front.
    cut: bool,
    panic: Option<String>,
}

impl Console {
    pub(crate) fn new(tail_bytes: usize) -> Self {
        let tail = Tail { bytes: VecDeque::new(), capacity: tail_bytes, cut: false, panic: None };
        Self { tail: Arc::new(Mutex::new(tail)) }
    }

    /// The last bytes that the guest wrote, as text: invalid UTF-8 is replaced, and a line that
    /// was cut off at the front is left out. Of at most
    /// [`console_tail_bytes`](crate::VmConfig::console_tail_bytes). The text is the guest's own:
    /// it may hold control characters.
    pub fn tail(&self) -> String {
        let tail = self.lock();
        let bytes: Vec<u8> = tail.bytes.iter().copied().collect();
        let cut = tail.cut;
        drop(tail);
        whole_lines(&bytes, cut)
    }

    /// The end of the tail, for an error.
    pub(crate) fn last_lines(&self) -> String {
        let tail = self.lock();
        let skip = tail.bytes.len().saturating_sub(MAX_ERROR_BYTES);
        let bytes: Vec<u8> = tail.bytes.iter().skip(skip).copied().collect();
        let cut = tail.cut || skip > 0;
        drop(tail);
        whole_lines(&bytes, cut)
    }

    /// The message of the kernel's first panic, where it showed one: printable, and short.
    fn panic_message(&self) -> Option<String> {
        self.lock().panic.clone()
    }

    /// How a guest ended, with what it said: a reset after a panic was a panic.
    pub(crate) fn explain(&self, status: ExitStatus) -> ExitStatus {
        match status {
            ExitStatus::Rebooted => match self.panic_message() {
                Some(message) => ExitStatus::Panicked { message: Some(message) },
                None => ExitStatus::Rebooted,
            },
            ExitStatus::Panicked { message: None } => {
                ExitStatus::Panicked { message: self.panic_message() }
            }
            other => other,
        }
    }

    fn lock(&self) -> MutexGuard<'_, Tail> {
        self.tail.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

fn whole_lines(bytes: &[u8], cut: bool) -> String {
    let text = String::from_utf8_lossy(bytes);
    match text.split_once('\n') {
        Some((_, rest)) if cut => rest.to_owned(),
        _ => text.into_owned(),
    }
}

impl std::fmt::Debug for Console {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Console").field("tail", &self.tail()).finish()
    }
}

/// The guest's side: every byte of output goes to the tail, then to the writer.
#[derive(Clone)]
pub(crate) struct ConsoleSink {
    console: Console,
    writer: Option<ConsoleWriter>,
    line: Vec<u8>,
}

impl ConsoleSink {
    pub(crate) fn new(console: Console, writer: Option<ConsoleWriter>) -> Self {
        Self { console, writer, line: Vec::new() }
    }

    /// The host's side.
    pub(crate) fn console(&self) -> Console {
        self.console.clone()
    }
}

impl Write for ConsoleSink {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        let mut tail = self.console.lock();
        for &byte in bytes {
            if tail.bytes.len() == tail.capacity {
                tail.bytes.pop_front();
                tail.cut = true;
            }
            if tail.capacity > 0 {
                tail.bytes.push_back(byte);
            }
            if byte == b'\n' {
                if tail.panic.is_none() {
                    tail.panic = panic_message(&String::from_utf8_lossy(&self.line));
                }
                self.line.clear();
            } else if self.line.len() < MAX_LINE_BYTES {
                self.line.push(byte);
            }
        }
        drop(tail);
        if let Some(writer) = &self.writer {
            let mut writer = writer.lock().unwrap_or_else(PoisonError::into_inner);
            if writer.write_all(bytes).and_then(|()| writer.flush()).is_err() {
                drop(writer);
                self.writer = None;
            }
        }
        Ok(bytes.len())
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

/// The words after `Kernel panic - not syncing: ` in a line.
fn panic_message(line: &str) -> Option<String> {
    let (_, rest) = line.split_once(PANIC)?;
    Some(printable(rest.trim_end()).chars().take(MAX_MESSAGE_CHARS).collect())
}

#[cfg(test)]
mod tests {
    use super::*;

    fn sink(tail_bytes: usize) -> (ConsoleSink, Console) {
        let console = Console::new(tail_bytes);
        (ConsoleSink::new(console.clone(), None), console)
    }

    #[test]
    fn tail_keeps_the_last_whole_lines() {
        let (mut guest, console) = sink(12);
        guest.write_all(b"first line\nsecond\nthird").unwrap();
        assert_eq!(console.tail(), "third");
        let (mut guest, console) = sink(4);
        guest.write_all(b"a\nb\n").unwrap();
        assert_eq!(console.tail(), "a\nb\n", "it is full, and nothing was cut");
        let (mut guest, console) = sink(0);
        guest.write_all(b"text").unwrap();
        assert_eq!(console.tail(), "");
    }

    #[test]
    fn a_writer_that_fails_is_let_go_of_and_the_tail_goes_on() {
        struct Full(Arc<Mutex<u32>>);
        impl Write for Full {
            fn write(&mut self, _: &[u8]) -> io::Result<usize> {
                *self.0.lock().unwrap() += 1;
                Err(io::Error::from_raw_os_error(libc::ENOSPC))
            }
            fn flush(&mut self) -> io::Result<()> {
                Ok(())
            }
        }
        let calls = Arc::new(Mutex::new(0));
        let console = Console::new(100);
        let writer: ConsoleWriter = Arc::new(Mutex::new(Full(calls.clone())));
        let mut guest = ConsoleSink::new(console.clone(), Some(writer));
        guest.write_all(b"a").unwrap();
        guest.write_all(b"b").unwrap();
        assert_eq!(console.tail(), "ab");
        assert_eq!(*calls.lock().unwrap(), 1);
    }

    #[test]
    fn a_panic_is_seen_whatever_is_kept_of_the_tail_and_cannot_steer_a_terminal() {
        let (mut guest, console) = sink(0);
        guest
            .write_all(b"[1.0] Kernel panic - not syncing: VFS: \x1b]0;owned\x07 root\r\n")
            .unwrap();
        guest.write_all(b"[1.0] Kernel panic - not syncing: a second one\n").unwrap();
        let message = console.panic_message().unwrap();
        assert_eq!(message, "VFS: \u{fffd}]0;owned\u{fffd} root");
        let (mut guest, console) = sink(0);
        guest.write_all(PANIC.as_bytes()).unwrap();
        guest.write_all(&[b'x'; 100_000]).unwrap();
        guest.write_all(b"\n").unwrap();
        assert_eq!(console.panic_message().unwrap().len(), MAX_MESSAGE_CHARS);
    }
}

//! What a guest writes to its serial port: the last bytes of it, and a copy to a writer.
//!
//! The library never opens, reads or changes a terminal by itself. A writer runs on the thread
//! of the vCPU that wrote, so one that blocks stops that vCPU; one that fails is let go of.

use std::collections::VecDeque;
use std::io::{self, Write};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

/// A writer that a guest's console output is copied to.
pub(crate) type ConsoleWriter = Arc<Mutex<dyn Write + Send>>;

/// The console of a guest, read side. Clones show the same console, also after the VM is gone.
#[derive(Clone)]
pub struct Console {
    tail: Arc<Mutex<Tail>>,
    writer: Option<ConsoleWriter>,
}

struct Tail {
    bytes: VecDeque<u8>,
    capacity: usize,
}

impl Console {
    pub(crate) fn new(tail_bytes: usize, writer: Option<ConsoleWriter>) -> Self {
        let tail = Tail { bytes: VecDeque::new(), capacity: tail_bytes };
        Self { tail: Arc::new(Mutex::new(tail)), writer }
    }

    /// The last bytes that the guest wrote, as text: invalid UTF-8 is replaced, and a line that
    /// was cut off at the front is left out. At most
    /// [`console_tail_bytes`](crate::VmConfig::console_tail_bytes) long. The text is the guest's
    /// own: it may hold control characters.
    pub fn tail(&self) -> String {
        let tail = self.lock();
        let cut = tail.bytes.len() == tail.capacity;
        let bytes: Vec<u8> = tail.bytes.iter().copied().collect();
        drop(tail);
        let text = String::from_utf8_lossy(&bytes);
        match text.split_once('\n') {
            Some((_, rest)) if cut => rest.to_owned(),
            _ => text.into_owned(),
        }
    }

    fn lock(&self) -> MutexGuard<'_, Tail> {
        self.tail.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// The guest's side: every byte of output goes to the tail, then to the writer.
impl Write for Console {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        let mut tail = self.lock();
        for &byte in bytes {
            if tail.bytes.len() == tail.capacity {
                tail.bytes.pop_front();
            }
            if tail.capacity > 0 {
                tail.bytes.push_back(byte);
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

impl std::fmt::Debug for Console {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Console").field("tail", &self.tail()).finish_non_exhaustive()
    }
}

/// The kernel's message where the console ends with a panic: the words after
/// `Kernel panic - not syncing: `.
pub(crate) fn panic_message(tail: &str) -> Option<String> {
    let (_, rest) = tail.split_once("Kernel panic - not syncing: ")?;
    Some(rest.lines().next().unwrap_or(rest).trim_end().to_owned())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn tail_keeps_the_last_whole_lines() {
        let mut console = Console::new(12, None);
        console.write_all(b"first line\nsecond\nthird").unwrap();
        assert_eq!(console.tail(), "third");
        let mut nowhere = Console::new(0, None);
        nowhere.write_all(b"text").unwrap();
        assert_eq!(nowhere.tail(), "");
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
        let mut console = Console::new(100, Some(Arc::new(Mutex::new(Full(calls.clone())))));
        console.write_all(b"a").unwrap();
        console.write_all(b"b").unwrap();
        assert_eq!(console.tail(), "ab");
        assert_eq!(*calls.lock().unwrap(), 1);
    }

    #[test]
    fn panic_message_is_the_rest_of_its_line() {
        let tail = "[    1.0] Kernel panic - not syncing: VFS: no root\r\n[    1.0] CPU: 0\n";
        assert_eq!(panic_message(tail).as_deref(), Some("VFS: no root"));
        assert_eq!(panic_message("all is well\n"), None);
    }
}

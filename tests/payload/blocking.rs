//! A console writer that holds up its guest for as long as a test wants.

use std::io::{self, Write};
use std::sync::mpsc::{Receiver, RecvTimeoutError, Sender, channel};
use std::sync::{Arc, OnceLock};

use crate::PATIENCE;

/// Blocks whoever writes to it, until its [`Gate`] is open.
pub struct Blocks {
    begun: Sender<()>,
    go: Receiver<()>,
    was_let_go: Arc<OnceLock<bool>>,
}

/// Where a writer waits.
pub struct Gate {
    has_begun: Receiver<()>,
    /// Nothing is sent: it is open when this is gone.
    bar: Option<Sender<()>>,
    was_let_go: Arc<OnceLock<bool>>,
}

/// A writer that blocks, and the gate that it waits at.
pub fn blocking() -> (Blocks, Gate) {
    let (begun, has_begun) = channel();
    let (bar, go) = channel();
    let was_let_go = Arc::<OnceLock<bool>>::default();
    let gate = Gate { has_begun, bar: Some(bar), was_let_go: Arc::clone(&was_let_go) };
    (Blocks { begun, go, was_let_go }, gate)
}

impl Gate {
    /// Waits until somebody waits here.
    pub fn until_begun(&self) {
        self.has_begun.recv_timeout(PATIENCE).expect("somebody writes");
    }

    /// Lets go who waits here, and who comes later.
    pub fn open(&mut self) {
        drop(self.bar.take());
    }

    /// Whether who waited first was let go. None while it waits; false where it waited in vain.
    pub fn was_let_go(&self) -> Option<bool> {
        self.was_let_go.get().copied()
    }
}

impl Blocks {
    /// Says that somebody waits, and waits until the gate is open.
    pub fn wait(&self) {
        // A test that has seen enough does not listen any more.
        let _ = self.begun.send(());
        let waited = self.go.recv_timeout(PATIENCE);
        self.was_let_go.get_or_init(|| waited == Err(RecvTimeoutError::Disconnected));
    }
}

impl Write for Blocks {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        self.wait();
        Ok(bytes.len())
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

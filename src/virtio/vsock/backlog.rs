//! Connections of the guest to a port of the host that nobody has accepted yet.
//!
//! The device puts them in, a listener of the host takes them out. Neither waits for the other.

use std::collections::VecDeque;
use std::io;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::os::unix::net::UnixStream;
use std::sync::{Condvar, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use rustix::event::{EventfdFlags, eventfd};

/// The queue, shared by the device and its listener.
#[derive(Debug)]
pub(crate) struct Backlog {
    state: Mutex<State>,
    arrived: Condvar,
    /// Readable while a connection waits, and when none will come any more: its counter is the
    /// number of them, which each read takes one off.
    readable: OwnedFd,
}

#[derive(Debug)]
struct State {
    /// With the port of the guest that each came from.
    waiting: VecDeque<(UnixStream, u32)>,
    limit: usize,
    open: bool,
}

/// What a wait for a connection came to.
#[derive(Debug)]
pub(crate) enum Arrival {
    /// From this port of the guest.
    Connection(UnixStream, u32),
    /// None so far.
    Nothing,
    /// The device is gone, and no more will come.
    Closed,
}

impl Backlog {
    /// A queue of at most `limit` connections.
    pub(crate) fn new(limit: usize) -> io::Result<Self> {
        let flags = EventfdFlags::CLOEXEC | EventfdFlags::NONBLOCK | EventfdFlags::SEMAPHORE;
        let state = State { waiting: VecDeque::new(), limit, open: true };
        let (state, arrived) = (Mutex::new(state), Condvar::new());
        Ok(Self { state, arrived, readable: eventfd(0, flags)? })
    }

    /// The next connection; waits for one for at most `timeout`.
    pub(crate) fn wait(&self, timeout: Duration) -> Arrival {
        let idle = |state: &mut State| state.waiting.is_empty() && state.open;
        let state = self.lock();
        let state = match timeout.is_zero() {
            true => state,
            false => {
                let waited = self.arrived.wait_timeout_while(state, timeout, idle);
                waited.unwrap_or_else(PoisonError::into_inner).0
            }
        };
        self.take(state)
    }

    /// Whether there is room for one more.
    pub(super) fn has_room(&self) -> bool {
        let state = self.lock();
        state.open && state.waiting.len() < state.limit
    }

    /// Adds a connection; only the device does, which has looked for room.
    pub(super) fn push(&self, socket: UnixStream, guest_port: u32) {
        let mut state = self.lock();
        state.waiting.push_back((socket, guest_port));
        // Before anybody takes it, who takes one off the counter with it.
        self.signal();
    }

    /// No more will come. Those that wait can still be taken.
    pub(super) fn close(&self) {
        if std::mem::take(&mut self.lock().open) {
            self.signal();
        }
    }

    fn take(&self, mut state: MutexGuard<'_, State>) -> Arrival {
        match state.waiting.pop_front() {
            Some((socket, guest_port)) => {
                let _ = rustix::io::read(&self.readable, &mut [0; 8]);
                Arrival::Connection(socket, guest_port)
            }
            None if state.open => Arrival::Nothing,
            None => Arrival::Closed,
        }
    }

    fn signal(&self) {
        // It cannot be full: the queue has a limit far below that.
        let _ = rustix::io::write(&self.readable, &1u64.to_ne_bytes());
        self.arrived.notify_all();
    }

    fn lock(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl AsFd for Backlog {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.readable.as_fd()
    }
}

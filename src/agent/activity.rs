//! What is going on between a host and its guest: calls and streams that are open, and when the last one
//! began or ended. Whoever puts a VM to sleep looks at it first.
//!
//! Only the calls of handles that were given one are counted. What this crate does by itself, such as hooks,
//! is no sign that anybody needs the guest.

use std::sync::Arc;
use std::time::Instant;

use tokio::sync::watch;

use super::Agent;

/// A counter of what is going on: a handle that clones.
#[derive(Clone, Debug)]
pub(crate) struct Activity {
    state: Arc<watch::Sender<State>>,
    /// What this handle was told of.
    seen: watch::Receiver<State>,
}

#[derive(Clone, Copy, Debug)]
struct State {
    open: usize,
    last: Instant,
}

/// Something that goes on, until it is dropped.
#[derive(Debug)]
pub(crate) struct Ongoing(Arc<watch::Sender<State>>);

impl Activity {
    /// Nothing goes on, and the last of it was now.
    pub(crate) fn new() -> Self {
        let (state, seen) = watch::channel(State { open: 0, last: Instant::now() });
        Self { state: Arc::new(state), seen }
    }

    /// Something begins.
    pub(crate) fn begin(&self) -> Ongoing {
        self.state.send_modify(|state| {
            state.open += 1;
            state.last = Instant::now();
        });
        Ongoing(Arc::clone(&self.state))
    }

    /// How much goes on.
    pub(crate) fn open(&self) -> usize {
        self.state.borrow().open
    }

    /// When something began or ended last.
    pub(crate) fn last(&self) -> Instant {
        self.state.borrow().last
    }

    /// Waits until something has begun or ended since this handle, or the one that it is a clone of, waited the
    /// last time, or was made. So nothing is missed between a look and a wait.
    pub(crate) async fn changed(&mut self) {
        // The other end is in `state`.
        let _ = self.seen.changed().await;
    }
}

impl Drop for Ongoing {
    fn drop(&mut self) {
        self.0.send_modify(|state| {
            state.open -= 1;
            state.last = Instant::now();
        });
    }
}

impl Agent {
    /// A handle whose calls count, and all that they open for as long as it is open: programs, files, streams.
    /// A stream of bytes that was taken out of its [`GuestStream`](super::GuestStream) counts no more. Hooks,
    /// [`freeze`](Self::freeze) and [`thaw`](Self::thaw) never count.
    pub(crate) fn with_activity(mut self, activity: Activity) -> Self {
        self.calls = self.calls.counted(activity);
        self
    }
}

#[cfg(test)]
mod tests;

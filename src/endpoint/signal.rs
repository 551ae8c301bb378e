//! A word that is said once to many tasks: to end, or to begin nothing new.
//!
//! Every connection's task listens for it, and so looks each time that it is polled. That costs a load: a
//! `CancellationToken` alone would take a lock that all tasks share, several times for each request.

use std::pin::Pin;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::task::{Context, Poll, Waker};

use tokio_util::sync::{CancellationToken, WaitForCancellationFutureOwned};

#[derive(Clone, Default)]
pub(super) struct Signal(Arc<Inner>);

#[derive(Default)]
struct Inner {
    /// Set before the token is.
    is_given: AtomicBool,
    token: CancellationToken,
}

impl Signal {
    pub(super) fn give(&self) {
        self.0.is_given.store(true, Ordering::Release);
        self.0.token.cancel();
    }

    pub(super) fn wait(&self) -> Wait {
        let token = Box::pin(self.0.token.clone().cancelled_owned());
        Wait { signal: self.clone(), token, waker: None }
    }
}

/// Resolves when the signal is given.
pub(super) struct Wait {
    signal: Signal,
    token: Pin<Box<WaitForCancellationFutureOwned>>,
    /// Whom the token wakes.
    waker: Option<Waker>,
}

impl Future for Wait {
    type Output = ();

    fn poll(mut self: Pin<&mut Self>, context: &mut Context<'_>) -> Poll<()> {
        let is_known = self.waker.as_ref().is_some_and(|waker| waker.will_wake(context.waker()));
        if is_known && !self.signal.0.is_given.load(Ordering::Acquire) {
            return Poll::Pending;
        }
        let given = self.token.as_mut().poll(context);
        if given.is_pending() && !is_known {
            self.waker = Some(context.waker().clone());
        }
        given
    }
}

/// Gives the signal when it is dropped.
pub(super) struct SignalOnDrop(pub(super) Signal);

impl Drop for SignalOnDrop {
    fn drop(&mut self) {
        self.0.give();
    }
}

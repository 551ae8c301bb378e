//! A timer that goes from one request of a connection to the next.
//!
//! Every request has a time limit, and hardly one reaches it. A timer of its own for each would go into and out of the
//! runtime's timers, under a lock of theirs; this one goes off at the limit of an earlier request, and is set anew then.

use std::pin::Pin;
use std::sync::{Arc, Mutex, PoisonError};
use std::task::{Context, Poll, ready};
use std::time::Duration;

use hyper::rt::{Sleep, Timer};
use tokio::time::{Instant, sleep_until};

/// One timer for one limit at a time.
pub(super) struct Alarm(Pin<Box<tokio::time::Sleep>>);

impl Alarm {
    pub(super) fn new(until: Instant) -> Self {
        Self(Box::pin(sleep_until(until)))
    }

    /// Ready from `until` on.
    pub(super) fn poll(&mut self, until: Instant, context: &mut Context<'_>) -> Poll<()> {
        let mut sleep = self.0.as_mut();
        if until < sleep.deadline() {
            sleep.as_mut().reset(until);
        }
        loop {
            ready!(sleep.as_mut().poll(context));
            if sleep.deadline() >= until {
                return Poll::Ready(());
            }
            sleep.as_mut().reset(until);
        }
    }
}

/// hyper's timer for one connection, on which one thing at a time has a limit: the next head.
#[derive(Clone)]
pub(super) struct HeadTimer(Arc<Mutex<Alarm>>);

impl HeadTimer {
    pub(super) fn new(limit: Duration) -> Self {
        Self(Arc::new(Mutex::new(Alarm::new(Instant::now() + limit))))
    }
}

impl Timer for HeadTimer {
    fn sleep(&self, duration: Duration) -> Pin<Box<dyn Sleep>> {
        self.sleep_until(self.now() + duration)
    }

    fn sleep_until(&self, until: std::time::Instant) -> Pin<Box<dyn Sleep>> {
        Box::pin(Until { alarm: Arc::clone(&self.0), until: until.into() })
    }
}

struct Until {
    alarm: Arc<Mutex<Alarm>>,
    until: Instant,
}

impl Future for Until {
    type Output = ();

    fn poll(self: Pin<&mut Self>, context: &mut Context<'_>) -> Poll<()> {
        self.alarm.lock().unwrap_or_else(PoisonError::into_inner).poll(self.until, context)
    }
}

impl Sleep for Until {}

#[cfg(test)]
mod tests {
    use std::task::Waker;

    use super::*;

    #[test]
    fn an_alarm_of_an_earlier_request_does_not_end_a_later_one() {
        let runtime = tokio::runtime::Builder::new_current_thread().enable_time().build().unwrap();
        runtime.block_on(async {
            let context = &mut Context::from_waker(Waker::noop());
            let second = Duration::from_secs(1);
            let past = Instant::now() - second;
            let mut alarm = Alarm::new(past);
            assert!(alarm.poll(past + 3600 * second, context).is_pending());
            assert!(alarm.poll(past + second / 2, context).is_ready());
            assert!(alarm.poll(past + 3600 * second, context).is_pending());
        });
    }
}

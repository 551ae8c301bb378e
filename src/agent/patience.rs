//! How long the other side is waited for.
//!
//! In steps, not until a time: this process may stand still meanwhile, stopped, frozen, or with the machine
//! that it is on, and who is waited for with it. That is one step of many, however long it lasts.

use std::io::{self, Read, Write};
use std::os::unix::net::UnixStream;
use std::pin::{Pin, pin};
use std::sync::Arc;
use std::task::{Context, Poll, ready};
use std::time::Duration;

use tokio::time::{Instant, Sleep, sleep, timeout};

use super::AgentError;
use crate::error::Error;

/// How long the agent may take for an answer, and for each piece of what it alone has to say or to take: a
/// file, a tree. It takes milliseconds; only one that hangs, or a VM that is paused, takes longer. What a
/// program says or takes is its own matter, however long that lasts.
pub(super) const PATIENCE: Duration = Duration::from_secs(60);

/// The steps of a wait.
const STEPS: u32 = 12;

/// What is waited for, if it comes within the limit.
pub(crate) async fn within<T>(limit: Duration, future: impl Future<Output = T>) -> Option<T> {
    let mut future = pin!(future);
    // A timer counts milliseconds.
    let steps = u32::try_from(limit.as_millis()).map_or(STEPS, |ms| ms.clamp(1, STEPS));
    for _ in 0..steps {
        if let Ok(done) = timeout(limit / steps, future.as_mut()).await {
            return Some(done);
        }
    }
    None
}

/// Nothing has come, or was taken, for as long as the agent may take.
pub(super) fn silent() -> Error {
    AgentError::Silent { seconds: PATIENCE.as_secs() }.into()
}

/// How long the other side is waited for: anew after each thing that it does.
#[derive(Debug)]
pub(super) struct Patience {
    step: Duration,
    waiting: Option<Waiting>,
}

#[derive(Debug)]
struct Waiting {
    sleep: Pin<Box<Sleep>>,
    steps: u32,
}

impl Default for Patience {
    fn default() -> Self {
        Self::new(PATIENCE)
    }
}

impl Patience {
    pub(super) fn new(limit: Duration) -> Self {
        Self { step: limit / STEPS, waiting: None }
    }

    /// Passes on what was polled. Where that has to wait, it does so within the limit.
    pub(super) fn poll<T>(
        &mut self,
        context: &mut Context<'_>,
        polled: Poll<T>,
    ) -> Poll<Result<T, Error>> {
        if let Poll::Ready(done) = polled {
            self.waiting = None;
            return Poll::Ready(Ok(done));
        }
        let step = self.step;
        let begin = || Waiting { sleep: Box::pin(sleep(step)), steps: 0 };
        let waiting = self.waiting.get_or_insert_with(begin);
        while waiting.steps < STEPS {
            ready!(waiting.sleep.as_mut().poll(context));
            waiting.steps += 1;
            waiting.sleep.as_mut().reset(Instant::now() + step);
        }
        Poll::Ready(Err(silent()))
    }
}

/// A socket whose reads and writes wait, within a limit: then they are [`io::ErrorKind::WouldBlock`].
#[derive(Clone)]
pub(super) struct PatientSocket(Arc<UnixStream>);

impl PatientSocket {
    pub(super) fn new(socket: UnixStream, limit: Duration) -> io::Result<Self> {
        socket.set_nonblocking(false)?;
        socket.set_read_timeout(Some(limit / STEPS))?;
        socket.set_write_timeout(Some(limit / STEPS))?;
        Ok(Self(Arc::new(socket)))
    }

    pub(super) fn socket(&self) -> &UnixStream {
        &self.0
    }

    fn wait<T>(&self, mut step: impl FnMut(&UnixStream) -> io::Result<T>) -> io::Result<T> {
        for _ in 1..STEPS {
            match step(&self.0) {
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => {}
                done => return done,
            }
        }
        step(&self.0)
    }
}

impl Read for PatientSocket {
    fn read(&mut self, bytes: &mut [u8]) -> io::Result<usize> {
        self.wait(|mut socket| socket.read(bytes))
    }
}

impl Write for PatientSocket {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        self.wait(|mut socket| socket.write(bytes))
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use std::future::{pending, poll_fn};
    use std::thread;

    use tokio::sync::oneshot;

    use super::*;

    /// This process stands still, and goes on.
    async fn stand_still(time: Duration) {
        thread::sleep(time);
        // For the timers that have gone off meanwhile.
        sleep(Duration::from_millis(1)).await;
    }

    #[tokio::test]
    async fn time_in_which_this_process_stood_still_is_one_step() {
        let limit = Duration::from_millis(600);
        let (answer, answered) = oneshot::channel();
        let waits = tokio::spawn(within(limit, answered));
        let mut patience = Patience::new(limit);
        let poll = move |context: &mut Context<'_>| patience.poll(context, Poll::<()>::Pending);
        let waits_too = tokio::spawn(poll_fn(poll));
        sleep(Duration::from_millis(1)).await;
        stand_still(2 * limit).await;
        assert!(!waits.is_finished() && !waits_too.is_finished());
        answer.send(()).unwrap();
        waits.await.unwrap().unwrap().unwrap();
        waits_too.await.unwrap().unwrap_err();
    }

    #[tokio::test]
    async fn what_never_comes_is_waited_for_as_long_as_the_limit_says() {
        let limit = Duration::from_millis(120);
        let begin = Instant::now();
        assert_eq!(within(limit, pending::<()>()).await, None);
        assert!(begin.elapsed() >= limit);
        // What is there at once needs no time.
        assert_eq!(within(Duration::ZERO, async { 7 }).await, Some(7));
        assert_eq!(within(Duration::ZERO, pending::<()>()).await, None);
        let mut patience = Patience::new(limit);
        let begin = Instant::now();
        poll_fn(|context| patience.poll(context, Poll::<()>::Pending)).await.unwrap_err();
        assert!(begin.elapsed() >= limit);
    }
}

//! Whether the agent is alive while programs run: those may be silent for ever, it may not.
//!
//! It is asked on the connection that it keeps to the host, where nothing else is said. Other calls need
//! none of this: what they wait for the agent has to say within its time.

use std::sync::Arc;
use std::time::Duration;

use tokio::sync::watch;
use tokio::time::sleep;

use super::connection::Connection;
use crate::protocol::{Line, Reply};

/// How often the agent is asked, and how long it may take.
#[derive(Clone, Copy, Debug)]
pub(super) struct Rhythm {
    pub(super) pause: Duration,
    /// How often it is looked whether the VM is paused, which stops the clock.
    pub(super) tick: Duration,
    pub(super) ticks: u32,
}

impl Rhythm {
    /// Generous: a guest may be slow, and a minute is short beside for ever.
    pub(super) const USUAL: Self =
        Self { pause: Duration::from_secs(15), tick: Duration::from_secs(1), ticks: 60 };

    /// How long an agent is waited for.
    fn limit(self) -> Duration {
        self.tick * self.ticks
    }
}

/// How many programs run, and how often the agent was found silent.
#[derive(Debug)]
pub(super) struct Pulse {
    running: watch::Sender<usize>,
    silences: watch::Sender<Duration>,
}

impl Default for Pulse {
    fn default() -> Self {
        Self { running: watch::Sender::new(0), silences: watch::Sender::new(Duration::ZERO) }
    }
}

/// A program that runs.
pub(super) struct Beat {
    pulse: Arc<Pulse>,
    silences: watch::Receiver<Duration>,
}

impl Beat {
    /// Waits until the agent is found silent, while this program runs. Says for how long it was.
    pub(super) async fn stops(&mut self) -> Duration {
        match self.silences.changed().await {
            Ok(()) => *self.silences.borrow_and_update(),
            // The other end is in `pulse`.
            Err(_) => std::future::pending().await,
        }
    }
}

impl Drop for Beat {
    fn drop(&mut self) {
        self.pulse.running.send_modify(|running| *running -= 1);
    }
}

impl Pulse {
    /// A program runs, until what is returned is dropped.
    pub(super) fn begin(self: &Arc<Self>) -> Beat {
        self.running.send_modify(|running| *running += 1);
        Beat { pulse: Arc::clone(self), silences: self.silences.subscribe() }
    }

    /// Holds the agent's line, until its end, or until the agent is silent while programs run and the VM
    /// is not paused.
    pub(super) async fn hold(
        &self,
        line: &mut Connection,
        rhythm: Rhythm,
        is_paused: impl Fn() -> bool,
    ) {
        let mut running = self.running.subscribe();
        loop {
            tokio::select! {
                // Nothing is said unasked.
                _ = line.reader.next() => return,
                _ = running.wait_for(|running| *running > 0) => {}
            }
            tokio::select! {
                _ = line.reader.next() => return,
                () = sleep(rhythm.pause) => {}
            }
            if *running.borrow() > 0 && !self.ask(line, rhythm, &is_paused).await {
                return;
            }
        }
    }

    /// Whether it is alive.
    async fn ask(
        &self,
        line: &mut Connection,
        rhythm: Rhythm,
        is_paused: &impl Fn() -> bool,
    ) -> bool {
        if line.writer.message(&Line::Ping).await.is_err() {
            return false;
        }
        let mut waited = 0;
        while waited < rhythm.ticks {
            tokio::select! {
                answer = line.reader.message() => return matches!(answer, Ok(Some(Reply::Done))),
                // Ticks, not times: this process may have been stopped meanwhile.
                () = sleep(rhythm.tick) => {
                    waited = if is_paused() { 0 } else { waited + 1 };
                }
            }
        }
        self.silences.send_replace(rhythm.limit());
        false
    }
}

#[cfg(test)]
mod tests {
    use std::io::{ErrorKind as IoErrorKind, Read, Write};
    use std::sync::atomic::{AtomicBool, Ordering};

    use super::*;
    use crate::ErrorKind;
    use crate::agent::tests::{calls, heard, pair, process_of};
    use crate::protocol::{Channel, Frame, Wire};

    const fn ms(ms: u64) -> Duration {
        Duration::from_millis(ms)
    }

    const FAST: Rhythm = Rhythm { pause: ms(5), tick: ms(20), ticks: 3 };
    const PATIENT: Rhythm = Rhythm { ticks: 3000, ..FAST };

    fn ping() -> (u8, Vec<u8>) {
        (Channel::Message as u8, Line::Ping.to_bytes())
    }

    #[tokio::test(flavor = "multi_thread")]
    async fn an_agent_that_answers_is_asked_again_and_again_until_it_leaves() {
        let calls = calls();
        let (mut line, mut agent) = pair();
        let (_process, _program) = process_of(&calls);
        let held = {
            let calls = calls.clone();
            tokio::spawn(async move { calls.pulse().hold(&mut line, PATIENT, || false).await })
        };
        for _ in 0..3 {
            assert_eq!(heard(&mut agent), ping());
            agent.write_all(&Frame::message(&Reply::Done)).unwrap();
        }
        assert!(!held.is_finished());
        drop(agent);
        held.await.unwrap();
    }

    #[tokio::test(flavor = "multi_thread")]
    async fn a_program_whose_agent_hangs_ends_with_an_error_that_says_so() {
        let calls = calls();
        let (mut line, mut agent) = pair();
        let (mut process, _program) = process_of(&calls);
        // The agent's kernel still takes what is sent, and nobody answers.
        calls.pulse().hold(&mut line, FAST, || false).await;
        assert_eq!(heard(&mut agent), ping());
        let error = process.wait().await.unwrap_err();
        assert_eq!(error.kind(), &ErrorKind::Timeout);
        assert!(error.to_string().contains("hangs"), "{error}");
    }

    #[tokio::test(flavor = "multi_thread")]
    async fn a_vm_that_is_paused_is_not_silent() {
        let calls = calls();
        let (mut line, mut agent) = pair();
        let (mut process, _program) = process_of(&calls);
        let paused = Arc::new(AtomicBool::new(true));
        let held = {
            let (calls, paused) = (calls.clone(), Arc::clone(&paused));
            let is_paused = move || paused.load(Ordering::Relaxed);
            tokio::spawn(async move { calls.pulse().hold(&mut line, FAST, is_paused).await })
        };
        assert_eq!(heard(&mut agent), ping());
        // Far longer than an agent may be silent.
        let ended = tokio::time::timeout(ms(500), process.wait()).await;
        assert!(ended.is_err() && !held.is_finished());
        paused.store(false, Ordering::Relaxed);
        assert_eq!(process.wait().await.unwrap_err().kind(), &ErrorKind::Timeout);
        held.await.unwrap();
    }

    #[tokio::test(flavor = "multi_thread")]
    async fn nothing_is_asked_while_no_program_runs() {
        let calls = calls();
        let (mut line, mut agent) = pair();
        drop(process_of(&calls));
        // The program's task goes a little later than its handle.
        while *calls.pulse().running.borrow() > 0 {
            tokio::task::yield_now().await;
        }
        let hold = calls.pulse().hold(&mut line, FAST, || false);
        assert!(tokio::time::timeout(ms(200), hold).await.is_err());
        agent.set_nonblocking(true).unwrap();
        assert_eq!(agent.read(&mut [0; 1]).unwrap_err().kind(), IoErrorKind::WouldBlock);
    }
}

//! What a session has used.

use std::time::{Duration, Instant};

use serde::{Deserialize, Serialize};

/// What a session has used since it began. No number ever falls, also not over a restart of the process.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default)]
#[non_exhaustive]
pub struct Metering {
    /// How long its guest was awake: from the start on, and while it was put to sleep, woken and ended.
    pub running: Duration,
    /// How long it slept, also while no process had it.
    pub suspended: Duration,
    /// The processor time of its vCPUs.
    pub vcpu: Duration,
    /// Bytes that were written to disks to put it to sleep, all times together. What it shares with its template was
    /// not.
    pub snapshot_bytes: u64,
    /// Requests and connections that it was given.
    pub requests: u64,
    /// How many times it was put to sleep.
    pub suspends: u64,
    /// How many times it was woken.
    pub resumes: u64,
}

/// What time counts as.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Counts {
    Running,
    Suspended,
    /// It is over.
    Nothing,
}

/// Counts what a session uses.
#[derive(Debug)]
pub(super) struct Meter {
    pub(super) totals: Metering,
    counts: Counts,
    /// Up to when time is in `totals`.
    until: Instant,
    /// The VM's own count of its processor time, as far as it is in `totals`.
    cpu: Duration,
    /// Since when time counts as what it does, and how much did before that in another process.
    began: Instant,
    before: Duration,
}

impl Meter {
    /// One that goes on from what was counted before.
    pub(super) fn new(totals: Metering, counts: Counts, before: Duration) -> Self {
        let now = Instant::now();
        Self { totals, counts, until: now, cpu: Duration::ZERO, began: now, before }
    }

    /// Counts up to now; `cpu` is what the VM says that it has used, where it runs.
    pub(super) fn settle(&mut self, cpu: Option<Duration>) -> Metering {
        let now = Instant::now();
        let passed = now.saturating_duration_since(self.until);
        match self.counts {
            Counts::Running => add(&mut self.totals.running, passed),
            Counts::Suspended => add(&mut self.totals.suspended, passed),
            Counts::Nothing => {}
        }
        self.until = now;
        if let Some(cpu) = cpu {
            add(&mut self.totals.vcpu, cpu.saturating_sub(self.cpu));
            self.cpu = cpu.max(self.cpu);
        }
        self.totals
    }

    /// From now on time counts as this. A VM that wakes has used `cpu` before.
    pub(super) fn begin(&mut self, counts: Counts, cpu: Duration) {
        self.settle(None);
        self.cpu = cpu;
        if self.counts != counts {
            (self.counts, self.began, self.before) = (counts, self.until, Duration::ZERO);
        }
    }

    /// How old the session is.
    pub(super) fn age(&self) -> Duration {
        let since = match self.counts {
            Counts::Running | Counts::Suspended => self.until.elapsed(),
            Counts::Nothing => Duration::ZERO,
        };
        self.totals.running.saturating_add(self.totals.suspended).saturating_add(since)
    }

    /// For how long time has counted as what it does.
    pub(super) fn for_how_long(&self) -> Duration {
        self.began.elapsed().saturating_add(self.before)
    }
}

/// What was counted before comes from a file, and may be anything.
fn add(total: &mut Duration, more: Duration) {
    *total = total.saturating_add(more);
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn processor_time_is_counted_once_whatever_the_vm_counts_from() {
        let second = Duration::from_secs(1);
        let before = Metering { vcpu: 5 * second, ..Metering::default() };
        let mut meter = Meter::new(before, Counts::Nothing, Duration::ZERO);
        // It had used something before it became a session's.
        meter.begin(Counts::Running, 3 * second);
        assert_eq!(meter.settle(Some(4 * second)).vcpu, 6 * second);
        assert_eq!(meter.settle(Some(4 * second)).vcpu, 6 * second);
        // Another VM that is the same begins anew.
        meter.begin(Counts::Suspended, Duration::ZERO);
        meter.begin(Counts::Running, Duration::ZERO);
        assert_eq!(meter.settle(Some(second)).vcpu, 7 * second);
        // One that says less than before has used nothing.
        assert_eq!(meter.settle(Some(Duration::ZERO)).vcpu, 7 * second);
    }

    #[test]
    fn time_counts_as_what_the_session_does() {
        let pause = || std::thread::sleep(Duration::from_millis(2));
        let mut meter = Meter::new(Metering::default(), Counts::Running, Duration::ZERO);
        pause();
        meter.begin(Counts::Suspended, Duration::ZERO);
        let running = meter.totals.running;
        assert!(running >= Duration::from_millis(2));
        pause();
        assert!(meter.for_how_long() >= Duration::from_millis(2));
        meter.begin(Counts::Nothing, Duration::ZERO);
        let over = meter.settle(None);
        pause();
        assert_eq!((meter.settle(None), over.running), (over, running));
        assert!(over.suspended >= Duration::from_millis(2));
        let found = Meter::new(over, Counts::Suspended, Duration::from_secs(60));
        assert!(found.for_how_long() >= Duration::from_secs(60));
    }
}

//! Whether a session that runs is idle.
//!
//! Nothing is looked at before the time is up that it would have to be idle for; then what went on meanwhile says
//! whether it was, or when to look again. While something is open, nothing is looked at until that ends.

use std::time::{Duration, Instant};

use super::policy::{SessionPolicy, after};

/// The shortest time between two looks.
const SHORTEST: Duration = Duration::from_millis(10);
/// The longest time until a suspend that failed is tried again, unless the session has to be idle for longer.
const LONGEST_PAUSE: Duration = Duration::from_secs(300);

/// What went on between the host and the guest.
#[derive(Clone, Copy, Debug)]
pub(super) struct Seen {
    /// Requests, streams, calls and leases that are open.
    pub(super) open: usize,
    /// When one of them began or ended last.
    pub(super) last: Instant,
    /// The processor time of the guest, in all.
    pub(super) cpu: Duration,
}

/// What a look says.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Verdict {
    /// Something is open: to be looked at again when something has ended.
    Held,
    /// Not yet, or the guest computes: to be looked at again when it is due.
    NotYet,
    /// It is idle, since then.
    Idle(Instant),
}

/// Since when a session may be idle.
#[derive(Debug)]
pub(super) struct Idle {
    /// Nothing is known to have gone on since then.
    since: Instant,
    /// The processor time that the guest had used at a time: one or two looks ago, and at the last.
    cpu: [(Instant, Duration); 2],
    /// Something is open.
    held: bool,
    /// Suspends that failed, one after the other.
    failures: u32,
    /// Not to be tried before.
    pause: Option<Instant>,
}

impl Idle {
    pub(super) fn new(now: Instant, cpu: Duration) -> Self {
        Self { since: now, cpu: [(now, cpu); 2], held: false, failures: 0, pause: None }
    }

    /// Whether nothing is to be done before something ends.
    pub(super) fn is_held(&self) -> bool {
        self.held
    }

    /// When to look next.
    pub(super) fn due(&self, policy: &SessionPolicy) -> Option<Instant> {
        if self.held {
            return None;
        }
        let idle_after = policy.idle_after.map(|duration| duration.max(SHORTEST));
        after(self.since, idle_after).map(|due| self.pause.map_or(due, |pause| pause.max(due)))
    }

    /// Looks, at a time when it is due or something has ended.
    pub(super) fn look(&mut self, policy: &SessionPolicy, now: Instant, seen: Seen) -> Verdict {
        let was_held = std::mem::replace(&mut self.held, seen.open > 0);
        if self.held {
            return Verdict::Held;
        }
        if was_held {
            // It has just ended; of the processor's time before that nothing is to be said.
            self.restart(now, seen.cpu);
            return Verdict::NotYet;
        }
        self.since = self.since.max(seen.last);
        if self.due(policy).is_none_or(|due| due > now) {
            // What it computes from now on is not to be small beside hours of short requests.
            self.cpu = [self.cpu[1], (now, seen.cpu)];
            return Verdict::NotYet;
        }
        // Of one time to two that it has to be idle for: what went on in the first of them counts too.
        let (sampled, before) = self.cpu[0];
        let passed = now.saturating_duration_since(sampled).as_secs_f64();
        let share = seen.cpu.saturating_sub(before).as_secs_f64() / passed.max(1e-9);
        if policy.busy_cpu.is_some_and(|busy| share > busy) {
            self.restart(now, seen.cpu);
            return Verdict::NotYet;
        }
        Verdict::Idle(self.since)
    }

    /// It is not idle now.
    pub(super) fn restart(&mut self, now: Instant, cpu: Duration) {
        self.since = now;
        self.cpu = [(now, cpu); 2];
    }

    /// It could not be suspended. The next attempt is made after a time that doubles each time.
    pub(super) fn failed(&mut self, policy: &SessionPolicy, now: Instant) {
        let first = policy.idle_after.unwrap_or_default().max(SHORTEST);
        let pause = first.saturating_mul(1 << self.failures.min(16));
        self.failures = self.failures.saturating_add(1);
        self.pause = now.checked_add(pause.min(LONGEST_PAUSE.max(first)));
    }

    /// Another policy has other reasons.
    pub(super) fn try_again(&mut self) {
        (self.failures, self.pause) = (0, None);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const SECOND: Duration = Duration::from_secs(1);

    fn policy() -> SessionPolicy {
        SessionPolicy::new().idle_after(10 * SECOND)
    }

    fn seen(open: usize, last: Instant, cpu: Duration) -> Seen {
        Seen { open, last, cpu }
    }

    #[test]
    fn a_guest_in_which_nothing_goes_on_is_idle_when_the_time_is_up() {
        let (begin, policy) = (Instant::now(), policy());
        let mut idle = Idle::new(begin, SECOND);
        assert_eq!(idle.due(&policy), Some(begin + 10 * SECOND));
        assert_eq!(idle.due(&SessionPolicy::new()), None);
        let early = idle.look(&policy, begin + 9 * SECOND, seen(0, begin, SECOND));
        assert_eq!(early, Verdict::NotYet);
        let late = idle.look(&policy, begin + 10 * SECOND, seen(0, begin, SECOND));
        assert_eq!(late, Verdict::Idle(begin));
    }

    #[test]
    fn what_went_on_meanwhile_moves_the_next_look_and_what_is_open_holds_it() {
        let (begin, policy) = (Instant::now(), policy());
        let mut idle = Idle::new(begin, SECOND);
        let last = begin + 7 * SECOND;
        let look = idle.look(&policy, begin + 10 * SECOND, seen(0, last, SECOND));
        assert_eq!((look, idle.due(&policy)), (Verdict::NotYet, Some(last + 10 * SECOND)));
        let look = idle.look(&policy, begin + 17 * SECOND, seen(2, last, SECOND));
        assert_eq!((look, idle.due(&policy)), (Verdict::Held, None));
        assert!(idle.is_held());
        let ended = begin + 100 * SECOND;
        let look = idle.look(&policy, ended, seen(0, ended, SECOND));
        assert_eq!((look, idle.due(&policy)), (Verdict::NotYet, Some(ended + 10 * SECOND)));
        let look = idle.look(&policy, ended + 10 * SECOND, seen(0, ended, SECOND));
        assert_eq!(look, Verdict::Idle(ended));
    }

    #[test]
    fn a_guest_that_computes_is_not_idle_whatever_it_did_before() {
        let (begin, policy) = (Instant::now(), policy());
        let mut idle = Idle::new(begin, Duration::ZERO);
        let (at, tenth) = (begin + 10 * SECOND, SECOND);
        // A tenth of a vCPU is what is allowed.
        let mut allowed = Idle::new(begin, Duration::ZERO);
        assert_eq!(allowed.look(&policy, at, seen(0, begin, tenth)), Verdict::Idle(begin));
        let more = tenth + Duration::from_millis(1);
        assert_eq!(idle.look(&policy, at, seen(0, begin, more)), Verdict::NotYet);
        assert_eq!(idle.due(&policy), Some(at + 10 * SECOND));
        let mut deaf = policy.clone();
        deaf.busy_cpu = None;
        let look = idle.look(&deaf, at + 10 * SECOND, seen(0, begin, 100 * SECOND));
        assert_eq!(look, Verdict::Idle(at));
    }

    #[test]
    fn hours_of_an_open_stream_do_not_make_the_work_after_it_small() {
        let (begin, policy) = (Instant::now(), policy());
        let mut idle = Idle::new(begin, Duration::ZERO);
        assert_eq!(
            idle.look(&policy, begin + 10 * SECOND, seen(1, begin, Duration::ZERO)),
            Verdict::Held
        );
        let ended = begin + 9000 * SECOND;
        assert_eq!(idle.look(&policy, ended, seen(0, ended, SECOND)), Verdict::NotYet);
        let computed = seen(0, ended, SECOND + 5 * SECOND);
        assert_eq!(idle.look(&policy, ended + 10 * SECOND, computed), Verdict::NotYet);
    }

    #[test]
    fn hours_of_short_requests_do_not_make_the_work_after_them_small() {
        let (begin, policy) = (Instant::now(), policy());
        let mut idle = Idle::new(begin, Duration::ZERO);
        let mut now = begin;
        for _ in 0..1000 {
            let last = now + 9 * SECOND;
            now = idle.due(&policy).unwrap();
            assert_eq!(idle.look(&policy, now, seen(0, last, SECOND)), Verdict::NotYet);
        }
        now = idle.due(&policy).unwrap();
        let computed = seen(0, now - 10 * SECOND, SECOND + 5 * SECOND);
        assert_eq!(idle.look(&policy, now, computed), Verdict::NotYet);
        // And it is not seen once more.
        let looked = idle.look(&policy, idle.due(&policy).unwrap(), computed);
        assert_eq!(looked, Verdict::Idle(now));
    }

    #[test]
    fn a_suspend_that_fails_is_tried_again_later_and_later() {
        let (begin, policy) = (Instant::now(), policy());
        let mut idle = Idle::new(begin, Duration::ZERO);
        let mut now = begin + 10 * SECOND;
        for seconds in [10, 20, 40, 80, 160, 300, 300] {
            idle.failed(&policy, now);
            assert_eq!(idle.due(&policy), Some(now + seconds * SECOND));
            now += seconds * SECOND;
        }
        idle.try_again();
        assert_eq!(idle.due(&policy), Some(begin + 10 * SECOND));
        // A time that no clock reaches is never.
        let never = SessionPolicy::new().idle_after(Duration::MAX);
        assert_eq!(idle.due(&never), None);
        idle.failed(&never, now);
        // Nor is one of nothing a loop.
        let at_once = SessionPolicy::new().idle_after(Duration::ZERO);
        assert_eq!(Idle::new(begin, SECOND).due(&at_once), Some(begin + SHORTEST));
    }
}

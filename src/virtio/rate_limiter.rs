//! What keeps a device to its rate: token buckets, and a timer that wakes the device when there
//! are tokens again.
//!
//! A device asks [`RateLimiter::take`] before each request. Where the answer is no it puts the
//! request back, and serves the queue again when the limiter's [`source`](RateLimiter::source)
//! is ready. No thread waits, and a device that is within its rate makes no system call. What a
//! bucket holds is not part of a snapshot: a restored device has rested.

use std::io;
use std::os::fd::OwnedFd;
use std::time::{Duration, Instant};

use rustix::time::{
    Itimerspec, TimerfdClockId, TimerfdFlags, TimerfdTimerFlags, Timespec, timerfd_create,
    timerfd_settime,
};

use crate::config::RateLimit;

/// A device's limit, which may change at any time.
#[derive(Debug)]
pub(crate) struct RateLimiter {
    limit: RateLimit,
    buckets: Buckets,
    timer: OwnedFd,
    /// The last request was refused.
    waits: bool,
}

impl RateLimiter {
    /// Starts with full buckets. The timer is made in any case, for a limit that comes later.
    pub(crate) fn new(limit: RateLimit) -> io::Result<Self> {
        let flags = TimerfdFlags::NONBLOCK | TimerfdFlags::CLOEXEC;
        let timer = timerfd_create(TimerfdClockId::Monotonic, flags)?;
        Ok(Self { limit, buckets: Buckets::new(limit, Instant::now()), timer, waits: false })
    }

    /// What is ready when a request that was refused may be tried again: one of the device's
    /// [`sources`](super::VirtioDevice::sources).
    pub(crate) fn source(&self) -> io::Result<OwnedFd> {
        self.timer.try_clone()
    }

    /// Pays for an operation of so many bytes. Where it may not be done yet nothing is paid, and
    /// the source will be ready when it may.
    pub(crate) fn take(&mut self, bytes: u64) -> bool {
        self.wait_for(|buckets| buckets.take(Instant::now(), bytes))
    }

    /// Whether an operation may be done of which nobody knows the size before; it is
    /// [paid for](Self::pay) afterwards. Where it may not, the source will be ready when it may.
    pub(crate) fn may_begin(&mut self) -> bool {
        self.wait_for(|buckets| match buckets.wait(Instant::now(), 0) {
            Duration::ZERO => Ok(()),
            wait => Err(wait),
        })
    }

    /// Pays for an operation of so many bytes that was done.
    pub(crate) fn pay(&mut self, bytes: u64) {
        self.buckets.pay(bytes);
    }

    fn wait_for(&mut self, ask: impl FnOnce(&mut Buckets) -> Result<(), Duration>) -> bool {
        let answer = if self.buckets.is_unlimited() { Ok(()) } else { ask(&mut self.buckets) };
        if let Err(wait) = answer {
            self.wake_after(wait);
        }
        self.waits = answer.is_err();
        !self.waits
    }

    pub(crate) fn limit(&self) -> RateLimit {
        self.limit
    }

    /// Changes the limit. A device that waits tries again at once.
    pub(crate) fn set(&mut self, limit: RateLimit) {
        self.limit = limit;
        self.buckets.set(limit, Instant::now());
        if self.waits {
            self.wake_after(Duration::ZERO);
        }
    }

    /// Arming the timer takes an expiry away that nobody has read, so that each one is an edge.
    fn wake_after(&self, wait: Duration) {
        // A time of zero would disarm it.
        let wait = wait.max(Duration::from_nanos(1));
        let value = Timespec {
            tv_sec: i64::try_from(wait.as_secs()).unwrap_or(i64::MAX),
            tv_nsec: wait.subsec_nanos().into(),
        };
        let once = Itimerspec { it_interval: Timespec { tv_sec: 0, tv_nsec: 0 }, it_value: value };
        if let Err(error) = timerfd_settime(&self.timer, TimerfdTimerFlags::empty(), &once) {
            tracing::error!(%error, "a rate limiter's timer cannot be set");
        }
    }
}

/// Both buckets of a limit. An operation passes when each has enough.
#[derive(Clone, Copy, Debug)]
struct Buckets {
    bytes: Option<TokenBucket>,
    operations: Option<TokenBucket>,
}

impl Buckets {
    fn new(limit: RateLimit, now: Instant) -> Self {
        let bucket = |rate: Option<u64>, burst: Option<u64>| {
            rate.map(|rate| TokenBucket::full(rate, burst.unwrap_or(rate), now))
        };
        Self {
            bytes: bucket(limit.bytes_per_second, limit.burst_bytes),
            operations: bucket(limit.operations_per_second, limit.burst_operations),
        }
    }

    fn is_unlimited(&self) -> bool {
        self.bytes.is_none() && self.operations.is_none()
    }

    /// Pays for an operation, or says how long it has to wait.
    fn take(&mut self, now: Instant, bytes: u64) -> Result<(), Duration> {
        let wait = self.wait(now, bytes);
        if !wait.is_zero() {
            return Err(wait);
        }
        self.pay(bytes);
        Ok(())
    }

    /// How long an operation has to wait.
    fn wait(&mut self, now: Instant, bytes: u64) -> Duration {
        let wait = |bucket: &mut Option<TokenBucket>, cost| {
            bucket.as_mut().map_or(Duration::ZERO, |bucket| bucket.wait(now, cost))
        };
        wait(&mut self.bytes, bytes).max(wait(&mut self.operations, 1))
    }

    fn pay(&mut self, bytes: u64) {
        for (bucket, cost) in [(&mut self.bytes, bytes), (&mut self.operations, 1)] {
            if let Some(bucket) = bucket {
                bucket.pay(cost);
            }
        }
    }

    /// Takes over what was saved or owed: one limit after another forgives no debt, and gives no
    /// second burst.
    fn set(&mut self, limit: RateLimit, now: Instant) {
        let before = std::mem::replace(self, Self::new(limit, now));
        for (new, before) in
            [(&mut self.bytes, before.bytes), (&mut self.operations, before.operations)]
        {
            if let (Some(new), Some(mut before)) = (new, before) {
                before.fill(now);
                new.level = new.level.min(before.level);
            }
        }
    }
}

/// A bucket fills at a rate up to its burst, and may be in debt.
#[derive(Clone, Copy, Debug)]
struct TokenBucket {
    rate: u64,
    burst: u64,
    /// In billionths of a token: what a rate of one a second gives in a nanosecond.
    level: i128,
    filled_at: Instant,
}

/// Billionths in a token.
const TOKEN: i128 = 1_000_000_000;

impl TokenBucket {
    fn full(rate: u64, burst: u64, now: Instant) -> Self {
        let (rate, burst) = (rate.max(1), burst.max(1));
        Self { rate, burst, level: i128::from(burst) * TOKEN, filled_at: now }
    }

    /// Brings the level up to now.
    fn fill(&mut self, now: Instant) {
        let elapsed = now.saturating_duration_since(self.filled_at);
        self.filled_at = self.filled_at.max(now);
        let nanoseconds = i128::try_from(elapsed.as_nanos()).unwrap_or(i128::MAX);
        let gained = nanoseconds.saturating_mul(self.rate.into());
        let full = i128::from(self.burst) * TOKEN;
        self.level = self.level.saturating_add(gained).min(full);
    }

    /// How long until `cost` can be paid; zero where it can be now. What costs more than the
    /// bucket holds needs a full one.
    fn wait(&mut self, now: Instant, cost: u64) -> Duration {
        self.fill(now);
        let missing = i128::from(cost.min(self.burst)) * TOKEN - self.level;
        let nanoseconds = u128::try_from(missing).unwrap_or(0).div_ceil(self.rate.into());
        Duration::from_nanos(u64::try_from(nanoseconds).unwrap_or(u64::MAX))
    }

    /// Pays, and goes into debt for what the bucket does not hold.
    fn pay(&mut self, cost: u64) {
        self.level = self.level.saturating_sub(i128::from(cost) * TOKEN);
    }
}

#[cfg(test)]
mod tests {
    use proptest::collection::vec;
    use proptest::prelude::*;

    use super::*;

    fn limit(rate: u64, burst: u64) -> RateLimit {
        RateLimit::default().bytes_per_second(rate).burst_bytes(burst)
    }

    /// What passes, and when, of requests that come so many nanoseconds after one another.
    fn passed(buckets: &mut Buckets, start: Instant, requests: &[(u64, u64)]) -> Vec<(u64, u64)> {
        let mut at = 0;
        let mut passed = Vec::new();
        for (pause, cost) in requests {
            at += pause;
            if buckets.take(start + Duration::from_nanos(at), *cost).is_ok() {
                passed.push((at, *cost));
            }
        }
        passed
    }

    /// In no stretch of time passes more than the rate gives in it, and one burst: or one request,
    /// where that is larger.
    fn keeps_to(rate: u64, burst: u64, passed: &[(u64, u64)]) -> Result<(), TestCaseError> {
        let most = passed.iter().map(|(_, cost)| *cost).max().unwrap_or(0).max(burst);
        for (first, (from, _)) in passed.iter().enumerate() {
            let mut sum = 0;
            for (to, cost) in &passed[first..] {
                sum += u128::from(*cost);
                let gained = u128::from(to - from) * u128::from(rate) / TOKEN as u128;
                prop_assert!(sum <= gained + 1 + u128::from(most), "{sum} from {from} to {to}");
            }
        }
        Ok(())
    }

    proptest! {
        #[test]
        fn never_more_than_the_rate_and_one_burst(
            rate in 1u64..1 << 40,
            burst in 1u64..1 << 24,
            requests in vec((0u64..1 << 28, 0u64..1 << 25), 1..80),
        ) {
            let start = Instant::now();
            let mut buckets = Buckets::new(limit(rate, burst), start);
            keeps_to(rate, burst, &passed(&mut buckets, start, &requests))?;
        }

        #[test]
        fn operations_are_limited_as_bytes_are(
            rate in 1u64..1 << 20,
            burst in 1u64..1 << 10,
            pauses in vec(0u64..1 << 24, 1..80),
        ) {
            let start = Instant::now();
            let operations =
                RateLimit::default().operations_per_second(rate).burst_operations(burst);
            let requests: Vec<_> = pauses.into_iter().map(|pause| (pause, u64::MAX)).collect();
            let passed = passed(&mut Buckets::new(operations, start), start, &requests);
            let passed: Vec<_> = passed.into_iter().map(|(at, _)| (at, 1)).collect();
            keeps_to(rate, burst, &passed)?;
        }

        #[test]
        fn a_request_passes_at_the_very_time_that_was_said(
            (bytes, bytes_burst) in (1u64..1 << 40, 1u64..1 << 40),
            (operations, operations_burst) in (1u64..1 << 40, 1u64..1 << 40),
            costs in vec(any::<u32>().prop_map(u64::from), 1..50),
        ) {
            let limit = limit(bytes, bytes_burst)
                .operations_per_second(operations)
                .burst_operations(operations_burst);
            let mut now = Instant::now();
            let mut buckets = Buckets::new(limit, now);
            for cost in costs {
                if let Err(wait) = buckets.take(now, cost) {
                    let sooner = wait - Duration::from_nanos(1);
                    prop_assert!(buckets.take(now + sooner, cost).is_err());
                    now += wait;
                    prop_assert_eq!(buckets.take(now, cost), Ok(()));
                }
            }
        }

        #[test]
        fn one_limit_after_another_gives_no_second_burst(
            limits in vec((1u64..1 << 40, 1u64..1 << 24), 1..8),
            requests in vec((0u64..1 << 28, 0u64..1 << 24), 1..40),
        ) {
            let start = Instant::now();
            let (rate, burst) = limits.iter().fold((0, 0), |(rate, burst), limit| {
                (limit.0.max(rate), limit.1.max(burst))
            });
            let mut buckets = Buckets::new(limit(rate, burst), start);
            let mut all = Vec::new();
            let mut at = 0;
            for (turn, (pause, cost)) in requests.into_iter().enumerate() {
                at += pause;
                let now = start + Duration::from_nanos(at);
                let (rate, burst) = limits[turn % limits.len()];
                buckets.set(limit(rate, burst), now);
                if buckets.take(now, cost).is_ok() {
                    all.push((at, cost));
                }
            }
            keeps_to(rate, burst, &all)?;
        }

        #[test]
        fn no_value_is_too_large_or_too_small(
            steps in vec((any::<[Option<u64>; 4]>(), any::<u32>(), any::<u64>()), 1..50),
        ) {
            let mut now = Instant::now();
            let mut buckets = Buckets::new(RateLimit::default(), now);
            for ([bytes, burst, operations, operations_burst], seconds, cost) in steps {
                let limit = RateLimit {
                    bytes_per_second: bytes,
                    burst_bytes: burst,
                    operations_per_second: operations,
                    burst_operations: operations_burst,
                };
                let passed = buckets.take(now, cost).is_ok();
                let wait = buckets.take(now, u64::MAX).err();
                prop_assert!(passed || wait.is_some());
                now += Duration::from_secs(seconds.into());
                buckets.set(limit, now);
                // A clock that goes back is one that stands still.
                let _ = buckets.take(now - Duration::from_millis(1), cost);
            }
        }
    }

    #[test]
    fn a_request_larger_than_the_burst_passes_once_and_is_paid_for() {
        let start = Instant::now();
        let mut buckets = Buckets::new(limit(1000, 100), start);
        assert_eq!(buckets.take(start, 5100), Ok(()));
        assert_eq!(buckets.take(start, 1), Err(Duration::from_millis(5001)));
        assert_eq!(buckets.take(start, 5100), Err(Duration::from_millis(5100)));
    }

    #[test]
    fn what_is_not_limited_is_not_held_up() {
        let mut limiter = RateLimiter::new(RateLimit::default()).unwrap();
        assert!((0..10_000).all(|_| limiter.take(u64::MAX)));
    }
}

//! How much time has passed since something was written to a file, whatever was done to the clocks since.
//!
//! Within one boot of the host CLOCK_BOOTTIME says it, which nobody sets, but that each time namespace has its own. Over a
//! boot, and from one namespace to another, there is the wall clock alone: one that was set back says that no time has
//! passed, never that it went backwards.

use std::fs;
use std::time::{Duration, SystemTime, UNIX_EPOCH};

use rustix::time::{ClockId, clock_gettime};
use serde::{Deserialize, Serialize};

/// A moment that can be written down.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub(super) struct Stamp {
    /// The boot and the time namespace that the next is counted in.
    boot: String,
    since_boot: Duration,
    wall: Duration,
}

impl Stamp {
    pub(super) fn now() -> Self {
        let mut boot = fs::read_to_string("/proc/sys/kernel/random/boot_id").unwrap_or_default();
        if let Ok(namespace) = fs::read_link("/proc/self/ns/time") {
            boot.push_str(&namespace.to_string_lossy());
        }
        let now = clock_gettime(ClockId::Boottime);
        let seconds = u64::try_from(now.tv_sec).unwrap_or(0);
        let nanos = u32::try_from(now.tv_nsec).unwrap_or(0);
        Self {
            boot: boot.replace('\n', " "),
            since_boot: Duration::from_secs(seconds) + Duration::from_nanos(nanos.into()),
            wall: SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default(),
        }
    }

    /// How much time has passed between `self` and `now`.
    pub(super) fn until(&self, now: &Self) -> Duration {
        match self.boot == now.boot && !self.boot.is_empty() {
            true => now.since_boot.saturating_sub(self.since_boot),
            false => now.wall.saturating_sub(self.wall),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn stamp(boot: &str, since_boot: u64, wall: u64) -> Stamp {
        let seconds = Duration::from_secs;
        Stamp { boot: boot.into(), since_boot: seconds(since_boot), wall: seconds(wall) }
    }

    #[test]
    fn a_wall_clock_that_jumps_counts_for_nothing_within_a_boot() {
        let before = stamp("a", 100, 1_000_000);
        for wall in [0, 999_000, 1_000_007, 9_000_000] {
            assert_eq!(before.until(&stamp("a", 107, wall)), Duration::from_secs(7));
        }
    }

    #[test]
    fn over_a_boot_time_never_goes_backwards() {
        let before = stamp("a", 100, 1_000_000);
        assert_eq!(before.until(&stamp("b", 1, 1_000_060)), Duration::from_secs(60));
        assert_eq!(before.until(&stamp("b", 1, 10)), Duration::ZERO);
        let unknown = stamp("", 100, 1_000_000);
        assert_eq!(unknown.until(&stamp("", 900, 1_000_003)), Duration::from_secs(3));
    }

    #[test]
    fn now_is_after_what_was_now() {
        let before = Stamp::now();
        std::thread::sleep(Duration::from_millis(2));
        let passed = before.until(&Stamp::now());
        assert!(passed >= Duration::from_millis(2) && passed < Duration::from_secs(3600));
    }
}

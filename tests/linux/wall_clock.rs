//! The wall clock, which tests set on a machine of our own. On any other it is left alone.

use std::fs;
use std::thread::sleep;
use std::time::{Duration, Instant, SystemTime};

use rustix::time::{ClockId, Timespec, clock_settime};

/// The longest time that a test waits for, in seconds, where it may not set the clock.
const LONGEST_WAIT: i64 = 60;

/// The wall clock of this machine. It is right again when this goes.
pub struct WallClock {
    is_ours: bool,
    /// What it would be if nobody had set it.
    began: (Duration, Instant),
    /// By how many seconds it is off that.
    off: i64,
}

impl WallClock {
    pub fn new() -> Self {
        let name = fs::read_to_string("/proc/sys/kernel/hostname").unwrap();
        let now = SystemTime::UNIX_EPOCH.elapsed().unwrap();
        Self { is_ours: name.trim() == "testbed", began: (now, Instant::now()), off: 0 }
    }

    /// Sets it by so many seconds off what it should be.
    pub fn jump(&mut self, seconds: i64) {
        if !self.is_ours {
            return;
        }
        self.off = seconds;
        let now = self.began.0 + self.began.1.elapsed();
        let tv_sec = now.as_secs() as i64 + seconds;
        let time = Timespec { tv_sec, tv_nsec: now.subsec_nanos().into() };
        clock_settime(ClockId::Realtime, time).unwrap();
    }

    /// Lets so many seconds pass for everybody, and says how many did: on a machine of our own all of them, at once.
    pub fn pass(&mut self, seconds: i64) -> i64 {
        if self.is_ours {
            self.jump(self.off + seconds);
            return seconds;
        }
        let seconds = seconds.min(LONGEST_WAIT);
        sleep(Duration::from_secs(seconds as u64));
        seconds
    }
}

impl Drop for WallClock {
    fn drop(&mut self) {
        self.jump(0);
    }
}

//! How much of a processor a thread has used, told to other threads.
//!
//! Source: pthread_getcpuclockid(3), clock_gettime(2).

use std::mem::MaybeUninit;
use std::time::Duration;

/// The processor time of a thread, in it and in the kernel, with what a vCPU's guest has used.
#[derive(Clone, Copy, Debug)]
pub(crate) struct ThreadClock(libc::clockid_t);

impl ThreadClock {
    /// That of the calling thread.
    pub(crate) fn current() -> Option<Self> {
        let mut clock = 0;
        // SAFETY: the thread is the calling one, which lives, and `clock` takes the answer.
        let failed = unsafe { libc::pthread_getcpuclockid(libc::pthread_self(), &raw mut clock) };
        (failed == 0).then_some(Self(clock))
    }

    /// What the thread has used since it began; a system call. The caller knows that the thread is alive: a
    /// number that the kernel gave to another thread of this process would be that one's time.
    pub(crate) fn read(self) -> Duration {
        let mut time = MaybeUninit::<libc::timespec>::uninit();
        // SAFETY: the kernel writes a whole timespec, or fails.
        if unsafe { libc::clock_gettime(self.0, time.as_mut_ptr()) } != 0 {
            return Duration::ZERO;
        }
        // SAFETY: written just above.
        let time = unsafe { time.assume_init() };
        // A processor's time is not negative, and its nanoseconds are less than a second.
        Duration::new(time.tv_sec.unsigned_abs(), time.tv_nsec.unsigned_abs() as u32)
    }
}

#[cfg(test)]
mod tests {
    use std::sync::mpsc::channel;
    use std::thread;

    use super::*;

    #[test]
    fn a_thread_that_works_uses_time_and_one_that_waits_uses_none() {
        let (tell, told) = channel();
        let (stop, stopped) = channel::<()>();
        let waiting = thread::spawn(move || {
            tell.send(ThreadClock::current().unwrap()).unwrap();
            let _ = stopped.recv();
        });
        let other = told.recv().unwrap();
        let own = ThreadClock::current().unwrap();
        let begin = own.read();
        let others = other.read();
        while own.read() < begin + Duration::from_millis(30) {}
        assert!(other.read() - others < Duration::from_millis(10));
        drop(stop);
        waiting.join().unwrap();
    }
}

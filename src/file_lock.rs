//! Locks of files (flock) that somebody holds for as long as a VM, or a process, is there.
//!
//! A process that is being started has a copy of each descriptor of its parent until it executes its program,
//! and with them locks that its parent has let go of. So who finds one taken looks again before it says so.

use std::fs::{File, TryLockError};
use std::io;
use std::thread;
use std::time::Duration;

const TRIES: u32 = 20;
const PAUSE: Duration = Duration::from_millis(5);

/// Whether a file is ours now.
pub(crate) enum Locked {
    Ours,
    /// Nobody can tell: its file system has no locks.
    NoLocks,
    /// Somebody has it, a tenth of a second later too.
    Taken,
}

/// Locks a file for this process alone.
pub(crate) fn exclusive(file: &File) -> io::Result<Locked> {
    patiently(|| file.try_lock())
}

/// Locks a file together with others who do so.
pub(crate) fn shared(file: &File) -> io::Result<Locked> {
    patiently(|| file.try_lock_shared())
}

fn patiently(lock: impl Fn() -> Result<(), TryLockError>) -> io::Result<Locked> {
    for _ in 0..TRIES {
        match lock() {
            Ok(()) => return Ok(Locked::Ours),
            Err(TryLockError::WouldBlock) => thread::sleep(PAUSE),
            Err(TryLockError::Error(error)) if error.kind() == io::ErrorKind::Unsupported => {
                return Ok(Locked::NoLocks);
            }
            Err(TryLockError::Error(error)) => return Err(error),
        }
    }
    Ok(Locked::Taken)
}

#[cfg(test)]
mod tests {
    use vmm_sys_util::tempfile::TempFile;

    use super::*;

    #[test]
    fn a_lock_that_is_held_for_a_moment_is_waited_for_and_one_that_stays_is_not() {
        let file = TempFile::new().unwrap();
        let open = || File::open(file.as_path()).unwrap();
        let held = open();
        held.try_lock().unwrap();
        assert!(matches!(exclusive(&open()).unwrap(), Locked::Taken));
        assert!(matches!(shared(&open()).unwrap(), Locked::Taken));
        let moment = thread::spawn(move || {
            thread::sleep(PAUSE * 2);
            drop(held);
        });
        // A thread that stands still meanwhile holds it for longer.
        let one = open();
        while !matches!(shared(&one).unwrap(), Locked::Ours) {}
        assert!(matches!(shared(&open()).unwrap(), Locked::Ours));
        moment.join().unwrap();
    }
}

//! Locks of files (flock), which go with whoever has them, and with their process, however that ends.
//!
//! A process that is being started has a copy of each descriptor of its parent until it executes its program, and with
//! them their locks. So who lets go of a lock unlocks it: closing would leave it to the copy. One whose process was
//! ended may still be left to a copy, so who finds it taken looks again for a moment before that is an error.

use std::fs::{File, TryLockError};
use std::io;
use std::ops::Deref;
use std::process;
use std::thread;
use std::time::Duration;

const TRIES: u32 = 20;
const PAUSE: Duration = Duration::from_millis(5);

/// An open file, and its lock, if it has one: both go with this value, whoever has a copy of the descriptor.
#[derive(Debug)]
pub(crate) struct LockedFile {
    file: File,
    /// The process that locked it. A child after a fork has a copy of all, and lets go of nothing by dropping it.
    locked_by: Option<u32>,
}

/// Whether a file is ours now.
#[derive(Debug)]
pub(crate) enum Locked {
    Ours(LockedFile),
    /// Nobody can tell: its file system has no locks.
    NoLocks(LockedFile),
    /// Somebody has it.
    Taken,
}

impl LockedFile {
    /// Locks a file for this process alone. Where it is taken, that is looked at for a tenth of a second.
    pub(crate) fn exclusive(file: File) -> io::Result<Locked> {
        patiently(file, File::try_lock)
    }

    /// Locks a file together with others who do so, as patiently.
    pub(crate) fn shared(file: File) -> io::Result<Locked> {
        patiently(file, File::try_lock_shared)
    }

    /// As [`exclusive`](Self::exclusive), and looks once.
    pub(crate) fn exclusive_now(file: File) -> io::Result<Locked> {
        let locked = file.try_lock();
        Locked::of(file, locked)
    }

    /// As [`shared`](Self::shared), and waits for as long as another has it for itself.
    #[cfg(feature = "image")]
    pub(crate) fn wait_shared(file: File) -> io::Result<Self> {
        file.lock_shared()?;
        Ok(Self::ours(file))
    }

    fn ours(file: File) -> Self {
        Self { file, locked_by: Some(process::id()) }
    }
}

impl Locked {
    fn of(file: File, locked: Result<(), TryLockError>) -> io::Result<Self> {
        match locked {
            Ok(()) => Ok(Self::Ours(LockedFile::ours(file))),
            Err(TryLockError::WouldBlock) => Ok(Self::Taken),
            Err(TryLockError::Error(error)) if error.kind() == io::ErrorKind::Unsupported => {
                Ok(Self::NoLocks(file.into()))
            }
            Err(TryLockError::Error(error)) => Err(error),
        }
    }
}

fn patiently(file: File, lock: impl Fn(&File) -> Result<(), TryLockError>) -> io::Result<Locked> {
    let mut locked = lock(&file);
    for _ in 1..TRIES {
        if !matches!(locked, Err(TryLockError::WouldBlock)) {
            break;
        }
        thread::sleep(PAUSE);
        locked = lock(&file);
    }
    Locked::of(file, locked)
}

/// Without a lock.
impl From<File> for LockedFile {
    fn from(file: File) -> Self {
        Self { file, locked_by: None }
    }
}

impl Deref for LockedFile {
    type Target = File;

    fn deref(&self) -> &File {
        &self.file
    }
}

impl Drop for LockedFile {
    fn drop(&mut self) {
        if self.locked_by == Some(process::id()) {
            let _ = self.file.unlock();
        }
    }
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
        assert!(matches!(LockedFile::exclusive(open()).unwrap(), Locked::Taken));
        assert!(matches!(LockedFile::exclusive_now(open()).unwrap(), Locked::Taken));
        assert!(matches!(LockedFile::shared(open()).unwrap(), Locked::Taken));
        let moment = thread::spawn(move || {
            thread::sleep(PAUSE * 2);
            drop(held);
        });
        // A thread that stands still meanwhile holds it for longer.
        let one = loop {
            match LockedFile::shared(open()).unwrap() {
                Locked::Ours(one) => break one,
                locked => assert!(matches!(locked, Locked::Taken)),
            }
        };
        assert!(matches!(LockedFile::shared(open()).unwrap(), Locked::Ours(_)));
        assert!(matches!(LockedFile::exclusive_now(open()).unwrap(), Locked::Taken));
        drop(one);
        moment.join().unwrap();
    }

    #[test]
    fn a_lock_is_let_go_of_even_where_somebody_has_a_copy_of_the_descriptor() {
        let file = TempFile::new().unwrap();
        let open = || File::open(file.as_path()).unwrap();
        for lock in [LockedFile::exclusive, LockedFile::shared, LockedFile::exclusive_now] {
            let Locked::Ours(locked) = lock(open()).unwrap() else { panic!("it is taken") };
            let copy = locked.try_clone().unwrap();
            assert!(matches!(LockedFile::exclusive_now(open()).unwrap(), Locked::Taken));
            drop(locked);
            assert!(matches!(LockedFile::exclusive_now(open()).unwrap(), Locked::Ours(_)));
            drop(copy);
        }
    }

    #[test]
    fn who_did_not_lock_a_file_leaves_the_lock_to_who_has_it() {
        let file = TempFile::new().unwrap();
        let open = || File::open(file.as_path()).unwrap();
        let held = open();
        held.try_lock().unwrap();
        let copy = || held.try_clone().unwrap();
        drop(LockedFile::from(copy()));
        // What a child has after a fork.
        drop(LockedFile { file: copy(), locked_by: Some(process::id() + 1) });
        assert!(matches!(LockedFile::exclusive_now(open()).unwrap(), Locked::Taken));
    }
}

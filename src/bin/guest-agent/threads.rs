//! Threads, each with a small stack, and never more of a kind than there may be.

use std::io;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::thread;

use crate::sys;

/// Enough for every thread: what is large is on the heap, and nothing recurses.
const STACK_BYTES: usize = 64 << 10;

/// What the kernel says where there may be no more threads (pthread_create(3)).
const EAGAIN: i32 = 11;

/// So many at once leave memory behind, which the allocator gives back when it is told to.
const MANY: usize = 32;

/// A thread for as long as there is something to do.
pub(crate) fn spawn(work: impl FnOnce() + Send + 'static) -> io::Result<()> {
    thread::Builder::new().stack_size(STACK_BYTES).spawn(work).map(|_| ())
}

/// Threads of one kind.
pub(crate) struct Threads {
    max: usize,
    count: AtomicUsize,
    /// How many there were at most since memory was given back.
    most: AtomicUsize,
}

/// One of them, until it is dropped.
pub(crate) struct Place(&'static Threads);

impl Threads {
    /// As many as this at a time.
    pub(crate) const fn at_most(max: usize) -> Self {
        Self { max, count: AtomicUsize::new(0), most: AtomicUsize::new(0) }
    }

    /// A place for a thread that there is, unless there are too many.
    pub(crate) fn place(&'static self) -> io::Result<Place> {
        let taken = self.count.fetch_add(1, Ordering::Relaxed);
        self.most.fetch_max(taken + 1, Ordering::Relaxed);
        let place = Place(self);
        if taken >= self.max {
            return Err(io::Error::from_raw_os_error(EAGAIN));
        }
        Ok(place)
    }

    /// Runs something on a thread of its own, unless there are too many.
    pub(crate) fn spawn(&'static self, work: impl FnOnce() + Send + 'static) -> io::Result<()> {
        let place = self.place()?;
        spawn(move || {
            let _place = place;
            work();
        })
    }
}

impl Drop for Place {
    fn drop(&mut self) {
        let Threads { count, most, .. } = self.0;
        let left = count.fetch_sub(1, Ordering::Relaxed) - 1;
        if left < MANY / 2 && most.load(Ordering::Relaxed) >= MANY {
            most.store(left, Ordering::Relaxed);
            sys::give_memory_back();
        }
    }
}

#[cfg(test)]
mod tests {
    use std::sync::{Arc, Mutex, mpsc};

    use super::*;

    #[test]
    fn there_are_never_more_than_may_be_and_places_become_free_again() {
        static SOME: Threads = Threads::at_most(40);
        let (sender, receiver) = mpsc::channel::<()>();
        let receiver = Arc::new(Mutex::new(receiver));
        for _ in 0..40 {
            let receiver = Arc::clone(&receiver);
            let wait = move || {
                let _ = receiver.lock().unwrap().recv();
            };
            SOME.spawn(wait).unwrap();
        }
        let refused = SOME.spawn(|| ()).unwrap_err();
        assert_eq!(refused.raw_os_error(), Some(EAGAIN));
        drop(sender);
        while SOME.spawn(|| ()).is_err() {
            thread::yield_now();
        }
    }
}

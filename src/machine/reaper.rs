//! Takes down what is slow to take down, on threads of its own.
//!
//! Closing a VM's descriptors sleeps for 1 to 15 ms in the kernel, and unmapping a large memory
//! takes as long as its pages are many. So a machine that is dropped is handed to the reaper.
//! Its threads come with the first corpse and go with the last one: a process without VMs has
//! none of them.

use std::collections::VecDeque;
use std::ops::Deref;
use std::sync::{Mutex, PoisonError};
use std::thread;

use crate::kvm::block_signals;

/// Closing sleeps, so several at a time are faster than one: up to this many threads.
const MAX_THREADS: usize = 8;

/// With so many waiting, a drop takes its own down: a process that drops faster than the kernel
/// closes is slowed rather than let grow.
const MAX_WAITING: usize = 256;

type Corpse = Box<dyn Send>;

struct Reaper {
    waiting: VecDeque<Corpse>,
    threads: usize,
}

static REAPER: Mutex<Reaper> = Mutex::new(Reaper { waiting: VecDeque::new(), threads: 0 });

/// A value whose drop is slow, and happens on a thread of the reaper.
#[derive(Debug)]
pub(super) struct Reaped<T: Send + 'static> {
    // Empty only after `drop` took it out.
    value: Option<Box<T>>,
}

impl<T: Send> Reaped<T> {
    pub(super) fn new(value: T) -> Self {
        Self { value: Some(Box::new(value)) }
    }
}

impl<T: Send> Deref for Reaped<T> {
    type Target = T;

    fn deref(&self) -> &T {
        match &self.value {
            Some(value) => value,
            None => unreachable!("a dropped value is not borrowed"),
        }
    }
}

impl<T: Send> Drop for Reaped<T> {
    fn drop(&mut self) {
        if let Some(value) = self.value.take() {
            reap(value);
        }
    }
}

fn reap(corpse: Corpse) {
    let mut reaper = REAPER.lock().unwrap_or_else(PoisonError::into_inner);
    if reaper.waiting.len() >= MAX_WAITING {
        drop(reaper);
        drop(corpse);
        return;
    }
    reaper.waiting.push_back(corpse);
    if reaper.threads == MAX_THREADS {
        return;
    }
    reaper.threads += 1;
    drop(reaper);
    let spawned = thread::Builder::new().name("dormouse-reaper".into()).spawn(|| {
        // The embedding program's signals are for its own threads.
        block_signals();
        work();
    });
    if spawned.is_err() {
        // No thread is to be had: the caller does the work, of this corpse and its like.
        work();
    }
}

/// Drops what waits until nothing does.
fn work() {
    loop {
        let mut reaper = REAPER.lock().unwrap_or_else(PoisonError::into_inner);
        let Some(corpse) = reaper.waiting.pop_front() else {
            reaper.threads -= 1;
            return;
        };
        drop(reaper);
        drop(corpse);
    }
}

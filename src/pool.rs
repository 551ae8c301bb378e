//! VMs of one snapshot that are kept ready to run.

use std::collections::VecDeque;
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::thread::{self, JoinHandle};
use std::time::{Duration, Instant};

use thiserror::Error as ThisError;

use crate::config::RestoreOptions;
use crate::error::{Error, ErrorKind};
use crate::microvm::{MicroVm, OnEnd, Paused};
use crate::snapshot::Snapshot;

/// How long a VM that was taken is left alone with the machine, before the next one is made ready.
const HEAD_START: Duration = Duration::from_millis(1);

/// Why the pool has no VM to give.
#[derive(Debug, ThisError)]
enum PoolError {
    #[error(
        "{max} VMs of the pool are in use, and no place became free for this one within {seconds} s"
    )]
    AllInUse { max: usize, seconds: f64 },
    #[error("a pool of {min} VMs ready and {max} in use: it takes 1 or more in use")]
    Sizes { min: usize, max: usize },
    #[error("cannot start the pool's thread")]
    Thread(#[source] std::io::Error),
}

impl From<PoolError> for Error {
    fn from(error: PoolError) -> Self {
        match error {
            PoolError::AllInUse { .. } => Error::new(ErrorKind::Timeout, error)
                .fix("end VMs that are done, or allow more with `PoolOptions::max`"),
            PoolError::Sizes { .. } => Error::new(ErrorKind::Config, error),
            PoolError::Thread(_) => Error::new(ErrorKind::Resources, error)
                .fix("raise the limit of processes (ulimit -u)"),
        }
    }
}

/// How many VMs a [`Pool`] keeps ready, and how many it lets be in use.
#[derive(Clone, Debug)]
pub struct PoolOptions {
    min: usize,
    max: usize,
    timeout: Duration,
    restore: RestoreOptions,
}

impl Default for PoolOptions {
    fn default() -> Self {
        let timeout = Duration::from_secs(10);
        Self { min: 1, max: usize::MAX, timeout, restore: RestoreOptions::default() }
    }
}

impl PoolOptions {
    /// One ready, any number in use.
    pub fn new() -> Self {
        Self::default()
    }

    /// How many VMs are kept ready: each costs its descriptors, its threads and some 200 KiB.
    #[must_use]
    pub fn min(mut self, count: usize) -> Self {
        self.min = count;
        self
    }

    /// How many VMs of the pool may be in use at once: beyond that, [`Pool::acquire`] waits until
    /// one has ended.
    #[must_use]
    pub fn max(mut self, count: usize) -> Self {
        self.max = count;
        self
    }

    /// How long [`Pool::acquire`] waits at most; 10 s unless set.
    #[must_use]
    pub fn timeout(mut self, timeout: Duration) -> Self {
        self.timeout = timeout;
        self
    }

    /// How each VM is restored. What only one VM can have, such as a tap, makes the second fail.
    #[must_use]
    pub fn restore(mut self, options: RestoreOptions) -> Self {
        self.restore = options;
        self
    }
}

/// Keeps VMs of a snapshot restored, so that one runs within microseconds of being asked for.
///
/// A thread of its own restores them, one after the other. A VM that is taken is the caller's,
/// and of nobody else; when it ends, whatever its state, its place is free again. Dropping the
/// pool ends the VMs that are ready, not those in use. One that has been ready for long was paused for as long: its
/// clocks go on from when it was restored, whatever [`Clock`](crate::Clock) says.
///
/// ```no_run
/// use dormouse::{Pool, PoolOptions, Snapshot};
///
/// let pool = Pool::new(Snapshot::open("base")?, PoolOptions::new().min(4).max(100))?;
/// let vm = pool.acquire()?.resume()?;
/// # Ok::<(), dormouse::Error>(())
/// ```
#[derive(Debug)]
#[must_use = "dropping it ends the VMs that it keeps ready"]
pub struct Pool {
    shared: Arc<Shared>,
    thread: Option<JoinHandle<()>>,
}

#[derive(Debug)]
struct Shared {
    snapshot: Snapshot,
    options: PoolOptions,
    vms: Mutex<Vms>,
    /// Signalled when a VM became ready, was taken or has ended.
    changed: Condvar,
}

#[derive(Debug, Default)]
struct Vms {
    ready: VecDeque<MicroVm<Paused>>,
    in_use: usize,
    /// Who waits for a place, by the numbers that they drew, the first who came first.
    waiting: VecDeque<u64>,
    next_number: u64,
    /// Why the thread could not make the last one: it tries again when somebody asks.
    failed: Option<Error>,
    over: bool,
}

impl Pool {
    /// A pool of this snapshot. Returns at once; the first VMs are ready a little later.
    ///
    /// # Errors
    ///
    /// [`ErrorKind::Config`] for a pool of no VMs, [`ErrorKind::Resources`] where its thread
    /// cannot be started.
    pub fn new(snapshot: Snapshot, options: PoolOptions) -> Result<Self, Error> {
        if options.max == 0 {
            return Err(PoolError::Sizes { min: options.min, max: options.max }.into());
        }
        let shared =
            Arc::new(Shared { snapshot, options, vms: Mutex::default(), changed: Condvar::new() });
        let worker = Arc::clone(&shared);
        let builder = thread::Builder::new().name("dormouse-pool".to_owned());
        let thread = builder.spawn(move || worker.keep_ready()).map_err(PoolError::Thread)?;
        Ok(Self { shared, thread: Some(thread) })
    }

    /// A VM that is restored and has not run: one that is ready, in a few microseconds; else one
    /// that is made now, in about a millisecond; and where as many are in use as may be, the first
    /// whose place becomes free. Of several who wait, who came first has it.
    ///
    /// # Errors
    ///
    /// [`ErrorKind::Timeout`] where no place became free; whatever
    /// [`Snapshot::restore_with`] says where one is made.
    pub fn acquire(&self) -> Result<MicroVm<Paused>, Error> {
        self.shared.acquire()
    }

    /// How many VMs are ready now.
    pub fn ready(&self) -> usize {
        self.shared.lock().ready.len()
    }

    /// How many VMs of the pool are in use now.
    pub fn in_use(&self) -> usize {
        self.shared.lock().in_use
    }
}

impl Drop for Pool {
    fn drop(&mut self) {
        self.shared.lock().over = true;
        self.shared.changed.notify_all();
        if let Some(thread) = self.thread.take() {
            let _ = thread.join();
        }
        // Out of the lock, which the end of each of them takes.
        let ready = std::mem::take(&mut self.shared.lock().ready);
        drop(ready);
    }
}

impl Shared {
    fn acquire(self: &Arc<Self>) -> Result<MicroVm<Paused>, Error> {
        let begin = Instant::now();
        let max = self.options.max;
        let mut vms = self.lock();
        let number = vms.next_number;
        vms.next_number += 1;
        vms.waiting.push_back(number);
        while vms.in_use >= max || vms.waiting.front() != Some(&number) {
            let left = self.options.timeout.saturating_sub(begin.elapsed());
            if left.is_zero() {
                vms.waiting.retain(|other| *other != number);
                drop(vms);
                // The next one may be the first now.
                self.changed.notify_all();
                let seconds = self.options.timeout.as_secs_f64();
                return Err(PoolError::AllInUse { max, seconds }.into());
            }
            let waited = self.changed.wait_timeout(vms, left);
            vms = waited.unwrap_or_else(PoisonError::into_inner).0;
        }
        vms.waiting.pop_front();
        vms.in_use += 1;
        vms.failed = None;
        let ready = vms.ready.pop_front();
        drop(vms);
        self.changed.notify_all();
        // Gives the place back however this ends.
        let shared = Arc::clone(self);
        let on_end = OnEnd::new(move || shared.give_back());
        let mut vm = match ready {
            Some(vm) => vm,
            None => self.snapshot.restore_with(&self.options.restore)?,
        };
        vm.on_end(on_end);
        Ok(vm)
    }

    fn give_back(&self) {
        let mut vms = self.lock();
        vms.in_use = vms.in_use.saturating_sub(1);
        drop(vms);
        self.changed.notify_all();
    }

    /// The thread's life.
    fn keep_ready(&self) {
        loop {
            let mut vms = self.lock();
            let was_full = vms.ready.len() >= self.options.min;
            let waited = self.changed.wait_while(vms, |vms| {
                !vms.over && (vms.ready.len() >= self.options.min || vms.failed.is_some())
            });
            vms = waited.unwrap_or_else(PoisonError::into_inner);
            if was_full {
                // Somebody has just taken one, and is about to run it.
                let waited = self.changed.wait_timeout_while(vms, HEAD_START, |vms| !vms.over);
                vms = waited.unwrap_or_else(PoisonError::into_inner).0;
            }
            if vms.over {
                return;
            }
            drop(vms);
            let made = self.snapshot.restore_with(&self.options.restore);
            let mut vms = self.lock();
            match made {
                Ok(vm) => vms.ready.push_back(vm),
                Err(error) => {
                    tracing::warn!(%error, "a pool cannot make a VM ready");
                    vms.failed = Some(error);
                }
            }
            drop(vms);
            self.changed.notify_all();
        }
    }

    fn lock(&self) -> MutexGuard<'_, Vms> {
        self.vms.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

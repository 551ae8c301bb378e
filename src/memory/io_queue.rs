//! Operations on files that have to be waited for: one io_uring for all VMs of the process, so
//! that a slow disk of one holds up no device of another.
//!
//! It is here because the kernel reads and writes guest RAM for it, long after the call. Source:
//! io_uring(7). The ring takes nothing but the operations of a [`Transfer`]: it was told so
//! before it was enabled. Where there is no io_uring (Docker's default filter forbids it), a few
//! threads do the same with blocking calls.

use std::any::Any;
use std::collections::{HashMap, VecDeque};
use std::io;
use std::sync::{Arc, Condvar, Mutex, MutexGuard, OnceLock, PoisonError};

use io_uring::register::Restriction;
use io_uring::{IoUring, opcode};
use vmm_sys_util::eventfd::EventFd;

use super::{Progress, Transfer};

/// Submissions that the kernel takes at once; what is more waits here.
const RING_ENTRIES: u32 = 256;
/// Operations that the kernel has at once. A disk that hangs keeps its places, 256 a queue.
const COMPLETIONS: u32 = 16384;
/// Threads of the kernel's that may wait for files. A disk that hangs keeps those that it has.
const KERNEL_WORKERS: u32 = 256;

/// The operations under way.
pub(crate) struct IoQueue {
    backend: Backend,
    /// Written by the kernel when an operation of the ring is done.
    event: EventFd,
    /// What looks at the event, kept as long as there is something to look at.
    watch: OnceLock<Box<dyn Any + Send + Sync>>,
}

enum Backend {
    Ring(Box<Mutex<Ring>>),
    Workers(Arc<Workers>),
}

struct Ring {
    uring: IoUring,
    next_key: u64,
    running: HashMap<u64, Box<Running>>,
    /// Keys of what the ring had no room for.
    backlog: VecDeque<u64>,
}

/// Threads in place of a ring.
#[derive(Default)]
pub(crate) struct Workers {
    inbox: Mutex<(VecDeque<Running>, bool)>,
    more: Condvar,
}

/// An operation, and who wants to know of its end. It keeps the queue, which keeps the ring,
/// until then.
struct Running {
    transfer: Transfer,
    client: Arc<FileIo>,
    token: u64,
}

impl IoQueue {
    /// A queue with an io_uring.
    pub(crate) fn ring() -> io::Result<Self> {
        let uring = IoUring::builder()
            .setup_r_disabled()
            .setup_clamp()
            .setup_cqsize(COMPLETIONS)
            .dontfork()
            .build(RING_ENTRIES)?;
        let event = event_fd()?;
        let codes = [
            opcode::Nop::CODE,
            opcode::Readv::CODE,
            opcode::Writev::CODE,
            opcode::Write::CODE,
            opcode::Fsync::CODE,
            opcode::Fallocate::CODE,
        ];
        let submitter = uring.submitter();
        submitter.register_eventfd(std::os::fd::AsRawFd::as_raw_fd(&event))?;
        // Advice, which kernels before 5.15 do not take.
        let _ = submitter.register_iowq_max_workers(&mut [KERNEL_WORKERS, 0]);
        submitter.register_restrictions(&mut codes.map(Restriction::sqe_op))?;
        submitter.register_enable_rings()?;
        let ring = Ring { uring, next_key: 0, running: HashMap::new(), backlog: VecDeque::new() };
        Ok(Self {
            backend: Backend::Ring(Box::new(Mutex::new(ring))),
            event,
            watch: OnceLock::new(),
        })
    }

    /// A queue whose operations are done by threads that call [`Workers::work`].
    pub(crate) fn workers() -> io::Result<(Self, Arc<Workers>)> {
        let workers = Arc::new(Workers::default());
        let backend = Backend::Workers(Arc::clone(&workers));
        Ok((Self { backend, event: event_fd()?, watch: OnceLock::new() }, workers))
    }

    /// Becomes readable when [`reap`](Self::reap) is to be called.
    pub(crate) fn event(&self) -> io::Result<EventFd> {
        self.event.try_clone()
    }

    /// Keeps what looks at the event.
    pub(crate) fn set_watch(&self, watch: impl Any + Send + Sync) {
        let _ = self.watch.set(Box::new(watch));
    }

    /// Gives the ends of operations to those who wait for them.
    pub(crate) fn reap(&self) {
        let Backend::Ring(ring) = &self.backend else { return };
        let _ = self.event.read();
        let mut ended = Vec::new();
        {
            let mut ring = lock(ring);
            let Ring { uring, running, backlog, .. } = &mut *ring;
            for entry in uring.completion() {
                let key = entry.user_data();
                let Some(operation) = running.get_mut(&key) else { continue };
                let result = usize::try_from(entry.result())
                    .map_err(|_| io::Error::from_raw_os_error(-entry.result()));
                match operation.transfer.advance(result) {
                    Progress::Again => backlog.push_back(key),
                    Progress::Done(result) => {
                        ended.extend(running.remove(&key).map(|operation| (operation, result)));
                    }
                }
            }
            ring.flush(&self.event);
        }
        // Not under the lock: what ends here may be the last that kept a VM's memory.
        for (operation, result) in ended {
            operation.client.deliver(operation.token, result);
        }
    }
}

impl Ring {
    /// Hands as much of the backlog as there is room for to the kernel.
    fn flush(&mut self, event: &EventFd) {
        // No more than there is room for completions: the kernel tells of none that overflow.
        let room = self.uring.params().cq_entries() as usize;
        while self.running.len() - self.backlog.len() < room
            && let Some(key) = self.backlog.front()
        {
            let Some(operation) = self.running.get_mut(key) else { break };
            let entry = operation.transfer.entry().user_data(*key);
            // SAFETY: the operation stays in its box in `running`, untouched, until its
            // completion; it owns the file, the buffers and the list that the entry points to.
            if unsafe { self.uring.submission().push(&entry) }.is_ok() {
                self.backlog.pop_front();
            } else if self.uring.submit().is_err() {
                break;
            }
        }
        if !self.uring.submission().is_empty() && self.uring.submit().is_err() {
            // The kernel is short of something. This tries again when the loop comes round.
            let _ = event.write(1);
        }
    }
}

impl Workers {
    /// Does operations until the queue is dropped.
    pub(crate) fn work(&self) {
        loop {
            let mut running = {
                let waited = self
                    .more
                    .wait_while(lock(&self.inbox), |(list, over)| list.is_empty() && !*over);
                let mut inbox = waited.unwrap_or_else(PoisonError::into_inner);
                let Some(running) = inbox.0.pop_front() else { return };
                running
            };
            loop {
                let result = running.transfer.run();
                if let Progress::Done(result) = running.transfer.advance(result) {
                    running.client.deliver(running.token, result);
                    break;
                }
            }
        }
    }
}

impl Drop for IoQueue {
    fn drop(&mut self) {
        if let Backend::Workers(workers) = &self.backend {
            lock(&workers.inbox).1 = true;
            workers.more.notify_all();
        }
    }
}

/// A device's share of the queue: what it submitted comes back here.
pub(crate) struct FileIo {
    queue: Arc<IoQueue>,
    done: Mutex<Vec<(u64, io::Result<()>)>>,
    event: EventFd,
}

impl FileIo {
    pub(crate) fn new(queue: &Arc<IoQueue>) -> io::Result<Arc<Self>> {
        let queue = Arc::clone(queue);
        Ok(Arc::new(Self { queue, done: Mutex::default(), event: event_fd()? }))
    }

    /// Begins operations. Each end is found by its token in [`take_done`](Self::take_done).
    pub(crate) fn submit(self: &Arc<Self>, transfers: Vec<(u64, Transfer)>) {
        let running = transfers.into_iter().map(|(token, transfer)| Running {
            transfer,
            client: Arc::clone(self),
            token,
        });
        match &self.queue.backend {
            Backend::Ring(ring) => {
                let mut ring = lock(ring);
                for operation in running {
                    let key = ring.next_key;
                    ring.next_key = ring.next_key.wrapping_add(1);
                    ring.running.insert(key, Box::new(operation));
                    ring.backlog.push_back(key);
                }
                ring.flush(&self.queue.event);
            }
            Backend::Workers(workers) => {
                lock(&workers.inbox).0.extend(running);
                workers.more.notify_all();
            }
        }
    }

    /// What has ended since the last call.
    pub(crate) fn take_done(&self) -> Vec<(u64, io::Result<()>)> {
        let _ = self.event.read();
        std::mem::take(&mut lock(&self.done))
    }

    /// Becomes readable when something has ended.
    pub(crate) fn event(&self) -> io::Result<EventFd> {
        self.event.try_clone()
    }

    fn deliver(&self, token: u64, result: io::Result<()>) {
        lock(&self.done).push((token, result));
        // A counter that is full is readable as well.
        let _ = self.event.write(1);
    }
}

impl std::fmt::Debug for FileIo {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("FileIo").finish_non_exhaustive()
    }
}

fn event_fd() -> io::Result<EventFd> {
    EventFd::new(libc::EFD_NONBLOCK | libc::EFD_CLOEXEC)
}

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

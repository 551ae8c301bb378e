//! Operations on files that have to be waited for: one io_uring for all VMs of the process, so
//! that a slow disk of one holds up no device of another.
//!
//! It is here because the kernel reads and writes guest RAM for it, long after the call. Source:
//! io_uring(7). The ring takes nothing but the operations of a [`Transfer`]: it was told so
//! before it was enabled. Where there is no io_uring (Docker's default filter forbids it), a few
//! threads do the same with blocking calls. Devices take turns ([`Turns`]), and what one has under way is
//! bounded, since a disk that hangs keeps what it has of both.

use std::any::Any;
use std::collections::HashMap;
use std::io;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Condvar, Mutex, MutexGuard, OnceLock, PoisonError};

use io_uring::register::Restriction;
use io_uring::{IoUring, opcode};
use vmm_sys_util::eventfd::EventFd;

use super::turns::Turns;
use super::{Progress, Transfer};

/// Submissions that the kernel takes at once; what is more waits here.
const RING_ENTRIES: u32 = 256;
/// Operations that the kernel has at once, and those of one device.
const COMPLETIONS: u32 = 16384;
const AT_ONCE: usize = 64;
/// Threads of the kernel's that may wait for files.
const KERNEL_WORKERS: u32 = 256;
/// What one device has under way where threads of ours wait for files: half of them.
const WORKERS_AT_ONCE: usize = 4;

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
    /// Keys of those that the kernel does not have.
    turns: Turns<ClientId, u64>,
    in_kernel: usize,
}

/// Threads in place of a ring.
pub(crate) struct Workers {
    inbox: Mutex<Inbox>,
    more: Condvar,
}

struct Inbox {
    turns: Turns<ClientId, Running>,
    is_over: bool,
}

/// A device's, by its address, which stays as long as anything of it is under way.
type ClientId = usize;

/// An operation, and who wants to know of its end. It keeps the queue, which keeps the ring,
/// until then.
struct Running {
    transfer: Transfer,
    client: Arc<FileIo>,
    token: u64,
}

impl Running {
    /// What is left to do after an attempt. Nothing is done again for a device that is gone.
    fn advance(&mut self, result: io::Result<usize>) -> Progress {
        match self.transfer.advance(result) {
            Progress::Again if self.client.is_cancelled() => Progress::Done(Err(cancelled())),
            progress => progress,
        }
    }
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
        let (running, turns) = (HashMap::new(), Turns::new(AT_ONCE));
        let ring = Ring { uring, next_key: 0, running, turns, in_kernel: 0 };
        Ok(Self {
            backend: Backend::Ring(Box::new(Mutex::new(ring))),
            event,
            watch: OnceLock::new(),
        })
    }

    /// A queue whose operations are done by threads that call [`Workers::work`].
    pub(crate) fn workers() -> io::Result<(Self, Arc<Workers>)> {
        let inbox = Inbox { turns: Turns::new(WORKERS_AT_ONCE), is_over: false };
        let workers = Arc::new(Workers { inbox: Mutex::new(inbox), more: Condvar::new() });
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
            let Ring { uring, running, turns, in_kernel, .. } = &mut *ring;
            for entry in uring.completion() {
                let key = entry.user_data();
                let Some(operation) = running.get_mut(&key) else { continue };
                let client = operation.client.id();
                turns.done(client);
                *in_kernel -= 1;
                let result = usize::try_from(entry.result())
                    .map_err(|_| io::Error::from_raw_os_error(-entry.result()));
                match operation.advance(result) {
                    Progress::Again => turns.push(client, key),
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
    /// Hands as much of what waits as there is room for to the kernel.
    fn flush(&mut self, event: &EventFd) {
        // No more than there is room for completions: the kernel tells of none that overflow.
        let room = self.uring.params().cq_entries() as usize;
        while self.in_kernel < room
            && let Some((client, key)) = self.turns.next()
        {
            let Some(operation) = self.running.get_mut(&key) else { continue };
            let entry = operation.transfer.entry().user_data(key);
            // SAFETY: the operation stays in its box in `running`, untouched, until its
            // completion; it owns the file, the buffers and the list that the entry points to.
            if unsafe { self.uring.submission().push(&entry) }.is_ok() {
                self.in_kernel += 1;
                continue;
            }
            self.turns.put_back(client, key);
            if self.uring.submit().is_err() {
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
    /// Begins an operation, and never ends it.
    #[cfg(test)]
    pub(crate) fn take_one(&self) -> impl Sized + use<> {
        lock(&self.inbox).turns.next()
    }

    /// Does operations until the queue is dropped.
    pub(crate) fn work(&self) {
        loop {
            let mut running = {
                let is_idle = |inbox: &mut Inbox| inbox.turns.is_empty() && !inbox.is_over;
                let waited = self.more.wait_while(lock(&self.inbox), is_idle);
                let mut inbox = waited.unwrap_or_else(PoisonError::into_inner);
                match inbox.turns.next() {
                    Some((_, running)) => running,
                    None if inbox.is_over => return,
                    None => continue,
                }
            };
            let result = loop {
                let result = running.transfer.run();
                if let Progress::Done(result) = running.advance(result) {
                    break result;
                }
            };
            lock(&self.inbox).turns.done(running.client.id());
            self.more.notify_one();
            running.client.deliver(running.token, result);
        }
    }
}

impl Drop for IoQueue {
    fn drop(&mut self) {
        if let Backend::Workers(workers) = &self.backend {
            lock(&workers.inbox).is_over = true;
            workers.more.notify_all();
        }
    }
}

/// A device's share of the queue: what it submitted comes back here.
pub(crate) struct FileIo {
    queue: Arc<IoQueue>,
    done: Mutex<Vec<(u64, io::Result<()>)>>,
    event: EventFd,
    is_cancelled: AtomicBool,
}

impl FileIo {
    pub(crate) fn new(queue: &Arc<IoQueue>) -> io::Result<Arc<Self>> {
        let queue = Arc::clone(queue);
        let (done, is_cancelled) = (Mutex::default(), AtomicBool::new(false));
        Ok(Arc::new(Self { queue, done, event: event_fd()?, is_cancelled }))
    }

    /// Begins operations. Each end is found by its token in [`take_done`](Self::take_done).
    pub(crate) fn submit(self: &Arc<Self>, transfers: Vec<(u64, Transfer)>) {
        let running = transfers.into_iter().map(|(token, transfer)| Running {
            transfer,
            client: Arc::clone(self),
            token,
        });
        if self.is_cancelled() {
            return running.for_each(|operation| self.deliver(operation.token, Err(cancelled())));
        }
        match &self.queue.backend {
            Backend::Ring(ring) => {
                let mut ring = lock(ring);
                for operation in running {
                    let key = ring.next_key;
                    ring.next_key = ring.next_key.wrapping_add(1);
                    ring.running.insert(key, Box::new(operation));
                    ring.turns.push(self.id(), key);
                }
                ring.flush(&self.queue.event);
            }
            Backend::Workers(workers) => {
                let mut inbox = lock(&workers.inbox);
                running.for_each(|operation| inbox.turns.push(self.id(), operation));
                drop(inbox);
                workers.more.notify_all();
            }
        }
    }

    /// Nothing begins any more. What has not begun ends now, with an error; what is under way ends when the
    /// kernel has done with it.
    pub(crate) fn cancel(&self) {
        self.is_cancelled.store(true, Ordering::Relaxed);
        let ended: Vec<Running> = match &self.queue.backend {
            Backend::Ring(ring) => {
                let mut ring = lock(ring);
                let waiting = ring.turns.take_waiting(self.id());
                let taken = waiting.into_iter().filter_map(|key| ring.running.remove(&key));
                taken.map(|operation| *operation).collect()
            }
            Backend::Workers(workers) => lock(&workers.inbox).turns.take_waiting(self.id()).into(),
        };
        // Not under the lock, as above.
        for operation in ended {
            self.deliver(operation.token, Err(cancelled()));
        }
    }

    fn is_cancelled(&self) -> bool {
        self.is_cancelled.load(Ordering::Relaxed)
    }

    fn id(&self) -> ClientId {
        std::ptr::from_ref(self).addr()
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

fn cancelled() -> io::Error {
    io::Error::from_raw_os_error(libc::ECANCELED)
}

fn event_fd() -> io::Result<EventFd> {
    EventFd::new(libc::EFD_NONBLOCK | libc::EFD_CLOEXEC)
}

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

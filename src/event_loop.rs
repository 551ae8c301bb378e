//! The device thread: one for all VMs of the process, woken by the doorbells and the sources of their
//! devices.
//!
//! It comes with the first device and goes with the last one, and sleeps in epoll_wait while no
//! doorbell rings and no source of a device is ready. Source: event-manager's documentation; epoll(7).

use std::io;
use std::os::fd::AsRawFd;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, PoisonError};
use std::thread::{self, ThreadId};

use event_manager::{
    EventManager, EventOps, Events, MutEventSubscriber, RemoteEndpoint, SubscriberId,
};
use thiserror::Error as ThisError;
use vmm_sys_util::epoll::EventSet;
use vmm_sys_util::eventfd::EventFd;

use crate::error::{Error, ErrorKind};
use crate::kvm::block_signals;
use crate::seccomp::Confinement;

/// Why a device cannot be served.
#[derive(Debug, ThisError)]
pub(crate) enum EventLoopError {
    #[error("cannot start the device thread")]
    Thread(#[source] io::Error),
    #[error("cannot watch a doorbell")]
    Watch(#[source] event_manager::Error),
}

impl From<EventLoopError> for Error {
    fn from(error: EventLoopError) -> Self {
        Error::new(ErrorKind::Resources, error)
            .fix("raise the limits of open files and processes (ulimit -n, ulimit -u)")
    }
}

/// How sources are watched.
const SOURCE: EventSet = EventSet::from_bits_truncate(
    EventSet::IN.bits() | EventSet::OUT.bits() | EventSet::EDGE_TRIGGERED.bits(),
);

/// What wakes a device, and what to do then.
pub(crate) struct Subscription {
    /// Eventfds that the driver rings.
    pub(crate) doorbells: Vec<EventFd>,
    /// Descriptors of the host, watched edge-triggered for input and output.
    pub(crate) sources: Vec<Box<dyn AsRawFd + Send>>,
    /// Called with what happened. It returns soon.
    pub(crate) answer: Box<dyn FnMut(Wake) -> Answered + Send>,
    /// Why one of them could not be watched.
    unwatched: Option<event_manager::Error>,
}

impl Subscription {
    pub(crate) fn new(
        doorbells: Vec<EventFd>,
        sources: Vec<Box<dyn AsRawFd + Send>>,
        answer: Box<dyn FnMut(Wake) -> Answered + Send>,
    ) -> Self {
        Self { doorbells, sources, answer, unwatched: None }
    }
}

/// Why a device is woken: one of its doorbells, or one of its sources, by its place.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Wake {
    Doorbell(usize),
    Source(usize),
}

/// Whether the work is done.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Answered {
    Done,
    /// There is more, for when the others have had their turn.
    Again,
}

type Endpoint = RemoteEndpoint<Subscription>;

/// The running thread, and how many watches it has.
struct DeviceThread {
    endpoint: Endpoint,
    id: ThreadId,
    stop: Arc<AtomicBool>,
    watches: usize,
}

static DEVICE_THREAD: Mutex<Option<DeviceThread>> = Mutex::new(None);

/// A place in the device thread; dropping it returns when it is woken no more.
pub(crate) struct Watch {
    id: SubscriberId,
    endpoint: Endpoint,
    device_thread: ThreadId,
}

impl Watch {
    /// Answers from now on. Returns after the device thread's current turn.
    pub(crate) fn new(subscription: Subscription) -> Result<Self, EventLoopError> {
        let (endpoint, device_thread) = enter()?;
        let added = endpoint.call_blocking(move |manager| {
            let id = manager.add_subscriber(subscription);
            let unwatched = manager.subscriber_mut(id)?.unwatched.take();
            match unwatched {
                None => Ok(id),
                Some(error) => {
                    manager.remove_subscriber(id)?;
                    Err(error)
                }
            }
        });
        match added {
            Ok(id) => Ok(Self { id, endpoint, device_thread }),
            Err(error) => {
                leave();
                Err(EventLoopError::Watch(error))
            }
        }
    }
}

impl std::fmt::Debug for Watch {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Watch").field("id", &self.id).finish_non_exhaustive()
    }
}

impl Drop for Watch {
    fn drop(&mut self) {
        let id = self.id;
        if thread::current().id() == self.device_thread {
            // The device thread cannot wait for itself; it does this after its turn.
            let _ = self.endpoint.fire(move |manager| drop(manager.remove_subscriber(id)));
        } else {
            // What it holds ends here, not on the device thread.
            drop(self.endpoint.call_blocking(move |manager| manager.remove_subscriber(id)));
        }
        leave();
    }
}

/// Counts one watch more, and starts the thread for the first one. The lock is held for the
/// count alone: a device at its work holds up nobody who wants in.
fn enter() -> Result<(Endpoint, ThreadId), EventLoopError> {
    let mut running = DEVICE_THREAD.lock().unwrap_or_else(PoisonError::into_inner);
    let device_thread = match &mut *running {
        Some(device_thread) => device_thread,
        None => running.insert(DeviceThread::start()?),
    };
    device_thread.watches += 1;
    Ok((device_thread.endpoint.clone(), device_thread.id))
}

/// Counts one watch less, and ends the thread after the last one.
fn leave() {
    let mut running = DEVICE_THREAD.lock().unwrap_or_else(PoisonError::into_inner);
    let Some(device_thread) = &mut *running else { return };
    device_thread.watches -= 1;
    if device_thread.watches == 0 {
        device_thread.stop.store(true, Ordering::SeqCst);
        let _ = device_thread.endpoint.kick();
        *running = None;
    }
}

impl DeviceThread {
    fn start() -> Result<Self, EventLoopError> {
        let mut manager = EventManager::<Subscription>::new().map_err(EventLoopError::Watch)?;
        let endpoint = manager.remote_endpoint();
        let stop = Arc::new(AtomicBool::new(false));
        let stopped = Arc::clone(&stop);
        let thread = thread::Builder::new()
            .name("dormouse-device".into())
            .spawn(move || {
                block_signals();
                // A process whose kernel has none is not worse off than with another library.
                if let Err(error) = Confinement::Device.apply() {
                    tracing::warn!(%error, "the device thread runs without a seccomp filter");
                }
                while !stopped.load(Ordering::SeqCst) && manager.run().is_ok() {}
            })
            .map_err(EventLoopError::Thread)?;
        Ok(Self { endpoint, id: thread.thread().id(), stop, watches: 0 })
    }
}

impl MutEventSubscriber for Subscription {
    fn init(&mut self, ops: &mut EventOps<'_>) {
        let doorbells = self.doorbells.iter().map(AsRawFd::as_raw_fd);
        let sources = self.sources.iter().map(|source| source.as_raw_fd());
        let all = doorbells.map(|fd| (fd, EventSet::IN)).chain(sources.map(|fd| (fd, SOURCE)));
        for (place, (fd, events)) in (0..).zip(all) {
            if let Err(error) = ops.add(Events::with_data_raw(fd, place, events)) {
                self.unwatched = Some(error);
                return;
            }
        }
    }

    fn process(&mut self, events: Events, ops: &mut EventOps<'_>) {
        let place = events.data() as usize;
        if let Some(doorbell) = self.doorbells.get(place) {
            // However often it rang, it is answered once.
            let _ = doorbell.read();
            if (self.answer)(Wake::Doorbell(place)) == Answered::Again {
                let _ = doorbell.write(1);
            }
        } else if let Some(source) = self.sources.get(place - self.doorbells.len()) {
            let again = Events::with_data_raw(source.as_raw_fd(), events.data(), SOURCE);
            if (self.answer)(Wake::Source(place - self.doorbells.len())) == Answered::Again {
                // To watch it anew makes an event of what is ready already. What the device has taken in makes none, so
                // that it is woken by its doorbells too.
                let _ = ops.modify(again);
                for doorbell in &self.doorbells {
                    let _ = doorbell.write(1);
                }
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use std::sync::atomic::AtomicUsize;
    use std::time::{Duration, Instant};

    use super::*;

    /// Only a failing test waits so long.
    const PATIENCE: Duration = Duration::from_secs(60);

    /// A watch of one doorbell, and how often that was answered.
    fn watch(gone: &Arc<AtomicBool>) -> (Watch, EventFd, Arc<AtomicUsize>) {
        let doorbell = EventFd::new(libc::EFD_NONBLOCK).unwrap();
        let (count, gone) = (Arc::new(AtomicUsize::new(0)), Arc::clone(gone));
        let (doorbells, counted) = (vec![doorbell.try_clone().unwrap()], Arc::clone(&count));
        let answer = Box::new(move |wake| {
            assert_eq!(wake, Wake::Doorbell(0));
            // A panic would end the thread for all: the count says it.
            let step = if gone.load(Ordering::SeqCst) { 1 << 32 } else { 1 };
            counted.fetch_add(step, Ordering::SeqCst);
            Answered::Done
        });
        let watch = Watch::new(Subscription::new(doorbells, Vec::new(), answer)).unwrap();
        (watch, doorbell, count)
    }

    fn ring_until_answered(doorbell: &EventFd, count: &AtomicUsize) {
        let before = count.load(Ordering::SeqCst);
        doorbell.write(1).unwrap();
        let begin = Instant::now();
        while count.load(Ordering::SeqCst) == before {
            assert!(begin.elapsed() < PATIENCE, "a doorbell is not answered");
            thread::yield_now();
        }
    }

    #[test]
    fn what_cannot_be_watched_is_an_error_and_leaves_no_watch() {
        // epoll(7) watches no regular file.
        let file: Box<dyn AsRawFd + Send> =
            Box::new(std::fs::File::open("/proc/self/exe").unwrap());
        let answer = Box::new(|_| Answered::Done);
        let error = Watch::new(Subscription::new(Vec::new(), vec![file], answer)).unwrap_err();
        assert!(matches!(error, EventLoopError::Watch(_)), "{error:?}");
    }

    #[test]
    fn watches_come_and_go_while_doorbells_ring_and_none_is_answered_after_its_end() {
        thread::scope(|scope| {
            for _ in 0..6 {
                scope.spawn(|| {
                    for round in 0..300 {
                        let gone = Arc::new(AtomicBool::new(false));
                        let (watch, doorbell, count) = watch(&gone);
                        ring_until_answered(&doorbell, &count);
                        // Now and then it still rings when it goes.
                        if round % 3 == 0 {
                            doorbell.write(1).unwrap();
                        }
                        drop(watch);
                        gone.store(true, Ordering::SeqCst);
                        doorbell.write(1).unwrap();
                        thread::yield_now();
                        let count = count.load(Ordering::SeqCst);
                        assert!((1..=2).contains(&count), "answered {count:#x} times");
                    }
                });
            }
        });
    }
}

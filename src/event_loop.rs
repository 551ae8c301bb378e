//! The device thread: one for all VMs of the process, woken by the doorbells of their devices.
//!
//! It comes with the first device and goes with the last one, and sleeps in epoll_wait while no
//! doorbell rings. Source: event-manager's documentation; epoll(7).

use std::io;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, PoisonError};
use std::thread;

use event_manager::{
    EventManager, EventOps, Events, MutEventSubscriber, RemoteEndpoint, SubscriberId,
};
use thiserror::Error as ThisError;
use vmm_sys_util::epoll::EventSet;
use vmm_sys_util::eventfd::EventFd;

use crate::error::{Error, ErrorKind};
use crate::kvm::block_signals;

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

/// Doorbells, and what to do when one of them rings.
pub(crate) struct Doorbells {
    pub(crate) events: Vec<EventFd>,
    /// Called with the place of the doorbell that rang. It returns soon.
    pub(crate) answer: Box<dyn FnMut(usize) -> Answered + Send>,
}

/// Whether a doorbell's work is done.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Answered {
    Done,
    /// There is more, for when the others have had their turn.
    Again,
}

type Endpoint = RemoteEndpoint<Doorbells>;

/// The running thread, and how many watches it has.
struct DeviceThread {
    endpoint: Endpoint,
    stop: Arc<AtomicBool>,
    watches: usize,
}

static DEVICE_THREAD: Mutex<Option<DeviceThread>> = Mutex::new(None);

/// A place in the device thread; dropping it returns when its doorbells are answered no more.
#[derive(Debug)]
pub(crate) struct Watch {
    id: SubscriberId,
}

impl Watch {
    /// Answers `doorbells` from now on.
    pub(crate) fn new(doorbells: Doorbells) -> Result<Self, EventLoopError> {
        let mut running = DEVICE_THREAD.lock().unwrap_or_else(PoisonError::into_inner);
        let device_thread = match &mut *running {
            Some(device_thread) => device_thread,
            None => running.insert(DeviceThread::start()?),
        };
        let added = device_thread.endpoint.call_blocking(move |manager| {
            Ok::<_, event_manager::Error>(manager.add_subscriber(doorbells))
        });
        let id = added.map_err(EventLoopError::Watch)?;
        device_thread.watches += 1;
        Ok(Self { id })
    }
}

impl Drop for Watch {
    fn drop(&mut self) {
        let mut running = DEVICE_THREAD.lock().unwrap_or_else(PoisonError::into_inner);
        let Some(device_thread) = &mut *running else { return };
        let id = self.id;
        let removed =
            device_thread.endpoint.call_blocking(move |manager| manager.remove_subscriber(id));
        // The answer and what it holds end here, not on the device thread.
        drop(removed);
        device_thread.watches -= 1;
        if device_thread.watches == 0 {
            device_thread.stop.store(true, Ordering::SeqCst);
            let _ = device_thread.endpoint.kick();
            *running = None;
        }
    }
}

impl DeviceThread {
    fn start() -> Result<Self, EventLoopError> {
        let mut manager = EventManager::<Doorbells>::new().map_err(EventLoopError::Watch)?;
        let endpoint = manager.remote_endpoint();
        let stop = Arc::new(AtomicBool::new(false));
        let stopped = Arc::clone(&stop);
        thread::Builder::new()
            .name("dormouse-device".into())
            .spawn(move || {
                block_signals();
                while !stopped.load(Ordering::SeqCst) && manager.run().is_ok() {}
            })
            .map_err(EventLoopError::Thread)?;
        Ok(Self { endpoint, stop, watches: 0 })
    }
}

impl MutEventSubscriber for Doorbells {
    fn init(&mut self, ops: &mut EventOps<'_>) {
        for (index, event) in (0..).zip(&self.events) {
            // A doorbell that cannot be watched is one that never rings.
            if let Err(error) = ops.add(Events::with_data(event, index, EventSet::IN)) {
                tracing::error!(%error, "a doorbell cannot be watched");
            }
        }
    }

    fn process(&mut self, events: Events, _ops: &mut EventOps<'_>) {
        let index = events.data() as usize;
        let Some(event) = self.events.get(index) else { return };
        // However often it rang, it is answered once.
        let _ = event.read();
        if (self.answer)(index) == Answered::Again {
            let _ = event.write(1);
        }
    }
}

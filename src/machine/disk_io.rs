//! The I/O queue of the process: made for the first disk, gone with the last one and what it has
//! under way.

use std::os::fd::AsRawFd;
use std::sync::{Arc, Mutex, PoisonError, Weak};
use std::thread;

use super::MachineError;
use crate::error::Error;
use crate::event_loop::{Answered, Subscription, Watch};
use crate::kvm::block_signals;
use crate::memory::IoQueue;
use crate::seccomp::Confinement;

/// How many operations wait at once where there is no io_uring.
const WORKERS: usize = 8;

static QUEUE: Mutex<Weak<IoQueue>> = Mutex::new(Weak::new());

/// The queue that all disks share.
pub(crate) fn queue() -> Result<Arc<IoQueue>, Error> {
    let mut shared = QUEUE.lock().unwrap_or_else(PoisonError::into_inner);
    if let Some(queue) = shared.upgrade() {
        return Ok(queue);
    }
    let queue = match IoQueue::ring() {
        Ok(queue) => with_ring(queue)?,
        Err(error) => {
            tracing::info!(%error, "no io_uring; threads wait for disks instead");
            with_workers()?
        }
    };
    *shared = Arc::downgrade(&queue);
    Ok(queue)
}

/// The device thread looks at the ring.
fn with_ring(queue: IoQueue) -> Result<Arc<IoQueue>, Error> {
    let queue = Arc::new(queue);
    let reaped = Arc::downgrade(&queue);
    let answer = Box::new(move |_| {
        if let Some(queue) = reaped.upgrade() {
            queue.reap();
        }
        Answered::Done
    });
    let event = queue.event().map_err(MachineError::EventFd)?;
    let sources: Vec<Box<dyn AsRawFd + Send>> = vec![Box::new(event)];
    queue.set_watch(Watch::new(Subscription::new(Vec::new(), sources, answer))?);
    Ok(queue)
}

pub(crate) fn with_workers() -> Result<Arc<IoQueue>, Error> {
    let (queue, workers) = IoQueue::workers().map_err(MachineError::EventFd)?;
    let queue = Arc::new(queue);
    for _ in 0..WORKERS {
        let workers = Arc::clone(&workers);
        let work = move || {
            block_signals();
            if let Err(error) = Confinement::Device.apply() {
                tracing::warn!(%error, "a disk thread runs without a seccomp filter");
            }
            workers.work();
        };
        let thread = thread::Builder::new().name("dormouse-disk".into());
        thread.spawn(work).map_err(MachineError::DiskThread)?;
    }
    Ok(queue)
}

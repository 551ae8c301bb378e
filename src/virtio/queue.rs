//! One split virtqueue, with what a device needs of it: chains that are checked, and a bound on
//! the work that one doorbell can ask for.
//!
//! Source: virtio 1.2 §2.7. The rings are virtio-queue's.

use std::sync::Arc;

use thiserror::Error as ThisError;
use virtio_queue::desc::split::Descriptor;
use virtio_queue::{DescriptorChain, Queue, QueueOwnedT, QueueT};
use vm_memory::{GuestMemoryBackend, GuestMemoryMmap};

use super::Interrupt;
use crate::memory::{GuestBytes, GuestRam};

/// Requests that one doorbell gets served before other devices get their turn.
const MAX_REQUESTS: usize = 256;

/// How a driver broke its queue.
#[derive(Debug, ThisError)]
pub(crate) enum QueueError {
    #[error("the rings are outside of memory or inconsistent")]
    Rings(#[from] virtio_queue::Error),
    #[error("a descriptor chain is outside of memory, loops, or is longer than its queue")]
    Chain,
}

/// How far a doorbell's requests have been served.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Served {
    /// All of them.
    All,
    /// There may be more: the doorbell is to be rung again.
    Some,
}

/// A request of a driver: bytes to read, then bytes to write, inside guest RAM.
#[derive(Debug, Default)]
pub(crate) struct Chain<'ram> {
    pub(crate) readable: GuestBytes<'ram>,
    pub(crate) writable: GuestBytes<'ram>,
}

/// A queue of an active device.
#[derive(Debug)]
pub(crate) struct VirtQueue {
    pub(super) queue: Queue,
    ram: Arc<GuestRam>,
    interrupt: Arc<Interrupt>,
}

impl VirtQueue {
    pub(super) fn new(
        max_size: u16,
        ram: Arc<GuestRam>,
        interrupt: Arc<Interrupt>,
    ) -> Result<Self, QueueError> {
        Ok(Self { queue: Queue::new(max_size)?, ram, interrupt })
    }

    /// Whether the driver's choice of size and addresses can be used.
    pub(super) fn is_valid(&self) -> bool {
        self.queue.is_valid(self.ram.inner())
    }

    /// Answers the driver's requests: `answer` says how many bytes it wrote to each.
    pub(crate) fn serve(
        &mut self,
        mut answer: impl FnMut(Chain<'_>) -> u32,
    ) -> Result<Served, QueueError> {
        let ram = Arc::clone(&self.ram);
        let memory = ram.inner();
        let mut requests = 0;
        let served = loop {
            self.queue.disable_notification(memory)?;
            while requests < MAX_REQUESTS
                && let Some(chain) = self.queue.iter(memory)?.next()
            {
                let head = chain.head_index();
                let written = answer(check(memory, chain, self.queue.size())?);
                self.queue.add_used(memory, head, written)?;
                requests += 1;
            }
            if requests == MAX_REQUESTS {
                break Served::Some;
            }
            // True where a request came after the last look.
            if !self.queue.enable_notification(memory)? {
                break Served::All;
            }
        };
        if requests > 0 && self.queue.needs_notification(memory)? {
            self.interrupt.used_buffer();
        }
        Ok(served)
    }
}

/// Collects the buffers of a chain.
fn check<'ram>(
    memory: &'ram GuestMemoryMmap,
    chain: DescriptorChain<&'ram GuestMemoryMmap>,
    queue_size: u16,
) -> Result<Chain<'ram>, QueueError> {
    let mut buffers = Chain::default();
    let mut count = 0;
    let mut last: Option<Descriptor> = None;
    for descriptor in chain {
        count += 1;
        let target = match (descriptor.is_write_only(), last) {
            (true, _) => &mut buffers.writable,
            // What the device reads comes before what it writes (§2.7.4.2).
            (false, Some(before)) if before.is_write_only() => return Err(QueueError::Chain),
            (false, _) => &mut buffers.readable,
        };
        for slice in memory.get_slices(descriptor.addr(), descriptor.len() as usize) {
            target.push(slice.map_err(|_| QueueError::Chain)?);
        }
        last = Some(descriptor);
    }
    // The iterator ends without a word at a descriptor that it cannot follow.
    let complete = last.is_some_and(|descriptor| !descriptor.has_next());
    if !complete || count > usize::from(queue_size) {
        return Err(QueueError::Chain);
    }
    Ok(buffers)
}

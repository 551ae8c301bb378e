//! One split virtqueue, with what a device needs of it: chains that are checked, and a bound on
//! the work that one doorbell can ask for.
//!
//! Source: virtio 1.2 §2.7. The rings are virtio-queue's.

use std::num::Wrapping;
use std::sync::Arc;
use std::sync::atomic::{Ordering, fence};

use smallvec::SmallVec;
use thiserror::Error as ThisError;
use virtio_queue::desc::split::Descriptor;
use virtio_queue::{DescriptorChain, Queue, QueueOwnedT, QueueT};
use vm_memory::{Bytes, GuestAddress, GuestMemoryBackend, GuestMemoryMmap};

use super::Interrupt;
use super::state::QueueState;
use crate::memory::{GuestBytes, GuestRam};

/// What one doorbell gets served before other devices get their turn: so many requests, and about
/// so many bytes, which take a millisecond or some.
const MAX_REQUESTS: usize = 256;
const MAX_BYTES: u64 = 8 << 20;

/// A ring begins with its flags and its index (§2.7.6, §2.7.8).
const RING_HEADER_BYTES: u64 = 4;
const USED_ELEMENT_BYTES: usize = 8;
/// The driver wants no interrupt.
const AVAIL_F_NO_INTERRUPT: u16 = 1;

/// Requests that are taken from the rings together, and given back together unless they are
/// large: as many bytes as are worth a look of the driver's.
const BATCH: usize = 16;
const BATCH_BYTES: u64 = 128 << 10;

type Batch<'ram> = SmallVec<[Chain<'ram>; BATCH]>;

/// How a driver broke its queue.
#[derive(Debug, ThisError)]
pub(crate) enum QueueError {
    #[error("the rings are outside of memory or inconsistent")]
    Rings(#[from] virtio_queue::Error),
    #[error("a descriptor chain is outside of memory, loops, or is longer than its queue")]
    Chain,
    #[error("more requests are in flight than the queue has descriptors")]
    InFlight,
    #[error("the device failed")]
    Stopped,
}

/// How far a doorbell's requests have been served.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Served {
    /// All of them.
    All,
    /// There may be more: the doorbell is to be rung again.
    Some,
}

/// What became of a request.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Answer {
    /// It is done; so many bytes were written to it.
    Used(u32),
    /// It is being done elsewhere; [`VirtQueue::add_used`] will follow.
    InFlight,
    /// Not now: it stays in the queue, and those behind it.
    PutBack,
}

/// A request of a driver: bytes to read, then bytes to write, inside guest RAM.
#[derive(Debug, Default)]
pub(crate) struct Chain<'ram> {
    /// The number by which it is given back.
    pub(crate) head: u16,
    pub(crate) readable: GuestBytes<'ram>,
    pub(crate) writable: GuestBytes<'ram>,
}

/// The queues of a device that may be served now, and the RAM that they are in.
pub(crate) struct Queues<'a> {
    ram: &'a Arc<GuestRam>,
    list: &'a mut [VirtQueue],
    config_changed: bool,
}

impl<'a> Queues<'a> {
    pub(super) fn new(ram: &'a Arc<GuestRam>, list: &'a mut [VirtQueue]) -> Self {
        Self { ram, list, config_changed: false }
    }

    /// Has the driver told that the configuration space changed in this turn.
    pub(crate) fn config_changed(&mut self) {
        self.config_changed = true;
    }

    pub(super) fn has_config_changed(&self) -> bool {
        self.config_changed
    }

    /// The RAM, which outlives a borrow of a queue.
    pub(crate) fn ram(&self) -> &'a Arc<GuestRam> {
        self.ram
    }

    /// A queue, if the driver has made it ready and the device is not paused.
    pub(crate) fn get(&mut self, index: usize) -> Option<&mut VirtQueue> {
        self.list.get_mut(index).filter(|queue| queue.queue.ready())
    }

    /// Answers the driver's requests in a queue one by one, as many as fit into a turn.
    pub(crate) fn serve(
        &mut self,
        index: usize,
        answer: impl FnMut(Chain<'a>) -> Answer,
    ) -> Result<Served, QueueError> {
        self.serve_up_to(index, MAX_BYTES, answer)
    }

    /// As [`serve`](Self::serve), for a device that takes longer for its bytes.
    pub(crate) fn serve_up_to(
        &mut self,
        index: usize,
        max_bytes: u64,
        mut answer: impl FnMut(Chain<'a>) -> Answer,
    ) -> Result<Served, QueueError> {
        let ram = self.ram;
        let Some(queue) = self.get(index) else { return Ok(Served::All) };
        let (mut requests, mut bytes) = (0, 0);
        let served = loop {
            queue.want_no_doorbell(ram)?;
            let left = (MAX_REQUESTS - requests, max_bytes - bytes);
            let taken = queue.answer_some(ram, left, &mut answer)?;
            requests += taken.count;
            bytes = max_bytes.min(bytes + taken.bytes);
            if taken.put_back {
                break Served::All;
            }
            if requests == MAX_REQUESTS || bytes == max_bytes {
                break Served::Some;
            }
            if taken.count == 0 && !queue.wait_for_more(ram)? {
                break Served::All;
            }
        };
        queue.signal(ram)?;
        Ok(served)
    }
}

/// What became of requests that were taken together.
struct Taken {
    count: usize,
    /// Their sizes.
    bytes: u64,
    put_back: bool,
}

/// A queue of an active device.
#[derive(Debug)]
pub(crate) struct VirtQueue {
    pub(super) queue: Queue,
    interrupt: Arc<Interrupt>,
    /// How much was used since the driver was last told.
    unsignalled: u16,
}

impl VirtQueue {
    pub(super) fn new(max_size: u16, interrupt: Arc<Interrupt>) -> Result<Self, QueueError> {
        Ok(Self { queue: Queue::new(max_size)?, interrupt, unsignalled: 0 })
    }

    /// Whether the driver's choice of size and addresses can be used.
    pub(super) fn is_valid(&self, ram: &GuestRam) -> bool {
        let (queue, size) = (&self.queue, usize::from(self.queue.size()));
        let rings = [
            (queue.desc_table(), 16 * size),
            (queue.avail_ring(), 6 + 2 * size),
            (queue.used_ring(), 6 + 8 * size),
        ];
        // First, since the queue would write to the host's log what a guest may say as often as it likes.
        let are_there =
            rings.iter().all(|(at, bytes)| ram.inner().check_range(GuestAddress(*at), *bytes));
        are_there && queue.is_valid(ram.inner())
    }

    /// How many descriptors the driver gave it.
    #[cfg(fuzzing)]
    pub(crate) fn size(&self) -> u16 {
        self.queue.size()
    }

    /// Takes the driver's next request, if there is one.
    pub(crate) fn next<'ram>(
        &mut self,
        ram: &'ram GuestRam,
    ) -> Result<Option<Chain<'ram>>, QueueError> {
        let size = self.queue.size();
        match self.queue.iter(ram.inner())?.next() {
            Some(chain) => check(ram.inner(), chain, size).map(Some),
            None => Ok(None),
        }
    }

    /// Answers the next requests, a batch at most. The driver, which may be looking at the rings
    /// all the time from another CPU, is bothered once a batch.
    fn answer_some<'ram>(
        &mut self,
        ram: &'ram GuestRam,
        (max, max_bytes): (usize, u64),
        answer: &mut impl FnMut(Chain<'ram>) -> Answer,
    ) -> Result<Taken, QueueError> {
        let (batch, broken) = self.next_batch(ram, max.min(BATCH))?;
        let left = batch.len();
        let mut taken = Taken { count: 0, bytes: 0, put_back: false };
        let (mut used, mut bytes) = (SmallVec::<[(u16, u32); BATCH]>::new(), 0);
        for chain in batch {
            let head = chain.head;
            let size = chain.readable.len() + chain.writable.len();
            match answer(chain) {
                Answer::Used(written) => {
                    used.push((head, written));
                    bytes += size;
                    taken.bytes += size;
                }
                Answer::InFlight => taken.bytes += size,
                Answer::PutBack => {
                    taken.put_back = true;
                    break;
                }
            }
            taken.count += 1;
            // Large requests are given back one by one: the driver goes on meanwhile.
            if bytes >= BATCH_BYTES {
                self.add_used_together(ram, &used)?;
                used.clear();
                bytes = 0;
            }
            if taken.bytes >= max_bytes {
                break;
            }
        }
        self.add_used_together(ram, &used)?;
        for _ in taken.count..left {
            self.put_back();
        }
        broken.map_or(Ok(taken), Err)
    }

    /// Takes the next requests as far as they are good, and says what is wrong with the one after
    /// them.
    fn next_batch<'ram>(
        &mut self,
        ram: &'ram GuestRam,
        max: usize,
    ) -> Result<(Batch<'ram>, Option<QueueError>), QueueError> {
        let size = self.queue.size();
        let mut batch = Batch::new();
        for chain in self.queue.iter(ram.inner())?.take(max) {
            match check(ram.inner(), chain, size) {
                Ok(chain) => batch.push(chain),
                Err(error) => return Ok((batch, Some(error))),
            }
        }
        Ok((batch, None))
    }

    /// Undoes the last [`next`](Self::next).
    pub(crate) fn put_back(&mut self) {
        self.queue.go_to_previous_position();
    }

    /// Gives a request back, with so many bytes written to it. The driver is not told yet.
    pub(crate) fn add_used(
        &mut self,
        ram: &GuestRam,
        head: u16,
        written: u32,
    ) -> Result<(), QueueError> {
        // The driver may have made the queue smaller since. It is not told: it would be written to the host's log.
        if head >= self.queue.size() {
            return Err(QueueError::Chain);
        }
        self.queue.add_used(ram.inner(), head, written)?;
        self.unsignalled = self.unsignalled.saturating_add(1);
        Ok(())
    }

    /// Gives several requests back, each with so many bytes written to it: the driver sees all
    /// of them or none. It is not told yet.
    pub(crate) fn add_used_together(
        &mut self,
        ram: &GuestRam,
        used: &[(u16, u32)],
    ) -> Result<(), QueueError> {
        let Some((&(last, written), others)) = used.split_last() else { return Ok(()) };
        // The elements come first; the index that makes them valid moves with the last one.
        let mut next = Wrapping(self.queue.next_used());
        if !others.is_empty() {
            let elements = GuestAddress(self.queue.used_ring() + RING_HEADER_BYTES);
            let bytes = usize::from(self.queue.size()) * USED_ELEMENT_BYTES;
            let ring = ram.inner().get_slice(elements, bytes).map_err(|_| QueueError::Chain)?;
            for &(head, written) in others {
                let element = u64::from(head) | u64::from(written) << 32;
                let place = usize::from(next.0 % self.queue.size()) * USED_ELEMENT_BYTES;
                ring.write_obj(element.to_le(), place).map_err(|_| QueueError::Chain)?;
                next += 1;
            }
        }
        self.queue.set_next_used(next.0);
        self.unsignalled = self.unsignalled.saturating_add(others.len() as u16);
        self.add_used(ram, last, written)
    }

    /// Tells the driver, if it wants to know, of what was used since it was last told.
    pub(crate) fn signal(&mut self, ram: &GuestRam) -> Result<(), QueueError> {
        let added = std::mem::take(&mut self.unsignalled);
        if added > 0 && self.wants_signal(ram, added)? {
            self.interrupt.used_buffer();
        }
        Ok(())
    }

    /// Whether the driver wants to know that so much more was used (§2.7.7.2, §2.7.10).
    fn wants_signal(&self, ram: &GuestRam, added: u16) -> Result<bool, QueueError> {
        // What was used is there before the driver's wish is read: it may be asleep after this.
        fence(Ordering::SeqCst);
        let load = |address: u64| {
            let loaded = ram.inner().load(GuestAddress(address), Ordering::Relaxed);
            loaded.map(u16::from_le).map_err(|_| QueueError::Chain)
        };
        let ring = self.queue.avail_ring();
        if !self.queue.event_idx_enabled() {
            return Ok(load(ring)? & AVAIL_F_NO_INTERRUPT == 0);
        }
        let used_event = load(ring + RING_HEADER_BYTES + 2 * u64::from(self.queue.size()))?;
        let since = Wrapping(self.queue.next_used()) - Wrapping(used_event) - Wrapping(1);
        Ok(since.0 < added)
    }

    /// Tells the driver that the doorbell is not needed until [`wait_for_more`](Self::wait_for_more)
    /// asks for it. With EVENT_IDX it is not needed anyway, once it rang.
    pub(crate) fn want_no_doorbell(&mut self, ram: &GuestRam) -> Result<(), QueueError> {
        Ok(self.queue.disable_notification(ram.inner())?)
    }

    /// Asks for the doorbell at the driver's next request. True where one came meanwhile.
    pub(crate) fn wait_for_more(&mut self, ram: &GuestRam) -> Result<bool, QueueError> {
        Ok(self.queue.enable_notification(ram.inner())?)
    }

    /// How many buffers the driver has given, modulo 65,536.
    pub(crate) fn given(&self, ram: &GuestRam) -> Result<u16, QueueError> {
        Ok(self.queue.avail_idx(ram.inner(), Ordering::Acquire)?.0)
    }

    /// Asks for the doorbell when the driver gives more than so many buffers, whether or not
    /// those were taken. True where it has.
    pub(crate) fn wait_beyond(&mut self, ram: &GuestRam, given: u16) -> Result<bool, QueueError> {
        let next = self.queue.next_avail();
        self.queue.set_next_avail(given);
        let more = self.queue.enable_notification(ram.inner());
        self.queue.set_next_avail(next);
        Ok(more?)
    }

    pub(super) fn state(&self) -> QueueState {
        let state = self.queue.state();
        QueueState {
            size: state.size,
            ready: state.ready,
            event_idx: state.event_idx_enabled,
            next_avail: state.next_avail,
            next_used: state.next_used,
            descriptor_table: state.desc_table,
            available_ring: state.avail_ring,
            used_ring: state.used_ring,
        }
    }

    /// Takes a state on. False where it is not one that a driver could have made.
    pub(super) fn restore(&mut self, state: &QueueState, ram: &GuestRam) -> bool {
        let queue = Queue::try_from(virtio_queue::QueueState {
            max_size: self.queue.max_size(),
            next_avail: state.next_avail,
            next_used: state.next_used,
            event_idx_enabled: state.event_idx,
            size: state.size,
            ready: state.ready,
            desc_table: state.descriptor_table,
            avail_ring: state.available_ring,
            used_ring: state.used_ring,
        });
        let Ok(queue) = queue else { return false };
        if queue.ready() && !queue.is_valid(ram.inner()) {
            return false;
        }
        self.queue = queue;
        self.unsignalled = 0;
        true
    }
}

/// Collects the buffers of a chain.
fn check<'ram>(
    memory: &'ram GuestMemoryMmap,
    chain: DescriptorChain<&'ram GuestMemoryMmap>,
    queue_size: u16,
) -> Result<Chain<'ram>, QueueError> {
    let mut buffers = Chain { head: chain.head_index(), ..Chain::default() };
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
        let (address, len) = (descriptor.addr(), descriptor.len() as usize);
        // A buffer is nearly always inside of one region, and that is looked up faster.
        match memory.get_slice(address, len) {
            Ok(slice) => target.push(slice),
            Err(_) => {
                for slice in memory.get_slices(address, len) {
                    target.push(slice.map_err(|_| QueueError::Chain)?);
                }
            }
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

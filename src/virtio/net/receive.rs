//! The receive queue: buffers of the driver, filled with frames one after the other.

use std::collections::VecDeque;

use smallvec::SmallVec;

use super::header::{
    F_GUEST_TSO4, F_GUEST_TSO6, F_MRG_RXBUF, HEADER_BYTES, MAX_FRAME_BYTES, NUM_BUFFERS_AT,
};
use super::moved::{Moved, Room};
use super::{Net, QUEUE_SIZE, RECEIVE};
use crate::memory::{GuestBytes, GuestRam, MAX_FRAME_PIECES};
use crate::virtio::{Chain, QueueError, Queues, Served, VirtQueue};

/// Frames that are received before other devices get their turn.
const MAX_FRAMES: usize = 256;

/// An Ethernet header with a VLAN's tag.
const ETHERNET_BYTES: u64 = 18;
/// What a packet of IP has at most where nobody says more.
const USUAL_MTU: u16 = 1500;

/// Buffers that were taken from the queue and are empty yet, in the queue's order.
#[derive(Default)]
struct Buffers<'ram> {
    chains: VecDeque<Chain<'ram>>,
    bytes: u64,
    pieces: usize,
}

impl Net {
    /// Gives the driver the frames that are there, as far as it has buffers.
    pub(super) fn receive(&mut self, queues: &mut Queues<'_>) -> Result<Served, QueueError> {
        let ram = queues.ram();
        let Some(queue) = queues.get(RECEIVE) else { return Ok(Served::All) };
        // What a driver gives back is no news while there are others: `gather` asks for the
        // doorbell where they lack.
        queue.want_no_doorbell(ram)?;
        let mut buffers = Buffers::default();
        let served = self.fill(queue, ram, &mut buffers);
        // What is still empty stays where it was.
        for _ in buffers.chains {
            queue.put_back();
        }
        queue.signal(ram)?;
        served
    }

    fn fill<'ram>(
        &mut self,
        queue: &mut VirtQueue,
        ram: &'ram GuestRam,
        buffers: &mut Buffers<'ram>,
    ) -> Result<Served, QueueError> {
        for _ in 0..MAX_FRAMES {
            if !self.link_up || !self.receive_limiter.may_begin() {
                return Ok(Served::All);
            }
            let room = match self.backend.next() {
                Ok(Some(room)) => room,
                Ok(None) => return Ok(Served::All),
                Err(error) => {
                    self.link_lost(&error);
                    return Ok(Served::All);
                }
            };
            if !self.gather(queue, ram, buffers, room)? {
                return Ok(Served::All);
            }
            let space = buffers.space();
            match self.backend.receive(&space) {
                Ok(Moved::Frame(bytes)) => {
                    queue.add_used_together(ram, &buffers.take(&space, bytes))?;
                    self.metrics.rx_frames += 1;
                    let bytes = bytes.saturating_sub(HEADER_BYTES);
                    self.metrics.rx_bytes += bytes;
                    self.receive_limiter.pay(bytes);
                }
                Ok(Moved::Dropped) => self.metrics.rx_dropped += 1,
                Ok(Moved::Nothing) => return Ok(Served::All),
                Err(error) => {
                    self.link_lost(&error);
                    return Ok(Served::All);
                }
            }
        }
        Ok(Served::Some)
    }

    /// Takes buffers until there is so much room, or all that the driver ever gave at once, or as many pieces as a frame
    /// may be in. A driver that wants no large frames may have room for no more than a usual one. False where it has
    /// to give more first: its doorbell will say so.
    fn gather<'ram>(
        &mut self,
        queue: &mut VirtQueue,
        ram: &'ram GuestRam,
        buffers: &mut Buffers<'ram>,
        room: Room,
    ) -> Result<bool, QueueError> {
        let is_mergeable = self.features & F_MRG_RXBUF != 0;
        let (wanted, enough) = match room {
            _ if !is_mergeable => (1, 1),
            Room::Known(bytes) => (bytes, bytes),
            Room::Unknown => {
                let largest = HEADER_BYTES + MAX_FRAME_BYTES;
                let mtu = u64::from(self.mtu.unwrap_or(0).max(USUAL_MTU));
                let is_large = self.features & (F_GUEST_TSO4 | F_GUEST_TSO6) != 0;
                (largest, if is_large { largest } else { HEADER_BYTES + ETHERNET_BYTES + mtu })
            }
        };
        loop {
            while buffers.bytes < wanted
                && buffers.pieces < MAX_FRAME_PIECES
                && buffers.chains.len() < usize::from(QUEUE_SIZE)
                && (is_mergeable || buffers.chains.is_empty())
            {
                match queue.next(ram)? {
                    Some(chain) => buffers.push(chain),
                    None => break,
                }
            }
            let count = buffers.chains.len();
            let is_all = count > 0 && (!is_mergeable || count >= self.most_buffers);
            self.most_buffers = self.most_buffers.max(count);
            let is_full = buffers.pieces >= MAX_FRAME_PIECES || count >= usize::from(QUEUE_SIZE);
            if buffers.bytes >= enough || is_all || is_full {
                return Ok(true);
            }
            // All of them were taken, so the next one that comes rings.
            if !queue.wait_for_more(ram)? {
                return Ok(false);
            }
        }
    }
}

impl<'ram> Buffers<'ram> {
    fn push(&mut self, chain: Chain<'ram>) {
        self.bytes += chain.writable.len();
        self.pieces += chain.writable.count_pieces();
        self.chains.push_back(chain);
    }

    /// All of them as one, as far as a frame may be in so many pieces.
    fn space(&self) -> GuestBytes<'ram> {
        let mut space = GuestBytes::default();
        for chain in &self.chains {
            space.append(&chain.writable);
        }
        space.truncate_pieces(MAX_FRAME_PIECES);
        space
    }

    /// Takes out those that a frame of so many bytes has filled, with their shares, and writes
    /// how many they are into the frame's header.
    fn take(&mut self, space: &GuestBytes<'ram>, bytes: u64) -> SmallVec<[(u16, u32); 4]> {
        let mut used = SmallVec::new();
        let mut rest = bytes;
        while rest > 0
            && let Some(chain) = self.chains.pop_front()
        {
            let len = chain.writable.len();
            self.bytes -= len;
            self.pieces -= chain.writable.count_pieces();
            used.push((chain.head, rest.min(len) as u32));
            rest = rest.saturating_sub(len);
        }
        space.copy_from_at(NUM_BUFFERS_AT, &(used.len() as u16).to_le_bytes());
        used
    }
}

#[cfg(test)]
mod tests {
    use vm_memory::VolatileSlice;

    use super::*;

    #[test]
    fn a_frame_is_given_no_more_pieces_than_one_call_reads_and_takes_whole_buffers() {
        let mut bytes = vec![0u8; 8192];
        let slice = VolatileSlice::from(&mut bytes[..]);
        let mut buffers = Buffers::default();
        for head in 0..2 {
            let mut writable = GuestBytes::default();
            (0..700).for_each(|piece| writable.push(slice.subslice(piece * 4, 4).unwrap()));
            buffers.push(Chain { head, writable, ..Chain::default() });
        }
        assert_eq!((buffers.bytes, buffers.pieces), (5600, 1400));
        let space = buffers.space();
        assert_eq!(space.len(), 4 * MAX_FRAME_PIECES as u64);
        assert_eq!(buffers.take(&space, 2801).as_slice(), [(0, 2800), (1, 1)]);
        assert_eq!((buffers.bytes, buffers.pieces), (0, 0));
    }
}

//! Credit: how much each side of a connection may send before the other has taken it.
//!
//! Source: virtio 1.2 §5.10.6.3. Counters are free-running and wrap.

use super::packet::Header;

/// What the device keeps of a connection that its socket does not take, at most.
pub(super) const BUF_ALLOC: u32 = 128 << 10;

/// The counters of one connection. Those of the peer are what the guest claims.
#[derive(Debug, Default)]
pub(super) struct Credit {
    /// Bytes of the guest that left to the socket.
    forwarded: u32,
    /// What the guest was last told of them.
    announced: u32,
    /// Bytes that were sent to the guest.
    sent: u32,
    peer_buf_alloc: u32,
    peer_fwd_cnt: u32,
    /// Whether the guest was asked for credit since it last gave some.
    requested: bool,
}

impl Credit {
    /// Takes in what a packet of the guest says.
    pub(super) fn update(&mut self, header: &Header) {
        let before = self.room();
        self.peer_buf_alloc = header.buf_alloc;
        self.peer_fwd_cnt = header.fwd_cnt;
        if self.room() > before {
            self.requested = false;
        }
    }

    /// How many bytes the guest has room for.
    pub(super) fn room(&self) -> u32 {
        self.peer_buf_alloc.saturating_sub(self.sent.wrapping_sub(self.peer_fwd_cnt))
    }

    pub(super) fn sent(&mut self, bytes: u32) {
        self.sent = self.sent.wrapping_add(bytes);
    }

    pub(super) fn forwarded(&mut self, bytes: u32) {
        self.forwarded = self.forwarded.wrapping_add(bytes);
    }

    /// Whether the guest may send so many bytes more, by what it was told.
    pub(super) fn allows(&self, kept: usize, bytes: u64) -> bool {
        self.outstanding(kept) + bytes <= u64::from(BUF_ALLOC)
    }

    /// Whether the guest should be told of bytes that left. Where it has half of the room, it
    /// will hear of them with some other packet.
    pub(super) fn is_worth_an_update(&self, kept: usize) -> bool {
        self.forwarded != self.announced && self.outstanding(kept) > u64::from(BUF_ALLOC / 2)
    }

    /// Whether to ask the guest for credit: once each time that there is none.
    pub(super) fn request(&mut self) -> bool {
        !std::mem::replace(&mut self.requested, true)
    }

    /// Writes the device's side to a packet.
    pub(super) fn announce(&mut self, header: &mut Header) {
        header.buf_alloc = BUF_ALLOC;
        header.fwd_cnt = self.forwarded;
        self.announced = self.forwarded;
    }

    /// Bytes that the guest sent and was not told to be gone; `kept` of them are still here.
    fn outstanding(&self, kept: usize) -> u64 {
        u64::from(self.forwarded.wrapping_sub(self.announced)) + kept as u64
    }
}

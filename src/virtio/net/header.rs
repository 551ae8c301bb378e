//! `struct virtio_net_hdr` and the feature bits that give its fields a meaning (§5.1.3, §5.1.6).

use crate::tap::Offloads;

/// Feature bits.
pub(super) const F_CSUM: u64 = 1 << 0;
pub(super) const F_GUEST_CSUM: u64 = 1 << 1;
pub(super) const F_MTU: u64 = 1 << 3;
pub(super) const F_MAC: u64 = 1 << 5;
pub(super) const F_GUEST_TSO4: u64 = 1 << 7;
pub(super) const F_GUEST_TSO6: u64 = 1 << 8;
pub(super) const F_GUEST_ECN: u64 = 1 << 9;
pub(super) const F_HOST_TSO4: u64 = 1 << 11;
pub(super) const F_HOST_TSO6: u64 = 1 << 12;
pub(super) const F_HOST_ECN: u64 = 1 << 13;
pub(super) const F_MRG_RXBUF: u64 = 1 << 15;
pub(super) const F_STATUS: u64 = 1 << 16;

/// What a back end offers that takes and gives frames that are not finished.
pub(super) const OFFLOADS: u64 = F_CSUM
    | F_GUEST_CSUM
    | F_GUEST_TSO4
    | F_GUEST_TSO6
    | F_GUEST_ECN
    | F_HOST_TSO4
    | F_HOST_TSO6
    | F_HOST_ECN;

/// The header's length, with num_buffers, which every driver of this century has.
pub(super) const HEADER_BYTES: u64 = 12;
/// Where num_buffers is.
pub(super) const NUM_BUFFERS_AT: usize = 10;
/// An Ethernet header.
pub(super) const MIN_FRAME_BYTES: u64 = 14;
/// The largest frame that a driver must have room for (§5.1.6.3.1), and an Ethernet header with
/// a VLAN's tag around the largest packet of IP.
pub(super) const MAX_FRAME_BYTES: u64 = 65_550;

/// What may be left undone in frames to the guest.
pub(super) fn offloads(features: u64) -> Offloads {
    // One builds on the other (§5.1.3.1); the kernel refuses what a driver chose against that.
    if features & F_GUEST_CSUM == 0 {
        return Offloads::default();
    }
    let (tso4, tso6) = (features & F_GUEST_TSO4 != 0, features & F_GUEST_TSO6 != 0);
    let ecn = (tso4 || tso6) && features & F_GUEST_ECN != 0;
    Offloads { checksum: true, tso4, tso6, ecn }
}

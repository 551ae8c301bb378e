//! A packet's header, `struct virtio_vsock_hdr`.
//!
//! Source: virtio 1.2 §5.10.6.

use crate::memory::GuestBytes;

pub(super) const HEADER_BYTES: usize = 44;
/// The host's address.
pub(super) const HOST_CID: u64 = 2;
/// The type of a stream socket, the only one that the device offers.
pub(super) const TYPE_STREAM: u16 = 1;
/// Flags of [`Op::Shutdown`]: the sender will not receive, and will not send, any more.
pub(super) const SHUTDOWN_RECEIVE: u32 = 1;
pub(super) const SHUTDOWN_SEND: u32 = 2;

/// What a packet says.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(u16)]
pub(super) enum Op {
    Request = 1,
    Response = 2,
    Rst = 3,
    Shutdown = 4,
    Rw = 5,
    CreditUpdate = 6,
    CreditRequest = 7,
}

impl Op {
    const ALL: [Self; 7] = [
        Self::Request,
        Self::Response,
        Self::Rst,
        Self::Shutdown,
        Self::Rw,
        Self::CreditUpdate,
        Self::CreditRequest,
    ];
}

/// The two ports of a connection, by which it is told apart from the guest's others.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub(super) struct Key {
    pub(super) host_port: u32,
    pub(super) guest_port: u32,
}

/// A header, as it is in guest RAM.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(super) struct Header {
    pub(super) src_cid: u64,
    pub(super) dst_cid: u64,
    pub(super) src_port: u32,
    pub(super) dst_port: u32,
    pub(super) len: u32,
    pub(super) kind: u16,
    pub(super) op: u16,
    pub(super) flags: u32,
    pub(super) buf_alloc: u32,
    pub(super) fwd_cnt: u32,
}

impl Header {
    /// A packet without data from the host to the guest.
    pub(super) fn to_guest(guest_cid: u64, key: Key, op: Op) -> Self {
        Self {
            src_cid: HOST_CID,
            dst_cid: guest_cid,
            src_port: key.host_port,
            dst_port: key.guest_port,
            kind: TYPE_STREAM,
            op: op as u16,
            ..Self::default()
        }
    }

    /// The operation, where it is one that there is.
    pub(super) fn op(&self) -> Option<Op> {
        Op::ALL.into_iter().find(|op| *op as u16 == self.op)
    }

    /// The connection that a packet of the guest belongs to.
    pub(super) fn key(&self) -> Key {
        Key { host_port: self.dst_port, guest_port: self.src_port }
    }

    pub(super) fn read(bytes: &GuestBytes<'_>) -> Self {
        let mut header = [0; HEADER_BYTES];
        bytes.copy_to(&mut header);
        let mut rest = &header[..];
        Self {
            src_cid: u64::from_le_bytes(take(&mut rest)),
            dst_cid: u64::from_le_bytes(take(&mut rest)),
            src_port: u32::from_le_bytes(take(&mut rest)),
            dst_port: u32::from_le_bytes(take(&mut rest)),
            len: u32::from_le_bytes(take(&mut rest)),
            kind: u16::from_le_bytes(take(&mut rest)),
            op: u16::from_le_bytes(take(&mut rest)),
            flags: u32::from_le_bytes(take(&mut rest)),
            buf_alloc: u32::from_le_bytes(take(&mut rest)),
            fwd_cnt: u32::from_le_bytes(take(&mut rest)),
        }
    }

    pub(super) fn write(&self, target: &GuestBytes<'_>) {
        let mut bytes = Vec::with_capacity(HEADER_BYTES);
        bytes.extend(self.src_cid.to_le_bytes());
        bytes.extend(self.dst_cid.to_le_bytes());
        bytes.extend(self.src_port.to_le_bytes());
        bytes.extend(self.dst_port.to_le_bytes());
        bytes.extend(self.len.to_le_bytes());
        bytes.extend(self.kind.to_le_bytes());
        bytes.extend(self.op.to_le_bytes());
        bytes.extend(self.flags.to_le_bytes());
        bytes.extend(self.buf_alloc.to_le_bytes());
        bytes.extend(self.fwd_cnt.to_le_bytes());
        target.copy_from(&bytes);
    }
}

/// Takes the next bytes, which are there.
fn take<const N: usize>(bytes: &mut &[u8]) -> [u8; N] {
    let Some((first, rest)) = bytes.split_first_chunk() else { return [0; N] };
    *bytes = rest;
    *first
}

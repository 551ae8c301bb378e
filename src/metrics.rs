//! What devices have done, as plain counters.

mod balloon;

pub use self::balloon::{BalloonMetrics, BalloonStats, BalloonStatus};

use serde::{Deserialize, Serialize};

/// What a device of a VM has done since this process created, restored or woke the VM.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
#[non_exhaustive]
pub enum DeviceMetrics {
    /// A disk.
    Block(BlockMetrics),
    /// A network interface.
    Net(NetMetrics),
    /// The entropy device.
    Entropy(EntropyMetrics),
    /// The vsock device.
    Vsock(VsockMetrics),
    /// The memory balloon.
    Balloon(BalloonMetrics),
}

/// What a disk has done. Bytes are those of requests that were answered without an error.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default)]
#[non_exhaustive]
pub struct BlockMetrics {
    /// Reads.
    pub reads: u64,
    /// Bytes read.
    pub read_bytes: u64,
    /// Writes.
    pub writes: u64,
    /// Bytes written.
    pub written_bytes: u64,
    /// Flushes, each an fdatasync; the first after a write an fsync.
    pub flushes: u64,
    /// Discards, and writes of zeroes.
    pub clears: u64,
    /// Requests that were answered with an error.
    pub errors: u64,
}

/// What a network interface has done. Frames are counted without the virtio header.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default)]
#[non_exhaustive]
pub struct NetMetrics {
    /// Frames to the guest.
    pub rx_frames: u64,
    /// Bytes of frames to the guest.
    pub rx_bytes: u64,
    /// Frames to the guest that were dropped: too large for the driver's buffers, or shorter than
    /// a frame can be.
    pub rx_dropped: u64,
    /// Frames from the guest.
    pub tx_frames: u64,
    /// Bytes of frames from the guest.
    pub tx_bytes: u64,
    /// Frames from the guest that were dropped: malformed, refused by the host, or sent while
    /// the link was down.
    pub tx_dropped: u64,
    /// How often the link went up or down.
    pub link_changes: u64,
}

/// What the entropy device has done.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default)]
#[non_exhaustive]
pub struct EntropyMetrics {
    /// Requests.
    pub requests: u64,
    /// Random bytes given.
    pub bytes: u64,
}

/// What the vsock device has done. Bytes are those of data, without headers.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default)]
#[non_exhaustive]
pub struct VsockMetrics {
    /// Connections that the host wanted.
    pub opened_by_host: u64,
    /// Connections that the guest wanted, and got.
    pub opened_by_guest: u64,
    /// Connections that one side wanted and the other refused, or that were one too many.
    pub refused: u64,
    /// Connections that one side ended without its other half, or that broke.
    pub reset: u64,
    /// Connections that there are now.
    pub active: u64,
    /// Bytes that the guest was sent.
    pub bytes_to_guest: u64,
    /// Bytes that the guest sent.
    pub bytes_from_guest: u64,
    /// Packets that the guest was sent.
    pub packets_to_guest: u64,
    /// Packets that the guest sent.
    pub packets_from_guest: u64,
}

//! What devices have done, as plain counters.

mod balloon;

pub use self::balloon::{BalloonMetrics, BalloonStats, BalloonStatus};

use serde::{Deserialize, Serialize};

/// What a device of a VM has done since the VM was created.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
#[non_exhaustive]
pub enum DeviceMetrics {
    /// A disk.
    Block(BlockMetrics),
    /// The entropy device.
    Entropy(EntropyMetrics),
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
    /// Flushes, each an fdatasync.
    pub flushes: u64,
    /// Discards, and writes of zeroes.
    pub clears: u64,
    /// Requests that were answered with an error.
    pub errors: u64,
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

//! What is known of a memory balloon.

use std::time::SystemTime;

use serde::{Deserialize, Serialize};

/// What the balloon has done.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default)]
#[non_exhaustive]
pub struct BalloonMetrics {
    /// Bytes that the guest put into the balloon, and the host took back.
    pub inflated_bytes: u64,
    /// Bytes that the guest took out of the balloon.
    pub deflated_bytes: u64,
    /// Bytes that the guest reported as free, and the host took back.
    pub reported_bytes: u64,
    /// Pages that the guest put into the balloon and does not have, or more than once.
    pub refused_pages: u64,
}

/// How large a balloon is, and how the guest fares.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[non_exhaustive]
pub struct BalloonStatus {
    /// How large the host wants it.
    pub target_bytes: u64,
    /// How large the guest says that it is.
    pub actual_bytes: u64,
    /// The guest's statistics, where its driver has given any.
    pub stats: Option<BalloonStats>,
}

/// A guest's memory statistics, under the names of virtio 1.2 §5.5.6.3. They are the guest's own
/// words; a number that it does not give is `None`.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[non_exhaustive]
pub struct BalloonStats {
    /// When they came from the guest.
    pub taken: SystemTime,
    /// Bytes that were swapped in.
    pub swap_in: Option<u64>,
    /// Bytes that were swapped out.
    pub swap_out: Option<u64>,
    /// Page faults that needed I/O.
    pub majflt: Option<u64>,
    /// Page faults that did not.
    pub minflt: Option<u64>,
    /// Bytes that nothing uses.
    pub memfree: Option<u64>,
    /// Bytes that there are, without those in the balloon.
    pub memtot: Option<u64>,
    /// Bytes that new programs could have without swapping.
    pub avail: Option<u64>,
    /// Bytes that could be given up for other uses, such as those of cached files.
    pub caches: Option<u64>,
    /// Huge pages that were given to programs.
    pub htlb_pgalloc: Option<u64>,
    /// Huge pages that could not be given.
    pub htlb_pgfail: Option<u64>,
}

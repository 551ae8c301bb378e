//! What a snapshot keeps of a virtio device, as plain data.
//!
//! It comes back from a file that anybody may have written: what is restored is checked as what
//! a driver writes is.

use serde::{Deserialize, Serialize};
use thiserror::Error as ThisError;

use crate::bounded;
use crate::config::MacAddress;
use crate::metrics::BalloonStats;

/// Why a state cannot be restored.
#[derive(Debug, ThisError)]
pub(crate) enum RestoreError {
    #[error("the state is of a device with {found} queues, this one has {expected}")]
    QueueCount { found: usize, expected: usize },
    #[error("queue {index} is outside of memory, or larger than the device's")]
    Queue { index: usize },
    #[error("the state is of another kind of device")]
    Device,
    #[error("a memory balloon of {pages} pages: the guest has {most}")]
    Balloon { pages: u64, most: u64 },
    #[error("the driver's features {found:#x} are not among those of the device, {offered:#x}")]
    Features { found: u64, offered: u64 },
}

/// A device with its queues and registers.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct TransportState {
    pub(super) registers: Registers,
    pub(super) interrupt_status: u32,
    #[serde(deserialize_with = "bounded::list")]
    pub(super) queues: Vec<QueueState>,
    pub(super) device: DeviceState,
}

/// What the driver wrote to the transport's registers.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct Registers {
    pub(super) status: u32,
    pub(super) driver_features: u64,
    pub(super) device_features_sel: u32,
    pub(super) driver_features_sel: u32,
    pub(super) queue_sel: u32,
    pub(super) config_generation: u32,
}

/// A queue: where the driver put it, and how far it was served.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct QueueState {
    pub(super) size: u16,
    pub(super) ready: bool,
    pub(super) event_idx: bool,
    pub(super) next_avail: u16,
    pub(super) next_used: u16,
    pub(super) descriptor_table: u64,
    pub(super) available_ring: u64,
    pub(super) used_ring: u64,
}

/// What a device itself has to remember.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub(crate) enum DeviceState {
    /// Nothing: its file, or its peer, has it all.
    Stateless,
    /// The port of the host that its last connection came from.
    Vsock { last_port: u32 },
    /// A network interface: what its driver knows of it.
    Net { mac: MacAddress, link_up: bool },
    /// A memory balloon: how large it is to be and is, and the driver's buffer for statistics.
    Balloon { num_pages: u32, actual: u32, stats_buffer: Option<u16>, stats: Option<BalloonStats> },
}

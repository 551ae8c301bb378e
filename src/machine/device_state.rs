//! The state of all devices of a machine, in the order in which the guest finds them.

use serde::{Deserialize, Serialize};
use thiserror::Error as ThisError;

use super::Machine;
use crate::bounded;
use crate::devices::{LegacyError, LegacyState};
use crate::error::{Error, ErrorKind};
use crate::virtio::{RestoreError, TransportState};

/// All that a snapshot keeps of a machine's devices.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct DevicesState {
    legacy: LegacyState,
    #[serde(deserialize_with = "bounded::list")]
    virtio: Vec<TransportState>,
}

#[cfg(fuzzing)]
impl DevicesState {
    pub(crate) fn legacy(&self) -> &LegacyState {
        &self.legacy
    }

    pub(crate) fn virtio(&self) -> &[TransportState] {
        &self.virtio
    }
}

/// Why devices cannot go on from a state.
#[derive(Debug, ThisError)]
pub(crate) enum DevicesError {
    #[error("the state has {found} virtio devices, the configuration {expected}")]
    Count { found: usize, expected: usize },
    #[error("cannot restore the serial port")]
    Serial(#[from] LegacyError),
    #[error("cannot restore virtio device {index}")]
    Virtio { index: usize, source: RestoreError },
}

impl From<DevicesError> for Error {
    fn from(error: DevicesError) -> Self {
        Self::new(ErrorKind::Config, error)
            .fix("restore with the configuration of the snapshot: its devices, in their order")
    }
}

impl Machine {
    /// The state of the devices of a machine that is stopped.
    pub(crate) fn devices_state(&self) -> DevicesState {
        let legacy = LegacyState { serial: self.serial_input.state() };
        DevicesState { legacy, virtio: self.virtio.iter().map(|slot| slot.state()).collect() }
    }

    /// Lets the devices of a new machine go on from a state. They serve nothing before
    /// [`run`](Self::run), which also raises the interrupts that were pending: by then the
    /// interrupt controllers have their state. Where it fails the machine is of no use.
    pub(crate) fn restore_devices(&self, state: &DevicesState) -> Result<(), DevicesError> {
        let (found, expected) = (state.virtio.len(), self.virtio.len());
        if found != expected {
            return Err(DevicesError::Count { found, expected });
        }
        self.serial_input.restore(&state.legacy.serial)?;
        for (index, (slot, state)) in self.virtio.iter().zip(&state.virtio).enumerate() {
            slot.restore(state).map_err(|source| DevicesError::Virtio { index, source })?;
        }
        Ok(())
    }
}

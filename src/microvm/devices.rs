//! The devices of a VM, from the host's side.

use thiserror::Error as ThisError;

use super::{MicroVm, Running};
use crate::config::RateLimit;
use crate::error::{Error, ErrorKind};
use crate::metrics::DeviceMetrics;

/// Why a device cannot do what the host asks.
#[derive(Debug, ThisError)]
enum DeviceError {
    #[error("the VM has no entropy device")]
    NoEntropy,
    #[error("there is no disk {index}: the VM has {count}, counted from 0")]
    NoDisk { index: usize, count: usize },
}

impl From<DeviceError> for Error {
    fn from(error: DeviceError) -> Self {
        let fix = match error {
            DeviceError::NoEntropy => "create it with `VmConfig::entropy(true)`",
            DeviceError::NoDisk { .. } => "create it with as many `VmConfig::block(…)`",
        };
        Error::new(ErrorKind::Config, error).fix(fix)
    }
}

impl MicroVm<Running> {
    /// What each virtio device has done, in the order in which the guest finds them: disks in
    /// the order of the configuration, then the others. Waits for the turn that a device is at.
    pub fn metrics(&self) -> Vec<DeviceMetrics> {
        self.state.machine.metrics()
    }

    /// Changes how fast a disk is, from its next request on; `RateLimit::default()` lifts the
    /// limit. Disks are counted from 0, in the order of the configuration. Waits for the turn
    /// that the disk is at.
    ///
    /// # Errors
    ///
    /// [`ErrorKind::Config`] where the VM has no such disk, or the limit is refused.
    pub fn set_disk_rate_limit(&self, index: usize, limit: RateLimit) -> Result<(), Error> {
        limit.check()?;
        let disks = &self.state.machine.controls().disks;
        let no_disk = DeviceError::NoDisk { index, count: disks.len() };
        let _ = disks.get(index).ok_or(no_disk)?.call(|disk, _| Ok(disk.set_rate_limit(limit)));
        Ok(())
    }

    /// Changes how fast the entropy device is, from its next request on;
    /// `RateLimit::default()` lifts the limit.
    ///
    /// # Errors
    ///
    /// [`ErrorKind::Config`] where the VM has no entropy device, or the limit is refused.
    pub fn set_entropy_rate_limit(&self, limit: RateLimit) -> Result<(), Error> {
        limit.check()?;
        let entropy = self.state.machine.controls().entropy.as_ref();
        let entropy = entropy.ok_or(DeviceError::NoEntropy)?;
        // It has nothing to say against it.
        let _ = entropy.call(|rng, _| Ok(rng.set_rate_limit(limit)));
        Ok(())
    }
}

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
}

impl From<DeviceError> for Error {
    fn from(error: DeviceError) -> Self {
        let fix = match error {
            DeviceError::NoEntropy => "create it with `VmConfig::entropy(true)`",
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

//! The devices of a VM, from the host's side.

use super::{MicroVm, Running};
use crate::metrics::DeviceMetrics;

impl MicroVm<Running> {
    /// What each virtio device has done, in the order in which the guest finds them: disks in
    /// the order of the configuration, then the others. Waits for the turn that a device is at.
    pub fn metrics(&self) -> Vec<DeviceMetrics> {
        self.state.machine.metrics()
    }
}

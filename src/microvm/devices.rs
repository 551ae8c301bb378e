//! The devices of a VM, from the host's side.

use thiserror::Error as ThisError;

use super::{MicroVm, Running};
use crate::config::RateLimit;
use crate::error::{Error, ErrorKind};
use crate::metrics::{BalloonStatus, DeviceMetrics};
use crate::virtio::{Balloon, DeviceHandle};

/// Why a device cannot do what the host asks.
#[derive(Debug, ThisError)]
enum DeviceError {
    #[error("the VM has no entropy device")]
    NoEntropy,
    #[error("there is no disk {index}: the VM has {count}, counted from 0")]
    NoDisk { index: usize, count: usize },
    #[error("there is no network interface {index}: the VM has {count}, counted from 0")]
    NoNetwork { index: usize, count: usize },
    #[error("the VM has no memory balloon")]
    NoBalloon,
    #[error("a balloon of {mib} MiB: the guest has {memory_mib} MiB of memory")]
    BalloonTooLarge { mib: u32, memory_mib: u64 },
}

impl From<DeviceError> for Error {
    fn from(error: DeviceError) -> Self {
        let fix = match error {
            DeviceError::NoEntropy => "create it with `VmConfig::entropy(true)`",
            DeviceError::NoBalloon => "create it with `VmConfig::balloon(…)`",
            DeviceError::BalloonTooLarge { .. } => {
                "leave the guest what it needs, some 64 MiB for a distribution's kernel"
            }
            DeviceError::NoNetwork { .. } => "create it with as many `VmConfig::network(…)`",
            DeviceError::NoDisk { .. } => "create it with as many `VmConfig::block(…)`",
        };
        Error::new(ErrorKind::Config, error).fix(fix)
    }
}

impl MicroVm<Running> {
    /// What each virtio device has done, in the order in which the guest finds them: disks, then
    /// network interfaces, both in the order of the configuration, then the entropy device, the
    /// balloon and the vsock device, those that there are. Waits for the turn that a device is at.
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
        disks.get(index).ok_or(no_disk)?.with(|disk| disk.set_rate_limit(limit));
        Ok(())
    }

    /// Changes how fast the guest may receive and transmit through an interface, from the next
    /// frame on; `RateLimit::default()` lifts a limit. Interfaces are counted from 0, in the order
    /// of the configuration. Waits for the turn that the interface is at.
    ///
    /// # Errors
    ///
    /// [`ErrorKind::Config`] where the VM has no such interface, or a limit is refused.
    pub fn set_network_rate_limits(
        &self,
        index: usize,
        receive: RateLimit,
        transmit: RateLimit,
    ) -> Result<(), Error> {
        receive.check()?;
        transmit.check()?;
        let networks = &self.state.machine.controls().networks;
        let no_network = DeviceError::NoNetwork { index, count: networks.len() };
        let network = networks.get(index).ok_or(no_network)?;
        network.with(|network| network.set_rate_limits(receive, transmit));
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
        entropy.with(|rng| rng.set_rate_limit(limit));
        Ok(())
    }

    /// How large the memory balloon is to be, in MiB; 0 lets the guest have all its memory back.
    ///
    /// Returns at once. The guest's driver follows in its own time, as far as it finds memory
    /// that it can do without: [`balloon`](Self::balloon) says how far it is. Until there is a
    /// driver, nothing happens.
    ///
    /// # Errors
    ///
    /// [`ErrorKind::Config`] where the VM has no balloon, or less memory than that.
    ///
    /// ```no_run
    /// # fn f(vm: dormouse::MicroVm<dormouse::Running>) -> Result<(), dormouse::Error> {
    /// vm.set_balloon_mib(256)?;
    /// while vm.balloon()?.actual_bytes < 256 << 20 {
    ///     std::thread::sleep(std::time::Duration::from_millis(100));
    /// }
    /// # Ok(())
    /// # }
    /// ```
    pub fn set_balloon_mib(&self, mib: u32) -> Result<(), Error> {
        let balloon = self.balloon_device()?;
        let memory_mib = self.state.machine.ram().bytes() >> 20;
        if u64::from(mib) > memory_mib {
            return Err(DeviceError::BalloonTooLarge { mib, memory_mib }.into());
        }
        const PAGES_PER_MIB: u32 = 256;
        balloon.reconfigure(|balloon| balloon.set_target(mib * PAGES_PER_MIB));
        Ok(())
    }

    /// How large the memory balloon is to be and is, and the guest's last known statistics. The
    /// guest is asked for new ones, which are there some milliseconds later, at a next call.
    ///
    /// # Errors
    ///
    /// [`ErrorKind::Config`] where the VM has no balloon.
    pub fn balloon(&self) -> Result<BalloonStatus, Error> {
        let balloon = self.balloon_device()?;
        // A driver that broke its queue is not asked, and that is all.
        let _ = balloon.call(Balloon::ask_for_stats);
        Ok(balloon.with(|balloon| balloon.status()))
    }

    fn balloon_device(&self) -> Result<&DeviceHandle<Balloon>, DeviceError> {
        self.state.machine.controls().balloon.as_ref().ok_or(DeviceError::NoBalloon)
    }
}

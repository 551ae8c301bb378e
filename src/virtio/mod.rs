//! Virtio devices: what a device is, apart from the transport that a driver reaches it by.
//!
//! Source: Virtual I/O Device (VIRTIO) 1.2. A device is written against [`VirtioDevice`] and
//! [`Queues`]; [`DeviceHandle`] shares it between its transport, the device thread and the host;
//! [`MmioTransport`] is the only transport. Devices hold eventfds and files, never KVM handles:
//! `machine` connects their doorbells, sources and interrupts.

mod balloon;
mod block;
#[cfg(fuzzing)]
pub(crate) mod fuzzing;
mod handle;
mod interrupt;
mod mmio;
mod net;
mod queue;
mod rate_limiter;
mod rng;
mod state;
mod status;
mod vsock;

use std::os::fd::AsRawFd;

use crate::memory::GuestRam;
use crate::metrics::DeviceMetrics;

pub(crate) use self::balloon::Balloon;
pub(crate) use self::block::Block;
pub(crate) use self::handle::{DeviceHandle, WeakDeviceHandle};
pub(crate) use self::interrupt::Interrupt;
pub(crate) use self::mmio::{MmioTransport, QUEUE_NOTIFY};
pub(crate) use self::net::{Backend, Net, Stream};
pub(crate) use self::queue::{Answer, Chain, QueueError, Queues, Served, VirtQueue};
pub(crate) use self::rate_limiter::RateLimiter;
pub(crate) use self::rng::Rng;
pub(crate) use self::state::{DeviceState, RestoreError, TransportState};
pub(crate) use self::vsock::{ACCEPTED, Arrival, Backlog, NO_PORT, OpenError, REFUSED, Vsock};

/// Device types (§5).
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(u32)]
pub(crate) enum DeviceType {
    Network = 1,
    Block = 2,
    Entropy = 4,
    Balloon = 5,
    Socket = 19,
}

/// Feature bits of every device (§6): the device is not a legacy one.
pub(crate) const F_VERSION_1: u64 = 1 << 32;
/// A descriptor may point to a table of descriptors.
pub(crate) const F_INDIRECT_DESC: u64 = 1 << 28;
/// Doorbells and interrupts are asked for by index.
pub(crate) const F_EVENT_IDX: u64 = 1 << 29;

/// A descriptor of the host that wakes a device; it is open as long as this is kept.
pub(crate) type Source = Box<dyn AsRawFd + Send>;

/// What a device does for its driver.
///
/// All calls come with the device's lock held, from a vCPU's thread (configuration), from the
/// device thread (requests) or from a thread of the embedding program (through
/// [`DeviceHandle::call`]). None may block for long: other VMs' devices wait.
pub(crate) trait VirtioDevice: Send {
    /// What the device is.
    fn device_type(&self) -> DeviceType;

    /// The device's own feature bits; those of every device are offered by the transport.
    fn features(&self) -> u64 {
        0
    }

    /// The size of each queue: a power of two, 32,768 at most.
    fn queue_sizes(&self) -> Vec<u16>;

    /// The bytes of the configuration space; what is read past its end is zero.
    fn config(&self) -> Vec<u8> {
        Vec::new()
    }

    /// The driver writes to the configuration space, within or past its end.
    fn write_config(&mut self, offset: u64, data: &[u8]) {
        let _ = (offset, data);
    }

    /// Descriptors of the host that wake the device, asked for once. They are watched
    /// edge-triggered for input and output: a device that leaves one half served goes on by
    /// itself when the driver's next doorbell brings what it lacked.
    fn sources(&self) -> std::io::Result<Vec<Source>> {
        Ok(Vec::new())
    }

    /// The driver has chosen its features and queues, and begins.
    fn activate(&mut self, features: u64) {
        let _ = features;
    }

    /// The driver starts again from nothing. Nothing is in flight.
    fn reset(&mut self) {}

    /// Serves a queue whose doorbell rang.
    ///
    /// # Errors
    ///
    /// The driver broke the queue: the transport stops the device and asks for a reset.
    fn serve(&mut self, index: usize, queues: &mut Queues<'_>) -> Result<Served, QueueError>;

    /// Serves a source that became ready, by its place in [`sources`](Self::sources).
    ///
    /// # Errors
    ///
    /// As [`serve`](Self::serve).
    fn ready(&mut self, source: usize, queues: &mut Queues<'_>) -> Result<Served, QueueError> {
        let _ = (source, queues);
        Ok(Served::All)
    }

    /// How many requests were taken from the queues and are being done elsewhere. A device is
    /// paused or reset only when there are none.
    fn in_flight(&self) -> usize {
        0
    }

    /// Answers the requests that were done elsewhere, also while the device is being paused.
    ///
    /// # Errors
    ///
    /// As [`serve`](Self::serve).
    fn finish(&mut self, queues: &mut Queues<'_>) -> Result<(), QueueError> {
        let _ = queues;
        Ok(())
    }

    /// A source became ready, and no driver is to hear of it: there is none yet, it has broken the device, or the VM is
    /// paused.
    fn unattended(&mut self) -> Served {
        Served::All
    }

    /// The VM is over: what is in flight ends soon, if with an error. [`finish`](Self::finish) is called for it.
    fn give_up(&mut self) {}

    /// The VM is over: lets go of what is of the host, such as files and their locks. Nothing
    /// follows but the drop, which may come much later.
    fn close(&mut self) {}

    /// What the device has done.
    fn metrics(&self) -> DeviceMetrics;

    /// What the device itself has to remember, beyond its queues and registers.
    fn state(&self) -> DeviceState {
        DeviceState::Stateless
    }

    /// Goes on from a state that [`state`](Self::state) gave, after
    /// [`activate`](Self::activate) where its driver had come so far. The back end, and what the
    /// configuration overrides, may be others than those of the state.
    ///
    /// # Errors
    ///
    /// The state is of another kind of device, or impossible with this RAM.
    fn restore(
        &mut self,
        state: &DeviceState,
        ram: &GuestRam,
    ) -> Result<ConfigSpace, RestoreError> {
        let _ = ram;
        match state {
            DeviceState::Stateless => Ok(ConfigSpace::Same),
            _ => Err(RestoreError::Device),
        }
    }
}

/// What a restored device's driver finds in the configuration space.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum ConfigSpace {
    /// What it knows.
    Same,
    /// Something else, which it is told of.
    Changed,
}

#[cfg(test)]
mod tests;

//! Virtio devices: what a device is, apart from the transport that a driver reaches it by.
//!
//! Source: Virtual I/O Device (VIRTIO) 1.2. A device is written against [`VirtioDevice`] and
//! [`VirtQueue`]; [`MmioTransport`] is the only transport. Devices hold eventfds and files, never
//! KVM handles: `machine` connects their doorbells and interrupts.

mod block;
mod interrupt;
mod mmio;
mod queue;
mod rng;

pub(crate) use self::block::Block;
pub(crate) use self::interrupt::Interrupt;
pub(crate) use self::mmio::{DeviceCore, MmioTransport, QUEUE_NOTIFY};
pub(crate) use self::queue::{QueueError, Served, VirtQueue};
pub(crate) use self::rng::Rng;

/// Device types (§5).
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(u32)]
pub(crate) enum DeviceType {
    Block = 2,
    Entropy = 4,
}

/// Feature bits of every device (§6): the device is not a legacy one.
pub(crate) const F_VERSION_1: u64 = 1 << 32;
/// A descriptor may point to a table of descriptors.
pub(crate) const F_INDIRECT_DESC: u64 = 1 << 28;
/// Doorbells and interrupts are asked for by index.
pub(crate) const F_EVENT_IDX: u64 = 1 << 29;

/// What a device does for its driver.
///
/// All calls come with the device's lock held, from a vCPU's thread (configuration) or from the
/// device thread (requests). None may block for long: other VMs' devices wait.
pub(crate) trait VirtioDevice: Send {
    /// What the device is.
    fn device_type(&self) -> DeviceType;

    /// The device's own feature bits; those of every device are offered by the transport.
    fn features(&self) -> u64 {
        0
    }

    /// The size of each queue: a power of two, 32,768 at most.
    fn queue_sizes(&self) -> &'static [u16];

    /// The bytes of the configuration space; what is read past its end is zero.
    fn config(&self) -> Vec<u8> {
        Vec::new()
    }

    /// The driver has chosen its features and queues, and begins.
    fn activate(&mut self, features: u64) {
        let _ = features;
    }

    /// The driver starts again from nothing.
    fn reset(&mut self) {}

    /// Serves a queue whose doorbell rang.
    ///
    /// # Errors
    ///
    /// The driver broke the queue: the transport stops the device and asks for a reset.
    fn serve(&mut self, index: usize, queue: &mut VirtQueue) -> Result<Served, QueueError>;
}

#[cfg(test)]
mod tests;

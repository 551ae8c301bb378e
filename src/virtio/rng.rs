//! The entropy device: random bytes of the host for the guest.
//!
//! Source: virtio 1.2 §5.4. A request gets 64 KiB at most: the specification lets a device give
//! fewer bytes than there is room for.

use std::fs::File;
use std::io::{self, Read};

use super::{DeviceType, QueueError, Served, VirtQueue, VirtioDevice};

const MAX_BYTES: u64 = 64 << 10;

/// The device.
#[derive(Debug)]
pub(crate) struct Rng {
    source: File,
}

impl Rng {
    /// A device that gives what the host's `/dev/urandom` gives.
    pub(crate) fn new() -> io::Result<Self> {
        Ok(Self { source: File::open("/dev/urandom")? })
    }
}

impl VirtioDevice for Rng {
    fn device_type(&self) -> DeviceType {
        DeviceType::Entropy
    }

    fn queue_sizes(&self) -> &'static [u16] {
        &[256]
    }

    fn serve(&mut self, _index: usize, queue: &mut VirtQueue) -> Result<Served, QueueError> {
        let mut bytes = Vec::new();
        queue.serve(|chain| {
            bytes.resize(chain.writable.len().min(MAX_BYTES) as usize, 0);
            match self.source.read_exact(&mut bytes) {
                Ok(()) => chain.writable.copy_from(&bytes) as u32,
                Err(_) => 0,
            }
        })
    }
}

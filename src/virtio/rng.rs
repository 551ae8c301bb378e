//! The entropy device: random bytes of the host for the guest.
//!
//! Source: virtio 1.2 §5.4. A request gets 64 KiB at most: the specification lets a device give
//! fewer bytes than there is room for.

use std::fs::File;
use std::io::{self, Read};

use super::{Answer, DeviceType, QueueError, Queues, Served, VirtioDevice};
use crate::metrics::{DeviceMetrics, EntropyMetrics};

const MAX_BYTES: u64 = 64 << 10;

/// The device.
#[derive(Debug)]
pub(crate) struct Rng {
    source: File,
    metrics: EntropyMetrics,
}

impl Rng {
    /// A device that gives what the host's `/dev/urandom` gives.
    pub(crate) fn new() -> io::Result<Self> {
        let source = File::open("/dev/urandom")?;
        Ok(Self { source, metrics: EntropyMetrics::default() })
    }
}

impl VirtioDevice for Rng {
    fn device_type(&self) -> DeviceType {
        DeviceType::Entropy
    }

    fn queue_sizes(&self) -> Vec<u16> {
        vec![256]
    }

    fn serve(&mut self, index: usize, queues: &mut Queues<'_>) -> Result<Served, QueueError> {
        let mut bytes = Vec::new();
        queues.serve(index, |chain| {
            bytes.resize(chain.writable.len().min(MAX_BYTES) as usize, 0);
            let given = match self.source.read_exact(&mut bytes) {
                Ok(()) => chain.writable.copy_from(&bytes),
                Err(_) => 0,
            };
            self.metrics.requests += 1;
            self.metrics.bytes += given as u64;
            Answer::Used(given as u32)
        })
    }

    fn metrics(&self) -> DeviceMetrics {
        DeviceMetrics::Entropy(self.metrics)
    }
}

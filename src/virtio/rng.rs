//! The entropy device: random bytes of the host for the guest.
//!
//! Source: virtio 1.2 §5.4. A request gets 64 KiB at most: the specification lets a device give
//! fewer bytes than there is room for.

use std::fs::File;
use std::io::{self, Read};

use super::{Answer, DeviceType, QueueError, Queues, RateLimiter, Served, Source, VirtioDevice};
use crate::config::RateLimit;
use crate::metrics::{DeviceMetrics, EntropyMetrics};

/// Random bytes for one request, and for all of one turn: half a millisecond.
const MAX_BYTES: u64 = 64 << 10;
const BYTES_PER_TURN: u64 = 256 << 10;

/// The device.
#[derive(Debug)]
pub(crate) struct Rng {
    source: File,
    limiter: RateLimiter,
    metrics: EntropyMetrics,
}

impl Rng {
    /// A device that gives what the host's `/dev/urandom` gives, no faster than
    /// `limit` says.
    pub(crate) fn new(limit: RateLimit) -> io::Result<Self> {
        let source = File::open("/dev/urandom")?;
        let limiter = RateLimiter::new(limit)?;
        Ok(Self { source, limiter, metrics: EntropyMetrics::default() })
    }

    pub(crate) fn rate_limit(&self) -> RateLimit {
        self.limiter.limit()
    }

    pub(crate) fn set_rate_limit(&mut self, limit: RateLimit) {
        self.limiter.set(limit);
    }
}

impl VirtioDevice for Rng {
    fn device_type(&self) -> DeviceType {
        DeviceType::Entropy
    }

    fn queue_sizes(&self) -> Vec<u16> {
        vec![256]
    }

    fn sources(&self) -> io::Result<Vec<Source>> {
        Ok(vec![Box::new(self.limiter.source()?)])
    }

    fn serve(&mut self, index: usize, queues: &mut Queues<'_>) -> Result<Served, QueueError> {
        let mut bytes = Vec::new();
        queues.serve_up_to(index, BYTES_PER_TURN, |chain| {
            let room = chain.writable.len().min(MAX_BYTES);
            if !self.limiter.take(room) {
                return Answer::PutBack;
            }
            bytes.resize(room as usize, 0);
            let given = match self.source.read_exact(&mut bytes) {
                Ok(()) => chain.writable.copy_from(&bytes),
                Err(_) => 0,
            };
            self.metrics.requests += 1;
            self.metrics.bytes += given as u64;
            Answer::Used(given as u32)
        })
    }

    /// There are tokens again.
    fn ready(&mut self, _: usize, queues: &mut Queues<'_>) -> Result<Served, QueueError> {
        self.serve(0, queues)
    }

    fn metrics(&self) -> DeviceMetrics {
        DeviceMetrics::Entropy(self.metrics)
    }
}

//! The network device: frames between the driver's buffers and whatever is at the cable's other
//! end.
//!
//! Source: virtio 1.2 §5.1. One pair of queues, no control queue. A frame is lost where the
//! specification and Ethernet let it be, and counted then; frames that arrive do so whole and in
//! order. Where the driver gives buffers too slowly, frames wait at the other end.

mod backend;
mod header;
mod moved;
mod passt;
mod receive;
mod stream;

use std::io;

pub(crate) use self::backend::Backend;
use self::header::{
    F_MAC, F_MRG_RXBUF, F_MTU, F_STATUS, HEADER_BYTES, MAX_FRAME_BYTES, MIN_FRAME_BYTES, offloads,
};
use self::moved::Moved;
pub(crate) use self::stream::Stream;
use super::{
    Answer, Chain, ConfigSpace, DeviceState, DeviceType, QueueError, Queues, RateLimiter,
    RestoreError, Served, Source, VirtioDevice,
};
use crate::config::{MacAddress, NetConfig, RateLimit};
use crate::memory::GuestRam;
use crate::metrics::{DeviceMetrics, NetMetrics};
use crate::random::random;

/// Queues (§5.1.2).
const RECEIVE: usize = 0;
const TRANSMIT: usize = 1;
const QUEUE_SIZE: u16 = 256;

/// Bit of the configuration space's status.
const LINK_UP: u16 = 1;

/// The device.
#[derive(Debug)]
pub(crate) struct Net {
    backend: Backend,
    receive_limiter: RateLimiter,
    transmit_limiter: RateLimiter,
    mac: MacAddress,
    /// The address of the configuration, if that has one.
    own_mac: Option<MacAddress>,
    mtu: Option<u16>,
    link_up: bool,
    /// What the driver has chosen.
    features: u64,
    /// The most receive buffers that there were at once.
    most_buffers: usize,
    metrics: NetMetrics,
}

impl Net {
    /// An interface of a configuration, with the address that it says or with a random one.
    pub(crate) fn new(backend: Backend, config: &NetConfig) -> io::Result<Self> {
        let mac = match config.mac {
            Some(mac) => mac,
            None => MacAddress::local(random()?),
        };
        let link_up = backend.is_up();
        Ok(Self {
            backend,
            receive_limiter: RateLimiter::new(config.receive_limit)?,
            transmit_limiter: RateLimiter::new(config.transmit_limit)?,
            mac,
            own_mac: config.mac,
            mtu: config.mtu,
            link_up,
            features: 0,
            most_buffers: 0,
            metrics: NetMetrics::default(),
        })
    }

    /// Of what it receives, and transmits.
    pub(crate) fn rate_limits(&self) -> (RateLimit, RateLimit) {
        (self.receive_limiter.limit(), self.transmit_limiter.limit())
    }

    pub(crate) fn set_rate_limits(&mut self, receive: RateLimit, transmit: RateLimit) {
        self.receive_limiter.set(receive);
        self.transmit_limiter.set(transmit);
    }

    fn choose(&mut self, features: u64) {
        // It takes a lock of the host's whole network, so a guest gets it for a change alone.
        if offloads(features) != offloads(self.features) {
            self.backend.activate(features);
        }
        self.features = features;
    }

    /// Sends what the driver has for the other end, until that takes no more.
    fn transmit(&mut self, queues: &mut Queues<'_>) -> Result<Served, QueueError> {
        match self.backend.flush() {
            Ok(true) => {}
            Ok(false) => return Ok(Served::All),
            Err(error) => self.link_lost(&error),
        }
        let served = queues.serve(TRANSMIT, |chain| match self.send(chain) {
            true => Answer::Used(0),
            false => Answer::PutBack,
        });
        // What the other end does not take now it takes when its descriptor says so.
        if let Err(error) = self.backend.flush() {
            self.link_lost(&error);
        }
        served
    }

    /// Sends one frame, or drops it. False where it has to wait.
    fn send(&mut self, chain: Chain<'_>) -> bool {
        let len = chain.readable.len().saturating_sub(HEADER_BYTES);
        if !self.transmit_limiter.may_begin() {
            return false;
        }
        let is_frame = (MIN_FRAME_BYTES..=MAX_FRAME_BYTES).contains(&len);
        let sent = if is_frame && self.link_up {
            self.backend.send(chain.readable)
        } else {
            Ok(Moved::Dropped)
        };
        match sent {
            Ok(Moved::Nothing) => return false,
            Ok(Moved::Frame(_)) => {
                self.metrics.tx_frames += 1;
                self.metrics.tx_bytes += len;
                self.transmit_limiter.pay(len);
            }
            Ok(Moved::Dropped) => self.metrics.tx_dropped += 1,
            Err(error) => {
                self.metrics.tx_dropped += 1;
                self.link_lost(&error);
            }
        }
        true
    }

    fn link_lost(&mut self, error: &io::Error) {
        if self.link_up {
            tracing::debug!(mac = %self.mac, %error, "the link is down");
            self.link_up = false;
            self.metrics.link_changes += 1;
        }
    }

    /// One turn: looks whether a link that was down is up again, does `work`, and tells the
    /// driver if the link changed.
    fn turn(
        &mut self,
        queues: &mut Queues<'_>,
        work: impl FnOnce(&mut Self, &mut Queues<'_>) -> Result<Served, QueueError>,
    ) -> Result<Served, QueueError> {
        let changes = self.metrics.link_changes;
        if !self.link_up && self.backend.is_up() {
            self.link_up = true;
            self.metrics.link_changes += 1;
        }
        let was_up = self.link_up;
        let served = work(self, queues);
        // A tap that was asked after it had failed tells when it is up again, and no other.
        if was_up && !self.link_up && self.backend.is_up() {
            self.link_up = true;
            self.metrics.link_changes += 1;
        }
        if self.metrics.link_changes != changes {
            queues.config_changed();
        }
        served
    }
}

impl VirtioDevice for Net {
    fn device_type(&self) -> DeviceType {
        DeviceType::Network
    }

    fn features(&self) -> u64 {
        let mtu = if self.mtu.is_some() { F_MTU } else { 0 };
        F_MAC | F_STATUS | F_MRG_RXBUF | mtu | self.backend.features()
    }

    fn queue_sizes(&self) -> Vec<u16> {
        vec![QUEUE_SIZE; 2]
    }

    /// `struct virtio_net_config` (§5.1.4).
    fn config(&self) -> Vec<u8> {
        let mut config = self.mac.0.to_vec();
        config.extend(if self.link_up { LINK_UP } else { 0 }.to_le_bytes());
        config.extend(1u16.to_le_bytes()); // max_virtqueue_pairs
        config.extend(self.mtu.unwrap_or(0).to_le_bytes());
        config
    }

    fn sources(&self) -> io::Result<Vec<Source>> {
        let limiters = (self.receive_limiter.source()?, self.transmit_limiter.source()?);
        Ok(vec![Box::new(self.backend.source()?), Box::new(limiters.0), Box::new(limiters.1)])
    }

    fn activate(&mut self, features: u64) {
        self.most_buffers = 0;
        self.choose(features);
    }

    fn reset(&mut self) {
        self.choose(0);
    }

    fn serve(&mut self, index: usize, queues: &mut Queues<'_>) -> Result<Served, QueueError> {
        match index {
            RECEIVE => self.turn(queues, Self::receive),
            _ => self.turn(queues, Self::transmit),
        }
    }

    fn ready(&mut self, _: usize, queues: &mut Queues<'_>) -> Result<Served, QueueError> {
        self.turn(queues, |net, queues| {
            if net.link_up && !net.backend.is_up() {
                net.link_lost(&io::ErrorKind::NetworkDown.into());
            }
            let (received, sent) = (net.receive(queues)?, net.transmit(queues)?);
            Ok(if received == Served::Some { received } else { sent })
        })
    }

    /// Pulls the cable out: a tap or a process of ours goes now.
    fn close(&mut self) {
        self.backend = Backend::Nothing;
        self.link_up = false;
    }

    fn metrics(&self) -> DeviceMetrics {
        DeviceMetrics::Net(self.metrics)
    }

    fn state(&self) -> DeviceState {
        DeviceState::Net { mac: self.mac, link_up: self.link_up }
    }

    /// An address that the configuration gives is the interface's, whatever its driver knows:
    /// a clone may get another one. A driver is told, but Linux's reads the address when it begins
    /// and never again: there the guest has to set it (`ip link set dev eth0 address …`). The
    /// link is what the back end is.
    fn restore(&mut self, state: &DeviceState, _: &GuestRam) -> Result<ConfigSpace, RestoreError> {
        let DeviceState::Net { mac, link_up } = *state else { return Err(RestoreError::Device) };
        self.mac = self.own_mac.unwrap_or(mac);
        self.link_up = self.backend.is_up();
        if self.link_up != link_up {
            self.metrics.link_changes += 1;
        }
        match (self.mac, self.link_up) == (mac, link_up) {
            true => Ok(ConfigSpace::Same),
            false => Ok(ConfigSpace::Changed),
        }
    }
}

//! The socket device: streams between programs of the guest and programs of the host.
//!
//! Source: virtio 1.2 §5.10. All of it is in this process, and vhost has no part in it. Each
//! connection has a UNIX socket on the host's side, so that the kernel wakes whoever waits, and
//! data moves between the socket and guest RAM without a copy of ours. The device wakes by one
//! descriptor, which stands for all of its sockets.

mod backlog;
mod connection;
mod credit;
mod muxer;
mod packet;
mod sockets;
mod unix;

use std::io;
use std::os::fd::OwnedFd;
use std::os::unix::net::UnixStream;
use std::sync::Arc;

pub(crate) use self::backlog::{Arrival, Backlog};
pub(crate) use self::connection::{ACCEPTED, REFUSED};
use self::muxer::Muxer;
pub(crate) use self::muxer::NO_PORT;
use super::{
    Answer, ConfigSpace, DeviceState, DeviceType, QueueError, Queues, RestoreError, Served, Source,
    VirtioDevice,
};
use crate::config::VsockConfig;
use crate::memory::GuestRam;
use crate::metrics::DeviceMetrics;

/// The queues.
const RX: usize = 0;
const TX: usize = 1;
const EVENT: usize = 2;

/// `VIRTIO_VSOCK_EVENT_TRANSPORT_RESET`: all connections are gone.
const EVENT_TRANSPORT_RESET: u32 = 0;
/// Packets for the guest in one turn.
const MAX_PACKETS: usize = 256;

/// Whether a guest that was restored knows that its connections are gone.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum TransportReset {
    /// It does, or never had any.
    Known,
    /// It has to be told, before anything else.
    Owed,
    /// It was told when it had given so many buffers for events (modulo 65,536), and knows when
    /// it gives the next one: drivers give a buffer back when they have dealt with its event.
    Told { given: u16 },
}

/// Why the host cannot have a connection.
#[derive(Debug)]
pub(crate) enum OpenError {
    /// The device is shut down.
    Over,
    /// There are as many as there may be.
    TooMany,
    /// The host has no sockets left.
    Socket(io::Error),
}

/// The device.
#[derive(Debug)]
pub(crate) struct Vsock {
    muxer: Muxer,
    reset: TransportReset,
    /// The driver works with it.
    active: bool,
    /// Packets of the guest wait until it has taken some of ours.
    held_up: bool,
}

impl Vsock {
    /// A device with no connection. Makes the UNIX socket where there is to be one. All ends when
    /// `ended` is readable, because then the guest has.
    pub(crate) fn new(config: &VsockConfig, ended: OwnedFd) -> io::Result<Self> {
        let reset = TransportReset::Known;
        Ok(Self { muxer: Muxer::new(config, ended)?, reset, active: false, held_up: false })
    }

    /// Asks the guest for a connection; returns the host's end, which can be read when the guest
    /// has answered: [`ACCEPTED`] or [`REFUSED`].
    pub(crate) fn open(&mut self, guest_port: u32) -> Result<UnixStream, OpenError> {
        self.muxer.open(guest_port)
    }

    /// Connections to a port of the host go to `listener`. False where another one has it.
    pub(crate) fn listen(&mut self, port: u32, listener: &Arc<Backlog>) -> bool {
        self.muxer.listen(port, listener)
    }

    /// Up to `limit` connections to a port of the host wait from now on, whether somebody listens
    /// or not.
    pub(crate) fn keep(&mut self, port: u32, limit: usize) -> io::Result<Arc<Backlog>> {
        let backlog = Arc::new(Backlog::new(limit)?);
        self.muxer.listen(port, &backlog);
        Ok(backlog)
    }

    /// Nobody listens at a port of the host any more.
    pub(crate) fn unlisten(&mut self, port: u32) {
        self.muxer.unlisten(port);
    }

    /// Connections, answers and turns that wait, and bytes that are kept.
    #[cfg(fuzzing)]
    pub(crate) fn held(&self) -> (usize, usize, usize) {
        self.muxer.held()
    }

    /// Serves what is there to serve: sockets, then the guest.
    fn turn(&mut self, tx: bool, queues: &mut Queues<'_>) -> Result<Served, QueueError> {
        let events = self.muxer.poll();
        let mut sent = Served::All;
        // A guest that has ended has said all that it will.
        self.held_up |= tx || self.muxer.guest_has_ended();
        if self.held_up && !self.muxer.is_congested() {
            self.held_up = false;
            sent = self.transmit(queues)?;
            // Whatever wakes the device for the rest, the guest does not ring for it again.
            self.held_up |= sent == Served::Some;
        }
        if self.muxer.guest_has_ended() && sent == Served::All {
            self.muxer.end();
        }
        let received = self.receive(queues)?;
        let goes_on = self.held_up && !self.muxer.is_congested();
        match events || goes_on || received == Served::Some {
            true => Ok(Served::Some),
            false => Ok(Served::All),
        }
    }

    /// Takes the guest's packets.
    fn transmit(&mut self, queues: &mut Queues<'_>) -> Result<Served, QueueError> {
        queues.serve(TX, |chain| {
            if self.muxer.is_congested() {
                self.held_up = true;
                return Answer::PutBack;
            }
            self.muxer.take_packet(chain.readable);
            Answer::Used(0)
        })
    }

    /// Gives the guest its packets, as far as it has buffers for them.
    fn receive(&mut self, queues: &mut Queues<'_>) -> Result<Served, QueueError> {
        let ram = queues.ram();
        let Some(rx) = queues.get(RX).filter(|_| self.reset == TransportReset::Known) else {
            return Ok(Served::All);
        };
        let mut served = Served::All;
        for turn in 0.. {
            if !self.muxer.has_packets() {
                break;
            }
            if turn == MAX_PACKETS {
                served = Served::Some;
                break;
            }
            let Some(chain) = rx.next(ram)? else {
                match rx.wait_for_more(ram)? {
                    true => continue,
                    false => break,
                }
            };
            match self.muxer.next_packet(chain.writable) {
                Some(len) => rx.add_used(ram, chain.head, len)?,
                None => rx.put_back(),
            }
        }
        rx.signal(ram)?;
        Ok(served)
    }

    /// Tells a guest that was restored that its connections are gone, as soon as it has a buffer
    /// for that, and sees whether it knows. The doorbell alone does not say so: it also rings
    /// when the VM goes on.
    fn tell_reset(&mut self, queues: &mut Queues<'_>) -> Result<(), QueueError> {
        let ram = queues.ram();
        let Some(event) = queues.get(EVENT) else {
            // A driver without a queue for events cannot be told, and does not expect it.
            self.reset = TransportReset::Known;
            return Ok(());
        };
        if self.reset == TransportReset::Owed {
            // Before the guest can have answered.
            let given = event.given(ram)?;
            let Some(chain) = event.next(ram)? else {
                event.wait_for_more(ram)?;
                return Ok(());
            };
            let written = chain.writable.copy_from(&EVENT_TRANSPORT_RESET.to_le_bytes());
            event.add_used(ram, chain.head, written as u32)?;
            event.signal(ram)?;
            self.reset = TransportReset::Told { given };
        }
        if let TransportReset::Told { given } = self.reset
            && event.wait_beyond(ram, given)?
        {
            self.reset = TransportReset::Known;
        }
        Ok(())
    }
}

impl VirtioDevice for Vsock {
    fn device_type(&self) -> DeviceType {
        DeviceType::Socket
    }

    fn queue_sizes(&self) -> Vec<u16> {
        vec![256, 256, 16]
    }

    /// `struct virtio_vsock_config` (§5.10.4).
    fn config(&self) -> Vec<u8> {
        self.muxer.guest_cid().to_le_bytes().to_vec()
    }

    fn sources(&self) -> io::Result<Vec<Source>> {
        Ok(vec![Box::new(self.muxer.sockets().descriptor()?)])
    }

    fn activate(&mut self, _: u64) {
        self.active = true;
    }

    fn reset(&mut self) {
        (self.active, self.held_up) = (false, false);
        self.reset = TransportReset::Known;
        self.muxer.forget();
    }

    fn serve(&mut self, index: usize, queues: &mut Queues<'_>) -> Result<Served, QueueError> {
        if index == EVENT {
            self.tell_reset(queues)?;
        }
        self.turn(index == TX, queues)
    }

    fn ready(&mut self, _: usize, queues: &mut Queues<'_>) -> Result<Served, QueueError> {
        self.turn(false, queues)
    }

    /// Without a driver, or in a pause, a guest may end, a host give up what it has asked for, and read what is left of
    /// connections that are over.
    fn unattended(&mut self) -> Served {
        let more = self.muxer.tend();
        if self.muxer.guest_has_ended() || self.muxer.sees_end() {
            self.muxer.end();
        }
        if more { Served::Some } else { Served::All }
    }

    /// Ends all connections and listeners for good.
    fn close(&mut self) {
        self.muxer.shut_down();
    }

    fn metrics(&self) -> DeviceMetrics {
        DeviceMetrics::Vsock(self.muxer.metrics())
    }

    fn state(&self) -> DeviceState {
        DeviceState::Vsock { last_port: self.muxer.last_port }
    }

    /// Connections do not outlive a snapshot. The host's ports go on from where they were, so
    /// that no new connection is taken for one that the guest still believes in.
    fn restore(&mut self, state: &DeviceState, _: &GuestRam) -> Result<ConfigSpace, RestoreError> {
        let DeviceState::Vsock { last_port } = state else { return Err(RestoreError::Device) };
        self.muxer.last_port = *last_port;
        if self.active {
            self.reset = TransportReset::Owed;
        }
        // A driver reads its CID again when it is told of the reset.
        Ok(ConfigSpace::Same)
    }
}

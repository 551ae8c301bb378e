//! One connection: a socket of the host on one side, packets of the guest on the other.
//!
//! Bytes of the host go from the socket to guest RAM, bytes of the guest from there to the
//! socket. What the socket refuses is kept, up to the credit that the guest was given, so that
//! no byte is lost; it counts as taken only when it has left. A host that does not read makes
//! the guest wait, and a guest that does not read makes the host wait.

use std::collections::VecDeque;
use std::io::{self, Read, Write};
use std::net::Shutdown;
use std::os::unix::net::UnixStream;

use super::credit::Credit;
use super::packet::{Header, Key, Op, SHUTDOWN_RECEIVE, SHUTDOWN_SEND};
use super::sockets::Ready;
use crate::memory::GuestBytes;

/// A packet carries so much data at most, as Linux has it.
const MAX_PACKET_BYTES: u64 = 64 << 10;

/// What the host's side of a socket is told before any data.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Greeting {
    /// One byte, [`ACCEPTED`] or [`REFUSED`].
    Byte,
    /// "OK", and the connection's port on the host's side; nothing where it is refused.
    Line,
}

pub(crate) const ACCEPTED: u8 = 1;
pub(crate) const REFUSED: u8 = 0;

#[derive(Debug)]
enum Phase {
    /// The host wants it; the guest has been asked, where `sent`.
    Requested {
        sent: bool,
        greeting: Greeting,
    },
    /// The guest wants it, and will be told that it is there.
    Answering,
    Established,
}

/// What a connection has for the guest.
pub(super) enum Step {
    Packet(Header),
    /// The connection's last packet.
    Last(Header),
    Nothing,
    /// The connection is over, and the guest never heard of it.
    Over,
}

/// How a guest broke the protocol, or the socket failed: the connection is reset.
#[derive(Debug)]
pub(super) struct Broken;

#[derive(Debug)]
pub(super) struct Connection {
    key: Key,
    guest_cid: u64,
    socket: UnixStream,
    phase: Phase,
    credit: Credit,
    kept: Kept,
    /// The socket may have something to read.
    readable: bool,
    /// The host has closed its end, or both directions are shut.
    hung_up: bool,
    /// The host will send no more.
    ended: bool,
    host_sends: bool,
    host_receives: bool,
    guest_sends: bool,
    guest_receives: bool,
    /// The shutdown flags that the guest knows of.
    told: u32,
    owes_credit: bool,
    /// Whether it waits in the muxer for its turn.
    pub(super) queued: bool,
}

impl Connection {
    /// A connection that the host wants.
    pub(super) fn to_guest(
        guest_cid: u64,
        key: Key,
        socket: UnixStream,
        greeting: Greeting,
    ) -> Self {
        Self::new(guest_cid, key, socket, Phase::Requested { sent: false, greeting })
    }

    /// A connection that the guest wants, and gets.
    pub(super) fn from_guest(guest_cid: u64, header: &Header, socket: UnixStream) -> Self {
        let mut connection = Self::new(guest_cid, header.key(), socket, Phase::Answering);
        connection.credit.update(header);
        connection
    }

    fn new(guest_cid: u64, key: Key, socket: UnixStream, phase: Phase) -> Self {
        Self {
            key,
            guest_cid,
            socket,
            phase,
            credit: Credit::default(),
            kept: Kept::default(),
            readable: false,
            hung_up: false,
            ended: false,
            host_sends: true,
            host_receives: true,
            guest_sends: true,
            guest_receives: true,
            told: 0,
            owes_credit: false,
            queued: false,
        }
    }

    pub(super) fn socket(&self) -> &UnixStream {
        &self.socket
    }

    #[cfg(fuzzing)]
    pub(super) fn kept_bytes(&self) -> usize {
        self.kept.len()
    }

    /// Whether it has begun, for the guest.
    pub(super) fn is_asked(&self) -> bool {
        !matches!(self.phase, Phase::Requested { sent: false, .. })
    }

    /// Whether the host has taken it back before the guest was asked.
    pub(super) fn is_given_up(&self) -> bool {
        self.hung_up && !self.is_asked()
    }

    pub(super) fn is_requested(&self) -> bool {
        matches!(self.phase, Phase::Requested { .. })
    }

    /// The socket became ready.
    pub(super) fn socket_ready(&mut self, ready: Ready) {
        self.readable |= ready.readable;
        self.ended |= ready.ended;
        self.hung_up |= ready.hung_up;
        self.flush();
    }

    /// Its next packet for the guest; data goes to `body`.
    pub(super) fn next_packet(&mut self, body: &GuestBytes<'_>) -> Step {
        match &mut self.phase {
            Phase::Requested { sent, .. } => {
                return match (std::mem::replace(sent, true), self.hung_up) {
                    (false, false) => self.packet(Op::Request),
                    (false, true) => Step::Over,
                    (true, false) => Step::Nothing,
                    (true, true) => self.last(Op::Rst),
                };
            }
            Phase::Answering => {
                self.phase = Phase::Established;
                return self.packet(Op::Response);
            }
            Phase::Established => {}
        }
        if self.readable
            && self.host_sends
            && self.guest_receives
            && let Some(step) = self.receive(body)
        {
            return step;
        }
        if self.hung_up && !(self.host_sends && self.guest_receives) {
            (self.host_sends, self.host_receives) = (false, false);
        }
        let receive = if self.host_receives { 0 } else { SHUTDOWN_RECEIVE };
        let flags = receive | if self.host_sends { 0 } else { SHUTDOWN_SEND };
        if flags != self.told {
            self.told = flags;
            let header = Header { flags, ..self.header(Op::Shutdown) };
            let all = SHUTDOWN_RECEIVE | SHUTDOWN_SEND;
            // The guest answers the last one with RST, which is then nobody's.
            return if flags == all { Step::Last(header) } else { Step::Packet(header) };
        }
        if self.owes_credit || self.credit.is_worth_an_update(self.kept.len()) {
            self.owes_credit = false;
            return self.packet(Op::CreditUpdate);
        }
        Step::Nothing
    }

    /// A packet with data of the host, or why there is none; `None` where there is no data.
    fn receive(&mut self, body: &GuestBytes<'_>) -> Option<Step> {
        let room = u64::from(self.credit.room()).min(body.len()).min(MAX_PACKET_BYTES);
        if body.len() == 0 {
            return None;
        }
        if room == 0 {
            return self.credit.request().then(|| self.packet(Op::CreditRequest));
        }
        match body.receive(&self.socket, room) {
            Ok(0) => {
                self.host_sends = false;
                None
            }
            Ok(bytes) => {
                // What comes later makes an event of its own; an end that came before does not.
                self.readable = bytes == room || self.ended;
                self.credit.sent(bytes as u32);
                let len = bytes as u32;
                Some(Step::Packet(Header { len, ..self.header(Op::Rw) }))
            }
            Err(error) if error.kind() == io::ErrorKind::WouldBlock => {
                self.readable = false;
                None
            }
            // The host closed its end without reading all.
            Err(_) => Some(self.last(Op::Rst)),
        }
    }

    /// The guest has room for so much, by any packet of it.
    pub(super) fn update_credit(&mut self, header: &Header) {
        self.credit.update(header);
    }

    /// The guest wants to know its credit.
    pub(super) fn owe_credit(&mut self) {
        self.owes_credit = true;
    }

    /// The guest accepts a connection that the host wants.
    pub(super) fn accept(&mut self) -> Result<(), Broken> {
        let Phase::Requested { sent: true, greeting } = self.phase else { return Err(Broken) };
        let text = match greeting {
            Greeting::Byte => vec![ACCEPTED],
            Greeting::Line => format!("OK {}\n", self.key.host_port).into_bytes(),
        };
        // Nothing was written before, so that there is room for all of it.
        (&self.socket).write_all(&text).map_err(|_| Broken)?;
        self.phase = Phase::Established;
        Ok(())
    }

    /// Says to a host that waits for the guest's answer that it is no.
    pub(super) fn refuse(&self) {
        if let Phase::Requested { greeting: Greeting::Byte, .. } = self.phase {
            let _ = (&self.socket).write_all(&[REFUSED]);
        }
    }

    /// Data of the guest.
    pub(super) fn send(&mut self, body: GuestBytes<'_>) -> Result<(), Broken> {
        let bytes = body.len();
        if !self.guest_sends || self.is_requested() || !self.credit.allows(self.kept.len(), bytes) {
            return Err(Broken);
        }
        let sent = match self.kept.is_empty() && self.host_receives {
            true => body.send(&self.socket),
            false => Ok(0),
        };
        match sent {
            Ok(sent) => {
                self.credit.forwarded(sent as u32);
                if let Some((_, rest)) = body.split_at(sent) {
                    self.kept.push(&rest);
                }
            }
            Err(error) if error.kind() == io::ErrorKind::WouldBlock => self.kept.push(&body),
            Err(_) => {
                self.host_receives = false;
                self.credit.forwarded(bytes as u32);
            }
        }
        self.flush();
        Ok(())
    }

    /// The guest shuts a direction or both. False where that ends the connection.
    pub(super) fn shut(&mut self, flags: u32) -> bool {
        if flags & SHUTDOWN_RECEIVE != 0 && std::mem::take(&mut self.guest_receives) {
            let _ = self.socket.shutdown(Shutdown::Read);
            self.read_in_vain();
        }
        if flags & SHUTDOWN_SEND != 0 {
            self.guest_sends = false;
            self.flush();
        }
        !self.is_requested() && (self.guest_receives || self.guest_sends)
    }

    /// Takes what the host has said and the guest will not, once reading is shut down and nothing can follow. A socket that
    /// is closed with something unread ends in a reset, and this guest closes in order.
    fn read_in_vain(&self) {
        let mut buffer = [0; 16 << 10];
        loop {
            match (&self.socket).read(&mut buffer) {
                Ok(0) => break,
                Err(error) if error.kind() != io::ErrorKind::Interrupted => break,
                _ => {}
            }
        }
    }

    /// Ends it, but for what the host has still to read.
    pub(super) fn into_rest(self) -> Option<Rest> {
        if self.kept.is_empty() || !self.host_receives {
            return None;
        }
        let _ = self.socket.shutdown(Shutdown::Read);
        Some(Rest { socket: self.socket, kept: self.kept })
    }

    /// Writes what was kept, as far as the socket takes it.
    fn flush(&mut self) {
        let before = self.kept.len();
        if self.host_receives && self.kept.flush(&self.socket).is_err() {
            self.host_receives = false;
        }
        if !self.host_receives {
            // It is nobody's, and the guest need not wait for it.
            self.kept.clear();
        }
        self.credit.forwarded((before - self.kept.len()) as u32);
        if !self.guest_sends && self.kept.is_empty() {
            let _ = self.socket.shutdown(Shutdown::Write);
        }
    }

    fn header(&mut self, op: Op) -> Header {
        let mut header = Header::to_guest(self.guest_cid, self.key, op);
        self.credit.announce(&mut header);
        header
    }

    fn packet(&mut self, op: Op) -> Step {
        Step::Packet(self.header(op))
    }

    fn last(&mut self, op: Op) -> Step {
        Step::Last(self.header(op))
    }
}

/// A connection that the guest has closed, until the host has all of it.
#[derive(Debug)]
pub(super) struct Rest {
    pub(super) socket: UnixStream,
    kept: Kept,
}

impl Rest {
    #[cfg(fuzzing)]
    pub(super) fn kept_bytes(&self) -> usize {
        self.kept.len()
    }

    /// Writes on. False when nothing is left, or nobody reads it.
    pub(super) fn flush(&mut self) -> bool {
        self.kept.flush(&self.socket).is_ok() && !self.kept.is_empty()
    }
}

/// Bytes that a socket refused.
#[derive(Debug, Default)]
struct Kept(VecDeque<u8>);

impl Kept {
    fn len(&self) -> usize {
        self.0.len()
    }

    fn is_empty(&self) -> bool {
        self.0.is_empty()
    }

    fn clear(&mut self) {
        self.0 = VecDeque::new();
    }

    /// The caller has checked that there is credit for them.
    fn push(&mut self, bytes: &GuestBytes<'_>) {
        let mut copy = vec![0; bytes.len() as usize];
        bytes.copy_to(&mut copy);
        self.0.extend(copy);
    }

    /// Writes until the socket is full or nothing is left.
    fn flush(&mut self, mut socket: &UnixStream) -> io::Result<()> {
        while !self.0.is_empty() {
            match socket.write(self.0.as_slices().0) {
                Ok(0) => return Err(io::ErrorKind::WriteZero.into()),
                Ok(bytes) => drop(self.0.drain(..bytes)),
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => return Ok(()),
                Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
                Err(error) => return Err(error),
            }
        }
        // Its memory is given back too.
        self.clear();
        Ok(())
    }
}

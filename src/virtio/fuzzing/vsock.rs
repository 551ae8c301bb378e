//! A guest's packets, and programs of the host that do anything with its connections.

use std::collections::HashMap;
use std::io::{Read, Write};
use std::net::Shutdown;
use std::os::unix::net::UnixStream;
use std::sync::Arc;
use std::time::Duration;

use rustix::event::{EventfdFlags, eventfd};

use super::guest::{Guest, queue_registers};
use super::input::Input;
use crate::config::VsockConfig;
use crate::virtio::{ACCEPTED, Arrival, Backlog, Vsock};

const MAX_CONNECTIONS: usize = 8;
/// A listener is at each of the first ports.
const LISTENERS: u32 = 2;
const BACKLOG: usize = 2;
/// The most that a host's end has before it is let go.
const MAX_HOSTS: usize = 32;
/// What the device may keep of one connection: its credit.
const MAX_KEPT: usize = 128 << 10;

/// A device without a connection.
pub(super) fn device() -> Vsock {
    let config = VsockConfig::default().max_connections(MAX_CONNECTIONS);
    let ended = eventfd(0, EventfdFlags::CLOEXEC | EventfdFlags::NONBLOCK).expect("an eventfd");
    Vsock::new(&config, ended).expect("a device")
}

/// Packets of a guest, and what the host does at the other ends. Where the guest writes nothing
/// but data into its buffers, each side reads what the other wrote, in order.
pub fn vsock_packet(bytes: &[u8]) {
    let mut input = Input::new(bytes);
    let hostile = input.byte() & 1 != 0;
    let mut guest = Guest::new(device());
    let backlogs: Vec<_> = (0..LISTENERS)
        .map(|port| {
            let backlog = Arc::new(Backlog::new(BACKLOG).expect("an eventfd"));
            assert!(guest.host(|device| device.listen(port, &backlog)));
            backlog
        })
        .collect();
    guest.begin_sockets(&mut input);
    let mut driver = Driver::default();
    let mut hosts: Vec<Host> = Vec::new();
    while !input.is_empty() {
        match input.byte() % 16 {
            0..=5 => driver.send(&mut guest, &mut input, hostile),
            6 | 7 => driver.receive(&mut guest, !hostile),
            8 => {
                let port = u32::from(input.byte() & 7);
                if let Ok(socket) = guest.host(|device| device.open(port)) {
                    hosts.push(Host::new(socket, true));
                }
            }
            9 => {
                let backlog = usize::from(input.byte()) % backlogs.len();
                if let Some(Arrival::Connection(socket, _)) =
                    backlogs.get(backlog).map(|backlog| backlog.wait(Duration::ZERO))
                {
                    hosts.push(Host::new(socket, false));
                }
            }
            10..=13 => {
                let index = usize::from(input.byte());
                if !hosts.is_empty() {
                    let index = index % hosts.len();
                    if !hosts.get_mut(index).is_some_and(|host| host.act(&mut input, !hostile)) {
                        hosts.swap_remove(index);
                    }
                }
            }
            14 => {
                let port = u32::from(input.byte()) % LISTENERS;
                guest.host(|device| device.unlisten(port));
                if let Some(backlog) = backlogs.get(port as usize) {
                    assert!(guest.host(|device| device.listen(port, backlog)));
                }
            }
            _ if hostile => guest.act(&mut input),
            _ => {
                guest.pause();
                guest.resume();
            }
        }
        guest.settle();
        hosts.truncate(MAX_HOSTS);
        let (connections, waiting, kept) = guest.host(|device| device.held());
        assert!(connections <= MAX_CONNECTIONS, "{connections} connections");
        assert!(waiting <= 600 + MAX_CONNECTIONS, "{waiting} answers wait");
        assert!(kept <= MAX_CONNECTIONS * MAX_KEPT, "{kept} bytes are kept");
    }
    guest.end();
}

/// The byte at a place of every stream.
fn pattern(at: u64) -> u8 {
    (at ^ at >> 8) as u8
}

/// Ports of the host and of the guest.
type Key = (u32, u32);

/// What the guest knows of its connections.
#[derive(Default)]
struct Driver {
    /// Connections that the device spoke of.
    heard: Vec<Key>,
    sent: HashMap<Key, u64>,
    received: HashMap<Key, u64>,
    taken: u16,
}

impl Driver {
    /// A packet, mostly of a connection that there is.
    fn send(&mut self, guest: &mut Guest<Vsock>, input: &mut Input<'_>, hostile: bool) {
        let choice = input.byte();
        let key = match self.heard.get(usize::from(choice >> 4)) {
            Some(key) if choice & 8 == 0 => *key,
            _ => (u32::from(choice & 3), u32::from(choice >> 4)),
        };
        let op = match input.byte() {
            op @ 0..=15 => u16::from(op) % 9,
            // Data most of all.
            _ => 5,
        };
        let len = match op {
            5 => u32::from(input.u16()) & 0x1fff,
            _ => 0,
        };
        // Answers and requests begin a stream, or end the one that there was.
        let at = match op {
            1 | 2 => 0,
            _ => self.sent.get(&key).copied().unwrap_or_default(),
        };
        let end = at + u64::from(len);
        let body: Vec<u8> = (at..end).map(pattern).collect();
        let mut header = Vec::new();
        header.extend(3u64.to_le_bytes());
        header.extend(2u64.to_le_bytes());
        header.extend(key.1.to_le_bytes());
        header.extend(key.0.to_le_bytes());
        header.extend(len.to_le_bytes());
        header.extend(1u16.to_le_bytes());
        header.extend(op.to_le_bytes());
        header.extend(u32::from(input.byte() & 3).to_le_bytes());
        let received = self.received.get(&key).copied().unwrap_or_default() as u32;
        let room = match input.byte() {
            0 => input.u32(),
            room => u32::from(room) << 8,
        };
        header.extend(room.to_le_bytes());
        header.extend(received.to_le_bytes());
        if hostile && input.byte() & 3 == 0 {
            let place = usize::from(input.byte()) % header.len();
            let any = input.bytes(4);
            for (byte, any) in header.iter_mut().skip(place).zip(any) {
                *byte = *any;
            }
        }
        if guest.send_packet(&header, &body) {
            self.sent.insert(key, end);
        }
    }

    /// Takes what the device sent, and gives the buffers back.
    fn receive(&mut self, guest: &mut Guest<Vsock>, check: bool) {
        while let Some((header, body)) = guest.next_packet(self.taken) {
            self.taken = self.taken.wrapping_add(1);
            let word = |at: usize| {
                let bytes = header.get(at..at + 4).and_then(|bytes| bytes.try_into().ok());
                bytes.map_or(0, u32::from_le_bytes)
            };
            let (key, len, op) = ((word(16), word(20)), word(24), word(28) >> 16);
            if check {
                assert_eq!(body.len(), len as usize, "the length that was used is the packet's");
                assert!(op == 5 || len == 0);
            }
            // REQUEST and RESPONSE begin a stream.
            if matches!(op, 1 | 2) {
                self.received.insert(key, 0);
            }
            if matches!(op, 1 | 2) && !self.heard.contains(&key) {
                self.heard.insert(0, key);
                self.heard.truncate(16);
            }
            let at = self.received.entry(key).or_default();
            for byte in body {
                assert!(!check || byte == pattern(*at), "the guest reads another byte at {at}");
                *at += 1;
            }
        }
        guest.give_buffers();
    }
}

/// The host's end of a connection.
struct Host {
    socket: UnixStream,
    /// The guest's answer is still to be read.
    asked: bool,
    read: u64,
    written: u64,
}

impl Host {
    fn new(socket: UnixStream, asked: bool) -> Self {
        socket.set_nonblocking(true).expect("a socket");
        Self { socket, asked, read: 0, written: 0 }
    }

    /// False where the program closes it.
    fn act(&mut self, input: &mut Input<'_>, check: bool) -> bool {
        let kind = input.byte();
        let len = usize::from(input.u16());
        match kind % 8 {
            0..=2 => {
                let bytes: Vec<u8> =
                    (self.written..self.written + len as u64).map(pattern).collect();
                self.written += self.socket.write(&bytes).unwrap_or(0) as u64;
            }
            3..=5 => {
                let mut bytes = vec![0; len];
                let count = self.socket.read(&mut bytes).unwrap_or(0);
                for byte in bytes.into_iter().take(count) {
                    if std::mem::take(&mut self.asked) {
                        // REFUSED is the last that it reads.
                        assert!(byte <= ACCEPTED, "an answer of {byte}");
                        continue;
                    }
                    let at = self.read;
                    assert!(!check || byte == pattern(at), "the host reads another byte at {at}");
                    self.read += 1;
                }
            }
            6 => {
                let how = match len % 3 {
                    0 => Shutdown::Read,
                    1 => Shutdown::Write,
                    _ => Shutdown::Both,
                };
                let _ = self.socket.shutdown(how);
            }
            _ => return false,
        }
        true
    }
}

/// The rings of the two queues, and their buffers. Buffers of packets to send are taken in turn.
const RINGS: [u64; 2] = [0x2_0000, 0x2_4000];
const AVAILABLE: u64 = 0x1000;
const USED: u64 = 0x2000;
const BUFFERS: [u64; 2] = [0xa000, 0];
const BUFFER_BYTES: [u64; 2] = [0x1000, 0x2040];
const SIZE: u16 = 4;
const RX: usize = 0;
const TX: usize = 1;

impl Guest<Vsock> {
    /// Brings both queues up, with buffers for the device in one.
    fn begin_sockets(&mut self, input: &mut Input<'_>) {
        let features = if input.byte() & 1 != 0 { 1 << 29 } else { 0 };
        for (register, value) in
            [(0x70, 3), (0x24, 0), (0x20, features), (0x24, 1), (0x20, 1), (0x70, 11)]
        {
            self.write(register, &u32::to_le_bytes(value));
        }
        for queue in [RX, TX] {
            let (base, writes) = (RINGS[queue] as u32, queue == RX);
            for (register, value) in queue_registers(queue as u32, SIZE, base) {
                self.write(register, &value.to_le_bytes());
            }
            for slot in 0..u64::from(SIZE) {
                let address = BUFFERS[queue] + slot * BUFFER_BYTES[queue];
                let mut descriptor = address.to_le_bytes().to_vec();
                descriptor.extend((BUFFER_BYTES[queue] as u32).to_le_bytes());
                descriptor.extend(if writes { 2u32 } else { 0 }.to_le_bytes());
                self.poke(RINGS[queue] + slot * 16, &descriptor);
                let entry = RINGS[queue] + AVAILABLE + 4 + slot * 2;
                self.poke(entry, &(slot as u16).to_le_bytes());
            }
        }
        self.write(0x70, &15u32.to_le_bytes());
        self.give_buffers();
    }

    /// False where the device has not taken the packets before this one.
    fn send_packet(&mut self, header: &[u8], body: &[u8]) -> bool {
        let [available, used] = [AVAILABLE, USED].map(|ring| self.peek(RINGS[TX] + ring + 2));
        if available.wrapping_sub(used) >= SIZE {
            return false;
        }
        let slot = u64::from(available % SIZE);
        let buffer = BUFFERS[TX] + slot * BUFFER_BYTES[TX];
        self.poke(buffer, &[header, body].concat());
        self.poke(RINGS[TX] + AVAILABLE + 2, &available.wrapping_add(1).to_le_bytes());
        self.serve(TX);
        true
    }

    /// What was received as number `at`: its header, and as much of the rest as was used.
    fn next_packet(&mut self, at: u16) -> Option<(Vec<u8>, Vec<u8>)> {
        if self.peek(RINGS[RX] + USED + 2) == at {
            return None;
        }
        let element = RINGS[RX] + USED + 4 + u64::from(at % SIZE) * 8;
        let len = u64::from(self.peek(element + 4)).min(BUFFER_BYTES[RX]);
        let buffer = BUFFERS[RX] + u64::from(at % SIZE) * BUFFER_BYTES[RX];
        let mut header = self.look(buffer, len as usize);
        let body = header.split_off(header.len().min(44));
        Some((header, body))
    }

    /// Makes every buffer available that was used.
    fn give_buffers(&mut self) {
        let used = self.peek(RINGS[RX] + USED + 2);
        self.poke(RINGS[RX] + AVAILABLE + 2, &used.wrapping_add(SIZE).to_le_bytes());
        self.serve(RX);
    }
}

//! All connections of a device: whose turn it is, which socket woke it, and where a packet goes.
//!
//! A connection with something for the guest waits in a queue for its turn, which is one packet:
//! one that has much does not hold up the others. Sockets are watched edge-triggered, by a
//! descriptor that the device thread watches in its turn. What a guest can make it keep is
//! bounded: connections by their number, bytes by their credit, answers by a queue whose end
//! holds up the guest's requests.

use std::collections::{HashMap, VecDeque};
use std::io;
use std::os::fd::OwnedFd;
use std::os::unix::net::UnixStream;
use std::sync::Arc;

use rustix::event::{PollFd, PollFlags, Timespec};

use super::OpenError;
use super::backlog::Backlog;
use super::connection::{Connection, Greeting, Rest, Step};
use super::packet::{HEADER_BYTES, HOST_CID, Header, Key, Op, TYPE_STREAM};
use super::sockets::{Sockets, pair};
use super::unix::{Call, SocketFile, UnixPath};
use crate::config::VsockConfig;
use crate::memory::GuestBytes;
use crate::metrics::VsockMetrics;

/// No port (VMADDR_PORT_ANY). Sockets that are no connections are watched by keys with it.
pub(crate) const NO_PORT: u32 = u32::MAX;
/// The key of the UNIX socket that others connect to.
const UNIX_LISTENER: Key = key_of(NO_PORT);
/// The key of what is ready when the guest has ended.
const GUEST_ENDED: Key = key_of(NO_PORT - 1);
/// The ports that the host's connections come from: few programs listen there.
const FIRST_PORT: u32 = 1 << 30;
const LAST_PORT: u32 = (1 << 31) - 1;
/// Answers to packets of no connection, before the guest's packets have to wait.
const MAX_RESETS: usize = 256;
/// Programs that are let in by the UNIX socket in one turn.
const MAX_CALLERS: usize = 256;

/// The key of a socket that is no connection.
const fn key_of(id: u32) -> Key {
    Key { host_port: NO_PORT, guest_port: id }
}

/// The connections, and who waits for some.
#[derive(Debug)]
pub(super) struct Muxer {
    guest_cid: u64,
    max_connections: usize,
    sockets: Sockets,
    /// Watched, and never read.
    ended: OwnedFd,
    guest_has_ended: bool,
    connections: HashMap<Key, Connection>,
    /// Those with something for the guest.
    turns: VecDeque<Key>,
    /// RSTs for what is no connection.
    resets: VecDeque<Header>,
    /// Connections that the guest has closed and the host has not read to their end.
    rests: HashMap<u32, Rest>,
    listeners: HashMap<u32, Arc<Backlog>>,
    unix: Option<UnixPath>,
    /// Outlives it until the device is shut down.
    socket_file: Option<Arc<SocketFile>>,
    /// Programs may have connected to it that were not let in.
    callers_wait: bool,
    next_id: u32,
    /// The port that the host's last connection came from.
    pub(super) last_port: u32,
    metrics: VsockMetrics,
}

impl Muxer {
    pub(super) fn new(config: &VsockConfig, ended: OwnedFd) -> io::Result<Self> {
        let sockets = Sockets::new()?;
        sockets.watch(&ended, GUEST_ENDED)?;
        let unix = config.unix_socket.as_deref().map(UnixPath::new).transpose()?;
        if let Some(unix) = &unix {
            sockets.watch(&unix.listener, UNIX_LISTENER)?;
        }
        Ok(Self {
            guest_cid: config.guest_cid.into(),
            max_connections: config.max_connections,
            sockets,
            ended,
            guest_has_ended: false,
            connections: HashMap::new(),
            turns: VecDeque::new(),
            resets: VecDeque::new(),
            rests: HashMap::new(),
            listeners: HashMap::new(),
            socket_file: unix.as_ref().map(|unix| Arc::clone(&unix.file)),
            unix,
            callers_wait: false,
            next_id: 0,
            last_port: LAST_PORT,
            metrics: VsockMetrics::default(),
        })
    }

    pub(super) fn guest_cid(&self) -> u64 {
        self.guest_cid
    }

    /// What wakes the device.
    pub(super) fn sockets(&self) -> &Sockets {
        &self.sockets
    }

    pub(super) fn metrics(&self) -> VsockMetrics {
        VsockMetrics { active: self.connections.len() as u64, ..self.metrics }
    }

    /// What it holds for guest and host: connections, packets and turns, bytes.
    #[cfg(fuzzing)]
    pub(super) fn held(&self) -> (usize, usize, usize) {
        let connections = self.connections.values().map(Connection::kept_bytes);
        let kept = connections.chain(self.rests.values().map(Rest::kept_bytes));
        let waiting = self.resets.len() + self.turns.len();
        (self.connections.len() + self.rests.len(), waiting, kept.sum())
    }

    /// Looks at the sockets that became ready. True where there may be more of them.
    pub(super) fn poll(&mut self) -> bool {
        let more = self.tend();
        let callers = std::mem::take(&mut self.callers_wait) && self.accept_callers();
        more || callers
    }

    /// As [`poll`](Self::poll), but lets nobody in: without a driver the host's last port may not be known yet.
    pub(super) fn tend(&mut self) -> bool {
        let (events, more) = self.sockets.poll();
        for (key, ready) in events {
            if let Some(connection) = self.connections.get_mut(&key) {
                connection.socket_ready(ready);
                match connection.is_given_up() {
                    true => self.give_up(key),
                    false => self.queue(key),
                }
            } else if key == GUEST_ENDED {
                // It can be written, at any time.
                self.guest_has_ended |= ready.readable;
            } else if key == UNIX_LISTENER {
                self.callers_wait = true;
            } else if key.host_port == NO_PORT {
                self.serve_other(key.guest_port);
            }
        }
        more
    }

    /// Removes a connection of which the guest has not heard.
    fn give_up(&mut self, key: Key) {
        if self.connections.remove(&key).is_some_and(|connection| connection.queued) {
            self.turns.retain(|waiting| *waiting != key);
        }
    }

    /// Whether the guest has ended, and all that is left is to [`end`](Self::end) too.
    pub(super) fn guest_has_ended(&self) -> bool {
        self.guest_has_ended
    }

    /// The same, without a look at the sockets.
    pub(super) fn sees_end(&self) -> bool {
        let mut ended = [PollFd::new(&self.ended, PollFlags::IN)];
        rustix::event::poll(&mut ended, Some(&Timespec::default())).is_ok_and(|ready| ready > 0)
    }

    /// Whether there is something for the guest.
    pub(super) fn has_packets(&self) -> bool {
        !(self.resets.is_empty() && self.turns.is_empty())
    }

    /// Whether the guest's packets have to wait until it has taken some of ours. A connection that
    /// is closed before its turn leaves it behind, to be found out when it comes.
    pub(super) fn is_congested(&self) -> bool {
        let live = self.connections.len();
        self.resets.len() >= MAX_RESETS || self.turns.len() >= live + MAX_RESETS
    }

    /// Writes the next packet for the guest; returns its length, or `None` where there is none
    /// after all.
    pub(super) fn next_packet(&mut self, buffer: GuestBytes<'_>) -> Option<u32> {
        // A buffer that has no room for a header is of no use, and goes back.
        let Some((head, body)) = buffer.split_at(HEADER_BYTES as u64) else { return Some(0) };
        let header = self.resets.pop_front().or_else(|| self.next_turn(&body))?;
        header.write(&head);
        self.metrics.packets_to_guest += 1;
        self.metrics.bytes_to_guest += u64::from(header.len);
        Some(HEADER_BYTES as u32 + header.len)
    }

    fn next_turn(&mut self, body: &GuestBytes<'_>) -> Option<Header> {
        while let Some(key) = self.turns.pop_front() {
            let Some(connection) = self.connections.get_mut(&key) else { continue };
            connection.queued = false;
            match connection.next_packet(body) {
                Step::Packet(header) => {
                    self.queue(key);
                    return Some(header);
                }
                Step::Last(header) => {
                    if header.op() == Some(Op::Rst) {
                        self.metrics.reset += 1;
                    }
                    self.connections.remove(&key);
                    return Some(header);
                }
                Step::Over => drop(self.connections.remove(&key)),
                Step::Nothing => {}
            }
        }
        None
    }

    /// Takes a packet of the guest.
    pub(super) fn take_packet(&mut self, packet: GuestBytes<'_>) {
        self.metrics.packets_from_guest += 1;
        let Some((head, body)) = packet.split_at(HEADER_BYTES as u64) else { return };
        let header = Header::read(&head);
        if (header.src_cid, header.dst_cid) != (self.guest_cid, HOST_CID) {
            return;
        }
        let key = header.key();
        let op = header.op();
        let Some((body, _)) = body.split_at(header.len.into()) else { return self.reset(&header) };
        if header.kind != TYPE_STREAM {
            // The connection of these ports, if there is one, is another.
            return self.answer_rst(&header);
        }
        let Some(connection) = self.connections.get_mut(&key) else {
            match op {
                Some(Op::Request) => self.request(&header),
                // The answer to our last packet.
                Some(Op::Rst) => {}
                _ => self.answer_rst(&header),
            }
            return;
        };
        connection.update_credit(&header);
        let sound = match op {
            Some(Op::Response) => connection.accept().is_ok(),
            Some(Op::Rw) => {
                let bytes = body.len();
                let sent = connection.send(body).is_ok();
                self.metrics.bytes_from_guest += if sent { bytes } else { 0 };
                sent
            }
            Some(Op::CreditRequest) => {
                connection.owe_credit();
                true
            }
            Some(Op::CreditUpdate) => true,
            Some(Op::Shutdown) => {
                if !connection.shut(header.flags) {
                    self.answer_rst(&header);
                    return self.close(key);
                }
                true
            }
            Some(Op::Rst) => {
                match connection.is_requested() {
                    true => self.metrics.refused += 1,
                    false => self.metrics.reset += 1,
                }
                return self.close(key);
            }
            Some(Op::Request) | None => false,
        };
        match sound {
            true => self.queue(key),
            false => self.reset(&header),
        }
    }

    /// The guest wants a connection to a port of the host.
    fn request(&mut self, header: &Header) {
        let socket = match self.has_room() {
            true => self.arrive(header.key()),
            false => None,
        };
        let Some(socket) = socket else {
            self.metrics.refused += 1;
            return self.answer_rst(header);
        };
        let connection = Connection::from_guest(self.guest_cid, header, socket);
        if self.insert(header.key(), connection).is_err() {
            self.metrics.refused += 1;
            return self.answer_rst(header);
        }
        self.metrics.opened_by_guest += 1;
        // Its answer goes before the data of others: Linux waits for it for two seconds.
        if let Some(connection) = self.connections.get_mut(&header.key()) {
            connection.queued = true;
            self.turns.push_front(header.key());
        }
    }

    /// The device's end of a connection to a port of the host, where somebody takes the other.
    fn arrive(&self, from: Key) -> Option<UnixStream> {
        let port = from.host_port;
        match self.listeners.get(&port) {
            Some(listener) if listener.has_room() => {
                let (device, host) = pair().ok()?;
                listener.push(host, from.guest_port);
                Some(device)
            }
            Some(_) => None,
            None if port == NO_PORT => None,
            None => self.unix.as_ref()?.connect(port),
        }
    }

    /// The host wants a connection to the guest, which is asked in a turn. Returns the host's end.
    pub(super) fn open(&mut self, guest_port: u32) -> Result<UnixStream, OpenError> {
        if self.max_connections == 0 {
            return Err(OpenError::Over);
        }
        if !self.has_room() {
            return Err(OpenError::TooMany);
        }
        let (device, host) = pair().map_err(OpenError::Socket)?;
        self.open_with(device, guest_port, Greeting::Byte).map_err(OpenError::Socket)?;
        Ok(host)
    }

    fn open_with(&mut self, socket: UnixStream, port: u32, greeting: Greeting) -> io::Result<()> {
        // There are far fewer connections than ports.
        let key = loop {
            self.last_port = match self.last_port {
                FIRST_PORT..LAST_PORT => self.last_port + 1,
                _ => FIRST_PORT,
            };
            let key = Key { host_port: self.last_port, guest_port: port };
            if !self.connections.contains_key(&key) {
                break key;
            }
        };
        let connection = Connection::to_guest(self.guest_cid, key, socket, greeting);
        self.insert(key, connection)?;
        self.metrics.opened_by_host += 1;
        Ok(())
    }

    /// Connections to a port of the host go to `listener` from now on. False where they go to
    /// another one.
    pub(super) fn listen(&mut self, port: u32, listener: &Arc<Backlog>) -> bool {
        if self.max_connections == 0 {
            listener.close();
            return true;
        }
        let free = !self.listeners.contains_key(&port);
        if free {
            self.listeners.insert(port, Arc::clone(listener));
        }
        free
    }

    /// Ends what [`listen`](Self::listen) began.
    pub(super) fn unlisten(&mut self, port: u32) {
        self.listeners.remove(&port);
    }

    /// Forgets every connection that the guest has heard of.
    pub(super) fn forget(&mut self) {
        let heard: Vec<Key> =
            self.connections.iter().filter(|(_, c)| c.is_asked()).map(|(key, _)| *key).collect();
        for key in heard {
            self.metrics.reset += 1;
            self.close(key);
        }
        self.resets.clear();
    }

    /// Ends all connections, and nobody will come any more. What the host has not read, it still
    /// may, for as long as the device is there.
    pub(super) fn end(&mut self) {
        // A device that is configured allows at least one.
        self.max_connections = 0;
        for (_, listener) in self.listeners.drain() {
            listener.close();
        }
        // A host that still waits for the guest's answer gets none.
        self.connections.retain(|_, connection| !connection.is_requested());
        let keys: Vec<Key> = self.connections.keys().copied().collect();
        keys.into_iter().for_each(|key| self.close(key));
        self.turns.clear();
        self.resets.clear();
        self.unix = None;
    }

    /// Ends it all at once: the host's ends see the end of what is in their sockets.
    pub(super) fn shut_down(&mut self) {
        self.end();
        self.rests.clear();
        self.socket_file = None;
    }

    fn has_room(&self) -> bool {
        let callers = self.unix.as_ref().map_or(0, UnixPath::callers);
        self.connections.len() + self.rests.len() + callers < self.max_connections
    }

    fn insert(&mut self, key: Key, connection: Connection) -> io::Result<()> {
        self.sockets.watch(connection.socket(), key)?;
        self.connections.insert(key, connection);
        Ok(())
    }

    fn queue(&mut self, key: Key) {
        if let Some(connection) = self.connections.get_mut(&key)
            && !std::mem::replace(&mut connection.queued, true)
        {
            self.turns.push_back(key);
        }
    }

    /// A packet that makes no sense resets its connection.
    fn reset(&mut self, header: &Header) {
        if self.connections.contains_key(&header.key()) {
            self.metrics.reset += 1;
            self.close(header.key());
        }
        self.answer_rst(header);
    }

    /// RST, but not for RST.
    fn answer_rst(&mut self, header: &Header) {
        if header.op() != Some(Op::Rst) {
            let reset = Header::to_guest(self.guest_cid, header.key(), Op::Rst);
            self.resets.push_back(Header { kind: header.kind, ..reset });
        }
    }

    /// Removes a connection; what the host has not read yet, it still may.
    fn close(&mut self, key: Key) {
        let Some(connection) = self.connections.remove(&key) else { return };
        connection.refuse();
        let Some(rest) = connection.into_rest() else { return };
        let id = self.free_id();
        if self.sockets.watch_anew(&rest.socket, key_of(id)).is_ok() {
            self.rests.insert(id, rest);
        }
    }

    /// A number that no caller and no rest has.
    fn free_id(&mut self) -> u32 {
        loop {
            self.next_id = if self.next_id >= NO_PORT - 2 { 0 } else { self.next_id + 1 };
            let taken = self.unix.as_ref().is_some_and(|unix| unix.has(self.next_id));
            if !taken && !self.rests.contains_key(&self.next_id) {
                return self.next_id;
            }
        }
    }

    /// A caller or a rest is ready.
    fn serve_other(&mut self, id: u32) {
        if let Some(rest) = self.rests.get_mut(&id) {
            if !rest.flush() {
                self.rests.remove(&id);
            }
            return;
        }
        let Some(unix) = self.unix.as_mut().filter(|unix| unix.has(id)) else { return };
        if let Call::Port(port, socket) = unix.read(id)
            && port != NO_PORT
        {
            // Watched as a caller so far; to be added anew, it has to be taken out.
            self.sockets.forget(&socket);
            let _ = self.open_with(socket, port, Greeting::Line);
        }
    }

    /// Lets those in who connected to the UNIX socket. True where there may be more of them.
    fn accept_callers(&mut self) -> bool {
        for _ in 0..MAX_CALLERS {
            let Some(accepted) = self.unix.as_ref().map(UnixPath::accept) else { return false };
            let Ok(socket) = accepted.inspect_err(|error| {
                // Without a descriptor left it is tried again when the device wakes.
                self.callers_wait = error.kind() != io::ErrorKind::WouldBlock;
            }) else {
                return false;
            };
            let id = self.free_id();
            let room = self.has_room();
            let Some(unix) = self.unix.as_mut().filter(|unix| room && unix.has_room()) else {
                continue;
            };
            if self.sockets.watch(&socket, key_of(id)).is_ok() {
                unix.add(id, socket);
            }
        }
        // The others in the next turn.
        self.callers_wait = true;
        true
    }
}

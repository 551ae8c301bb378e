//! The sockets of a device, watched edge-triggered by one descriptor.
//!
//! Source: epoll(7). A socket is watched until it is closed, for input, output and its end.

use std::io;
use std::os::fd::{AsFd, OwnedFd};
use std::os::unix::net::UnixStream;

use rustix::event::Timespec;
use rustix::event::epoll::{self, EventFlags};

use super::packet::Key;

/// Events that are looked at in one turn.
const MAX_EVENTS: usize = 256;

const WATCHED: EventFlags =
    EventFlags::IN.union(EventFlags::OUT).union(EventFlags::RDHUP).union(EventFlags::ET);

/// What an event says of a socket.
#[derive(Clone, Copy, Debug)]
pub(super) struct Ready {
    /// There is something to read, if only the end.
    pub(super) readable: bool,
    /// No more will come.
    pub(super) ended: bool,
    /// The other end is closed, or both directions are shut.
    pub(super) hung_up: bool,
}

/// The watched sockets, each with a key.
#[derive(Debug)]
pub(super) struct Sockets {
    epoll: OwnedFd,
}

impl Sockets {
    pub(super) fn new() -> io::Result<Self> {
        Ok(Self { epoll: epoll::create(epoll::CreateFlags::CLOEXEC)? })
    }

    /// Another handle of the descriptor that is ready when one of them is.
    pub(super) fn descriptor(&self) -> io::Result<OwnedFd> {
        self.epoll.try_clone()
    }

    /// Watches a socket. One that is ready already makes an event.
    pub(super) fn watch(&self, socket: impl AsFd, key: Key) -> io::Result<()> {
        Ok(epoll::add(&self.epoll, socket, pack(key), WATCHED)?)
    }

    /// Watches a socket that is watched by another key, or once more for what is ready already.
    pub(super) fn watch_anew(&self, socket: impl AsFd, key: Key) -> io::Result<()> {
        Ok(epoll::modify(&self.epoll, socket, pack(key), WATCHED)?)
    }

    /// Watches it no more.
    pub(super) fn forget(&self, socket: impl AsFd) {
        let _ = epoll::delete(&self.epoll, socket);
    }

    /// What became ready, and whether there may be more.
    pub(super) fn poll(&self) -> (impl Iterator<Item = (Key, Ready)> + use<>, bool) {
        let mut events = Vec::with_capacity(MAX_EVENTS);
        let now = Timespec { tv_sec: 0, tv_nsec: 0 };
        let buffer = rustix::buffer::spare_capacity(&mut events);
        // An error is an interruption: the events are still there.
        let more = epoll::wait(&self.epoll, buffer, Some(&now)).map_or(true, |n| n == MAX_EVENTS);
        let ended = EventFlags::RDHUP | EventFlags::HUP | EventFlags::ERR;
        let read = move |event: epoll::Event| {
            let flags = event.flags;
            let ready = Ready {
                readable: flags.intersects(ended | EventFlags::IN),
                ended: flags.intersects(ended),
                hung_up: flags.contains(EventFlags::HUP),
            };
            (unpack(event.data), ready)
        };
        (events.into_iter().map(read), more)
    }
}

/// A socket pair of which the first end never waits.
pub(super) fn pair() -> io::Result<(UnixStream, UnixStream)> {
    let (device, host) = UnixStream::pair()?;
    device.set_nonblocking(true)?;
    Ok((device, host))
}

fn pack(key: Key) -> epoll::EventData {
    epoll::EventData::new_u64(u64::from(key.host_port) << 32 | u64::from(key.guest_port))
}

fn unpack(data: epoll::EventData) -> Key {
    let data = data.u64();
    Key { host_port: (data >> 32) as u32, guest_port: data as u32 }
}

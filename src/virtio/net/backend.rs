//! What is at the other end of the cable: a tap, or a stream of frames.

use std::io;
use std::os::fd::{AsFd, OwnedFd};

use super::header::{HEADER_BYTES, OFFLOADS, offloads};
use super::moved::{Moved, Room};
use super::passt::{Passt, PasstError};
use super::stream::Stream;
use crate::config::UserNetwork;
use crate::memory::GuestBytes;
use crate::tap::{Carrier, Tap};

/// The other end.
#[derive(Debug)]
pub(crate) enum Backend {
    /// The kernel: it reads and writes virtio's header itself.
    Tap(Tap),
    /// A program or another VM.
    Stream(Stream),
    /// A child process of ours, which ends with this.
    Passt(Stream, Passt),
    /// The VM is over.
    Nothing,
}

impl Backend {
    /// A user-mode network for a guest.
    pub(crate) fn passt(network: &UserNetwork, mtu: Option<u16>) -> Result<Self, PasstError> {
        let (stream, process) = Passt::start(network, mtu)?;
        Ok(Self::Passt(stream, process))
    }

    /// What wakes the device.
    pub(super) fn source(&self) -> io::Result<OwnedFd> {
        match self {
            Self::Tap(tap) => tap.try_clone(),
            Self::Stream(stream) | Self::Passt(stream, _) => stream.try_clone(),
            Self::Nothing => Err(io::ErrorKind::NotConnected.into()),
        }
    }

    /// Feature bits of the device that are up to the other end.
    pub(super) fn features(&self) -> u64 {
        match self {
            Self::Tap(_) => OFFLOADS,
            Self::Stream(_) | Self::Passt(..) | Self::Nothing => 0,
        }
    }

    /// The driver has chosen its features.
    pub(super) fn activate(&self, features: u64) {
        if let Self::Tap(tap) = self
            && let Err(error) = tap.set_offloads(offloads(features))
        {
            // It offered them, so it is gone; the next frame will find that out.
            tracing::debug!(%error, "a tap takes no offloads");
        }
    }

    /// Whether frames can pass.
    pub(super) fn is_up(&self) -> bool {
        match self {
            Self::Tap(tap) => tap.carrier() == Carrier::Up,
            Self::Stream(stream) | Self::Passt(stream, _) => stream.is_open(),
            Self::Nothing => false,
        }
    }

    /// How much room the next frame takes with its header, at most. None where there is no frame.
    ///
    /// # Errors
    ///
    /// As [`receive`](Self::receive).
    pub(super) fn next(&mut self) -> io::Result<Option<Room>> {
        let known = |bytes: Option<u64>| bytes.map(Room::Known);
        match self {
            Self::Tap(_) => Ok(Some(Room::Unknown)),
            Self::Stream(stream) => stream.next().map(known),
            Self::Passt(stream, process) => stream.next().map(known).inspect_err(|_| process.end()),
            Self::Nothing => Ok(None),
        }
    }

    /// Receives a frame with its header into `space`; one that is larger is dropped.
    ///
    /// # Errors
    ///
    /// No more can come: the link is down.
    pub(super) fn receive(&mut self, space: &GuestBytes<'_>) -> io::Result<Moved> {
        match self {
            Self::Tap(tap) => receive_from_tap(tap, space),
            Self::Stream(stream) | Self::Passt(stream, _) => Ok(stream.receive(space)),
            Self::Nothing => Ok(Moved::Nothing),
        }
    }

    /// Sends a frame, which has its header before it.
    ///
    /// # Errors
    ///
    /// The frame is dropped, and no other can pass: the link is down.
    pub(super) fn send(&mut self, packet: GuestBytes<'_>) -> io::Result<Moved> {
        match self {
            Self::Tap(tap) => send_to_tap(tap, &packet),
            Self::Stream(stream) => stream.send(packet),
            Self::Passt(stream, process) => stream.send(packet).inspect_err(|_| process.end()),
            Self::Nothing => Ok(Moved::Dropped),
        }
    }

    /// Sends what is left of a frame that was taken in part. False where some of it still is.
    ///
    /// # Errors
    ///
    /// No frame can pass: the link is down.
    pub(super) fn flush(&mut self) -> io::Result<bool> {
        match self {
            Self::Tap(_) => Ok(true),
            Self::Stream(stream) => stream.flush(),
            Self::Passt(stream, process) => stream.flush().inspect_err(|_| process.end()),
            Self::Nothing => Ok(true),
        }
    }
}

fn receive_from_tap(tap: &Tap, space: &GuestBytes<'_>) -> io::Result<Moved> {
    // The kernel wants room for its header at least, and says no word of what it cut off.
    let mut spare = [0; HEADER_BYTES as usize];
    match space.read_frame(tap.as_fd(), &mut spare) {
        Ok(len) if len as u64 > space.len() || (len as u64) < HEADER_BYTES => Ok(Moved::Dropped),
        Ok(len) => Ok(Moved::Frame(len as u64)),
        Err(error) if error.kind() == io::ErrorKind::WouldBlock => Ok(Moved::Nothing),
        Err(error) => Err(error),
    }
}

fn send_to_tap(tap: &Tap, packet: &GuestBytes<'_>) -> io::Result<Moved> {
    match packet.write_frame(tap.as_fd()) {
        Ok(len) => Ok(Moved::Frame(len as u64)),
        Err(error) => match error.raw_os_error() {
            Some(libc::EAGAIN) => Ok(Moved::Nothing),
            // The interface is down, or gone.
            Some(libc::EIO | libc::EBADFD | libc::EBADF | libc::ENODEV) => Err(error),
            // The kernel does not like the frame: its header is nonsense, or there is no memory.
            _ => Ok(Moved::Dropped),
        },
    }
}

//! Frames over a stream socket, each after its length in four bytes, big-endian.
//!
//! The same as QEMU's stream back end and passt speak. The other side is not trusted: a length
//! that no frame has ends the connection.

use std::io::{self, Read};
use std::net::Shutdown;
use std::os::fd::{AsFd, OwnedFd};
use std::os::unix::net::UnixStream;
use std::sync::Arc;

use super::header::{HEADER_BYTES, MAX_FRAME_BYTES, MIN_FRAME_BYTES};
use super::moved::Moved;
use crate::config::{Cable, CableRest};
use crate::memory::GuestBytes;

const PREFIX_BYTES: usize = 4;
/// Room for some small frames, or for the largest one and the beginning of the next.
const BUFFER_BYTES: usize = 128 << 10;
/// Frames up to here are gathered and sent together: a copy costs less than a system call each.
const SMALL_BYTES: u64 = 4096;
const GATHERED_BYTES: usize = 64 << 10;

/// One end of the stream.
#[derive(Debug)]
pub(crate) struct Stream {
    socket: UnixStream,
    is_open: bool,
    /// What was read and is not yet the guest's: `received[begin..end]`.
    received: Vec<u8>,
    begin: usize,
    end: usize,
    /// Small frames of this turn, or what the socket did not take of those before.
    unsent: Vec<u8>,
    /// Where what is left goes when this ends, as in a VM that goes to sleep.
    cable: Option<Arc<Cable>>,
}

impl Stream {
    /// Takes a socket, which becomes non-blocking.
    pub(crate) fn new(socket: UnixStream) -> io::Result<Self> {
        socket.set_nonblocking(true)?;
        let (received, unsent) = (Vec::new(), Vec::new());
        Ok(Self { socket, is_open: true, received, begin: 0, end: 0, unsent, cable: None })
    }

    /// As [`new`](Self::new), which goes on where the last one ended.
    pub(crate) fn on(cable: &Arc<Cable>) -> io::Result<Self> {
        let mut stream = Self::new(cable.socket.try_clone()?)?;
        let CableRest { received, unsent } = cable.take();
        let (end, cable) = (received.len(), Some(Arc::clone(cable)));
        (stream.received, stream.end) = (received, end);
        (stream.unsent, stream.cable) = (unsent, cable);
        Ok(stream)
    }

    pub(super) fn try_clone(&self) -> io::Result<OwnedFd> {
        Ok(self.socket.try_clone()?.into())
    }

    pub(super) fn is_open(&self) -> bool {
        self.is_open
    }

    /// How much room the next frame takes with its header, if it is there as a whole.
    pub(super) fn next(&mut self) -> io::Result<Option<u64>> {
        let next = self.read_frame();
        self.ended(next)
    }

    /// Gives the next frame, a header before it.
    pub(super) fn receive(&mut self, space: &GuestBytes<'_>) -> Moved {
        let Ok(Some((at, len))) = self.frame() else { return Moved::Nothing };
        self.begin = at + len;
        let bytes = HEADER_BYTES + len as u64;
        if (len as u64) < MIN_FRAME_BYTES || bytes > space.len() {
            return Moved::Dropped;
        }
        // The frame is finished; num_buffers is up to whoever knows it.
        space.copy_from(&[0; HEADER_BYTES as usize]);
        let frame = self.received.get(at..at + len).unwrap_or_default();
        space.copy_from_at(HEADER_BYTES as usize, frame);
        Moved::Frame(bytes)
    }

    pub(super) fn send(&mut self, packet: GuestBytes<'_>) -> io::Result<Moved> {
        let sent = self.send_frame(packet);
        self.ended(sent)
    }

    pub(super) fn flush(&mut self) -> io::Result<bool> {
        let flushed = self.send_rest();
        self.ended(flushed)
    }

    /// An error is the end of the connection, for the other side too.
    fn ended<T>(&mut self, result: io::Result<T>) -> io::Result<T> {
        if result.is_err() {
            self.is_open = false;
            self.unsent = Vec::new();
            // Whoever made the socket may keep it open.
            let _ = self.socket.shutdown(Shutdown::Both);
        }
        result
    }

    fn read_frame(&mut self) -> io::Result<Option<u64>> {
        loop {
            if let Some((_, len)) = self.frame()? {
                return Ok(Some(HEADER_BYTES + len as u64));
            }
            if !self.read()? {
                return Ok(None);
            }
        }
    }

    /// Where the next frame is, if it is there as a whole.
    fn frame(&self) -> io::Result<Option<(usize, usize)>> {
        let bytes = self.received.get(self.begin..self.end).unwrap_or_default();
        let Some((prefix, rest)) = bytes.split_first_chunk::<PREFIX_BYTES>() else {
            return Ok(None);
        };
        let len = u32::from_be_bytes(*prefix);
        if u64::from(len) > MAX_FRAME_BYTES {
            let reason = format!("a frame of {len} bytes is announced");
            return Err(io::Error::new(io::ErrorKind::InvalidData, reason));
        }
        let len = len as usize;
        Ok((rest.len() >= len).then_some((self.begin + PREFIX_BYTES, len)))
    }

    /// Reads on behind what is there. False where there is no more for now.
    fn read(&mut self) -> io::Result<bool> {
        // A guest that never had traffic costs no buffer.
        self.received.resize(BUFFER_BYTES, 0);
        self.received.copy_within(self.begin..self.end, 0);
        self.end -= self.begin;
        self.begin = 0;
        let room = self.received.get_mut(self.end..).unwrap_or_default();
        match self.socket.read(room) {
            Ok(0) => Err(io::ErrorKind::UnexpectedEof.into()),
            Ok(read) => {
                self.end += read;
                Ok(true)
            }
            Err(error) if error.kind() == io::ErrorKind::WouldBlock => Ok(false),
            Err(error) if error.kind() == io::ErrorKind::Interrupted => Ok(true),
            Err(error) => Err(error),
        }
    }

    fn send_frame(&mut self, packet: GuestBytes<'_>) -> io::Result<Moved> {
        let Some((_, frame)) = packet.split_at(HEADER_BYTES) else { return Ok(Moved::Dropped) };
        let len = frame.len();
        let prefix = (len as u32).to_be_bytes();
        let is_small = len <= SMALL_BYTES;
        if (!is_small || self.unsent.len() >= GATHERED_BYTES) && !self.send_rest()? {
            return Ok(Moved::Nothing);
        }
        if is_small {
            self.gather(&prefix, &frame);
            return Ok(Moved::Frame(HEADER_BYTES + len));
        }
        let sent = match frame.send_frame(self.socket.as_fd(), &prefix) {
            Ok(sent) => sent,
            Err(error) if error.kind() == io::ErrorKind::WouldBlock => return Ok(Moved::Nothing),
            Err(error) if error.kind() == io::ErrorKind::InvalidInput => return Ok(Moved::Dropped),
            Err(error) => return Err(error),
        };
        let whole = PREFIX_BYTES + len as usize;
        if sent < whole {
            // The frame is the socket's now, and the driver's buffer the driver's again.
            self.gather(&prefix, &frame);
            self.unsent.drain(..sent);
        }
        Ok(Moved::Frame(HEADER_BYTES + len))
    }

    /// Takes a copy of a frame, to be sent with the next flush.
    fn gather(&mut self, prefix: &[u8; PREFIX_BYTES], frame: &GuestBytes<'_>) {
        self.unsent.extend(prefix);
        let at = self.unsent.len();
        self.unsent.resize(at + frame.len() as usize, 0);
        frame.copy_to(self.unsent.get_mut(at..).unwrap_or_default());
    }

    /// Sends what was gathered, or left over. False where the socket does not take it all.
    fn send_rest(&mut self) -> io::Result<bool> {
        while !self.unsent.is_empty() {
            match GuestBytes::default().send_frame(self.socket.as_fd(), &self.unsent) {
                Ok(sent) => drop(self.unsent.drain(..sent)),
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => return Ok(false),
                Err(error) => return Err(error),
            }
        }
        Ok(true)
    }
}

impl Drop for Stream {
    /// What comes next is read and written by whoever wakes: the two sides have to agree where a frame begins.
    fn drop(&mut self) {
        let Some(cable) = self.cable.take().filter(|_| self.is_open) else { return };
        let received = self.received.get(self.begin..self.end).unwrap_or_default().to_vec();
        cable.put_back(CableRest { received, unsent: std::mem::take(&mut self.unsent) });
    }
}

//! Frames: a length, a channel, and as many bytes. The header is five bytes: `u32` little-endian, how
//! many bytes follow it, and the channel.

use super::messages::Call;
use super::wire::{Malformed, Wire};

/// The largest message: arguments and environment of a program are the largest that there are.
pub(crate) const MAX_MESSAGE_BYTES: usize = 1 << 20;

/// The largest message on a connection that the guest opens: many may be open that have said nothing yet.
pub(crate) const MAX_OPENING_BYTES: usize = 16 << 10;

/// The most that a failure says of what could not be done.
pub(crate) const MAX_FAILURE_BYTES: usize = 4 << 10;

/// The largest piece of a stream.
pub(crate) const MAX_DATA_BYTES: usize = 64 << 10;

pub(crate) const HEADER_BYTES: usize = 5;

/// What a frame's bytes belong to.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
#[repr(u8)]
pub(crate) enum Channel {
    /// A message.
    Message = 0,
    /// A program's standard input, or the bytes of a file. An empty frame is its end.
    Data = 1,
    /// A program's standard output, and what its terminal shows.
    Stdout = 2,
    /// A program's standard error.
    Stderr = 3,
    /// A [`Call`]. On a connection that had one before, what comes ahead of it on the other
    /// channels is of that one.
    Call = 4,
}

impl Channel {
    fn new(number: u8) -> Option<Self> {
        match number {
            0 => Some(Self::Message),
            1 => Some(Self::Data),
            2 => Some(Self::Stdout),
            3 => Some(Self::Stderr),
            4 => Some(Self::Call),
            _ => None,
        }
    }

    fn max_bytes(self) -> usize {
        match self {
            Self::Message | Self::Call => MAX_MESSAGE_BYTES,
            Self::Data | Self::Stdout | Self::Stderr => MAX_DATA_BYTES,
        }
    }
}

/// A frame that came.
#[derive(Debug, PartialEq, Eq)]
pub(crate) struct Frame<'a> {
    pub(crate) channel: Channel,
    pub(crate) bytes: &'a [u8],
}

impl Frame<'_> {
    /// What a header announces: the channel, and how many bytes follow.
    pub(crate) fn parse_header(header: [u8; HEADER_BYTES]) -> Result<(Channel, usize), Malformed> {
        let [a, b, c, d, channel] = header;
        let length = u32::from_le_bytes([a, b, c, d]) as usize;
        let channel = Channel::new(channel).ok_or(Malformed { what: "a channel", at: 4 })?;
        match length > channel.max_bytes() {
            true => Err(Malformed { what: "a frame of a bounded length", at: 0 }),
            false => Ok((channel, length)),
        }
    }

    /// The header of a frame of as many bytes as these; the other side refuses more than the channel takes.
    pub(crate) fn header(channel: Channel, bytes: usize) -> [u8; HEADER_BYTES] {
        let [a, b, c, d] = (bytes as u32).to_le_bytes();
        [a, b, c, d, channel as u8]
    }

    /// A message in its frame.
    pub(crate) fn message(message: &impl Wire) -> Vec<u8> {
        Self::of(Channel::Message, message)
    }

    /// A call in its frame.
    pub(crate) fn call(call: &Call) -> Vec<u8> {
        Self::of(Channel::Call, call)
    }

    fn of(channel: Channel, message: &impl Wire) -> Vec<u8> {
        let mut out = vec![0; HEADER_BYTES];
        message.encode(&mut out);
        let header = Self::header(channel, out.len() - HEADER_BYTES);
        out[..HEADER_BYTES].copy_from_slice(&header);
        out
    }

    /// The message that it is.
    pub(crate) fn parse<T: Wire>(&self) -> Result<T, Malformed> {
        match self.channel {
            Channel::Message => T::from_bytes(self.bytes),
            _ => Err(Malformed { what: "a message", at: 0 }),
        }
    }

    /// The call that it is.
    pub(crate) fn parse_call(&self) -> Result<Call, Malformed> {
        match self.channel {
            Channel::Call => Call::from_bytes(self.bytes),
            _ => Err(Malformed { what: "a call", at: 0 }),
        }
    }
}

/// Finds the frames in what comes, in whatever pieces it comes. Keeps one frame at most, and what was read
/// with it.
#[derive(Debug, Default)]
pub(crate) struct Decoder {
    bytes: Vec<u8>,
    /// Bytes of the frames that were given out.
    used: usize,
}

impl Decoder {
    /// Takes bytes that came.
    pub(crate) fn feed(&mut self, bytes: &[u8]) {
        self.bytes.drain(..self.used);
        self.used = 0;
        self.bytes.extend_from_slice(bytes);
    }

    /// The next frame, if all of it has come.
    pub(crate) fn next(&mut self) -> Result<Option<Frame<'_>>, Malformed> {
        let rest = self.bytes.get(self.used..).unwrap_or_default();
        let Some((header, rest)) = rest.split_first_chunk::<HEADER_BYTES>() else {
            return Ok(None);
        };
        let (channel, length) = Frame::parse_header(*header)?;
        let Some(bytes) = rest.get(..length) else {
            return Ok(None);
        };
        self.used += HEADER_BYTES + length;
        Ok(Some(Frame { channel, bytes }))
    }

    /// Whether it ends between two frames.
    pub(crate) fn is_empty(&self) -> bool {
        self.used == self.bytes.len()
    }

    /// What came behind the last frame: a connection that goes on without frames begins with it.
    pub(crate) fn into_rest(mut self) -> Vec<u8> {
        self.bytes.drain(..self.used);
        self.bytes
    }
}

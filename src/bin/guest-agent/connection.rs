//! A connection of a call: frames in and out, for calls that wait for what they read and write.

use std::io::{self, Read, Write};
use std::os::unix::net::UnixStream;

use crate::protocol::{
    Call, Channel, Failure, Frame, HEADER_BYTES, MAX_DATA_BYTES, Malformed, Reply, Wire,
};

/// How much is written at once.
const OUTGOING_BYTES: usize = HEADER_BYTES + MAX_DATA_BYTES;

/// Buffers of this size are kept while nothing is to be done.
const SMALL_BYTES: usize = 4 << 10;

pub(crate) struct Connection {
    stream: UnixStream,
    /// What was read of it already.
    unread: Vec<u8>,
    incoming: Vec<u8>,
    outgoing: Vec<u8>,
}

impl Connection {
    pub(crate) fn new(stream: UnixStream) -> Self {
        Self::with_unread(stream, Vec::new())
    }

    /// A stream of which this was read, and not looked at.
    pub(crate) fn with_unread(stream: UnixStream, unread: Vec<u8>) -> Self {
        Self { stream, unread, incoming: Vec::new(), outgoing: Vec::new() }
    }

    /// The stream. Nothing was read of it beyond the last frame.
    pub(crate) fn into_stream(self) -> UnixStream {
        self.stream
    }

    /// The next frame.
    pub(crate) fn receive(&mut self) -> io::Result<Frame<'_>> {
        let mut header = [0; HEADER_BYTES];
        fill(&mut header, &mut self.unread, &mut self.stream)?;
        let (channel, length) = Frame::parse_header(header).map_err(invalid)?;
        self.incoming.resize(length, 0);
        fill(&mut self.incoming, &mut self.unread, &mut self.stream)?;
        Ok(Frame { channel, bytes: &self.incoming })
    }

    /// The next frame, which has to be a message.
    pub(crate) fn receive_message<T: Wire>(&mut self) -> io::Result<T> {
        self.receive()?.parse().map_err(invalid)
    }

    /// What the connection is for.
    pub(crate) fn receive_call(&mut self) -> io::Result<Call> {
        self.receive()?.parse_call().map_err(invalid)
    }

    /// The next call, when one is over, whenever that comes.
    pub(crate) fn receive_next_call(&mut self) -> io::Result<Call> {
        for buffer in [&mut self.incoming, &mut self.outgoing] {
            buffer.clear();
            buffer.shrink_to(SMALL_BYTES);
        }
        loop {
            let frame = self.receive()?;
            // The rest is of the call before, from a host that did not know yet of its end.
            if frame.channel == Channel::Call {
                return frame.parse_call().map_err(invalid);
            }
        }
    }

    /// Takes a message to write, with others or by [`flush`](Self::flush).
    pub(crate) fn queue(&mut self, message: &impl Wire) -> io::Result<()> {
        let frame = Frame::message(message);
        self.queue_bytes(&frame)
    }

    /// Takes the end of a stream to write.
    pub(crate) fn queue_end(&mut self) -> io::Result<()> {
        self.queue_bytes(&Frame::header(Channel::Data, 0))
    }

    fn queue_bytes(&mut self, bytes: &[u8]) -> io::Result<()> {
        if self.outgoing.len() + bytes.len() > OUTGOING_BYTES {
            self.flush()?;
        }
        self.outgoing.extend_from_slice(bytes);
        Ok(())
    }

    /// Takes a piece of a stream to write, of at most so many bytes, as `read` reads it; without a frame
    /// where that reads nothing. The outer error is the connection's, the inner one that of `read`.
    pub(crate) fn queue_data(
        &mut self,
        max: usize,
        read: impl FnOnce(&mut [u8]) -> io::Result<usize>,
    ) -> io::Result<io::Result<usize>> {
        // A small rest of the space would make a small frame.
        if self.outgoing.len() + HEADER_BYTES + max.min(MAX_DATA_BYTES) > OUTGOING_BYTES {
            self.flush()?;
        }
        let begin = self.outgoing.len();
        let data = begin + HEADER_BYTES;
        self.outgoing.resize(data + max.min(MAX_DATA_BYTES), 0);
        let result = read(&mut self.outgoing[data..]);
        match result {
            Ok(count) if count > 0 => {
                self.outgoing.truncate(data + count);
                self.outgoing[begin..data].copy_from_slice(&Frame::header(Channel::Data, count));
            }
            _ => self.outgoing.truncate(begin),
        }
        Ok(result)
    }

    /// Writes what was taken.
    pub(crate) fn flush(&mut self) -> io::Result<()> {
        self.stream.write_all(&self.outgoing)?;
        self.outgoing.clear();
        Ok(())
    }

    /// Writes a message, and what was taken before it.
    pub(crate) fn send(&mut self, message: &impl Wire) -> io::Result<()> {
        self.queue(message)?;
        self.flush()
    }

    /// Writes whether something could be done.
    pub(crate) fn answer(&mut self, result: Result<(), Failure>) -> io::Result<()> {
        self.send(&match result {
            Ok(()) => Reply::Done,
            Err(failure) => Reply::Failed(failure),
        })
    }
}

/// Reads so many bytes, first of what was read already.
fn fill(bytes: &mut [u8], unread: &mut Vec<u8>, stream: &mut UnixStream) -> io::Result<()> {
    let count = unread.len().min(bytes.len());
    let (first, rest) = bytes.split_at_mut(count);
    first.copy_from_slice(&unread[..count]);
    unread.drain(..count);
    stream.read_exact(rest)
}

pub(crate) fn invalid(malformed: Malformed) -> io::Error {
    io::Error::new(io::ErrorKind::InvalidData, malformed)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::protocol::{Call, FailureKind};

    #[test]
    fn messages_and_data_come_in_order_whatever_their_sizes() {
        let (a, b) = UnixStream::pair().unwrap();
        let (mut a, mut b) = (Connection::new(a), Connection::new(b));
        let writer = std::thread::spawn(move || {
            for size in [1, 70_000, 100, MAX_DATA_BYTES] {
                a.queue(&Call::Freeze).unwrap();
                let fill = |bytes: &mut [u8]| {
                    bytes.fill(7);
                    Ok(bytes.len())
                };
                a.queue_data(size, fill).unwrap().unwrap();
                assert_eq!(a.queue_data(size, |_| Ok(0)).unwrap().unwrap(), 0);
            }
            a.queue_end().unwrap();
            a.answer(Err(Failure::new(FailureKind::Other, "x"))).unwrap();
        });
        for size in [1, MAX_DATA_BYTES, 100, MAX_DATA_BYTES] {
            assert_eq!(b.receive_message::<Call>().unwrap(), Call::Freeze);
            let frame = b.receive().unwrap();
            assert_eq!((frame.channel, frame.bytes), (Channel::Data, &vec![7; size][..]));
        }
        assert!(b.receive().unwrap().bytes.is_empty());
        assert!(matches!(b.receive_message::<Reply>().unwrap(), Reply::Failed(_)));
        writer.join().unwrap();
        b.receive().unwrap_err();
    }

    #[test]
    fn what_was_read_already_comes_first_and_what_is_left_of_a_call_is_not_the_next() {
        let (mut a, b) = UnixStream::pair().unwrap();
        let late = [
            &Frame::header(Channel::Data, 3)[..],
            b"abc",
            &Frame::message(&Call::Shutdown(0)),
            &Frame::header(Channel::Data, 0),
            &Frame::call(&Call::Thaw),
            &Frame::call(&Call::Freeze),
        ]
        .concat();
        for at in 0..late.len() {
            let stream = b.try_clone().unwrap();
            let mut connection = Connection::with_unread(stream, late[..at].to_vec());
            a.write_all(&late[at..]).unwrap();
            assert_eq!(connection.receive_next_call().unwrap(), Call::Thaw);
            assert_eq!(connection.receive_call().unwrap(), Call::Freeze);
        }
    }

    #[test]
    fn what_is_no_frame_is_an_error() {
        let (mut a, b) = UnixStream::pair().unwrap();
        a.write_all(&[255; 64]).unwrap();
        let mut b = Connection::new(b);
        assert_eq!(b.receive().unwrap_err().kind(), io::ErrorKind::InvalidData);
    }
}

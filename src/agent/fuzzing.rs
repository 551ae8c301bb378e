//! What the fuzz target `agent_frame` does with the host's reader of frames, and a test with some bytes.

#![allow(clippy::panic, reason = "what a fuzz target finds is a panic")]
#![cfg_attr(not(fuzzing), expect(unreachable_pub, reason = "fuzz targets reach it"))]

use std::io;
use std::pin::Pin;
use std::task::{Context, Poll, Waker};

use tokio::io::{AsyncRead, ReadBuf};

use super::connection::{FrameReader, Piece, ReadError};
use crate::protocol::Decoder;

/// Bytes that come in pieces. The host, which waits for them, finds the frames that the decoder finds, and stumbles where
/// that does.
pub fn agent_reader(bytes: &[u8]) {
    let size = bytes.first().map_or(1, |first| usize::from(*first) + 1);
    let mut pieces = bytes.chunks(size);
    let mut decoder = Decoder::default();
    let mut reader = FrameReader::new(Pieces { bytes, size, left: 0 });
    loop {
        let expected = loop {
            match decoder.next() {
                Err(malformed) => break Err(malformed),
                Ok(Some(frame)) => break Ok(Some((frame.channel, frame.bytes.to_vec()))),
                Ok(None) => {}
            }
            match pieces.next() {
                Some(piece) => decoder.feed(piece),
                None => break Ok(None),
            }
        };
        match (next(&mut reader), expected) {
            (Ok(Some(read)), Ok(Some(frame))) => assert_eq!(read, frame),
            (Ok(None), Ok(None)) => return assert!(decoder.is_empty()),
            (Err(ReadError::Ended), Ok(None)) => return assert!(!decoder.is_empty()),
            (Err(ReadError::Malformed(read)), Err(expected)) => return assert_eq!(read, expected),
            (read, expected) => panic!("{read:?} where the decoder has {expected:?}"),
        }
    }
}

fn next(reader: &mut FrameReader<Pieces<'_>>) -> Result<Option<Piece>, ReadError> {
    let mut context = Context::from_waker(Waker::noop());
    loop {
        if let Poll::Ready(read) = reader.poll_next(&mut context) {
            return read;
        }
    }
}

/// Bytes that come a piece at a time, and are waited for between two.
struct Pieces<'a> {
    bytes: &'a [u8],
    size: usize,
    /// Of the piece that is there.
    left: usize,
}

impl AsyncRead for Pieces<'_> {
    fn poll_read(
        mut self: Pin<&mut Self>,
        _context: &mut Context<'_>,
        buffer: &mut ReadBuf<'_>,
    ) -> Poll<io::Result<()>> {
        if self.left == 0 && !self.bytes.is_empty() {
            self.left = self.size.min(self.bytes.len());
            return Poll::Pending;
        }
        let (now, rest) = self.bytes.split_at(self.left.min(buffer.remaining()));
        buffer.put_slice(now);
        self.bytes = rest;
        self.left -= now.len();
        Poll::Ready(Ok(()))
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;
    use crate::protocol::{Channel, Frame, Reply};

    proptest! {
        #[test]
        fn the_hosts_reader_and_the_decoder_find_the_same_frames(
            size in any::<u8>(),
            lengths in prop::collection::vec((0u8..6, 0usize..2000), 0..8),
            rest in prop::collection::vec(any::<u8>(), 0..40),
            cut in 0usize..40,
        ) {
            // The first byte, which is a length's, chooses the pieces.
            let channels = [Channel::Message, Channel::Data, Channel::Stdout, Channel::Stderr, Channel::Call];
            let mut bytes = [&Frame::header(Channel::Data, size.into())[..], &vec![7; size.into()]].concat();
            for (channel, length) in lengths {
                match channels.get(usize::from(channel)) {
                    Some(&channel) => {
                        bytes.extend(Frame::header(channel, length));
                        bytes.extend(vec![channel as u8; length]);
                    }
                    None => bytes.extend(Frame::message(&Reply::Done)),
                }
            }
            bytes.extend(&rest);
            bytes.truncate(bytes.len().saturating_sub(cut));
            agent_reader(&bytes);
            agent_reader(&rest);
        }
    }
}

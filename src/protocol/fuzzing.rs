//! The way in for the fuzz target `agent_frame`: what either side reads of the other.

#![allow(clippy::expect_used, clippy::panic, reason = "what a fuzz target finds is a panic")]

use super::*;

/// Bytes that come in pieces, as frames, and each message as all that it could be: what is read is
/// the same when it is written and read again, and nothing is kept beyond a frame.
pub fn agent_frame(bytes: &[u8]) {
    let mut decoder = Decoder::default();
    let piece = bytes.first().map_or(1, |first| usize::from(*first) + 1);
    for piece in bytes.chunks(piece) {
        decoder.feed(piece);
        loop {
            match decoder.next() {
                Ok(Some(frame)) if matches!(frame.channel, Channel::Message | Channel::Call) => {
                    messages(frame.bytes);
                }
                Ok(Some(frame)) => assert!(frame.bytes.len() <= MAX_DATA_BYTES),
                Ok(None) => break,
                Err(_) => return,
            }
        }
    }
    messages(bytes);
}

fn messages(bytes: &[u8]) {
    same::<Opening>(bytes);
    same::<Call>(bytes);
    same::<Line>(bytes);
    same::<Control>(bytes);
    same::<Reply>(bytes);
    same::<Node>(bytes);
    same::<Setup>(bytes);
    same::<Welcome>(bytes);
}

fn same<T: Wire + PartialEq + std::fmt::Debug>(bytes: &[u8]) {
    if let Ok(message) = T::from_bytes(bytes) {
        let again = T::from_bytes(&message.to_bytes()).expect("what was read can be read again");
        // A greeting of another version is known by that alone.
        assert_eq!(again.to_bytes(), message.to_bytes());
    }
}

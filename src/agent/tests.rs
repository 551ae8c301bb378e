//! What a hostile guest may say, and trees there and back, over socket pairs: no VM.

use std::io::{Read, Write};
use std::os::unix::net::UnixStream as StdStream;

use tokio::net::UnixStream;

use super::connection::{Connection, ReadError};
use crate::protocol::{Call, Channel, Frame, MAX_DATA_BYTES, Reply};

fn pair() -> (Connection, StdStream) {
    let (ours, theirs) = UnixStream::pair().unwrap();
    let theirs = theirs.into_std().unwrap();
    theirs.set_nonblocking(false).unwrap();
    (Connection::new(ours), theirs)
}

#[tokio::test]
async fn frames_come_whole_whoever_stops_waiting_in_the_middle() {
    let (mut connection, mut agent) = pair();
    let mut bytes = Frame::message(&Reply::Done);
    bytes.extend(Frame::header(Channel::Stdout, 3));
    bytes.extend(b"abc");
    for byte in bytes {
        let waiting = tokio::time::timeout(std::time::Duration::ZERO, connection.reader.next());
        assert!(waiting.await.is_err());
        agent.write_all(&[byte]).unwrap();
        if agent.peer_addr().is_err() {
            return;
        }
        tokio::task::yield_now().await;
        // A frame that is whole is taken at once.
        if let Ok(frame) =
            tokio::time::timeout(std::time::Duration::from_millis(1), connection.reader.next())
                .await
        {
            let (channel, bytes) = frame.unwrap().unwrap();
            match channel {
                Channel::Message => assert_eq!(bytes, [0]),
                _ => assert_eq!((channel, &bytes[..]), (Channel::Stdout, &b"abc"[..])),
            }
        }
    }
    drop(agent);
    assert!(connection.reader.next().await.unwrap().is_none());
}

#[tokio::test]
async fn absurd_lengths_unknown_channels_and_cut_off_frames_are_errors() {
    for header in [[255, 255, 255, 255, 0], [1, 0, 1, 0, 2], [0, 0, 0, 0, 9]] {
        let (mut connection, mut agent) = pair();
        agent.write_all(&header).unwrap();
        assert!(matches!(connection.reader.next().await, Err(ReadError::Malformed(_))));
    }
    let (mut connection, mut agent) = pair();
    agent.write_all(&Frame::header(Channel::Data, MAX_DATA_BYTES)).unwrap();
    agent.write_all(b"not all").unwrap();
    drop(agent);
    assert!(matches!(connection.reader.next().await, Err(ReadError::Io(_))));
}

#[tokio::test]
async fn what_follows_the_frames_is_left_for_whoever_wants_bytes() {
    let (mut connection, mut agent) = pair();
    agent.write_all(&Frame::message(&Reply::Done)).unwrap();
    agent.write_all(b"bytes").unwrap();
    connection.writer.message(&Call::Freeze).await.unwrap();
    let reply: Reply = connection.reader.message().await.unwrap().unwrap();
    assert_eq!(reply, Reply::Done);
    let stream = connection.into_stream().unwrap().into_std().unwrap();
    stream.set_nonblocking(false).unwrap();
    let mut five = [0; 5];
    (&stream).read_exact(&mut five).unwrap();
    assert_eq!(&five, b"bytes");
}

//! A host for tests: the other side of a call, over a pair of UNIX sockets.

use std::io::Write;
use std::os::unix::ffi::OsStrExt;
use std::os::unix::net::UnixStream;
use std::path::Path;
use std::time::Duration;

use crate::connection::Connection;
use crate::protocol::{
    Bytes, Call, Channel, Entry, Exec, Failure, FileKind, Frame, Node, Program, Reply, Stat, Wire,
};
use crate::{calls, threads};

/// Long enough for a busy machine; only a failing test waits for it.
const PATIENCE: Duration = Duration::from_secs(60);

/// A connection on which nothing was said yet.
pub(crate) fn dial() -> UnixStream {
    let (ours, theirs) = UnixStream::pair().unwrap();
    ours.set_read_timeout(Some(PATIENCE)).unwrap();
    ours.set_write_timeout(Some(PATIENCE)).unwrap();
    threads::spawn(move || {
        let _ = calls::serve(Connection::new(theirs));
    })
    .unwrap();
    ours
}

pub(crate) fn dial_with(call: &Call) -> UnixStream {
    let mut stream = dial();
    stream.write_all(&Frame::call(call)).unwrap();
    stream
}

pub(crate) fn call(call: &Call) -> Connection {
    Connection::new(dial_with(call))
}

/// The one answer to a call.
pub(crate) fn ask(asked: &Call) -> Reply {
    call(asked).receive_message().unwrap()
}

pub(crate) fn failure(reply: Reply) -> Failure {
    match reply {
        Reply::Failed(failure) => failure,
        other => panic!("{other:?}"),
    }
}

pub(crate) fn bytes(path: impl AsRef<Path>) -> Bytes {
    Bytes::from(path.as_ref().as_os_str().as_bytes())
}

pub(crate) fn program(argv: &[&str]) -> Program {
    Program {
        argv: argv.iter().copied().map(Bytes::from).collect(),
        env: vec![(Bytes::from("PATH"), Bytes::from("/usr/bin:/bin"))],
        home: false,
        cwd: None,
        user: None,
    }
}

pub(crate) fn exec(argv: &[&str]) -> Exec {
    Exec { program: program(argv), stdin: false, terminal: None, timeout_ms: None }
}

pub(crate) fn entry(name: &str, kind: FileKind, mode: u32) -> Entry {
    let stat = Stat { kind, mode, uid: 0, gid: 0, size: 0, modified_ns: 1_000_000_007_000_000_009 };
    Entry { name: Bytes::from(name), stat }
}

pub(crate) fn data(connection: &mut Connection, bytes: &[u8]) {
    for piece in bytes.chunks(60_000) {
        connection
            .queue_data(piece.len(), |out| {
                out.copy_from_slice(piece);
                Ok(piece.len())
            })
            .unwrap()
            .unwrap();
    }
}

/// The bytes of a stream, up to its empty frame.
pub(crate) fn read_data(connection: &mut Connection) -> Vec<u8> {
    let mut all = Vec::new();
    loop {
        let frame = connection.receive().unwrap();
        assert_eq!(frame.channel, Channel::Data);
        if frame.bytes.is_empty() {
            return all;
        }
        all.extend_from_slice(frame.bytes);
    }
}

/// A node of a tree, or a piece of a file in it.
#[derive(Debug, PartialEq, Eq)]
pub(crate) enum Piece {
    Node(Node),
    Data(Vec<u8>),
}

pub(crate) fn read_tree(connection: &mut Connection) -> Vec<Piece> {
    let mut pieces = Vec::new();
    loop {
        let frame = connection.receive().unwrap();
        if frame.channel == Channel::Data {
            pieces.push(Piece::Data(frame.bytes.to_vec()));
            continue;
        }
        let node = Node::from_bytes(frame.bytes).unwrap();
        let is_last = matches!(node, Node::End | Node::Failed(_));
        pieces.push(Piece::Node(node));
        if is_last {
            return pieces;
        }
    }
}

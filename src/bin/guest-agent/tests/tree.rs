use std::fs;
use std::io::{Seek, SeekFrom, Write};
use std::os::unix::fs::{MetadataExt, PermissionsExt, symlink};
use std::path::Path;

use crate::connection::Connection;
use crate::host::{Piece, bytes, call, data, entry, failure, read_tree};
use crate::protocol::{Bytes, Call, Channel, FailureKind, FileKind, Frame, Node, Reply, Symlink};
use crate::scratch::Scratch;

fn copy_out(path: &Path) -> Vec<Piece> {
    let mut connection = call(&Call::CopyOut(bytes(path)));
    assert_eq!(connection.receive_message::<Reply>().unwrap(), Reply::Done);
    let pieces = read_tree(&mut connection);
    // Nothing is behind it: the next call is answered.
    let mut stream = connection.into_stream();
    stream.write_all(&Frame::call(&Call::Thaw)).unwrap();
    assert_eq!(Connection::new(stream).receive_message::<Reply>().unwrap(), Reply::Done);
    pieces
}

fn begin_copy_in(path: &Path) -> Connection {
    let mut connection = call(&Call::CopyIn(bytes(path)));
    assert_eq!(connection.receive_message::<Reply>().unwrap(), Reply::Done);
    connection
}

fn send(connection: &mut Connection, pieces: &[Piece]) {
    for piece in pieces {
        match piece {
            Piece::Node(node) => connection.queue(node).unwrap(),
            Piece::Data(bytes) if bytes.is_empty() => connection.queue_end().unwrap(),
            Piece::Data(bytes) => data(connection, bytes),
        }
    }
    connection.flush().unwrap();
}

fn copy_in(path: &Path, pieces: &[Piece]) -> Reply {
    let mut connection = begin_copy_in(path);
    send(&mut connection, pieces);
    connection.receive_message().unwrap()
}

fn directory(name: &str) -> Piece {
    Piece::Node(Node::Directory(entry(name, FileKind::Directory, 0o755)))
}

fn file(name: &str, text: &[u8]) -> [Piece; 3] {
    let node = Node::File(entry(name, FileKind::File, 0o644));
    [Piece::Node(node), Piece::Data(text.to_vec()), Piece::Data(Vec::new())]
}

fn link(name: &str, target: &str) -> Piece {
    let entry = entry(name, FileKind::Symlink, 0o777);
    Piece::Node(Node::Symlink(Symlink { entry, target: Bytes::from(target) }))
}

const LEAVE: Piece = Piece::Node(Node::Leave);
const END: Piece = Piece::Node(Node::End);

#[test]
fn a_tree_that_is_copied_out_and_in_again_is_the_same() {
    let dir = Scratch::new();
    let from = dir.path("from");
    fs::create_dir_all(from.join("sub/empty")).unwrap();
    fs::write(from.join("large"), (0..200_000).map(|at| at as u8).collect::<Vec<_>>()).unwrap();
    fs::write(from.join("none"), "").unwrap();
    fs::write(from.join("sub/set"), "x").unwrap();
    fs::set_permissions(from.join("sub/set"), fs::Permissions::from_mode(0o4711)).unwrap();
    fs::set_permissions(from.join("sub"), fs::Permissions::from_mode(0o500)).unwrap();
    symlink("../nowhere", from.join("link")).unwrap();
    let mut sparse = fs::File::create(from.join("sparse")).unwrap();
    sparse.seek(SeekFrom::Start(1 << 20)).unwrap();
    sparse.write_all(b"middle").unwrap();
    sparse.set_len(3 << 20).unwrap();
    drop(sparse);

    let pieces = copy_out(&from);
    let to = dir.path("to");
    assert_eq!(copy_in(&to, &pieces), Reply::Done);
    for name in ["", "large", "none", "sub", "sub/set", "sub/empty", "link", "sparse"] {
        let [old, new] = [&from, &to].map(|root| fs::symlink_metadata(root.join(name)).unwrap());
        let facts = |m: &fs::Metadata| (m.mode(), m.uid(), m.gid(), m.mtime(), m.mtime_nsec());
        assert_eq!(facts(&old), facts(&new), "{name}");
    }
    for name in ["large", "none", "sparse", "sub/set"] {
        assert!(fs::read(from.join(name)).unwrap() == fs::read(to.join(name)).unwrap(), "{name}");
    }
    assert_eq!(fs::read_link(to.join("link")).unwrap(), Path::new("../nowhere"));
    // Holes came as such, and became such.
    let holes = pieces.iter().filter(|piece| matches!(piece, Piece::Node(Node::Hole(_))));
    assert_eq!(holes.count(), 2);
    assert!(fs::metadata(to.join("sparse")).unwrap().blocks() < 2048);
    // Copied again it comes out the same, whatever the order of the names is.
    assert_eq!(copy_out(&to).len(), pieces.len());
    fs::set_permissions(from.join("sub"), fs::Permissions::from_mode(0o700)).unwrap();
    fs::set_permissions(to.join("sub"), fs::Permissions::from_mode(0o700)).unwrap();
}

#[test]
fn the_root_of_a_tree_may_be_a_file_or_lie_behind_a_link() {
    let dir = Scratch::new();
    fs::write(dir.path("file"), "text").unwrap();
    symlink("file", dir.path("link")).unwrap();
    for name in ["file", "link"] {
        let pieces = copy_out(&dir.path(name));
        assert!(matches!(&pieces[0], Piece::Node(Node::File(entry)) if entry.name.0.is_empty()));
        assert_eq!(pieces[1..], [Piece::Data(b"text".to_vec()), Piece::Data(Vec::new()), END]);
    }
    let [node, text, end] = file("", b"new");
    assert_eq!(copy_in(&dir.path("link"), &[node, text, end, END]), Reply::Done);
    assert_eq!(fs::read(dir.path("file")).unwrap(), b"new");
    let gone = call(&Call::CopyOut(bytes(dir.path("gone")))).receive_message().unwrap();
    assert_eq!(failure(gone).kind, FailureKind::NotFound);
    let gone = call(&Call::CopyIn(bytes(dir.path("no/where")))).receive_message().unwrap();
    assert_eq!(failure(gone).kind, FailureKind::NotFound);
}

#[test]
fn a_slash_behind_a_link_changes_nothing_and_a_pipe_is_not_waited_for() {
    let dir = Scratch::new();
    fs::create_dir(dir.path("d")).unwrap();
    symlink("d/", dir.path("link")).unwrap();
    for name in ["link", "link/", "link/.", "d/"] {
        let pieces = copy_out(&dir.path(name));
        assert!(matches!(pieces[..], [Piece::Node(Node::Directory(_)), LEAVE, END]), "{name}");
    }
    let made = std::process::Command::new("mkfifo").arg(dir.path("pipe")).status().unwrap();
    assert!(made.success());
    for asked in [Call::List(bytes(dir.path("pipe"))), Call::CopyOut(bytes(dir.path("pipe/x")))] {
        let answer = call(&asked).receive_message().unwrap();
        assert!(failure(answer).errno == 20, "it is no directory");
    }
}

#[test]
fn what_is_neither_file_nor_directory_nor_link_is_left_out() {
    let dir = Scratch::new();
    fs::create_dir(dir.path("d")).unwrap();
    let _socket = std::os::unix::net::UnixListener::bind(dir.path("d/socket")).unwrap();
    let pieces = copy_out(&dir.path("d"));
    assert!(matches!(pieces[..], [Piece::Node(Node::Directory(_)), LEAVE, END]), "{pieces:?}");
}

#[test]
fn files_that_are_there_are_replaced_and_directories_kept() {
    let dir = Scratch::new();
    let root = dir.path("root");
    fs::create_dir_all(root.join("d")).unwrap();
    fs::set_permissions(&root, fs::Permissions::from_mode(0o711)).unwrap();
    fs::write(root.join("d/other"), "stays").unwrap();
    fs::write(root.join("d/file"), "old").unwrap();
    symlink("other", root.join("d/link")).unwrap();
    let mut pieces = vec![directory(""), directory("d")];
    pieces.extend(file("file", b"new"));
    pieces.extend(file("link", b"no link"));
    pieces.extend([LEAVE, link("l", "d"), LEAVE, END]);
    assert_eq!(copy_in(&root, &pieces), Reply::Done);
    let read = |name: &str| String::from_utf8(fs::read(root.join(name)).unwrap()).unwrap();
    assert_eq!([read("d/file"), read("d/other"), read("d/link")], ["new", "stays", "no link"]);
    assert_eq!(fs::metadata(&root).unwrap().mode() & 0o7777, 0o711);
    assert_eq!(fs::read_link(root.join("l")).unwrap(), Path::new("d"));
    // Once more: a link is replaced too.
    assert_eq!(copy_in(&root, &pieces), Reply::Done);
}

#[test]
fn a_tree_does_not_leave_the_directory_that_it_is_copied_to() {
    let dir = Scratch::new();
    fs::create_dir(dir.path("outside")).unwrap();
    fs::create_dir(dir.path("in")).unwrap();
    symlink("../outside", dir.path("in/d")).unwrap();
    let mut pieces = vec![directory(""), directory("d")];
    pieces.extend(file("escaped", b"x"));
    pieces.extend([LEAVE, LEAVE, END]);
    assert_eq!(failure(copy_in(&dir.path("in"), &pieces)).errno, 20);
    for name in ["..", ".", "", "a/b", "/etc", "a\0b"] {
        let [node, text, end] = file(name, b"x");
        let pieces = [directory(""), node, text, end, LEAVE, END];
        let failure = failure(copy_in(&dir.path("in"), &pieces));
        assert_eq!(failure.kind, FailureKind::Invalid, "{name:?}");
    }
    assert_eq!(fs::read_dir(dir.path("outside")).unwrap().count(), 0);
    assert_eq!(fs::read_dir(dir.path("in")).unwrap().count(), 1);
}

#[test]
fn a_tree_that_is_cut_off_is_answered_and_leaves_no_half_file() {
    let dir = Scratch::new();
    let [node, text, end] = file("a", b"half");
    let root = || dir.path("root");
    let broken = failure(copy_in(&root(), &[directory(""), node, text, END]));
    assert_eq!(broken.kind, FailureKind::Invalid);
    assert_eq!(failure(copy_in(&root(), &[directory(""), END])).kind, FailureKind::Invalid);
    let said = crate::protocol::Failure::new(FailureKind::Permission, "read a");
    let nodes = [directory(""), Piece::Node(Node::Failed(said.clone()))];
    assert_eq!(failure(copy_in(&root(), &nodes)), said);
    // What is no tree ends the connection.
    for pieces in [vec![LEAVE], vec![directory("name")], vec![directory(""), end]] {
        let mut connection = begin_copy_in(&root());
        send(&mut connection, &pieces);
        connection.receive().unwrap_err();
    }
    let mut connection = begin_copy_in(&root());
    let [node, text, _] = file("a", b"half");
    send(&mut connection, &[directory(""), node, text]);
    let mut stream = connection.into_stream();
    stream.write_all(&Frame::header(Channel::Stderr, 0)).unwrap();
    let mut connection = Connection::new(stream);
    connection.receive().unwrap_err();
    assert_eq!(fs::read_dir(root()).unwrap().count(), 0);
}

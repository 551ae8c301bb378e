//! Connections by a UNIX socket's path.

use std::io::{BufRead, BufReader, Read, Write};
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::{Path, PathBuf};

use vmm_sys_util::tempdir::TempDir;

use super::*;

/// A path for a socket, in a directory that goes with the test.
fn place() -> (TempDir, PathBuf) {
    let dir = TempDir::new().unwrap();
    let path = dir.as_path().join("socket");
    (dir, path)
}

fn guest(path: &Path) -> (RawGuest, DeviceHandle<virtio::Vsock>) {
    let (transport, handle, _) = device(&VsockConfig::default().unix_socket(path));
    (RawGuest::new(transport), handle)
}

#[test]
fn another_program_connects_by_the_path_and_reads_ok() {
    let (_dir, path) = place();
    let (mut guest, handle) = guest(&path);
    let mut stream = UnixStream::connect(&path).unwrap();
    // What follows the line at once is the guest's.
    stream.write_all(b"CONN").unwrap();
    stream.write_all(b"ECT 52\nhello").unwrap();
    let request = guest.expect(REQUEST);
    assert_eq!(request.dst_port, 52);
    guest.send(&Packet::of_guest(52, request.src_port, RESPONSE));
    let packet = until(|| guest.try_receive().filter(|packet| packet.op == RW));
    assert_eq!(packet.body, b"hello");
    guest.send(&Packet::data(52, request.src_port, b"hi"));
    guest.send(&Packet { flags: 3, ..Packet::of_guest(52, request.src_port, SHUTDOWN) });
    let mut lines = BufReader::new(stream);
    let mut line = String::new();
    lines.read_line(&mut line).unwrap();
    assert_eq!(line, format!("OK {}\n", request.src_port));
    line.clear();
    lines.read_to_string(&mut line).unwrap();
    assert_eq!(line, "hi");
    assert_eq!(metrics(&handle).opened_by_host, 1);

    drop((guest, handle));
    assert!(!path.exists(), "the socket is left behind");
}

#[test]
fn the_path_goes_with_the_device_also_after_the_guests_own_end() {
    let (_dir, path) = place();
    let (_transport, handle, _, exit) =
        device_and_latch(&VsockConfig::default().unix_socket(&path));
    exit.report(crate::exit::ExitStatus::PoweredOff);
    until(|| UnixStream::connect(&path).err());
    assert!(path.exists(), "the device thread may not remove it");
    handle.close();
    assert!(!path.exists(), "the socket is left behind");
}

#[test]
fn callers_who_are_refused_or_talk_nonsense_are_closed() {
    let (_dir, path) = place();
    let (mut guest, _handle) = guest(&path);
    let mut stream = UnixStream::connect(&path).unwrap();
    stream.write_all(b"CONNECT 52\n").unwrap();
    let request = guest.expect(REQUEST);
    guest.send(&Packet::of_guest(52, request.src_port, RST));
    assert_eq!(stream.read(&mut [0; 8]).unwrap(), 0);
    for line in ["\n", "connect me\n", "CONNECT 4294967295\n", "CONNECT -1\n", "CONNECT +1\n"] {
        let mut stream = UnixStream::connect(&path).unwrap();
        stream.write_all(line.as_bytes()).unwrap();
        assert_eq!(stream.read(&mut [0; 8]).unwrap(), 0, "{line}");
    }
    let mut stream = UnixStream::connect(&path).unwrap();
    let _ = stream.write_all(&[b'x'; 19]);
    assert_eq!(stream.read(&mut [0; 8]).unwrap(), 0);
    // Those who say nothing hold up the others for as long as they are there.
    let silent: Vec<_> = (0..64).map(|_| UnixStream::connect(&path).unwrap()).collect();
    let mut late = UnixStream::connect(&path).unwrap();
    assert_eq!(late.read(&mut [0; 8]).unwrap(), 0);
    drop(silent);
    until(|| {
        let mut stream = UnixStream::connect(&path).unwrap();
        stream.write_all(b"CONNECT 53\n").ok()?;
        guest.try_receive().filter(|packet| packet.dst_port == 53)
    });
}

#[test]
fn a_guest_reaches_who_listens_beside_the_path() {
    let (_dir, path) = place();
    let (mut guest, handle) = guest(&path);
    let beside = PathBuf::from(format!("{}_77", path.display()));
    guest.send(&Packet::of_guest(1, 77, REQUEST));
    guest.expect(RST);
    let listener = UnixListener::bind(&beside).unwrap();
    guest.connect(1, 77);
    let (mut stream, _) = listener.accept().unwrap();
    guest.send(&Packet::data(1, 77, b"hello"));
    let mut text = [0; 5];
    stream.read_exact(&mut text).unwrap();
    stream.write_all(b"hi").unwrap();
    assert_eq!(guest.expect(RW).body, b"hi");
    // A listener who accepts nobody is no reason to wait.
    rustix::net::listen(&listener, 1).unwrap();
    let mut refused = 0;
    for port in 2..20 {
        guest.send(&Packet::of_guest(port, 77, REQUEST));
        refused += u32::from(guest.receive().op == RST);
    }
    assert!(refused >= 10, "{refused}");
    assert_eq!(metrics(&handle).refused, u64::from(refused) + 1);
}

#[test]
fn a_path_where_something_is_already_is_refused_and_left_alone() {
    let (_dir, path) = place();
    std::fs::write(&path, "mine").unwrap();
    let ended = ExitLatch::default().descriptor().unwrap();
    virtio::Vsock::new(&VsockConfig::default().unix_socket(&path), ended).unwrap_err();
    assert_eq!(std::fs::read_to_string(&path).unwrap(), "mine");
}

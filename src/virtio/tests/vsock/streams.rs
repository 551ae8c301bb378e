//! Connections as a driver of others makes them.

use std::collections::HashMap;
use std::io::{Read, Write};
use std::net::Shutdown;
use std::os::fd::{AsFd, BorrowedFd};
use std::thread;

use rustix::event::{PollFd, PollFlags};
use virtio_drivers::device::socket::{
    DisconnectReason, SocketError, VirtIOSocket, VsockAddr, VsockConnectionManager, VsockEvent,
    VsockEventType,
};

use super::*;
use crate::error::ErrorKind;
use crate::exit::ExitStatus;

type Manager = VsockConnectionManager<TestHal, TestTransport, 4096>;

fn guest() -> (Manager, DeviceHandle<virtio::Vsock>, Vsock) {
    let (transport, handle, vsock) = device(&VsockConfig::default());
    let driver = VirtIOSocket::new(transport).unwrap();
    assert_eq!(driver.guest_cid(), GUEST_CID);
    (VsockConnectionManager::new_with_capacity(driver, 8192), handle, vsock)
}

/// Whether so many bytes were sent; if not, there was no credit for them.
fn send(guest: &mut Manager, peer: VsockAddr, port: u32, bytes: &[u8]) -> bool {
    match guest.send(peer, port, bytes) {
        Ok(()) => true,
        Err(virtio_drivers::Error::SocketDeviceError(
            SocketError::InsufficientBufferSpaceInPeer,
        )) => false,
        Err(error) => panic!("{error}"),
    }
}

/// A guest that sends back what it gets, on every connection, until `count` of them have ended.
fn echo(guest: &mut Manager, count: usize) {
    let mut waiting: HashMap<(u32, u32), Vec<u8>> = HashMap::new();
    let mut ended = 0;
    let mut buffer = vec![0; 8192];
    let begin = Instant::now();
    while ended < count {
        assert!(begin.elapsed() < PATIENCE, "{ended} of {count} connections have ended");
        let event = guest.poll().unwrap();
        if let Some(VsockEvent { source, destination, event_type, .. }) = event {
            let key = (source.port, destination.port);
            match event_type {
                VsockEventType::Received { .. } => {
                    let len = guest.recv(source, destination.port, &mut buffer).unwrap();
                    waiting.entry(key).or_default().extend(&buffer[..len]);
                    guest.update_credit(source, destination.port).unwrap();
                }
                VsockEventType::Disconnected { .. } => ended += 1,
                _ => {}
            }
            continue;
        }
        for ((peer, port), bytes) in waiting.iter_mut().filter(|(_, bytes)| !bytes.is_empty()) {
            let len = bytes.len().min(16 << 10);
            let peer = VsockAddr { cid: VMADDR_CID_HOST, port: *peer };
            if send(guest, peer, *port, &bytes[..len]) {
                bytes.drain(..len);
            }
        }
    }
}

/// Writes noise and reads as much back.
fn exchange(stream: &crate::vsock::VsockStream, seed: u64, len: usize) {
    let sent = noise(seed, len);
    thread::scope(|scope| {
        scope.spawn(|| (&mut &*stream).write_all(&sent).unwrap());
        let mut received = vec![0; len];
        (&mut &*stream).read_exact(&mut received).unwrap();
        assert!(received == sent, "the bytes came back changed");
    });
}

#[test]
fn the_host_connects_and_bytes_go_both_ways_unchanged() {
    let (mut guest, handle, vsock) = guest();
    guest.listen(1234);
    let host = thread::spawn(move || {
        let stream = vsock.connect_timeout(1234, PATIENCE).unwrap();
        exchange(&stream, 1, 400_000);
    });
    echo(&mut guest, 1);
    host.join().unwrap();
    let metrics = metrics(&handle);
    assert_eq!((metrics.opened_by_host, metrics.opened_by_guest), (1, 0));
    assert_eq!((metrics.bytes_to_guest, metrics.bytes_from_guest), (400_000, 400_000));
}

#[test]
fn hundreds_of_connections_at_once_each_get_their_own_bytes() {
    const COUNT: usize = 300;
    raise_the_limit_of_open_files(COUNT);
    let (mut guest, handle, vsock) = guest();
    guest.listen(1234);
    let host = thread::spawn(move || {
        let streams: Vec<_> =
            (0..COUNT).map(|_| vsock.connect_timeout(1234, PATIENCE).unwrap()).collect();
        for (seed, mut stream) in (0..).zip(&streams) {
            stream.write_all(&noise(seed, 6000)).unwrap();
        }
        for (seed, mut stream) in (0..).zip(&streams) {
            let mut received = vec![0; 6000];
            stream.read_exact(&mut received).unwrap();
            assert!(received == noise(seed, 6000), "stream {seed}");
        }
    });
    echo(&mut guest, COUNT);
    host.join().unwrap();
    assert_eq!(metrics(&handle).active, 0);
}

#[test]
fn thousands_of_connections_are_open_at_once_and_none_is_forgotten() {
    const COUNT: usize = 2500;
    raise_the_limit_of_open_files(COUNT);
    let (transport, handle, vsock) = device(&VsockConfig::default());
    let mut guest = RawGuest::new(transport);
    let streams = thread::spawn(move || {
        let connecting: Vec<_> = (0..COUNT).map(|_| vsock.begin_connect(7).unwrap()).collect();
        let streams = connecting.into_iter().map(|one| one.finish_timeout(PATIENCE).unwrap());
        let streams: Vec<_> = streams.collect();
        for (seed, mut stream) in (0..).zip(&streams) {
            stream.write_all(&noise(seed, 20)).unwrap();
        }
        for (seed, mut stream) in (0..).zip(&streams) {
            let mut received = [0; 20];
            stream.read_exact(&mut received).unwrap();
            assert!(received == noise(seed, 20)[..], "stream {seed}");
        }
        streams
    });
    let mut echoed = 0;
    while echoed < COUNT {
        let packet = guest.receive();
        match packet.op {
            REQUEST => guest.send(&Packet::of_guest(7, packet.src_port, RESPONSE)),
            RW => {
                guest.send(&Packet::data(7, packet.src_port, &packet.body));
                echoed += 1;
            }
            _ => {}
        }
    }
    let streams = streams.join().unwrap();
    assert_eq!(metrics(&handle).active, COUNT as u64);
    drop(streams);
    let mut ended = 0;
    while ended < COUNT {
        let packet = guest.receive();
        if packet.op == SHUTDOWN {
            guest.send(&Packet::of_guest(7, packet.src_port, RST));
            ended += 1;
        }
    }
    until(|| (metrics(&handle).active == 0).then_some(()));
}

#[test]
fn connections_with_much_to_say_take_turns() {
    const COUNT: u32 = 20;
    let (transport, handle, vsock) = device(&VsockConfig::default());
    let mut guest = RawGuest::new(transport);
    let listener = vsock.listen(9).unwrap();
    let accept = |port| {
        guest.connect(port, 9);
        listener.accept().unwrap()
    };
    let streams: Vec<_> = (1..=COUNT).map(accept).collect();
    handle.pause();
    for mut stream in &streams {
        stream.write_all(&[5; 40_000]).unwrap();
    }
    handle.resume();
    guest.transport.notify(0);
    // Nine packets each fill the guest's buffers, and a tenth has the rest.
    for _ in 0..9 {
        let mut ports: Vec<u32> = (0..COUNT).map(|_| guest.expect(RW).dst_port).collect();
        ports.sort_unstable();
        assert_eq!(ports, (1..=COUNT).collect::<Vec<_>>());
    }
}

#[test]
fn the_guest_connects_and_is_refused_where_nobody_listens_or_the_backlog_is_full() {
    let (mut guest, handle, vsock) = guest();
    let to = |port| VsockAddr { cid: VMADDR_CID_HOST, port };
    let mut outcome = |port, from| {
        guest.connect(to(port), from).unwrap();
        until(|| guest.poll().unwrap()).event_type
    };
    let reset = VsockEventType::Disconnected { reason: DisconnectReason::Reset };
    assert_eq!(outcome(9, 1), reset);
    let listener = vsock.listen(9).unwrap();
    assert_eq!(listener.port(), 9);
    assert_eq!(vsock.listen(9).unwrap_err().kind(), &ErrorKind::PortInUse);
    assert!(listener.try_accept().unwrap().is_none());
    for from in 0..128 {
        assert_eq!(outcome(9, from), VsockEventType::Connected);
    }
    assert_eq!(outcome(9, 1000), reset);
    let mut stream = listener.accept().unwrap();
    assert_eq!(outcome(9, 1001), VsockEventType::Connected);
    assert_eq!(outcome(9, 1002), reset);

    guest.send(to(9), 0, b"from the first").unwrap();
    let mut text = [0; 14];
    stream.read_exact(&mut text).unwrap();
    assert_eq!(&text, b"from the first");

    // With the listener go those whom nobody accepted.
    drop(listener);
    let mut ended = 0;
    until(|| {
        while let Some(event) = guest.poll().unwrap() {
            ended += usize::from(matches!(event.event_type, VsockEventType::Disconnected { .. }));
        }
        (ended == 128).then_some(())
    });
    guest.connect(to(9), 2000).unwrap();
    assert_eq!(until(|| guest.poll().unwrap()).event_type, reset);
    let metrics = metrics(&handle);
    assert_eq!((metrics.opened_by_guest, metrics.refused, metrics.active), (129, 4, 1));
}

#[test]
fn the_host_is_refused_timed_out_or_told_that_the_vm_is_over() {
    let (mut guest, handle, vsock) = guest();
    let connecting = vsock.begin_connect(1234).unwrap();
    until(|| {
        assert!(guest.poll().unwrap().is_none());
        (metrics(&handle).refused == 1).then_some(())
    });
    let error = connecting.finish().unwrap_err();
    assert_eq!(error.kind(), &ErrorKind::Refused);
    assert!(error.to_string().contains("port 1234"), "{error}");

    let error = vsock.connect_timeout(1234, Duration::from_millis(5)).unwrap_err();
    assert_eq!(error.kind(), &ErrorKind::Timeout);
    assert_eq!(vsock.begin_connect(u32::MAX).unwrap_err().kind(), &ErrorKind::Config);

    let listener = vsock.listen(7).unwrap();
    let connecting = vsock.begin_connect(1).unwrap();
    let waiting = thread::spawn(move || listener.accept().unwrap_err());
    vsock.close();
    let ended = ErrorKind::GuestEnded(ExitStatus::Terminated);
    assert_eq!(connecting.finish().unwrap_err().kind(), &ended);
    assert_eq!(waiting.join().unwrap().kind(), &ended);
    assert_eq!(vsock.begin_connect(1).unwrap_err().kind(), &ended);
    assert_eq!(vsock.listen(1).unwrap().accept().unwrap_err().kind(), &ended);
    drop((guest, handle));
    assert_eq!(vsock.begin_connect(1).unwrap_err().kind(), &ended);
    assert_eq!(vsock.listen(1).unwrap_err().kind(), &ended);
}

#[test]
fn one_connection_too_many_is_refused_on_both_sides() {
    let (transport, handle, vsock) = device(&VsockConfig::default().max_connections(2));
    let mut guest = RawGuest::new(transport);
    let listener = vsock.listen(9).unwrap();
    guest.connect(1, 9);
    guest.connect(2, 9);
    guest.send(&Packet::of_guest(3, 9, REQUEST));
    guest.expect(RST);
    let error = vsock.begin_connect(5).unwrap_err();
    assert_eq!(error.kind(), &ErrorKind::Resources);
    drop(listener.accept().unwrap());
    guest.expect(SHUTDOWN);
    guest.connect(3, 9);
    assert_eq!(metrics(&handle).active, 2);
}

#[test]
fn a_slow_reader_holds_up_the_guest_and_nobody_else() {
    let (transport, handle, vsock) = device(&VsockConfig::default());
    let mut guest = RawGuest::new(transport);
    let listener = vsock.listen(9).unwrap();
    guest.connect(1, 9);
    let slow = listener.accept().unwrap();
    guest.connect(2, 9);
    let quick = listener.accept().unwrap();
    // One floods its host, and the other's packets pass.
    let mut sent = 0;
    for _ in 0..100 {
        if sent < 128 << 10 {
            guest.send(&Packet::data(1, 9, &[7; 8192]));
            sent += 8192;
        }
        guest.send(&Packet::data(2, 9, &[8; 100]));
        (&quick).read_exact(&mut [0; 100]).unwrap();
        while guest.try_receive().is_some() {}
    }
    // One floods its guest, which has no room, and the other's bytes pass.
    let writer = thread::spawn(move || {
        let _ = (&slow).write_all(&vec![9; 4 << 20]);
        slow
    });
    let mut to_slow = 0;
    for round in 0..50u32 {
        (&quick).write_all(&round.to_le_bytes()).unwrap();
        until(|| {
            let packet = guest.try_receive()?;
            if packet.dst_port == 1 {
                to_slow += packet.body.len();
            }
            (packet.dst_port == 2 && packet.op == RW).then_some(())
        });
    }
    until(|| {
        if let Some(packet) = guest.try_receive() {
            to_slow += packet.body.len();
        }
        (to_slow == 1 << 20).then_some(())
    });
    assert_eq!(metrics(&handle).active, 2);
    vsock.close();
    writer.join().unwrap();
}

#[test]
fn nothing_moves_while_the_device_is_paused_and_all_of_it_afterwards() {
    let (transport, handle, vsock) = device(&VsockConfig::default());
    let mut guest = RawGuest::new(transport);
    let listener = vsock.listen(9).unwrap();
    guest.connect(1, 9);
    let stream = listener.accept().unwrap();
    handle.pause();
    (&stream).write_all(b"while paused").unwrap();
    stream.shutdown(Shutdown::Write).unwrap();
    let connecting = vsock.begin_connect(5).unwrap();
    thread::sleep(Duration::from_millis(20));
    assert_eq!(guest.try_receive(), None);
    assert!(handle.resume());
    guest.transport.notify(0);
    let mut ops: Vec<_> = (0..3).map(|_| guest.receive().op).collect();
    ops.sort();
    assert_eq!(ops, [REQUEST, SHUTDOWN, RW]);
    drop(connecting);
    guest.expect(RST);
}

#[test]
fn a_stream_is_a_unix_stream_and_a_handle_keeps_nothing_alive() {
    let (transport, handle, vsock) = device(&VsockConfig::default());
    let mut guest = RawGuest::new(transport);
    let listener = vsock.listen(9).unwrap();
    guest.connect(1, 9);
    let stream = listener.accept().unwrap();
    stream.set_read_timeout(Some(Duration::from_millis(1))).unwrap();
    let error = (&stream).read(&mut [0]).unwrap_err();
    assert_eq!(error.kind(), std::io::ErrorKind::WouldBlock);
    let clone = stream.try_clone().unwrap();
    let mut unix = std::os::unix::net::UnixStream::from(stream);
    unix.write_all(b"a").unwrap();
    drop(unix);
    (&clone).write_all(b"b").unwrap();
    until(|| guest.try_receive().filter(|packet| packet.body.ends_with(b"b")));
    let weak = handle.downgrade();
    drop((guest, handle));
    assert!(weak.upgrade().is_none(), "the device lives on");
    assert_eq!((&clone).read(&mut [0]).unwrap(), 0);
}

#[test]
fn a_guest_that_ends_ends_its_streams_after_its_last_bytes_while_nobody_waits_for_it() {
    let (transport, handle, vsock, exit) = device_and_latch(&VsockConfig::default());
    let mut guest = RawGuest::new(transport);
    let listener = vsock.listen(9).unwrap();
    guest.connect(1, 9);
    let mut stream = listener.accept().unwrap();
    guest.connect(2, 9);
    let connecting = vsock.begin_connect(5).unwrap();
    // More than the socket takes, with the reader yet to come.
    let sent = noise(1, 50 << 10);
    let (mut count, mut taken) = (0, 0);
    while count * sent.len() - taken <= 78 << 10 {
        guest.send(&Packet::data(1, 9, &sent));
        count += 1;
        while let Some(packet) = guest.try_receive() {
            taken = taken.max(if packet.dst_port == 1 { packet.fwd_cnt as usize } else { 0 });
        }
    }
    exit.report(ExitStatus::PoweredOff);
    let mut received = Vec::new();
    stream.read_to_end(&mut received).unwrap();
    assert!(received == sent.repeat(count), "{} of {count} times 50 KiB", received.len());
    assert_eq!((&stream).write(b"?").unwrap_err().kind(), std::io::ErrorKind::BrokenPipe);
    let ended = ErrorKind::GuestEnded(ExitStatus::PoweredOff);
    assert_eq!(connecting.finish().unwrap_err().kind(), &ended);
    // Who came before the end is still there, and nobody after it.
    assert_eq!(listener.accept().unwrap().read(&mut [0]).unwrap(), 0);
    assert_eq!(listener.accept().unwrap_err().kind(), &ended);
    assert_eq!(vsock.connect(5).unwrap_err().kind(), &ended);
    assert_eq!(metrics(&handle).active, 0);
}

#[test]
fn a_guest_that_ends_without_a_driver_wakes_all_that_wait_for_it() {
    let (_transport, _handle, vsock, exit) = device_and_latch(&VsockConfig::default());
    let listener = vsock.listen(9).unwrap();
    let connecting = vsock.begin_connect(5).unwrap();
    let wakes = |fd: BorrowedFd<'_>| {
        let patience = rustix::event::Timespec { tv_sec: PATIENCE.as_secs() as i64, tv_nsec: 0 };
        let mut fds = [PollFd::from_borrowed_fd(fd, PollFlags::IN)];
        rustix::event::poll(&mut fds, Some(&patience)).unwrap() == 1
    };
    exit.report(ExitStatus::PoweredOff);
    // By their descriptors alone, as an event loop sees them.
    assert!(wakes(listener.as_fd()) && wakes(connecting.as_fd()));
    let ended = ErrorKind::GuestEnded(ExitStatus::PoweredOff);
    assert_eq!(listener.try_accept().unwrap_err().kind(), &ended);
    assert_eq!(connecting.finish().unwrap_err().kind(), &ended);
}

//! What packets that break the rules, and connections that end in every way, come to.

use std::io::{ErrorKind as Io, Read, Write};
use std::net::Shutdown;
use std::time::Duration;

use vm_memory::{Bytes, GuestAddress};

use super::super::driver::ram;
use super::*;
use crate::error::ErrorKind;

fn guest() -> (RawGuest, DeviceHandle<virtio::Vsock>, Vsock) {
    let (transport, handle, vsock) = device(&VsockConfig::default());
    (RawGuest::new(transport), handle, vsock)
}

#[test]
fn the_guest_reads_its_cid() {
    let (guest, ..) = guest();
    assert_eq!((guest.transport.read(0x100), guest.transport.read(0x104)), (3, 0));
}

#[test]
fn packets_that_are_nobodys_are_answered_with_rst_or_not_at_all() {
    let (mut guest, handle, _vsock) = guest();
    let sound = Packet::of_guest(7, 9, REQUEST);
    // No answer: they are not the guest's, or not to the host, or RST, or no packet.
    guest.send(&Packet { src_cid: 4, ..sound.clone() });
    guest.send(&Packet { src_cid: 2, ..sound.clone() });
    guest.send(&Packet { dst_cid: 3, ..sound.clone() });
    guest.send(&Packet { dst_cid: u64::MAX, ..sound.clone() });
    guest.send(&Packet { op: RST, ..sound.clone() });
    guest.send(&Packet { op: RST, kind: 77, ..sound.clone() });
    guest.send_raw(&[&[0xff; 43]]);
    guest.send_raw(&[&[1]]);
    assert_eq!(guest.try_receive(), None);

    let refused = [
        sound.clone(),
        Packet { dst_port: u32::MAX, ..sound.clone() },
        Packet { kind: 2, ..sound.clone() },
        Packet { kind: 0, ..sound.clone() },
        Packet { op: 0, ..sound.clone() },
        Packet { op: 8, ..sound.clone() },
        Packet { op: u16::MAX, ..sound.clone() },
        Packet { len: 1, ..sound.clone() },
        Packet { len: u32::MAX, ..sound.clone() },
        Packet { op: RESPONSE, ..sound.clone() },
        Packet { op: SHUTDOWN, flags: 3, ..sound.clone() },
        Packet { op: CREDIT_UPDATE, ..sound.clone() },
        Packet { op: CREDIT_REQUEST, ..sound.clone() },
        Packet::data(7, 9, b"hello"),
    ];
    for packet in &refused {
        guest.send(packet);
        let answer = guest.expect(RST);
        assert_eq!((answer.src_cid, answer.dst_cid), (2, GUEST_CID));
        assert_eq!((answer.src_port, answer.dst_port), (packet.dst_port, 7));
        assert_eq!((answer.kind, answer.len), (packet.kind, 0));
    }
    assert_eq!(guest.try_receive(), None);
    assert!(!guest.needs_reset());
    assert_eq!(metrics(&handle).active, 0);
}

#[test]
fn a_connection_that_breaks_the_rules_is_reset_and_its_neighbour_is_not() {
    let (mut guest, handle, vsock) = guest();
    let listener = vsock.listen(9).unwrap();
    guest.connect(1, 9);
    let mut neighbour = listener.accept_timeout(PATIENCE).unwrap();
    let all_credit = vec![0; 128 << 10];
    let bad: [(&str, Packet); 6] = [
        ("a second request", Packet::of_guest(2, 9, REQUEST)),
        ("a response that nobody asked for", Packet::of_guest(2, 9, RESPONSE)),
        ("an unknown operation", Packet::of_guest(2, 9, 99)),
        ("a length beyond the chain", Packet { len: 6, ..Packet::data(2, 9, b"hello") }),
        ("the longest length", Packet { len: u32::MAX, ..Packet::data(2, 9, b"hello") }),
        ("more than its credit", Packet::data(2, 9, &[&all_credit[..], &[1]].concat())),
    ];
    for (resets, (name, packet)) in (1..).zip(bad) {
        guest.connect(2, 9);
        let mut stream = listener.accept_timeout(PATIENCE).unwrap();
        guest.send(&packet);
        assert_eq!(guest.expect(RST).dst_port, 2, "{name}");
        assert_eq!(stream.read(&mut [0; 8]).unwrap(), 0, "{name}");
        let metrics = metrics(&handle);
        assert_eq!((metrics.active, metrics.reset), (1, resets), "{name}");
    }
    guest.send(&Packet::data(1, 9, b"still here"));
    let mut text = [0; 10];
    neighbour.read_exact(&mut text).unwrap();
    assert_eq!(&text, b"still here");
}

#[test]
fn credit_is_what_the_socket_has_taken_and_no_byte_is_lost() {
    let (mut guest, _handle, vsock) = guest();
    let listener = vsock.listen(9).unwrap();
    guest.connect(1, 9);
    let mut stream = listener.accept_timeout(PATIENCE).unwrap();
    // The host does not read: the kernel's buffer fills, then the credit runs out.
    let sent = noise(1, 8 << 20);
    let (mut at, mut taken) = (0, 0);
    loop {
        while let Some(packet) = guest.try_receive() {
            assert_eq!(packet.op, CREDIT_UPDATE);
            assert_eq!(packet.buf_alloc, 128 << 10);
            taken = packet.fwd_cnt as usize;
        }
        let room = (128 << 10) - (at - taken);
        if room == 0 {
            break;
        }
        let len = room.min(32 << 10);
        guest.send(&Packet::data(1, 9, &sent[at..at + len]));
        at += len;
    }
    assert!(at - taken == 128 << 10 && at < 4 << 20, "{at} bytes were taken without a reader");
    guest.send(&Packet::of_guest(1, 9, CREDIT_REQUEST));
    assert_eq!(guest.expect(CREDIT_UPDATE).fwd_cnt as usize, taken);
    // The guest closes its end; the host reads all of it all the same.
    guest.send(&Packet { flags: 3, ..Packet::of_guest(1, 9, SHUTDOWN) });
    guest.expect(RST);
    let mut received = Vec::new();
    stream.read_to_end(&mut received).unwrap();
    assert!(received == sent[..at], "{} bytes of {at}", received.len());
}

#[test]
fn a_guest_without_room_is_asked_once_and_gets_no_more_than_it_has_room_for() {
    let (mut guest, _handle, vsock) = guest();
    let listener = vsock.listen(9).unwrap();
    guest.send(&Packet { buf_alloc: 10, ..Packet::of_guest(1, 9, REQUEST) });
    guest.expect(RESPONSE);
    let mut stream = listener.accept_timeout(PATIENCE).unwrap();
    stream.write_all(b"hello, guest of ten").unwrap();
    assert_eq!(guest.expect(RW).body, b"hello, gue");
    guest.expect(CREDIT_REQUEST);
    // An answer that gives nothing is no reason to ask again; neither are impossible ones.
    for (buf_alloc, fwd_cnt) in [(10, 0), (0, 0), (0, u32::MAX), (5, 1 << 31)] {
        guest.send(&Packet { buf_alloc, fwd_cnt, ..Packet::of_guest(1, 9, CREDIT_UPDATE) });
    }
    std::thread::sleep(Duration::from_millis(20));
    assert_eq!(guest.try_receive(), None);
    guest.send(&Packet { buf_alloc: 10, fwd_cnt: 5, ..Packet::of_guest(1, 9, CREDIT_UPDATE) });
    assert_eq!(guest.expect(RW).body, b"st of");
}

#[test]
fn each_direction_ends_by_itself() {
    let (mut guest, handle, vsock) = guest();
    let listener = vsock.listen(9).unwrap();

    // The guest has said all, and listens on.
    guest.connect(1, 9);
    let mut stream = listener.accept_timeout(PATIENCE).unwrap();
    guest.send(&Packet::data(1, 9, b"question"));
    guest.send(&Packet { flags: 2, ..Packet::of_guest(1, 9, SHUTDOWN) });
    let mut text = String::new();
    stream.read_to_string(&mut text).unwrap();
    assert_eq!(text, "question");
    stream.write_all(b"answer").unwrap();
    assert_eq!(guest.expect(RW).body, b"answer");
    drop(stream);
    let last = until(|| guest.try_receive().filter(|packet| packet.flags == 3));
    assert_eq!(last.op, SHUTDOWN);
    guest.send(&Packet::of_guest(1, 9, RST));
    assert_eq!(metrics(&handle).active, 0);

    // The host has said all, and listens on.
    guest.connect(1, 9);
    let mut stream = listener.accept_timeout(PATIENCE).unwrap();
    stream.write_all(b"question").unwrap();
    stream.shutdown(Shutdown::Write).unwrap();
    assert_eq!(guest.expect(RW).body, b"question");
    let packet = guest.expect(SHUTDOWN);
    assert_eq!(packet.flags, 2);
    guest.send(&Packet::data(1, 9, b"answer"));
    guest.send(&Packet { flags: 3, ..Packet::of_guest(1, 9, SHUTDOWN) });
    guest.expect(RST);
    let mut text = String::new();
    stream.read_to_string(&mut text).unwrap();
    assert_eq!(text, "answer");

    // The guest does not listen any more.
    guest.connect(1, 9);
    let mut stream = listener.accept_timeout(PATIENCE).unwrap();
    guest.send(&Packet { flags: 1, ..Packet::of_guest(1, 9, SHUTDOWN) });
    assert_eq!(stream.write(b"?").unwrap_err().kind(), Io::BrokenPipe);
    guest.send(&Packet::data(1, 9, b"but speaks"));
    let mut text = [0; 10];
    stream.read_exact(&mut text).unwrap();
    drop(stream);
    assert_eq!(guest.expect(SHUTDOWN).flags, 3);

    // The host does not listen any more: what the guest sends is nobody's, and it hears of it.
    guest.connect(1, 9);
    let stream = listener.accept_timeout(PATIENCE).unwrap();
    stream.shutdown(Shutdown::Read).unwrap();
    guest.send(&Packet::data(1, 9, b"anybody?"));
    assert_eq!(guest.expect(SHUTDOWN).flags, 1);
    (&stream).write_all(b"only me").unwrap();
    assert_eq!(guest.expect(RW).body, b"only me");
    drop(stream);
    assert_eq!(guest.expect(SHUTDOWN).flags, 3);
    assert_eq!((metrics(&handle).active, metrics(&handle).reset), (0, 0));
}

#[test]
fn a_host_that_closes_without_reading_resets_the_guest() {
    let (mut guest, handle, vsock) = guest();
    let listener = vsock.listen(9).unwrap();
    guest.connect(1, 9);
    let stream = listener.accept_timeout(PATIENCE).unwrap();
    guest.send(&Packet::data(1, 9, b"read me"));
    drop(stream);
    guest.expect(RST);
    assert_eq!((metrics(&handle).active, metrics(&handle).reset), (0, 1));
}

#[test]
fn a_guest_that_closes_in_order_is_at_its_end_whatever_it_did_not_take() {
    let (mut guest, handle, vsock) = guest();
    let listener = vsock.listen(9).unwrap();
    guest.send(&Packet { buf_alloc: 10, ..Packet::of_guest(1, 9, REQUEST) });
    guest.expect(RESPONSE);
    let mut stream = listener.accept_timeout(PATIENCE).unwrap();
    // More than it has room for.
    stream.write_all(&[7; 1000]).unwrap();
    assert_eq!(guest.expect(RW).body.len(), 10);
    guest.expect(CREDIT_REQUEST);
    guest.send(&Packet { buf_alloc: 10, ..Packet::data(1, 9, b"too large") });
    guest.send(&Packet { flags: 3, buf_alloc: 10, ..Packet::of_guest(1, 9, SHUTDOWN) });
    guest.expect(RST);
    let mut answer = String::new();
    stream.read_to_string(&mut answer).unwrap();
    assert_eq!(answer, "too large");
    assert_eq!((metrics(&handle).active, metrics(&handle).reset), (0, 0));
}

#[test]
fn a_guest_that_vanishes_leaves_the_ends_of_its_streams() {
    let (mut guest, handle, vsock) = guest();
    let listener = vsock.listen(9).unwrap();
    guest.connect(1, 9);
    let mut stream = listener.accept_timeout(PATIENCE).unwrap();
    guest.send(&Packet::data(1, 9, b"famous last words"));
    let RawGuest { mut transport, .. } = guest;
    transport.set_status(Default::default());
    let mut text = String::new();
    stream.read_to_string(&mut text).unwrap();
    assert_eq!(text, "famous last words");
    assert_eq!(stream.write(b"?").unwrap_err().kind(), Io::BrokenPipe);
    assert_eq!(metrics(&handle).active, 0);
    // Its successor finds the same listener.
    let mut guest = RawGuest::new(transport);
    guest.connect(1, 9);
    listener.accept_timeout(PATIENCE).unwrap();
}

#[test]
fn a_flood_of_refused_packets_waits_for_room_and_every_one_is_answered() {
    let (mut guest, ..) = guest();
    // Sixteen answers fit the driver's buffers, 256 the device; then the packets wait.
    for port in 0..16 + 256 {
        guest.send(&Packet::of_guest(port, 9, REQUEST));
    }
    let waiting: Vec<Vec<u8>> =
        (272..300).map(|port| Packet::of_guest(port, 9, REQUEST).header()).collect();
    let mut tokens = Vec::new();
    for header in &waiting {
        // SAFETY: the buffer outlives its use, which ends with `pop_used` below.
        tokens.push(unsafe { guest.tx.add(&[header], &mut []) }.unwrap());
    }
    guest.transport.notify(1);
    assert!(!guest.tx.can_pop(), "the device took a packet that it cannot answer");
    for port in 0..300 {
        assert_eq!(guest.expect(RST).dst_port, port);
    }
    for (token, header) in tokens.into_iter().zip(&waiting) {
        // SAFETY: this is the buffer of that token.
        unsafe { guest.tx.pop_used(token, &[header], &mut []) }.unwrap();
    }
}

#[test]
fn a_flood_of_connections_that_end_unanswered_waits_until_the_guest_takes_packets() {
    let (mut guest, handle, vsock) = guest();
    let listener = vsock.listen(9).unwrap();
    // Sixteen answers fit the driver's buffers, and 256 turns of what is gone the device: with
    // the last one that was answered, which could have had more to say, and 255 that were not.
    for port in 0..16 + 255 {
        guest.send(&Packet::of_guest(port, 9, REQUEST));
        guest.send(&Packet::of_guest(port, 9, RST));
        listener.accept_timeout(PATIENCE).unwrap();
    }
    let header = Packet::of_guest(500, 9, REQUEST).header();
    // SAFETY: the buffer outlives its use, which ends with `pop_used` below.
    let token = unsafe { guest.tx.add(&[&header], &mut []) }.unwrap();
    guest.transport.notify(1);
    assert!(!guest.tx.can_pop(), "the device remembers connections without end");
    for port in 0..16 {
        assert_eq!(guest.expect(RESPONSE).dst_port, port);
    }
    assert_eq!(guest.expect(RESPONSE).dst_port, 500);
    // SAFETY: this is the buffer of that token.
    unsafe { guest.tx.pop_used(token, &[&header], &mut []) }.unwrap();
    assert_eq!(metrics(&handle).active, 1);
}

#[test]
fn buffers_too_small_for_a_header_go_back_and_nothing_is_written() {
    let (transport, _handle, vsock) = device(&VsockConfig::default());
    let mut guest = RawGuest::new(transport);
    let mut small: VirtQueue<TestHal, 16> = {
        guest.transport.queue_unset(0);
        VirtQueue::new(&mut guest.transport, 0, false, false).unwrap()
    };
    let connecting = vsock.begin_connect(5).unwrap();
    let mut buffer = [0xee; 43];
    // SAFETY: the buffer outlives its use, which ends with `pop_used`.
    let token = unsafe { small.add(&[], &mut [&mut buffer]) }.unwrap();
    guest.transport.notify(0);
    until(|| small.can_pop().then_some(()));
    // SAFETY: this is the buffer of that token.
    let len = unsafe { small.pop_used(token, &[], &mut [&mut buffer]) }.unwrap();
    assert_eq!(len, 0);
    assert!(!guest.needs_reset());
    let error = connecting.finish_timeout(Duration::from_millis(1)).unwrap_err();
    assert_eq!(error.kind(), &ErrorKind::Timeout);
}

#[test]
fn a_restored_guest_is_told_of_the_reset_before_anything_else() {
    let (mut guest, handle, vsock) = guest();
    let listener = vsock.listen(9).unwrap();
    guest.connect(1, 9);
    let _stream = listener.accept_timeout(PATIENCE).unwrap();
    let connecting = vsock.begin_connect(7).unwrap();
    guest.expect(REQUEST);
    drop(connecting);
    guest.expect(RST);
    handle.pause();
    let state = handle.state();

    // The same driver, on a device that knows its state only.
    let (transport, restored, vsock) = device(&VsockConfig::default());
    restored.restore(&state).unwrap();
    let connecting = vsock.begin_connect(7).unwrap();
    guest.transport = transport;
    assert!(restored.resume(), "it was paused, so that its doorbells are rung again");
    // The guest is paused again before it looks at the event, and goes on.
    for _ in 0..2 {
        for queue in 0..3 {
            guest.transport.notify(queue);
        }
        std::thread::sleep(Duration::from_millis(20));
        assert_eq!(guest.try_receive(), None, "it has not looked at the event yet");
        restored.pause();
        restored.resume();
    }
    let event = guest.event.poll(&mut guest.transport, |bytes| Ok(Some(bytes.to_vec())));
    assert_eq!(event.unwrap().unwrap(), [0; 4]);
    guest.transport.notify(2);
    let request = guest.expect(REQUEST);
    assert_eq!(request.src_port, (1 << 30) + 1, "the port goes on from the last one");
    guest.send(&Packet { ..Packet::of_guest(7, request.src_port, RESPONSE) });
    let _stream = connecting.finish_timeout(PATIENCE).unwrap();
    guest.send(&Packet::data(1, 9, b"old"));
    guest.expect(RST);
}

#[test]
fn a_restored_guest_without_a_queue_for_events_is_not_kept_waiting() {
    let (guest, handle, _) = guest();
    handle.pause();
    let mut state = handle.state();
    state.queues[2].ready = false;
    let (transport, restored, vsock) = device(&VsockConfig::default());
    restored.restore(&state).unwrap();
    let mut guest = RawGuest { transport, ..guest };
    restored.resume();
    (0..3).for_each(|queue| guest.transport.notify(queue));
    let listener = vsock.listen(9).unwrap();
    guest.connect(1, 9);
    listener.accept_timeout(PATIENCE).unwrap();
}

#[test]
fn a_restored_guest_without_buffers_for_events_is_told_when_it_has_one() {
    let (guest, handle, _) = guest();
    handle.pause();
    let state = handle.state();
    // As if the device had used all sixteen, and the driver had not given them back.
    let mut used_up = state.clone();
    used_up.queues[2].next_avail = 16;
    let (transport, restored, vsock) = device(&VsockConfig::default().guest_cid(77));
    restored.restore(&used_up).unwrap();
    let mut guest = RawGuest { transport, ..guest };
    let connecting = vsock.begin_connect(7).unwrap();
    restored.resume();
    (0..3).for_each(|queue| guest.transport.notify(queue));
    assert_eq!(guest.try_receive(), None);
    assert_eq!(guest.transport.read_config_space::<u64>(0), Ok(77), "a clone may get another CID");

    // A seventeenth buffer: the driver's queue is not asked, since the device's place is not its.
    let avail = state.queues[2].available_ring;
    let give = |count: u16| {
        ram().write(&count.to_le_bytes(), GuestAddress(avail + 2)).unwrap();
    };
    give(17);
    guest.transport.notify(2);
    let used: u16 = ram().inner().read_obj(GuestAddress(state.queues[2].used_ring + 2)).unwrap();
    assert_eq!(used, 1, "it was told");
    guest.transport.notify(2);
    assert_eq!(guest.try_receive(), None, "a doorbell alone says nothing");
    give(18);
    guest.transport.notify(2);
    let request = guest.expect(REQUEST);
    assert_eq!((request.dst_cid, request.dst_port), (77, 7));
    drop(connecting);
}

#[test]
fn an_answer_to_the_guest_goes_before_the_data_of_others() {
    let (mut guest, handle, vsock) = guest();
    let listener = vsock.listen(9).unwrap();
    let mut streams = Vec::new();
    for port in 0..4 {
        guest.connect(port, 9);
        streams.push(listener.accept_timeout(PATIENCE).unwrap());
    }
    for stream in &mut streams {
        stream.write_all(&[7; 100 << 10]).unwrap();
    }
    // The driver's buffers are full: four answers were taken, sixteen packets were not.
    until(|| (metrics(&handle).packets_to_guest == 4 + 16).then_some(()));
    guest.send(&Packet::of_guest(5, 9, REQUEST));
    let ops: Vec<u16> = (0..17).map(|_| guest.receive().op).collect();
    assert_eq!(ops, [&[RW; 16][..], &[RESPONSE]].concat());
}

//! More than one turn's work, for a driver that rings only where it is asked to; and what is seen to without a driver.

use std::io::{Read, Write};

use virtio_drivers::transport::DeviceStatus;

use super::*;

const F_VERSION_1: u64 = 1 << 32;
const F_EVENT_IDX: u64 = 1 << 29;
const BODY_BYTES: usize = 56;

/// A queue of 256 with EVENT_IDX, as Linux has them: its driver rings where the device has asked for it, and nowhere
/// else.
struct QuietQueue {
    queue: VirtQueue<TestHal, 256>,
    index: u16,
    offered: u16,
}

impl QuietQueue {
    fn new(transport: &mut TestTransport, index: u16) -> Self {
        let queue = VirtQueue::new(transport, index, false, true).unwrap();
        Self { queue, index, offered: 0 }
    }

    /// Makes requests available.
    fn offer(
        &mut self,
        transport: &mut TestTransport,
        count: u16,
        mut add: impl FnMut(&mut VirtQueue<TestHal, 256>),
    ) {
        (0..count).for_each(|_| add(&mut self.queue));
        self.offered = self.offered.wrapping_add(count);
        let behind = self.offered.wrapping_sub(transport.avail_event(self.index)).wrapping_sub(1);
        if behind < count {
            transport.notify(self.index);
        }
    }
}

/// A driver of such queues.
struct QuietGuest {
    transport: TestTransport,
    rx: QuietQueue,
    buffers: Vec<[u8; 44 + BODY_BYTES]>,
    tx: QuietQueue,
    /// What it sends.
    packet: Vec<u8>,
}

impl QuietGuest {
    fn new(mut transport: TestTransport) -> Self {
        transport.set_status(DeviceStatus::empty());
        transport.write_driver_features(F_VERSION_1 | F_EVENT_IDX);
        let ok = DeviceStatus::ACKNOWLEDGE | DeviceStatus::DRIVER | DeviceStatus::FEATURES_OK;
        transport.set_status(ok);
        let rx = QuietQueue::new(&mut transport, 0);
        let tx = QuietQueue::new(&mut transport, 1);
        transport.set_status(ok | DeviceStatus::DRIVER_OK);
        Self { transport, rx, buffers: Vec::new(), tx, packet: Vec::new() }
    }

    /// Gives buffers to receive into.
    fn give(&mut self) {
        self.buffers = vec![[0; 44 + BODY_BYTES]; 256];
        let mut buffers = self.buffers.iter_mut();
        self.rx.offer(&mut self.transport, 256, |queue| {
            // SAFETY: the buffers stay where they are, and are given back with these.
            let token = unsafe { queue.add(&[], &mut [buffers.next().unwrap()]) }.unwrap();
            assert!(usize::from(token) < 256);
        });
    }

    /// The next packet, whose buffer is given again.
    fn try_receive(&mut self) -> Option<Packet> {
        let token = self.rx.queue.peek_used()?;
        let buffer = &mut self.buffers[usize::from(token)];
        // SAFETY: the buffer that was added with this token: of one descriptor each, in their order.
        let len = unsafe { self.rx.queue.pop_used(token, &[], &mut [buffer]) }.unwrap();
        let packet = Packet::read(&buffer[..len as usize]);
        self.rx.offer(&mut self.transport, 1, |queue| {
            // SAFETY: as above.
            let again = unsafe { queue.add(&[], &mut [buffer]) }.unwrap();
            assert_eq!(again, token, "the last descriptor that came back is the first to be used");
        });
        Some(packet)
    }

    fn send(&mut self, count: u16) {
        let packet = &self.packet;
        self.tx.offer(&mut self.transport, count, |queue| {
            // SAFETY: the packet stays where it is, and is given back with this.
            unsafe { queue.add(&[packet], &mut []) }.unwrap();
        });
    }

    /// How many packets were taken.
    fn take_back(&mut self) -> u16 {
        let mut taken = 0;
        while let Some(token) = self.tx.queue.peek_used() {
            // SAFETY: the same buffer as it was added with.
            unsafe { self.tx.queue.pop_used(token, &[&self.packet], &mut []) }.unwrap();
            taken += 1;
        }
        taken
    }
}

#[test]
fn what_is_more_than_a_turn_comes_though_the_guest_does_not_ring() {
    let (transport, _handle, vsock) = device(&VsockConfig::default());
    let mut guest = QuietGuest::new(transport);
    guest.give();
    let connecting = vsock.begin_connect(7).unwrap();
    let request = until(|| guest.try_receive());
    guest.packet = Packet::of_guest(7, request.src_port, RESPONSE).header();
    guest.send(1);
    let mut stream = connecting.finish().unwrap();

    // At once, and more than the guest has buffers for.
    let sent = noise(1, 300 * BODY_BYTES);
    stream.write_all(&sent).unwrap();
    let mut received = Vec::new();
    while received.len() < sent.len() {
        received.extend(until(|| guest.try_receive()).body);
    }
    assert!(received == sent);
}

#[test]
fn a_guest_whose_packets_had_to_wait_is_served_again() {
    let (transport, _handle, _vsock) = device(&VsockConfig::default());
    let mut guest = QuietGuest::new(transport);
    // Of no connection: each is answered, and there is no buffer for the answers.
    guest.packet = Packet::of_guest(1, 2, RW).header();
    guest.send(256);
    assert_eq!(guest.take_back(), 256);
    guest.send(256);
    assert_eq!(guest.take_back(), 0, "they wait");
    guest.give();
    assert_eq!(guest.take_back(), 256);
    guest.send(1);
    until(|| {
        let answer = guest.try_receive();
        assert!(answer.is_none_or(|answer| answer.op == RST));
        (guest.take_back() == 1).then_some(())
    });
}

#[test]
fn what_a_host_gives_up_is_forgotten_without_a_driver_and_in_a_pause() {
    let config = VsockConfig::default().max_connections(4);
    let (transport, handle, vsock) = device(&config);
    let give_up = || drop(until(|| vsock.begin_connect(1).ok()));
    (0..20).for_each(|_| give_up());
    let mut guest = RawGuest::new(transport);
    handle.pause();
    (0..20).for_each(|_| give_up());
    until(|| (metrics(&handle).active == 0).then_some(()));
    handle.resume();
    guest.transport.notify(0);
    // Nothing is left of them for the guest either.
    let listener = vsock.listen(5).unwrap();
    guest.connect(1, 5);
    drop(listener);
}

#[test]
fn what_is_left_of_a_connection_is_read_after_the_drivers_reset() {
    let (transport, _handle, vsock) = device(&VsockConfig::default());
    let mut guest = RawGuest::new(transport);
    let listener = vsock.listen(5).unwrap();
    guest.connect(1, 5);
    let mut stream = listener.accept().unwrap();
    // All that the socket takes, and the credit beyond that.
    let body = noise(1, 16 << 10);
    let (mut sent, mut taken) = (0, 0);
    while sent - taken + body.len() as u32 <= 128 << 10 {
        guest.send(&Packet::data(1, 5, &body));
        sent += body.len() as u32;
        while let Some(packet) = guest.try_receive() {
            taken = packet.fwd_cnt;
        }
    }
    assert!(taken < sent);
    guest.transport.set_status(DeviceStatus::empty());
    let mut received = Vec::new();
    stream.read_to_end(&mut received).unwrap();
    assert_eq!(received, body.repeat(sent as usize / body.len()));
}

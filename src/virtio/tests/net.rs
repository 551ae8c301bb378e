use std::io::{Read, Write};
use std::os::unix::net::UnixStream;
use std::time::{Duration, Instant};

use virtio_drivers::device::net::VirtIONetRaw;
use virtio_drivers::transport::InterruptStatus;
use vm_memory::{Bytes, GuestAddress};

use super::driver::{TestHal, TestTransport, ram};
use super::hostile::{BUFFERS, NEXT, Raw, RawDriver, WRITE};
use crate::bus::BusDevice;
use crate::config::{MacAddress, NetBackend, NetConfig, RateLimit};
use crate::metrics::{DeviceMetrics, NetMetrics};
use crate::virtio::{Backend, DeviceHandle, MmioTransport, Net, Stream};

pub(super) const MAC: MacAddress = MacAddress([2, 0, 0, 0, 0, 1]);
const F_MRG_RXBUF: u64 = 1 << 15;
pub(super) const HEADER: usize = 12;
const LARGEST: usize = 65_550;

pub(super) type Driver = VirtIONetRaw<TestHal, TestTransport, 64>;

/// An interface, and the other end of its cable.
pub(super) fn cable(mac: Option<MacAddress>) -> (Net, Peer) {
    let (near, far) = UnixStream::pair().unwrap();
    (net(near, mac), Peer(far))
}

fn net(socket: UnixStream, mac: Option<MacAddress>) -> Net {
    // What the backend is made of is not asked here.
    let config = NetConfig::tap("");
    let config = mac.iter().fold(config, |config, mac| config.mac(mac.0));
    Net::new(Backend::Stream(Stream::new(socket).unwrap()), &config).unwrap()
}

pub(super) fn counters(handle: &DeviceHandle<Net>) -> NetMetrics {
    match handle.metrics() {
        DeviceMetrics::Net(metrics) => metrics,
        other => panic!("{other:?}"),
    }
}

/// The program at the other end.
pub(super) struct Peer(pub(super) UnixStream);

impl Peer {
    pub(super) fn send(&mut self, frame: &[u8]) {
        let mut bytes = (frame.len() as u32).to_be_bytes().to_vec();
        bytes.extend(frame);
        self.0.write_all(&bytes).unwrap();
    }

    pub(super) fn receive(&mut self) -> Vec<u8> {
        self.0.set_read_timeout(Some(PATIENCE)).unwrap();
        let mut len = [0; 4];
        self.0.read_exact(&mut len).unwrap();
        let mut frame = vec![0; u32::from_be_bytes(len) as usize];
        self.0.read_exact(&mut frame).unwrap();
        frame
    }
}

/// Only a failing test waits so long.
const PATIENCE: Duration = Duration::from_secs(30);

pub(super) fn until(what: &str, mut done: impl FnMut() -> bool) {
    let begin = Instant::now();
    while !done() {
        assert!(begin.elapsed() < PATIENCE, "{what}");
        std::thread::yield_now();
    }
}

/// A frame whose every byte depends on its number, its length and its place.
pub(super) fn frame(number: usize, len: usize) -> Vec<u8> {
    (0..len).map(|at| (at * 7 + at / 256 + number * 31 + len) as u8).collect()
}

fn sizes() -> impl Iterator<Item = usize> + Clone {
    let edges = [4096 - HEADER, 4096, 8192 - HEADER, 32_768, 65_521, 65_535, 65_536, LARGEST - 1];
    (14..100)
        .chain((100..1600).step_by(37))
        .chain((1600..LARGEST).step_by(2311))
        .chain(edges)
        .chain([LARGEST])
}

/// Gives the driver's queue a buffer.
pub(super) fn give(driver: &mut Driver, buffer: &mut [u8]) -> u16 {
    // SAFETY: each test takes the buffer back before it ends, or ends the device first.
    unsafe { driver.receive_begin(buffer).unwrap() }
}

/// Takes the driver's buffer back once the device has used it: header and frame.
pub(super) fn take(driver: &mut Driver, token: u16, buffer: &mut [u8]) -> Vec<u8> {
    until("no frame came", || driver.poll_receive() == Some(token));
    // SAFETY: the buffer is the one that was given for this token.
    let (header, len) = unsafe { driver.receive_complete(token, buffer).unwrap() };
    buffer[..header + len].to_vec()
}

fn num_buffers(packet: &[u8]) -> u16 {
    u16::from_le_bytes([packet[10], packet[11]])
}

#[test]
fn frames_of_every_size_leave_whole_and_in_order() {
    let (net, mut peer) = cable(Some(MAC));
    let (transport, handle) = TestTransport::with_handle(net);
    let mut driver = Driver::new(transport).unwrap();
    assert_eq!(driver.mac_address(), MAC.0);
    let receiver = std::thread::spawn(move || {
        for (number, len) in sizes().enumerate() {
            assert!(peer.receive() == frame(number, len), "frame {number} of {len} bytes");
        }
    });
    let mut bytes = 0;
    for (number, len) in sizes().enumerate() {
        driver.send(&frame(number, len)).unwrap();
        bytes += len as u64;
    }
    receiver.join().unwrap();
    let metrics = counters(&handle);
    assert_eq!((metrics.tx_frames, metrics.tx_bytes), (sizes().count() as u64, bytes));
    assert_eq!(metrics.tx_dropped, 0);
}

#[test]
fn frames_of_every_size_arrive_whole_in_one_buffer() {
    let (net, mut peer) = cable(Some(MAC));
    let mut driver = Driver::new(TestTransport::new(net)).unwrap();
    let mut buffer = vec![0; HEADER + LARGEST];
    for (number, len) in sizes().enumerate() {
        let token = give(&mut driver, &mut buffer);
        peer.send(&frame(number, len));
        let packet = take(&mut driver, token, &mut buffer);
        assert_eq!(num_buffers(&packet), 1);
        assert_eq!(packet[..10], [0; 10]);
        assert!(packet[HEADER..] == frame(number, len), "frame {number} of {len} bytes");
    }
}

#[test]
fn frames_of_every_size_arrive_over_several_buffers() {
    const BUFFER: usize = 1536;
    let (net, mut peer) = cable(Some(MAC));
    let (transport, handle) = TestTransport::with_handle(net);
    let mut driver = Driver::new(transport.with_features(F_MRG_RXBUF)).unwrap();
    let mut buffers = vec![vec![0; BUFFER]; 64];
    let mut given = std::collections::VecDeque::new();
    let mut free: Vec<usize> = (0..64).collect();
    for (number, len) in sizes().enumerate() {
        for at in free.drain(..) {
            given.push_back((give(&mut driver, &mut buffers[at]), at));
        }
        peer.send(&frame(number, len));
        let mut packet = Vec::new();
        let mut count = 1;
        while count > 0 {
            let (token, at) = given.pop_front().unwrap();
            let len_before = packet.len();
            if len_before == 0 {
                until("no frame came", || driver.poll_receive().is_some());
                assert_eq!(driver.poll_receive(), Some(token));
            }
            // The others are there when the first one is.
            assert_eq!(driver.poll_receive(), Some(token));
            // SAFETY: the buffer is the one that was given for this token.
            let (header, rest) =
                unsafe { driver.receive_complete(token, &mut buffers[at]).unwrap() };
            packet.extend(&buffers[at][..header + rest]);
            free.push(at);
            if len_before == 0 {
                count = num_buffers(&packet);
                assert_eq!(usize::from(count), (HEADER + len).div_ceil(BUFFER));
            }
            count -= 1;
        }
        assert!(packet[HEADER..] == frame(number, len), "frame {number} of {len} bytes");
    }
    assert_eq!(counters(&handle).rx_dropped, 0);
}

#[test]
fn two_machines_are_joined_by_a_pair() {
    let (one, other) = NetConfig::pair().unwrap();
    let mut drivers = [one, other].map(|config| {
        let NetBackend::Socket(cable) = config.backend else { panic!("{config:?}") };
        Driver::new(TestTransport::new(net(cable.socket.try_clone().unwrap(), None))).unwrap()
    });
    let mut buffer = vec![0; 2048];
    for number in 0..200 {
        let (near, far) = (number % 2, 1 - number % 2);
        let token = give(&mut drivers[far], &mut buffer);
        drivers[near].send(&frame(number, 1514)).unwrap();
        let packet = take(&mut drivers[far], token, &mut buffer);
        assert_eq!(packet[HEADER..], frame(number, 1514));
    }
}

#[test]
fn frames_wait_while_there_is_no_buffer() {
    let (net, mut peer) = cable(Some(MAC));
    let (transport, handle) = TestTransport::with_handle(net);
    let mut driver = Driver::new(transport).unwrap();
    // Soon the socket takes no more.
    let sender = std::thread::spawn(move || {
        for number in 0..1000 {
            peer.send(&frame(number, 60 + number));
        }
        peer
    });
    let mut buffer = vec![0; 2048];
    for number in 0..1000 {
        let token = give(&mut driver, &mut buffer);
        let packet = take(&mut driver, token, &mut buffer);
        assert_eq!(packet[HEADER..], frame(number, 60 + number));
    }
    sender.join().unwrap();
    assert_eq!(counters(&handle).rx_dropped, 0);
}

#[test]
fn frames_that_do_not_fit_are_dropped_and_counted() {
    let (net, mut peer) = cable(Some(MAC));
    let (transport, handle) = TestTransport::with_handle(net);
    let mut driver = Driver::new(transport).unwrap();
    let mut buffer = vec![0; 1526];
    let token = give(&mut driver, &mut buffer);
    for len in [0, 1, 13, 1515, 9000, LARGEST] {
        peer.send(&frame(0, len));
    }
    peer.send(&frame(1, 1514));
    let packet = take(&mut driver, token, &mut buffer);
    assert_eq!(packet[HEADER..], frame(1, 1514));
    let metrics = counters(&handle);
    assert_eq!((metrics.rx_frames, metrics.rx_bytes, metrics.rx_dropped), (1, 1514, 6));
}

#[test]
fn what_the_other_end_does_not_take_waits_and_is_whole() {
    let (net, mut peer) = cable(Some(MAC));
    let (transport, handle) = TestTransport::with_handle(net);
    let mut driver = Driver::new(transport).unwrap();
    // More than the socket holds, in frames that it takes in part.
    let frames: Vec<Vec<u8>> =
        (0..32).map(|n| [vec![0; HEADER], frame(n, 40_000 + 13 * n)].concat()).collect();
    let tokens: Vec<u16> = frames
        .iter()
        // SAFETY: the frames outlive the device.
        .map(|frame| unsafe { driver.transmit_begin(frame).unwrap() })
        .collect();
    assert!(counters(&handle).tx_frames < 32, "the socket took everything");
    for (number, sent) in frames.iter().enumerate() {
        assert!(peer.receive() == sent[HEADER..], "frame {number}");
    }
    for (token, frame) in tokens.into_iter().zip(&frames) {
        until("a frame is not given back", || driver.poll_transmit() == Some(token));
        // SAFETY: the frame is the one that was sent with this token.
        unsafe { driver.transmit_complete(token, frame).unwrap() };
    }
    assert_eq!(counters(&handle).tx_dropped, 0);
}

#[test]
fn another_end_that_vanishes_takes_the_link_down_and_nothing_else() {
    let (net, mut peer) = cable(Some(MAC));
    let (transport, handle) = TestTransport::with_handle(net);
    let generation = transport.read(0xfc);
    let mut driver = Driver::new(transport).unwrap();
    let mut buffer = vec![0; 2048];
    let token = give(&mut driver, &mut buffer);
    peer.send(&frame(0, 100));
    take(&mut driver, token, &mut buffer);
    give(&mut driver, &mut buffer);
    driver.ack_interrupt();
    drop(peer);
    until("the link stays up", || counters(&handle).link_changes == 1);
    until("the driver is not told", || {
        driver.ack_interrupt().contains(InterruptStatus::DEVICE_CONFIGURATION_INTERRUPT)
    });
    for number in 0..10 {
        driver.send(&frame(number, 100)).unwrap();
    }
    let metrics = counters(&handle);
    assert_eq!((metrics.tx_dropped, metrics.link_changes), (10, 1));
    let mut registers = MmioTransport::new(handle.erase());
    let mut read = |register: u64| {
        let mut bytes = [0; 4];
        registers.read(register, &mut bytes);
        u32::from_le_bytes(bytes)
    };
    assert_eq!(read(0x104) >> 16, 0, "the link's status");
    assert_eq!(read(0xfc), generation + 1);
}

#[test]
fn a_hostile_other_end_takes_only_the_link_down() {
    for bad in [LARGEST as u32 + 1, 1 << 31, u32::MAX] {
        let (net, mut peer) = cable(Some(MAC));
        let (transport, handle) = TestTransport::with_handle(net);
        let _driver = Driver::new(transport).unwrap();
        peer.0.write_all(&bad.to_be_bytes()).unwrap();
        until("the link stays up", || counters(&handle).link_changes == 1);
        assert_eq!(peer.0.read(&mut [0]).unwrap(), 0, "the connection has ended");
    }
}

#[test]
fn hostile_frames_are_dropped() {
    let (net, mut peer) = cable(Some(MAC));
    let mut driver = RawDriver::over(TestTransport::new(net), 1);
    ram().write(&frame(5, 200), GuestAddress(BUFFERS)).unwrap();
    for chain in [
        vec![Raw(BUFFERS, 0, 0, 0)],                             // nothing
        vec![Raw(BUFFERS, 11, 0, 0)],                            // half a header
        vec![Raw(BUFFERS, 12, 0, 0)],                            // no frame
        vec![Raw(BUFFERS, 12, NEXT, 1), Raw(BUFFERS, 13, 0, 0)], // half an Ethernet header
        vec![Raw(BUFFERS, 1514, WRITE, 0)],                      // nothing to read
        vec![Raw(BUFFERS, 12 + LARGEST as u32 + 1, 0, 0)],       // more than a frame
        vec![Raw(0, 64 << 20, 0, 0)],                            // much more
    ] {
        let used = driver.used();
        driver.submit(&chain);
        assert_eq!(driver.used(), used + 1);
        assert!(!driver.needs_reset());
    }
    driver.submit(&[Raw(BUFFERS, 5, NEXT, 1), Raw(BUFFERS + 5, 100, 0, 0)]);
    assert_eq!(peer.receive(), frame(5, 200)[12..105], "a header in two pieces");
}

#[test]
fn receive_buffers_without_room_are_not_written_past_their_ends() {
    let (net, mut peer) = cable(Some(MAC));
    let (transport, handle) = TestTransport::with_handle(net);
    let mut driver = RawDriver::over(transport, 0);
    ram().write(&[0xee; 64], GuestAddress(BUFFERS)).unwrap();
    for len in [0, 1, 11, 12, 25] {
        driver.submit(&[Raw(BUFFERS, len, WRITE, 0)]);
    }
    driver.submit(&[Raw(BUFFERS, 64, 0, 0)]);
    assert_eq!(driver.used(), 0, "no frame has come");
    for _ in 0..3 {
        peer.send(&frame(0, 14));
    }
    until("the frames are not dropped", || {
        driver.transport.write(0x50, 0);
        let mut bytes = [0; 64];
        ram().inner().read_slice(&mut bytes, GuestAddress(BUFFERS)).unwrap();
        assert_eq!(bytes, [0xee; 64]);
        counters(&handle).rx_dropped == 3
    });
    assert!(!driver.needs_reset());
}

#[test]
fn the_doorbell_of_receive_buffers_is_wanted_only_where_they_lack() {
    let (net, mut peer) = cable(Some(MAC));
    let mut driver = RawDriver::over(TestTransport::new(net), 0);
    assert!(driver.wants_doorbell(), "there was no buffer yet");
    for used in [1, 3, 5] {
        driver.submit(&[Raw(BUFFERS, 112, WRITE, 0)]);
        assert!(!driver.wants_doorbell(), "a buffer is there");
        peer.send(&frame(0, 100));
        until("a frame waits for a doorbell", || driver.used() == used);
        // This one finds no buffer.
        peer.send(&frame(1, 100));
        until("no doorbell is wanted", || driver.wants_doorbell());
        driver.submit(&[Raw(BUFFERS, 112, WRITE, 0)]);
        until("a frame got no buffer", || driver.used() == used + 1);
    }
}

#[test]
fn a_storm_of_doorbells_does_nothing() {
    let (net, mut peer) = cable(Some(MAC));
    let mut driver = RawDriver::over(TestTransport::new(net), 1);
    for bell in 0..100_000u32 {
        driver.transport.write(0x50, bell % 5);
    }
    driver.submit(&[Raw(BUFFERS, 112, 0, 0)]);
    assert_eq!(peer.receive().len(), 100);
    assert!(!driver.needs_reset());
}

#[test]
fn a_limited_interface_passes_all_frames_each_when_its_time_comes() {
    let (near, far) = UnixStream::pair().unwrap();
    let limit = RateLimit::default()
        .bytes_per_second(1 << 20)
        .burst_bytes(1500)
        .operations_per_second(1000)
        .burst_operations(2);
    let config = NetConfig::tap("").receive_rate_limit(limit).transmit_rate_limit(limit);
    let net = Net::new(Backend::Stream(Stream::new(near).unwrap()), &config).unwrap();
    let mut driver = Driver::new(TestTransport::new(net)).unwrap();
    let mut peer = Peer(far);
    for number in 0..30 {
        let frame = frame(number, 1500);
        driver.send(&frame).unwrap();
        assert_eq!(peer.receive(), frame);
        peer.send(&frame);
        let mut packet = vec![0; 2048];
        driver.receive_wait(&mut packet).unwrap();
        assert_eq!(packet[HEADER..HEADER + 1500], frame);
    }
}

/// Offers a packet, header and frame, and waits for nothing.
fn offer(driver: &mut Driver, packet: &[u8]) -> u16 {
    // SAFETY: the test completes it before its buffer goes.
    unsafe { driver.transmit_begin(packet).unwrap() }
}

#[test]
fn a_limit_that_is_lifted_is_lifted_for_what_waits() {
    let (net, mut peer) = cable(Some(MAC));
    let (transport, handle) = TestTransport::with_handle(net);
    let mut driver = Driver::new(transport).unwrap();
    let slow = RateLimit::default().bytes_per_second(1);
    handle.with(|net| net.set_rate_limits(slow, slow));
    let sent = [1, 2].map(|number| [vec![0; HEADER], frame(number, 1500)].concat());
    let mut received = [vec![0; 2048], vec![0; 2048]];
    peer.send(&frame(1, 1500));
    peer.send(&frame(2, 1500));
    let sending = sent.each_ref().map(|packet| offer(&mut driver, packet));
    let receiving = received.each_mut().map(|buffer| give(&mut driver, buffer));
    // All that may pass has passed after this: a frame each way, of which a second one would be paid for in 25 minutes.
    for queue in 0..2 {
        handle.serve(queue);
    }
    let NetMetrics { rx_frames, tx_frames, .. } = counters(&handle);
    assert_eq!((rx_frames, tx_frames), (1, 1));
    handle.with(|net| net.set_rate_limits(RateLimit::default(), RateLimit::default()));
    let receiving = receiving.into_iter().zip(&mut received);
    let sending = sending.into_iter().zip(&sent);
    for (number, ((receives, buffer), (sends, packet))) in (1..).zip(receiving.zip(sending)) {
        let frame = frame(number, 1500);
        assert_eq!(take(&mut driver, receives, buffer)[HEADER..], frame);
        assert_eq!(peer.receive(), frame);
        until("the frame is sent", || driver.poll_transmit() == Some(sends));
        // SAFETY: the packet is the one that was offered for this token.
        unsafe { driver.transmit_complete(sends, packet) }.unwrap();
    }
}

//! The vsock device: a driver of packets by hand, and the one of the crate virtio-drivers.

mod hostile;
mod kept;
mod streams;
mod threads;
mod turns;
mod unix;

use std::sync::{Arc, OnceLock};
use std::time::{Duration, Instant};

use virtio_drivers::device::socket::VMADDR_CID_HOST;
use virtio_drivers::queue::{OwningQueue, VirtQueue};
use virtio_drivers::transport::Transport;

use super::driver::{TestHal, TestTransport};
use crate::config::VsockConfig;
use crate::console::Console;
use crate::exit::ExitLatch;
use crate::metrics::{DeviceMetrics, VsockMetrics};
use crate::virtio::{self, DeviceHandle};
use crate::vsock::Vsock;

/// Only a failing test waits so long.
const PATIENCE: Duration = Duration::from_secs(60);
const GUEST_CID: u64 = 3;
const NEEDS_RESET: u32 = 64;

const REQUEST: u16 = 1;
const RESPONSE: u16 = 2;
const RST: u16 = 3;
const SHUTDOWN: u16 = 4;
const RW: u16 = 5;
const CREDIT_UPDATE: u16 = 6;
const CREDIT_REQUEST: u16 = 7;

/// A device for a driver, and its side of the host.
fn device(config: &VsockConfig) -> (TestTransport, DeviceHandle<virtio::Vsock>, Vsock) {
    let (transport, handle, vsock, _) = device_and_latch(config);
    (transport, handle, vsock)
}

/// The same, and where the guest's end is reported.
fn device_and_latch(
    config: &VsockConfig,
) -> (TestTransport, DeviceHandle<virtio::Vsock>, Vsock, Arc<ExitLatch>) {
    let exit = Arc::new(ExitLatch::default());
    let device = virtio::Vsock::new(config, exit.descriptor().unwrap()).unwrap();
    let (transport, handle) = TestTransport::with_handle(device);
    let vsock = Vsock::new(handle.downgrade(), Arc::clone(&exit), Console::new(0));
    (transport, handle, vsock, exit)
}

/// For so many connections at once, of two descriptors each, beside those of tests that run meanwhile. The limit is the
/// process's, and stays.
fn raise_the_limit_of_open_files(connections: usize) {
    static RAISED: OnceLock<u64> = OnceLock::new();
    let limit = RAISED.get_or_init(|| {
        // SAFETY: the calls read and write the one struct.
        unsafe {
            let mut limit = std::mem::zeroed::<libc::rlimit>();
            libc::getrlimit(libc::RLIMIT_NOFILE, &mut limit);
            limit.rlim_cur = 16384.min(limit.rlim_max).max(limit.rlim_cur);
            libc::setrlimit(libc::RLIMIT_NOFILE, &limit);
            limit.rlim_cur
        }
    });
    let needed = 2 * connections as u64 + 400;
    assert!(*limit >= needed, "the limit of open files (ulimit -Hn) is {limit}, not {needed}");
}

fn metrics(handle: &DeviceHandle<virtio::Vsock>) -> VsockMetrics {
    let DeviceMetrics::Vsock(metrics) = handle.metrics() else { panic!("other metrics") };
    metrics
}

/// Calls `attempt` until it gives something.
#[track_caller]
fn until<T>(mut attempt: impl FnMut() -> Option<T>) -> T {
    let begin = Instant::now();
    loop {
        if let Some(result) = attempt() {
            return result;
        }
        assert!(begin.elapsed() < PATIENCE, "it does not come");
        std::thread::sleep(Duration::from_micros(100));
    }
}

/// A packet, as a guest sees it.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
struct Packet {
    src_cid: u64,
    dst_cid: u64,
    src_port: u32,
    dst_port: u32,
    len: u32,
    kind: u16,
    op: u16,
    flags: u32,
    buf_alloc: u32,
    fwd_cnt: u32,
    body: Vec<u8>,
}

impl Packet {
    /// A sound packet of the guest, with room for 1 MiB.
    fn of_guest(guest_port: u32, host_port: u32, op: u16) -> Self {
        Self {
            src_cid: GUEST_CID,
            dst_cid: VMADDR_CID_HOST,
            src_port: guest_port,
            dst_port: host_port,
            kind: 1,
            op,
            buf_alloc: 1 << 20,
            ..Self::default()
        }
    }

    fn data(guest_port: u32, host_port: u32, body: &[u8]) -> Self {
        let body = body.to_vec();
        let len = body.len() as u32;
        Self { len, body, ..Self::of_guest(guest_port, host_port, RW) }
    }

    fn header(&self) -> Vec<u8> {
        let mut bytes = self.src_cid.to_le_bytes().to_vec();
        bytes.extend(self.dst_cid.to_le_bytes());
        bytes.extend([self.src_port, self.dst_port, self.len].map(u32::to_le_bytes).concat());
        bytes.extend([self.kind, self.op].map(u16::to_le_bytes).concat());
        bytes.extend([self.flags, self.buf_alloc, self.fwd_cnt].map(u32::to_le_bytes).concat());
        bytes
    }

    fn read(bytes: &[u8]) -> Self {
        let word = |at: usize| u32::from_le_bytes(bytes[at..at + 4].try_into().unwrap());
        let long = |at: usize| u64::from_le_bytes(bytes[at..at + 8].try_into().unwrap());
        let half = |at: usize| u16::from_le_bytes(bytes[at..at + 2].try_into().unwrap());
        Self {
            src_cid: long(0),
            dst_cid: long(8),
            src_port: word(16),
            dst_port: word(20),
            len: word(24),
            kind: half(28),
            op: half(30),
            flags: word(32),
            buf_alloc: word(36),
            fwd_cnt: word(40),
            body: bytes[44..].to_vec(),
        }
    }
}

/// A driver that sends and receives single packets.
struct RawGuest {
    transport: TestTransport,
    rx: OwningQueue<TestHal, 16, 4096>,
    tx: VirtQueue<TestHal, 64>,
    event: OwningQueue<TestHal, 16, 64>,
}

impl RawGuest {
    fn new(transport: TestTransport) -> Self {
        let mut transport = transport;
        let features = 1u64 << 32;
        transport.set_status(Default::default());
        transport.write_driver_features(features);
        use virtio_drivers::transport::DeviceStatus as S;
        let ok = S::ACKNOWLEDGE | S::DRIVER | S::FEATURES_OK;
        transport.set_status(ok);
        let rx = OwningQueue::new(VirtQueue::new(&mut transport, 0, false, false).unwrap());
        let tx = VirtQueue::new(&mut transport, 1, false, false).unwrap();
        let event = OwningQueue::new(VirtQueue::new(&mut transport, 2, false, false).unwrap());
        transport.set_status(ok | S::DRIVER_OK);
        let mut guest = Self { transport, rx: rx.unwrap(), tx, event: event.unwrap() };
        guest.transport.notify(0);
        guest
    }

    /// Sends raw bytes, in these buffers.
    fn send_raw(&mut self, buffers: &[&[u8]]) {
        self.tx.add_notify_wait_pop(buffers, &mut [], &mut self.transport).unwrap();
    }

    fn send(&mut self, packet: &Packet) {
        let header = packet.header();
        match packet.body.is_empty() {
            true => self.send_raw(&[&header]),
            false => self.send_raw(&[&header, &packet.body]),
        }
    }

    /// The next packet, if one is there.
    fn try_receive(&mut self) -> Option<Packet> {
        let packet = self.rx.poll(&mut self.transport, |bytes| Ok(Some(Packet::read(bytes))));
        packet.unwrap()
    }

    #[track_caller]
    fn receive(&mut self) -> Packet {
        until(|| self.try_receive())
    }

    /// The next packet, which is of this kind.
    #[track_caller]
    fn expect(&mut self, op: u16) -> Packet {
        let packet = self.receive();
        assert_eq!(packet.op, op, "{packet:?}");
        packet
    }

    /// Connects from a port of the guest.
    #[track_caller]
    fn connect(&mut self, guest_port: u32, host_port: u32) {
        self.send(&Packet::of_guest(guest_port, host_port, REQUEST));
        let packet = self.expect(RESPONSE);
        assert_eq!((packet.src_port, packet.dst_port), (host_port, guest_port));
    }

    fn needs_reset(&self) -> bool {
        self.transport.read(0x70) & NEEDS_RESET != 0
    }
}

/// Bytes that no others look like.
fn noise(seed: u64, len: usize) -> Vec<u8> {
    let mut state = seed.wrapping_mul(0x9e37_79b9_7f4a_7c15) | 1;
    let mut next = || {
        // A linear congruential generator (Knuth's MMIX).
        state =
            state.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
        (state >> 56) as u8
    };
    (0..len).map(|_| next()).collect()
}

//! A driver that writes descriptors by hand, and what a device makes of bad ones.

use std::time::{Duration, Instant};

use virtio_drivers::transport::{DeviceStatus, Transport};
use vm_memory::{Bytes, GuestAddress};

use super::block::{Image, block};
use super::driver::{TestTransport, ram};
use super::net::{self, cable};
use super::state::vsock;
use crate::config::{BalloonConfig, BlockConfig, RateLimit};
use crate::virtio::{Balloon, Block, Rng, VirtioDevice};

const SIZE: u16 = 16;
/// Where the driver keeps things.
const TABLE: u64 = 0x1000_0000 - 0x10_0000;
const AVAIL: u64 = TABLE + 0x1000;
const USED: u64 = TABLE + 0x2000;
pub(super) const BUFFERS: u64 = TABLE + 0x3000;
const LONG_TABLE: u64 = TABLE + 0x8000;

pub(super) const NEXT: u16 = 1;
pub(super) const WRITE: u16 = 2;
const INDIRECT: u16 = 4;
const NEEDS_RESET: u32 = 64;

/// A driver of one queue, for descriptors of any content.
pub(super) struct RawDriver {
    pub(super) transport: TestTransport,
    queue: u16,
    next: u16,
}

/// A descriptor: address, length, flags, next.
#[derive(Clone, Copy)]
pub(super) struct Raw(pub(super) u64, pub(super) u32, pub(super) u16, pub(super) u16);

impl RawDriver {
    pub(super) fn new(device: impl VirtioDevice + 'static) -> Self {
        Self::over(TestTransport::new(device), 0)
    }

    pub(super) fn over(transport: TestTransport, queue: u16) -> Self {
        let mut driver = Self { transport, queue, next: 0 };
        driver.begin();
        driver
    }

    pub(super) fn begin(&mut self) {
        let transport = &mut self.transport;
        transport.set_status(DeviceStatus::empty());
        transport.set_status(DeviceStatus::ACKNOWLEDGE | DeviceStatus::DRIVER);
        transport.write_driver_features(1 << 32);
        let ok = DeviceStatus::ACKNOWLEDGE | DeviceStatus::DRIVER | DeviceStatus::FEATURES_OK;
        transport.set_status(ok);
        assert_eq!(transport.get_status(), ok);
        for page in [AVAIL, USED] {
            ram().write(&[0; 0x1000], GuestAddress(page)).unwrap();
        }
        transport.queue_set(self.queue, SIZE.into(), TABLE, AVAIL, USED);
        transport.set_status(ok | DeviceStatus::DRIVER_OK);
        self.next = 0;
    }

    /// Writes descriptors, makes the first one available, and rings.
    pub(super) fn submit(&mut self, descriptors: &[Raw]) {
        self.write_descriptors(descriptors);
        self.offer(0);
        self.transport.write(0x50, self.queue.into());
    }

    pub(super) fn write_descriptors(&self, descriptors: &[Raw]) {
        write_table(TABLE, descriptors);
    }

    /// Makes the chain that begins with this descriptor available.
    pub(super) fn offer(&mut self, head: u16) {
        let slot = AVAIL + 4 + u64::from(self.next % SIZE) * 2;
        ram().write(&head.to_le_bytes(), GuestAddress(slot)).unwrap();
        self.next = self.next.wrapping_add(1);
        ram().write(&self.next.to_le_bytes(), GuestAddress(AVAIL + 2)).unwrap();
    }

    pub(super) fn used(&self) -> u16 {
        ram().inner().read_obj(GuestAddress(USED + 2)).unwrap()
    }

    /// How much was written, by the used ring's element `at`.
    pub(super) fn used_len(&self, at: u64) -> u32 {
        ram().inner().read_obj(GuestAddress(USED + 4 + at * 8 + 4)).unwrap()
    }

    /// Without EVENT_IDX, what the used ring's flags say.
    pub(super) fn wants_doorbell(&self) -> bool {
        ram().inner().read_obj::<u16>(GuestAddress(USED)).unwrap() == 0
    }

    pub(super) fn needs_reset(&self) -> bool {
        self.transport.read(0x70) & NEEDS_RESET != 0
    }

    /// A block request with this data for the device. Its status, where it was answered.
    pub(super) fn block_request(&mut self, kind: u32, sector: u64, data: &[u8]) -> Option<u8> {
        let mut header = u64::from(kind).to_le_bytes().to_vec();
        header.extend(sector.to_le_bytes());
        ram().write(&header, GuestAddress(BUFFERS)).unwrap();
        ram().write(data, GuestAddress(BUFFERS + 0x100)).unwrap();
        ram().write(&[0xee], GuestAddress(BUFFERS + 0x80)).unwrap();
        let before = self.used();
        self.submit(&[
            Raw(BUFFERS, 16, NEXT, 1),
            Raw(BUFFERS + 0x100, data.len() as u32, NEXT, 2),
            Raw(BUFFERS + 0x80, 1, WRITE, 0),
        ]);
        let begin = Instant::now();
        while self.used() == before && begin.elapsed() < Duration::from_secs(20) {
            std::thread::yield_now();
        }
        (self.used() != before)
            .then(|| ram().inner().read_obj(GuestAddress(BUFFERS + 0x80)).unwrap())
    }
}

/// Writes descriptors to a table.
fn write_table(table: u64, descriptors: &[Raw]) {
    for (at, Raw(address, len, flags, next)) in (0u64..).zip(descriptors) {
        let mut bytes = address.to_le_bytes().to_vec();
        bytes.extend(len.to_le_bytes());
        bytes.extend(flags.to_le_bytes());
        bytes.extend(next.to_le_bytes());
        ram().write(&bytes, GuestAddress(table + at * 16)).unwrap();
    }
}

pub(super) fn disk() -> Block {
    // The open file outlives its name.
    let image = Image::new("hostile", 1 << 20);
    block(&BlockConfig::new(&image.0))
}

#[test]
fn chains_that_break_the_rules_stop_the_device_until_it_is_reset() {
    let long: Vec<Raw> = (0..SIZE).map(|at| Raw(BUFFERS, 1, NEXT, (at + 1) % SIZE)).collect();
    let bad: [(&str, Vec<Raw>); 9] = [
        ("a loop of one", vec![Raw(BUFFERS, 16, NEXT, 0)]),
        ("a loop of all", long),
        ("a next outside of the table", vec![Raw(BUFFERS, 16, NEXT, SIZE)]),
        ("an address outside of memory", vec![Raw(u64::MAX - 8, 16, WRITE, 0)]),
        ("a buffer across the end of memory", vec![Raw((256 << 20) - 8, 16, WRITE, 0)]),
        ("a buffer of 4 GiB", vec![Raw(0, u32::MAX, WRITE, 0)]),
        ("reading after writing", vec![Raw(BUFFERS, 16, WRITE | NEXT, 1), Raw(BUFFERS, 16, 0, 0)]),
        ("an indirect table of no descriptors", vec![Raw(BUFFERS, 0, INDIRECT, 0)]),
        ("more descriptors than the queue has", vec![Raw(LONG_TABLE, 17 * 16, INDIRECT, 0)]),
    ];
    let table = (1..=17).map(|next| Raw(BUFFERS, 1, if next < 17 { NEXT } else { 0 }, next));
    write_table(LONG_TABLE, &table.collect::<Vec<_>>());
    for (name, chain) in bad {
        for device in ["block", "balloon", "rng", "net", "vsock"] {
            let mut driver = match device {
                "block" => RawDriver::new(disk()),
                "balloon" => RawDriver::new(Balloon::new(BalloonConfig::default())),
                "rng" => RawDriver::new(Rng::new(RateLimit::default()).unwrap()),
                // What the guest sends.
                "net" => RawDriver::over(TestTransport::new(cable(None).0), 1),
                _ => RawDriver::over(TestTransport::new(vsock()), 1),
            };
            driver.submit(&chain);
            assert!(driver.needs_reset(), "{device}: {name}");
            assert_eq!(driver.used(), 0, "{device}: {name}");
            // It does nothing more, and works again after a reset.
            driver.submit(&[Raw(BUFFERS, 17, WRITE, 0)]);
            assert_eq!(driver.used(), 0, "{device}: {name}");
            driver.begin();
            driver.submit(&[Raw(BUFFERS, 17, WRITE, 0)]);
            assert_eq!(driver.used(), 1, "{device}: {name}");
        }
    }
}

#[test]
fn requests_without_room_for_what_they_need_are_answered() {
    let mut driver = RawDriver::new(disk());
    for chain in [
        vec![Raw(BUFFERS, 16, 0, 0)],                               // no status
        vec![Raw(BUFFERS, 1, WRITE, 0)],                            // no header
        vec![Raw(BUFFERS, 15, NEXT, 1), Raw(BUFFERS, 1, WRITE, 0)], // half a header
        vec![Raw(BUFFERS, 0, NEXT, 1), Raw(BUFFERS, 0, WRITE, 0)],  // nothing at all
        vec![Raw(BUFFERS, 16, NEXT, 1), Raw(BUFFERS, 512, WRITE, 0)], // 511 bytes of data
    ] {
        let before = driver.used();
        driver.submit(&chain);
        assert_eq!(driver.used(), before + 1);
        assert!(!driver.needs_reset());
    }
}

#[test]
fn buffers_that_are_for_reading_are_not_written_to() {
    let fill = [0x5a; 64];
    let unchanged = |device: &str| {
        let mut bytes = [0; 64];
        ram().inner().read_slice(&mut bytes, GuestAddress(BUFFERS)).unwrap();
        assert_eq!(bytes, fill, "{device}");
    };
    ram().write(&fill, GuestAddress(BUFFERS)).unwrap();
    // A read of a disk, an id, random bytes, an event: there is nothing that they could go to.
    let mut rng = RawDriver::new(Rng::new(RateLimit::default()).unwrap());
    rng.submit(&[Raw(BUFFERS, 64, 0, 0)]);
    assert_eq!(rng.used_len(0), 0);
    unchanged("rng");
    let mut vsock = RawDriver::over(TestTransport::new(vsock()), 2);
    vsock.submit(&[Raw(BUFFERS, 64, 0, 0)]);
    unchanged("vsock");
    let mut block = RawDriver::new(disk());
    for kind in [0u32, 8] {
        ram().write(&u64::from(kind).to_le_bytes(), GuestAddress(BUFFERS + 0x100)).unwrap();
        ram().write(&[0; 8], GuestAddress(BUFFERS + 0x108)).unwrap();
        block.submit(&[
            Raw(BUFFERS + 0x100, 16, NEXT, 1),
            Raw(BUFFERS, 64, NEXT, 2),
            Raw(BUFFERS + 0x200, 1, WRITE, 0),
        ]);
        unchanged("block");
    }
    let (device, mut peer) = cable(None);
    let (transport, handle) = TestTransport::with_handle(device);
    let mut net = RawDriver::over(transport, 0);
    net.submit(&[Raw(BUFFERS, 64, 0, 0)]);
    peer.send(&[7; 14]);
    net::until("the frame is dropped", || net::counters(&handle).rx_dropped == 1);
    unchanged("net");
    assert!(![&rng, &vsock, &block, &net].iter().any(|driver| driver.needs_reset()));
}

#[test]
fn an_available_index_that_runs_away_stops_the_device() {
    let driver = RawDriver::new(Rng::new(RateLimit::default()).unwrap());
    ram().write(&(SIZE + 1).to_le_bytes(), GuestAddress(AVAIL + 2)).unwrap();
    driver.transport.write(0x50, 0);
    assert!(driver.needs_reset());
}

#[test]
fn a_queue_keeps_its_place_while_it_is_ready() {
    let mut driver = RawDriver::new(Rng::new(RateLimit::default()).unwrap());
    driver.transport.write(0x80, 0xdead_0000);
    driver.transport.write(0x38, 8);
    driver.submit(&[Raw(BUFFERS, 16, WRITE, 0)]);
    assert_eq!(driver.used(), 1);
}

#[test]
fn queues_outside_of_memory_are_never_ready() {
    let transport = TestTransport::new(Rng::new(RateLimit::default()).unwrap());
    for (register, value) in [(0x80, 0xffff_f000), (0x90, 0xffff_fffe), (0xa0, 0xffff_fffc)] {
        transport.write(0x70, 0);
        transport.write(0x38, 16);
        transport.write(0x80, TABLE as u32);
        transport.write(0x90, AVAIL as u32);
        transport.write(0xa0, USED as u32);
        transport.write(register, value);
        transport.write(0x44, 1);
        assert_eq!(transport.read(0x44), 0, "register {register:#x}");
    }
}

#[test]
fn features_that_were_not_offered_are_not_accepted() {
    let mut transport = TestTransport::new(Rng::new(RateLimit::default()).unwrap());
    for features in [0, 1 << 33 | 1 << 32, 1, u64::MAX] {
        transport.set_status(DeviceStatus::empty());
        transport.write_driver_features(features);
        transport.set_status(DeviceStatus::DRIVER | DeviceStatus::FEATURES_OK);
        assert_eq!(transport.get_status(), DeviceStatus::DRIVER, "{features:#x}");
    }
}

#[test]
fn registers_take_any_value_at_any_offset() {
    let mut driver = RawDriver::new(disk());
    for register in (0..0x1100).step_by(2) {
        for value in [0, 1, 0x7fff_ffff, u32::MAX] {
            // The status register alone ends what the others did.
            if register != 0x70 {
                driver.transport.write(register, value);
            }
            driver.transport.read(register);
        }
    }
    driver.begin();
    assert_eq!(driver.block_request(4, 0, &[]), Some(0), "it flushes");
}

#[test]
fn the_configuration_ends_where_it_ends() {
    let transport = TestTransport::new(disk());
    assert_eq!(transport.read(0x100), 2048, "sectors");
    assert_eq!(transport.read(0x100 + 60), 0);
    assert_eq!(transport.read(0xffc), 0);
}

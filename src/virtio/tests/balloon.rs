//! The memory balloon, with queues that are driven by hand.

use virtio_drivers::queue::VirtQueue;
use virtio_drivers::transport::{DeviceStatus, Transport};
use vm_memory::{Bytes, GuestAddress, GuestMemoryBackend};

use super::driver::{TestHal, TestTransport, ram};
use crate::config::BalloonConfig;
use crate::metrics::{BalloonMetrics, DeviceMetrics};
use crate::virtio::{Balloon, DeviceHandle};

const PAGE: u64 = 4096;
/// Pages that no queue or buffer of these tests is in.
const FREE: u64 = 32 << 10;
const STATS: u64 = 1 << 1;
const DEFLATE_ON_OOM: u64 = 1 << 2;
const REPORTING: u64 = 1 << 5;
const VERSION_1: u64 = 1 << 32;

type Queue = VirtQueue<TestHal, 16>;

/// A driver that has chosen these features and set up these queues.
pub(super) struct Driver {
    pub(super) transport: TestTransport,
    pub(super) host: DeviceHandle<Balloon>,
    pub(super) queues: Vec<Queue>,
}

impl Driver {
    pub(super) fn new(config: BalloonConfig, features: u64, queues: &[u16]) -> Self {
        let (mut transport, host) = TestTransport::with_handle(Balloon::new(config));
        let ok = DeviceStatus::ACKNOWLEDGE | DeviceStatus::DRIVER | DeviceStatus::FEATURES_OK;
        transport.write_driver_features(features | VERSION_1);
        transport.set_status(ok);
        assert_eq!(transport.get_status(), ok, "{features:#x}");
        let queues = queues
            .iter()
            .map(|index| Queue::new(&mut transport, *index, false, false).unwrap())
            .collect();
        transport.set_status(ok | DeviceStatus::DRIVER_OK);
        Self { transport, host, queues }
    }

    /// Sends page numbers to a queue, and waits until they come back.
    fn send(&mut self, queue: usize, pfns: impl IntoIterator<Item = u32>) {
        let list: Vec<u8> = pfns.into_iter().flat_map(u32::to_le_bytes).collect();
        let queue = &mut self.queues[queue];
        queue.add_notify_wait_pop(&[&list], &mut [], &mut self.transport).unwrap();
    }

    fn metrics(&self) -> BalloonMetrics {
        match self.host.metrics() {
            DeviceMetrics::Balloon(metrics) => metrics,
            other => panic!("{other:?}"),
        }
    }
}

/// Writes to pages, so that the host has to have them.
fn touch(pages: std::ops::Range<u64>) {
    for page in pages {
        ram().write(&[0xa5; PAGE as usize], GuestAddress(page * PAGE)).unwrap();
    }
}

/// How many pages of a range the host has.
fn resident(pages: std::ops::Range<u64>) -> usize {
    let start = ram().inner().get_host_address(GuestAddress(pages.start * PAGE)).unwrap();
    let mut there = vec![0u8; (pages.end - pages.start) as usize];
    let len = there.len() * PAGE as usize;
    // SAFETY: the range is inside the test's RAM, and there is a byte for each of its pages.
    assert_eq!(unsafe { libc::mincore(start.cast(), len, there.as_mut_ptr()) }, 0);
    there.iter().filter(|page| **page & 1 != 0).count()
}

fn byte_of(page: u64) -> u8 {
    ram().inner().read_obj(GuestAddress(page * PAGE)).unwrap()
}

#[test]
fn pages_in_the_balloon_cost_the_host_nothing_and_come_back_as_zeroes() {
    let mut driver = Driver::new(BalloonConfig::default(), STATS, &[0, 1]);
    touch(FREE..FREE + 4096);
    assert_eq!(resident(FREE..FREE + 4096), 4096);
    // As Linux does it: 256 at a time, from the top; here with every fourth left out.
    let pages: Vec<u32> =
        (FREE as u32..FREE as u32 + 4096).rev().filter(|pfn| pfn % 4 != 0).collect();
    for pfns in pages.chunks(256) {
        driver.send(0, pfns.iter().copied());
    }
    assert_eq!(resident(FREE..FREE + 4096), 1024, "what is not in the balloon stays");
    assert_eq!((byte_of(FREE), byte_of(FREE + 1)), (0xa5, 0));
    driver.send(1, pages.iter().copied().take(256));
    touch(FREE + 4000..FREE + 4096);
    assert_eq!(byte_of(FREE + 4095), 0xa5);
    let inflated_bytes = 3072 * PAGE;
    let deflated_bytes = 256 * PAGE;
    assert_eq!(
        driver.metrics(),
        BalloonMetrics { inflated_bytes, deflated_bytes, ..BalloonMetrics::default() }
    );
}

#[test]
fn lists_that_lie_touch_nothing_but_the_pages_that_they_name() {
    let mut driver = Driver::new(BalloonConfig::default(), STATS, &[0, 1]);
    touch(FREE..FREE + 64);
    let last = (256 << 20) / PAGE as u32 - 1;
    touch(u64::from(last)..u64::from(last) + 1);
    let page = FREE as u32 + 7;
    driver.send(0, [page, last + 1, u32::MAX, page, 0x8000_0000, last + 2, page, u32::MAX - 1]);
    assert_eq!(resident(FREE..FREE + 64), 63);
    assert_eq!(driver.metrics().inflated_bytes, PAGE);
    assert_eq!(driver.metrics().refused_pages, 7);
    // A run that begins in RAM and goes on past its end.
    driver.send(0, [last + 1, last, last + 2]);
    assert_eq!(byte_of(last.into()), 0);
    assert_eq!(driver.metrics().inflated_bytes, 2 * PAGE);
    // A list of a million, of which the first thousand count; half a number at the end.
    touch(FREE..FREE + 64);
    driver.send(0, (0..1 << 20).map(|at| FREE as u32 + (at % 16)));
    assert_eq!(resident(FREE..FREE + 64), 48);
    driver.send(1, (0..1 << 20).map(|_| u32::MAX));
    let (queue, transport) = (&mut driver.queues[0], &mut driver.transport);
    queue.add_notify_wait_pop(&[&[1, 2, 3]], &mut [], transport).unwrap();
    queue.add_notify_wait_pop(&[], &mut [&mut [0; 64]], transport).unwrap();
    assert_eq!(resident(FREE..FREE + 64), 48);
    assert!(!driver.transport.get_status().contains(DeviceStatus::DEVICE_NEEDS_RESET));
}

#[test]
fn the_target_reaches_the_driver_and_its_size_the_host() {
    let mut driver =
        Driver::new(BalloonConfig::default().deflate_on_oom(true), DEFLATE_ON_OOM, &[0]);
    let generation = driver.transport.read_config_generation();
    driver.host.reconfigure(|balloon| balloon.set_target(5000));
    assert_ne!(driver.transport.read_config_generation(), generation);
    assert_eq!(driver.transport.read(0x60), 2, "the configuration changed");
    assert_eq!(driver.transport.read_config_space::<u32>(0).unwrap(), 5000);
    driver.transport.write_config_space(4, 4711u32).unwrap();
    assert_eq!(driver.transport.read_config_space::<u32>(4).unwrap(), 4711);
    // The target is the host's, and the space ends where it ends.
    driver.transport.write_config_space(0, 1u32).unwrap();
    driver.transport.write_config_space(8, 1u32).unwrap();
    driver.transport.write_config_space(4, 1u64).unwrap();
    let status = driver.host.with(|balloon| balloon.status());
    assert_eq!((status.target_bytes, status.actual_bytes), (5000 * PAGE, 4711 * PAGE));
    assert_eq!(driver.transport.read_config_space::<u64>(8).unwrap(), 0);
    driver.transport.set_status(DeviceStatus::empty());
    let status = driver.host.with(|balloon| balloon.status());
    assert_eq!((status.target_bytes, status.actual_bytes), (5000 * PAGE, 0));
}

/// `struct virtio_balloon_stat`s.
fn answer(stats: &[(u16, u64)]) -> Vec<u8> {
    let bytes = |(tag, value): &(u16, u64)| [&tag.to_le_bytes()[..], &value.to_le_bytes()].concat();
    stats.iter().flat_map(bytes).collect()
}

#[test]
fn statistics_come_when_the_host_asks_and_are_kept() {
    let mut driver = Driver::new(BalloonConfig::default(), STATS, &[0, 1, 2]);
    assert_eq!(driver.host.with(|balloon| balloon.status()).stats, None);
    driver.host.call(Balloon::ask_for_stats).unwrap();
    let transport = &mut driver.transport;
    let queue = &mut driver.queues[2];
    let mut offer = |driver_answer: &[u8]| {
        // SAFETY: the buffer is a copy in the test's RAM, by TestHal.
        let token = unsafe { queue.add(&[driver_answer], &mut []) }.unwrap();
        transport.notify(2);
        assert!(!queue.can_pop(), "the device keeps the buffer until the host asks");
        driver.host.call(Balloon::ask_for_stats).unwrap();
        assert_eq!(queue.peek_used(), Some(token));
        // SAFETY: the same buffer.
        unsafe { queue.pop_used(token, &[driver_answer], &mut []) }.unwrap();
        driver.host.with(|balloon| balloon.status()).stats.unwrap()
    };
    let begin = std::time::SystemTime::now();
    let stats = offer(&answer(&[(4, 100), (5, 200), (0, 7), (9, 9), (10, 1), (4, 300)]));
    assert!(stats.taken >= begin);
    assert_eq!((stats.memfree, stats.memtot, stats.swap_in), (Some(300), Some(200), Some(7)));
    assert_eq!((stats.htlb_pgfail, stats.avail), (Some(9), None));
    // Unknown tags, half a statistic, and far too many.
    let mut odd = answer(&[(u16::MAX, 1), (6, 5)]);
    odd.extend([4, 0, 1]);
    assert_eq!((offer(&odd).avail, offer(&odd).memfree), (Some(5), None));
    let many: Vec<(u16, u64)> = (0..20_000).map(|at| (at as u16 % 12, at)).collect();
    assert_eq!(offer(&answer(&many)).swap_in, Some(60));
    assert_eq!(offer(&[1]).swap_in, None);
}

#[test]
fn statistics_whose_doorbell_came_too_early_are_found() {
    let mut driver = Driver::new(BalloonConfig::default(), STATS, &[2]);
    // SAFETY: the buffer is a copy in the test's RAM, by TestHal, and static.
    unsafe { driver.queues[0].add(&[b"\x04\0abcdefgh"], &mut []) }.unwrap();
    driver.host.call(Balloon::ask_for_stats).unwrap();
    assert!(driver.queues[0].can_pop());
    assert!(driver.host.with(|balloon| balloon.status()).stats.unwrap().memfree.is_some());
}

#[test]
fn a_driver_with_many_buffers_for_statistics_gets_all_but_one_back() {
    let mut driver = Driver::new(BalloonConfig::default(), STATS, &[0, 1, 2]);
    let queue = &mut driver.queues[2];
    for at in 0..10 {
        // SAFETY: the buffer is a copy in the test's RAM, by TestHal, and static.
        unsafe { queue.add(&[b"0123456789"], &mut []) }.unwrap();
        if at % 3 == 0 {
            driver.transport.notify(2);
        }
    }
    let mut back = 0;
    while let Some(token) = queue.peek_used() {
        // SAFETY: the same buffer.
        unsafe { queue.pop_used(token, &[b"0123456789"], &mut []) }.unwrap();
        back += 1;
    }
    assert_eq!(back, 9);
}

#[test]
fn reported_pages_cost_the_host_nothing_on_either_reporting_queue() {
    let config = BalloonConfig::default().free_page_reporting(true);
    // Where the specification has the queue, where Linux has it, and where Linux would have it
    // without statistics.
    for (features, index) in [(STATS, 4), (STATS, 3), (0, 2)] {
        let mut driver = Driver::new(config, features | REPORTING, &[0, 1, index]);
        touch(FREE..FREE + 1024);
        // Pages of RAM are no memory of the driver's here, so that the descriptor is written by
        // hand: one of 512 pages, less some bytes at both ends.
        let table = 200 << 20;
        for address in [table, table + PAGE, table + 2 * PAGE] {
            ram().write(&[0; PAGE as usize], GuestAddress(address)).unwrap();
        }
        let transport = &mut driver.transport;
        transport.queue_unset(index);
        transport.queue_set(index, 16, table, table + PAGE, table + 2 * PAGE);
        let mut descriptor = (FREE * PAGE + 1).to_le_bytes().to_vec();
        descriptor.extend((512 * PAGE as u32 - 2).to_le_bytes());
        descriptor.extend([2, 0, 0, 0]);
        ram().write(&descriptor, GuestAddress(table)).unwrap();
        ram().write(&1u16.to_le_bytes(), GuestAddress(table + PAGE + 2)).unwrap();
        transport.set_status(transport.get_status());
        transport.notify(index);
        let used: u16 = ram().inner().read_obj(GuestAddress(table + 2 * PAGE + 2)).unwrap();
        assert_eq!(used, 1, "queue {index}");
        assert_eq!(resident(FREE..FREE + 1024), 1024 - 510, "queue {index}");
        assert_eq!((byte_of(FREE), byte_of(FREE + 511)), (0xa5, 0xa5));
        assert_eq!(driver.metrics().reported_bytes, 510 * PAGE);
    }
}

#[test]
fn queues_whose_features_were_not_chosen_are_left_alone() {
    let config = BalloonConfig::default().free_page_reporting(true);
    let mut driver = Driver::new(config, 0, &[0, 1, 2, 3, 4]);
    for queue in 2..5 {
        // SAFETY: the buffer is a copy in the test's RAM, by TestHal, and static.
        unsafe { driver.queues[queue].add(&[b"0123456789"], &mut []) }.unwrap();
        driver.transport.notify(queue as u16);
        assert!(!driver.queues[queue].can_pop());
    }
    driver.host.call(Balloon::ask_for_stats).unwrap();
    assert_eq!(driver.host.with(|balloon| balloon.status()).stats, None);
}

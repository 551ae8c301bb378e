//! What one device may take of the thread that serves all, and what it is answered when it, or the
//! host's file under it, takes too much or fails.

use std::fs::File;
use std::os::fd::{AsRawFd, FromRawFd, OwnedFd};
use std::os::unix::fs::FileExt;
use std::path::PathBuf;

use virtio_drivers::device::blk::VirtIOBlk;
use virtio_drivers::transport::{DeviceStatus, Transport};
use vm_memory::GuestAddress;

use super::block::{Image, block};
use super::driver::{TestHal, TestTransport, ram};
use super::hostile::{BUFFERS, NEXT, Raw, RawDriver, WRITE, disk};
use super::net::cable;
use crate::config::{BalloonConfig, BlockConfig, RateLimit};
use crate::metrics::DeviceMetrics;
use crate::virtio::{Balloon, Rng, Served};

#[test]
fn a_guest_that_asks_for_much_gets_it_in_turns_with_the_others() {
    let rng = Rng::new(RateLimit::default()).unwrap();
    let (transport, handle) = TestTransport::with_handle(rng);
    let mut driver = RawDriver::over(transport, 0);
    // 64 KiB, sixteen times: four in a turn.
    driver.write_descriptors(&[Raw(0, 64 << 10, WRITE, 0)]);
    (0..16).for_each(|_| driver.offer(0));
    for turn in 1..=4 {
        assert_eq!(handle.serve(0), Served::Some);
        assert_eq!(driver.used(), 4 * turn);
    }
    assert_eq!(handle.serve(0), Served::All);
    assert!(!driver.needs_reset());
}

#[test]
fn pages_that_are_no_neighbours_are_given_back_in_turns() {
    let (transport, handle) = TestTransport::with_handle(Balloon::new(BalloonConfig::default()));
    let mut driver = RawDriver::over(transport, 0);
    let list: Vec<u8> = (0..1024u32).flat_map(|page| (0x8000 + 2 * page).to_le_bytes()).collect();
    ram().write(&list, GuestAddress(BUFFERS)).unwrap();
    driver.write_descriptors(&[Raw(BUFFERS, 4096, 0, 0)]);
    (0..4).for_each(|_| driver.offer(0));
    for turn in 1..=4 {
        assert_eq!(handle.serve(0), Served::Some);
        assert_eq!(driver.used(), turn);
    }
    assert_eq!(handle.serve(0), Served::All);
}

#[test]
fn a_doorbell_of_no_queue_is_nobodys() {
    let (device, _peer) = cable(None);
    let mut driver = RawDriver::over(TestTransport::new(device), 1);
    driver.write_descriptors(&[Raw(BUFFERS, 112, 0, 0)]);
    driver.offer(0);
    driver.transport.write(0x50, 7);
    assert_eq!(driver.used(), 0);
    driver.transport.write(0x50, 1);
    assert_eq!(driver.used(), 1);
    // No device has a region of shared memory.
    assert_eq!([0xb0, 0xb4].map(|register| driver.transport.read(register)), [u32::MAX; 2]);
}

#[test]
fn a_driver_with_more_requests_in_flight_than_descriptors_is_stopped() {
    // Past the page cache, so that requests wait; and the queue's operations are never done.
    let image = Image::new("flight", 1 << 20);
    let (transport, handle) = TestTransport::with_handle(super::threads::hanging(&image));
    let mut driver = RawDriver::over(transport, 0);
    driver.write_descriptors(&[
        Raw(BUFFERS, 16, NEXT, 1),
        Raw(0, 4096, NEXT | WRITE, 2),
        Raw(BUFFERS + 16, 1, WRITE, 0),
    ]);
    ram().write(&[0; 16], GuestAddress(BUFFERS)).unwrap();
    // The same descriptors again and again, though the device has not given them back.
    let mut offered = 0;
    while !driver.needs_reset() {
        (0..16).for_each(|_| driver.offer(0));
        offered += 16;
        assert!(offered <= 512, "{offered} requests are in flight");
        handle.serve(0);
    }
    assert!(offered > 256);
    assert_eq!(driver.used(), 0);
    handle.close();
}

/// A file in memory that is neither written to nor grows any more: what fails on it fails as on a
/// full or broken disk.
fn sealed(content: &[u8]) -> (OwnedFd, PathBuf) {
    // SAFETY: the name is a C string; a descriptor that was made is nobody else's.
    let file = unsafe {
        let fd =
            libc::memfd_create(c"sealed".as_ptr(), libc::MFD_CLOEXEC | libc::MFD_ALLOW_SEALING);
        assert!(fd >= 0);
        OwnedFd::from_raw_fd(fd)
    };
    let file = File::from(file);
    file.write_all_at(content, 0).unwrap();
    let seals = libc::F_SEAL_WRITE | libc::F_SEAL_GROW | libc::F_SEAL_SHRINK;
    // SAFETY: the call has no memory arguments.
    assert_eq!(unsafe { libc::fcntl(file.as_raw_fd(), libc::F_ADD_SEALS, seals) }, 0);
    let path = format!("/proc/self/fd/{}", file.as_raw_fd()).into();
    (file.into(), path)
}

#[test]
fn writes_that_fail_on_the_host_are_errors_in_the_guest_and_reads_go_on() {
    let content = vec![0x5a; 64 << 10];
    let (_file, path) = sealed(&content);
    let (transport, handle) = TestTransport::with_handle(block(&BlockConfig::new(path)));
    let mut driver = VirtIOBlk::<TestHal, _>::new(transport).unwrap();
    for sector in [0, 8, 100] {
        assert!(driver.write_blocks(sector, &[1; 4096]).is_err());
        let mut read = [0; 4096];
        driver.read_blocks(sector, &mut read).unwrap();
        assert_eq!(read, [0x5a; 4096]);
    }
    driver.flush().unwrap();
    let DeviceMetrics::Block(metrics) = handle.metrics() else { panic!("no disk") };
    assert_eq!((metrics.errors, metrics.writes, metrics.reads), (3, 0, 3));
}

#[test]
fn a_driver_that_comes_again_may_choose_other_features_and_another_queue() {
    let image = Image::new("again", 64 * 512);
    let (transport, handle) = TestTransport::with_handle(block(&BlockConfig::new(&image.0)));
    // With indirect descriptors and EVENT_IDX, ...
    let mut first = VirtIOBlk::<TestHal, _>::new(transport).unwrap();
    first.write_blocks(3, &[3; 512]).unwrap();
    let of_first = handle.state().queues[0];
    assert!(of_first.event_idx && of_first.ready);
    // ... then without, in another place, after the first one's queue was left as it was.
    let mut second = RawDriver::over(TestTransport::of(&handle), 0);
    assert_eq!(second.block_request(1, 4, &[4; 512]), Some(0));
    let of_second = handle.state().queues[0];
    assert!(!of_second.event_idx && of_second.descriptor_table != of_first.descriptor_table);
    assert_eq!((of_second.next_avail, of_second.next_used), (1, 1));
    // ... and as at first.
    let mut third = VirtIOBlk::<TestHal, _>::new(TestTransport::of(&handle)).unwrap();
    let mut read = [0; 1024];
    third.read_blocks(3, &mut read).unwrap();
    assert_eq!(read, [[3; 512], [4; 512]].concat()[..]);
    assert!(handle.state().queues[0].event_idx);
}

#[test]
fn a_reset_leaves_nothing_of_what_was_in_the_queue() {
    let mut driver = RawDriver::new(disk());
    driver.write_descriptors(&[Raw(BUFFERS, 16, NEXT, 1), Raw(BUFFERS + 16, 1, WRITE, 0)]);
    driver.offer(0);
    let transport = &mut driver.transport;
    transport.set_status(DeviceStatus::empty());
    transport.write(0x50, 0);
    assert_eq!(driver.used(), 0, "a device that was reset serves nothing");
    driver.begin();
    assert_eq!(driver.block_request(4, 0, &[]), Some(0));
    assert_eq!(driver.used(), 1, "the request before the reset was answered");
}

//! What two threads share: a device between its driver, its sources and the host; and the rings
//! between a driver and a device that both sleep.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering, fence};
use std::thread;
use std::time::{Duration, Instant};

use virtio_drivers::device::blk::{BlkReq, BlkResp, VirtIOBlk};
use vm_memory::{Bytes, GuestAddress};
use vmm_sys_util::eventfd::EventFd;

use super::block::{Image, block};
use super::driver::{TestHal, TestTransport};
use crate::bus::BusDevice;
use crate::config::{BlockConfig, RateLimit};
use crate::disk::Disk;
use crate::memory::{FileIo, GuestRam, IoQueue, Workers};
use crate::virtio::state::QueueState;
use crate::virtio::{Answer, Block, Interrupt, MmioTransport, Queues, VirtQueue, VirtioDevice};

/// Only a failing test waits so long.
const PATIENCE: Duration = Duration::from_secs(60);

/// Sets a flag when it goes, also where an assertion fails: else the threads that wait for the flag, and the scope that
/// waits for them, would go on for ever.
pub(super) struct SetAtEnd<'a>(pub(super) &'a AtomicBool);

impl Drop for SetAtEnd<'_> {
    fn drop(&mut self) {
        self.0.store(true, Ordering::SeqCst);
    }
}

#[test]
fn a_disk_that_the_host_pauses_and_changes_all_the_time_loses_nothing() {
    let image = Image::new("busy", 64 * 512);
    // Past the page cache, so that requests are in flight when the pause comes.
    let config = BlockConfig::new(&image.0).direct(true);
    let (transport, handle) = TestTransport::with_handle(block(&config));
    let over = AtomicBool::new(false);
    thread::scope(|scope| {
        let _end = SetAtEnd(&over);
        let host = |act: &'static (dyn Fn(&crate::virtio::DeviceHandle<_>) + Sync)| {
            let (handle, over) = (&handle, &over);
            scope.spawn(move || {
                while !over.load(Ordering::Relaxed) {
                    act(handle);
                    thread::yield_now();
                }
            });
        };
        host(&|device| {
            device.pause();
            device.resume();
            // What the machine does: the doorbells that rang meanwhile ring again.
            device.serve(0);
        });
        host(&|device| device.with(|disk| disk.set_rate_limit(RateLimit::default())));
        host(&|device| drop((device.metrics(), device.state())));
        let mut driver = VirtIOBlk::<TestHal, _>::new(transport).unwrap();
        for round in 0..400usize {
            let written = [round as u8; 4096];
            driver.write_blocks(round % 8 * 8, &written).unwrap();
            let mut read = [0; 4096];
            driver.read_blocks(round % 8 * 8, &mut read).unwrap();
            assert_eq!(read, written);
            if round % 50 == 0 {
                driver.flush().unwrap();
            }
        }
    });
    assert_eq!(handle.call(|disk, _| Ok(VirtioDevice::in_flight(disk))).unwrap(), 0);
}

/// A disk whose operations are never done, where they have to wait: no thread works at them.
pub(super) fn hanging(image: &Image) -> Block {
    by_threads(image).0
}

/// A disk whose operations wait for threads that work at them, of which there is none yet.
fn by_threads(image: &Image) -> (Block, Arc<Workers>) {
    let (queue, workers) = IoQueue::workers().unwrap();
    let config = past_the_cache(image);
    let io = FileIo::new(&Arc::new(queue)).unwrap();
    (Block::new(Disk::open(&config).unwrap(), io, &config).unwrap(), workers)
}

fn past_the_cache(image: &Image) -> BlockConfig {
    BlockConfig::new(&image.0).direct(true)
}

#[test]
fn a_reset_does_not_wait_for_a_disk_whose_machine_is_over() {
    let image = Image::new("over", 64 * 512);
    let (transport, handle) = TestTransport::with_handle(hanging(&image));
    let mut driver = VirtIOBlk::<TestHal, _>::new(transport).unwrap();
    let (mut request, mut response) = (BlkReq::default(), BlkResp::default());
    let mut bytes = vec![0; 4096];
    // SAFETY: the buffers are there until the end, and the device never touches them.
    unsafe { driver.read_blocks_nb(0, &mut request, &mut bytes, &mut response) }.unwrap();
    let in_flight = || handle.call(|disk, _| Ok(VirtioDevice::in_flight(disk))).unwrap();
    assert_eq!(in_flight(), 1);
    let host = handle.clone();
    let closer = thread::spawn(move || {
        thread::sleep(Duration::from_millis(20));
        host.close();
    });
    // The driver resets the device by the status register, and would wait for ever.
    MmioTransport::new(handle.erase()).write(0x70, &[0; 4]);
    closer.join().unwrap();
    assert_eq!(in_flight(), 0);
}

#[test]
fn a_vm_that_is_over_waits_for_a_hung_disk_for_a_while_only_and_keeps_it_locked() {
    let image = Image::new("hung", 64 * 512);
    let (disk, workers) = by_threads(&image);
    let (transport, handle) = TestTransport::with_handle(disk);
    let mut driver = VirtIOBlk::<TestHal, _>::new(transport).unwrap();
    let (mut request, mut response) = (BlkReq::default(), BlkResp::default());
    let mut bytes = vec![0; 4096];
    // SAFETY: the buffers are there until the end, and the device never touches them.
    unsafe { driver.read_blocks_nb(0, &mut request, &mut bytes, &mut response) }.unwrap();
    // Nothing takes it back once it has begun.
    let begun = workers.take_one();
    handle.give_up();
    handle.drain(Instant::now() + Duration::from_millis(20));
    let in_flight = || handle.call(|disk, _| Ok(VirtioDevice::in_flight(disk))).unwrap();
    assert_eq!(in_flight(), 1);
    handle.close();
    assert_eq!(in_flight(), 0);
    // Nobody else has the disk while the operation may still come to it.
    let error = Disk::open(&past_the_cache(&image)).unwrap_err();
    assert!(error.to_string().contains("in use"), "{error}");
    drop(begun);
    Disk::open(&past_the_cache(&image)).unwrap();
}

#[test]
fn a_pause_does_not_wait_for_a_driver_that_says_it_is_none_any_more() {
    let image = Image::new("none", 64 * 512);
    let (disk, workers) = by_threads(&image);
    let (transport, handle) = TestTransport::with_handle(disk);
    let mut driver = VirtIOBlk::<TestHal, _>::new(transport).unwrap();
    let (mut request, mut response) = (BlkReq::default(), BlkResp::default());
    let mut bytes = vec![0; 4096];
    // SAFETY: the buffers are there until the end of the test, before which the operation ends.
    unsafe { driver.read_blocks_nb(0, &mut request, &mut bytes, &mut response) }.unwrap();
    // ACKNOWLEDGE alone.
    MmioTransport::new(handle.erase()).write(0x70, &1u32.to_le_bytes());
    thread::spawn(move || workers.work());
    let pausing = handle.clone();
    let paused = thread::spawn(move || pausing.pause());
    let begin = Instant::now();
    while !paused.is_finished() {
        assert!(begin.elapsed() < PATIENCE, "the pause waits for ever");
        handle.ready(0);
        thread::sleep(Duration::from_millis(1));
    }
    paused.join().unwrap();
}

const SIZE: u16 = 8;
const TABLE: u64 = 0x1000;
const AVAILABLE: u64 = 0x2000;
const USED: u64 = 0x3000;
/// Where EVENT_IDX has the driver's wish for an interrupt, and the device's for a doorbell.
const USED_EVENT: u64 = AVAILABLE + 4 + 2 * SIZE as u64;
const AVAIL_EVENT: u64 = USED + 4 + 8 * SIZE as u64;

/// A driver as §2.7.13 has it, on a thread of its own.
struct Driver {
    ram: Arc<GuestRam>,
    doorbell: EventFd,
    line: EventFd,
    available: u16,
    used: u16,
}

impl Driver {
    fn load(&self, address: u64) -> u16 {
        self.ram.inner().load(GuestAddress(address), Ordering::Acquire).unwrap()
    }

    fn store(&self, address: u64, value: u16) {
        self.ram.inner().store(value, GuestAddress(address), Ordering::Release).unwrap();
    }

    /// Offers one request, and rings if the device wants that.
    fn offer(&mut self) {
        let slot = u64::from(self.available % SIZE);
        self.store(AVAILABLE + 4 + 2 * slot, slot as u16);
        let before = self.available;
        self.available = self.available.wrapping_add(1);
        self.store(AVAILABLE + 2, self.available);
        fence(Ordering::SeqCst);
        if self.load(AVAIL_EVENT) == before {
            self.doorbell.write(1).unwrap();
        }
    }

    /// Waits for an answer, asleep until an interrupt.
    fn wait(&mut self) {
        loop {
            self.store(USED_EVENT, self.used);
            fence(Ordering::SeqCst);
            if self.load(USED + 2) != self.used {
                self.used = self.used.wrapping_add(1);
                return;
            }
            sleep_on(&self.line, "an interrupt is lost");
        }
    }
}

fn sleep_on(event: &EventFd, what: &str) {
    let begin = Instant::now();
    while event.read().is_err() {
        assert!(begin.elapsed() < PATIENCE, "{what}");
        thread::yield_now();
    }
}

#[test]
fn no_doorbell_and_no_interrupt_is_lost_between_two_threads() {
    const REQUESTS: usize = 200_000;
    let ram = Arc::new(GuestRam::fresh(&[(GuestAddress(0), 0x10000)]).unwrap());
    for slot in 0..u64::from(SIZE) {
        // One byte to write to.
        let descriptor = [&0x8000u64.to_le_bytes()[..], &[1, 0, 0, 0, 2, 0, 0, 0]].concat();
        ram.write(&descriptor, GuestAddress(TABLE + 16 * slot)).unwrap();
    }
    let line = EventFd::new(libc::EFD_NONBLOCK).unwrap();
    let doorbell = EventFd::new(libc::EFD_NONBLOCK).unwrap();
    let interrupt = Arc::new(Interrupt::new(line.try_clone().unwrap()));
    let mut queue = VirtQueue::new(SIZE, interrupt).unwrap();
    let state = QueueState {
        size: SIZE,
        ready: true,
        event_idx: true,
        next_avail: 0,
        next_used: 0,
        descriptor_table: TABLE,
        available_ring: AVAILABLE,
        used_ring: USED,
    };
    assert!(queue.restore(&state, &ram));
    let mut driver = Driver { ram: Arc::clone(&ram), doorbell, line, available: 0, used: 0 };
    let rung = driver.doorbell.try_clone().unwrap();
    thread::scope(|scope| {
        scope.spawn(|| {
            let mut served = 0;
            while served < REQUESTS {
                let mut queues = Queues::new(&ram, std::slice::from_mut(&mut queue));
                queues
                    .serve(0, |_| {
                        served += 1;
                        Answer::Used(0)
                    })
                    .unwrap();
                if served < REQUESTS {
                    sleep_on(&rung, "a doorbell is lost");
                }
            }
        });
        // Now and then as many as there is room for, mostly one after the other.
        let mut offered = 0;
        while offered < REQUESTS {
            let burst =
                if offered % 5 == 0 { usize::from(SIZE) } else { 1 }.min(REQUESTS - offered);
            (0..burst).for_each(|_| driver.offer());
            (0..burst).for_each(|_| driver.wait());
            offered += burst;
        }
    });
}

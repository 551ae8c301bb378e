use std::fs::{self, File};
use std::os::unix::fs::{FileExt, MetadataExt};
use std::path::PathBuf;
use std::sync::atomic::{AtomicU32, Ordering};

use virtio_drivers::device::blk::{BlkReq, BlkResp, VirtIOBlk};

use super::driver::{TestHal, TestTransport, assert_nothing_was_written_too_late};
use super::net::until;
use crate::config::{BlockConfig, RateLimit};
use crate::disk::Disk;
use crate::machine::disk_io;
use crate::memory::FileIo;
use crate::virtio::{Block, VirtioDevice};

/// A disk of a configuration, whose requests wait as those of a machine do.
pub(super) fn block(config: &BlockConfig) -> Block {
    let queue = disk_io::queue().unwrap();
    let disk = Disk::open(config).unwrap();
    Block::new(disk, FileIo::new(&queue).unwrap(), config).unwrap()
}

/// A file of random bytes, which goes with it.
pub(super) struct Image(pub(super) PathBuf);

impl Image {
    pub(super) fn new(name: &str, bytes: usize) -> Self {
        static COUNT: AtomicU32 = AtomicU32::new(0);
        let unique = (std::process::id(), COUNT.fetch_add(1, Ordering::Relaxed));
        let name = format!("dormouse-{name}-{}-{}", unique.0, unique.1);
        let path = std::env::temp_dir().join(name);
        let content: Vec<u8> = (0..bytes).map(|at| (at / 512 * 31 + at) as u8).collect();
        fs::write(&path, content).unwrap();
        Self(path)
    }

    pub(super) fn content(&self) -> Vec<u8> {
        fs::read(&self.0).unwrap()
    }
}

impl Drop for Image {
    fn drop(&mut self) {
        let _ = fs::remove_file(&self.0);
    }
}

/// A file of random bytes, and a driver of a disk on it.
struct TestDisk {
    image: Image,
    driver: VirtIOBlk<TestHal, TestTransport>,
}

impl TestDisk {
    fn new(name: &str, bytes: usize) -> Self {
        Self::with(name, bytes, |config| config)
    }

    fn with(name: &str, bytes: usize, change: fn(BlockConfig) -> BlockConfig) -> Self {
        let image = Image::new(name, bytes);
        let config = change(BlockConfig::new(&image.0).id("dormouse"));
        let driver = VirtIOBlk::new(TestTransport::new(block(&config))).unwrap();
        Self { image, driver }
    }

    fn content(&self) -> Vec<u8> {
        self.image.content()
    }
}

#[test]
fn sectors_are_read_and_written_where_they_are() {
    let mut disk = TestDisk::new("rw", 64 * 512 + 100);
    assert_eq!(disk.driver.capacity(), 64, "the incomplete sector is left out");
    assert!(!disk.driver.readonly());
    let before = disk.content();
    let mut read = vec![0; 8 * 512];
    disk.driver.read_blocks(5, &mut read).unwrap();
    assert_eq!(read, before[5 * 512..13 * 512]);

    let written: Vec<u8> = (0..3 * 512).map(|at| at as u8 ^ 0x5a).collect();
    disk.driver.write_blocks(61, &written).unwrap();
    disk.driver.flush().unwrap();
    let after = disk.content();
    assert_eq!(after[61 * 512..64 * 512], written);
    assert_eq!(after[..61 * 512], before[..61 * 512]);
    assert_eq!(after[64 * 512..], before[64 * 512..]);
}

#[test]
fn sectors_past_the_end_are_errors_and_change_nothing() {
    let mut disk = TestDisk::new("end", 16 * 512);
    let before = disk.content();
    for (sector, count) in [(16, 1), (15, 2), (0, 17), (usize::MAX / 512, 1), (usize::MAX, 1)] {
        let mut buffer = vec![0; count * 512];
        assert!(disk.driver.read_blocks(sector, &mut buffer).is_err());
        assert!(disk.driver.write_blocks(sector, &buffer).is_err());
    }
    assert_eq!(disk.content(), before);
}

#[test]
fn write_to_read_only_disk_is_an_error() {
    let mut disk = TestDisk::with("ro", 16 * 512, BlockConfig::read_only);
    assert!(disk.driver.readonly());
    let before = disk.content();
    assert!(disk.driver.write_blocks(0, &[1; 512]).is_err());
    assert_eq!(disk.content(), before);
    disk.driver.read_blocks(0, &mut [0; 512]).unwrap();
}

#[test]
fn the_id_is_the_configured_one() {
    let mut disk = TestDisk::new("id", 512);
    let mut id = [0xff; 20];
    assert_eq!(disk.driver.device_id(&mut id).unwrap(), 8);
    assert_eq!(&id[..9], b"dormouse\0");
}

#[test]
fn a_file_that_shrinks_under_the_guest_gives_errors_not_stale_bytes() {
    let mut disk = TestDisk::new("short", 64 * 512);
    File::options().write(true).open(&disk.image.0).unwrap().set_len(32 * 512).unwrap();
    assert!(disk.driver.read_blocks(31, &mut [0; 1024]).is_err());
    disk.driver.read_blocks(31, &mut [0; 512]).unwrap();
}

#[test]
fn many_requests_in_any_order_keep_the_disk_equal_to_a_model() {
    let disk = requests_against_a_model(|config| config);
    assert_eq!(disk.0.content(), disk.1);
}

#[test]
fn many_requests_past_the_page_cache_keep_the_disk_equal_to_a_model() {
    let disk = requests_against_a_model(|config| config.direct(true));
    assert_eq!(disk.0.content(), disk.1);
}

#[test]
fn many_requests_to_a_delta_equal_a_model_and_leave_the_disk_as_it_was() {
    let (disk, model) = requests_against_a_model(BlockConfig::discard_writes);
    assert_ne!(disk.content(), model);
    let fresh = Image::new("fresh", 256 * 512);
    assert_eq!(disk.content(), fresh.content());
}

/// Returns the disk, and what the guest has to see of it.
fn requests_against_a_model(change: fn(BlockConfig) -> BlockConfig) -> (TestDisk, Vec<u8>) {
    let mut disk = TestDisk::with("model", 256 * 512, change);
    let mut model = disk.content();
    let mut state = 1u64;
    let mut random = |below: u64| {
        // A linear congruential generator (Knuth's MMIX); the test is the same each time.
        state = state.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1);
        (state >> 33) % below
    };
    for _ in 0..2000 {
        let sector = random(256) as usize;
        let count = 1 + random((256 - sector as u64).min(16)) as usize;
        let range = sector * 512..(sector + count) * 512;
        if random(2) == 0 {
            let fill = random(256) as u8;
            disk.driver.write_blocks(sector, &vec![fill; count * 512]).unwrap();
            model[range].fill(fill);
        } else {
            let mut read = vec![0; count * 512];
            disk.driver.read_blocks(sector, &mut read).unwrap();
            assert_eq!(read, model[range]);
        }
    }
    let mut all = vec![0; model.len()];
    disk.driver.read_blocks(0, &mut all).unwrap();
    assert_eq!(all, model);
    (disk, model)
}

#[test]
fn discards_are_holes_and_zeroes_are_zeroes() {
    use super::hostile::RawDriver;

    let image = Image::new("holes", 1 << 20);
    let file = File::open(&image.0).unwrap();
    let blocks = file.metadata().unwrap().blocks();
    let mut raw = RawDriver::new(block(&BlockConfig::new(&image.0)));
    let range = |sector: u64, sectors: u32, flags: u32| {
        let mut bytes = sector.to_le_bytes().to_vec();
        bytes.extend(sectors.to_le_bytes());
        bytes.extend(flags.to_le_bytes());
        bytes
    };
    const DISCARD: u32 = 11;
    const WRITE_ZEROES: u32 = 13;
    assert_eq!(raw.block_request(DISCARD, 0, &range(1024, 512, 0)), Some(0));
    assert!(file.metadata().unwrap().blocks() < blocks, "nothing was given back");
    assert_eq!(raw.block_request(WRITE_ZEROES, 0, &range(8, 8, 1)), Some(0));
    let mut bytes = [1; 4096];
    file.read_exact_at(&mut bytes, 8 * 512).unwrap();
    assert_eq!(bytes, [0; 4096]);

    // Past the end, too large, reserved flags, half a range.
    assert_eq!(raw.block_request(DISCARD, 0, &range(2048, 1, 0)), Some(1));
    assert_eq!(raw.block_request(DISCARD, 0, &range(u64::MAX, 1, 0)), Some(1));
    assert_eq!(raw.block_request(DISCARD, 0, &range(0, u32::MAX, 0)), Some(1));
    assert_eq!(raw.block_request(DISCARD, 0, &range(0, 1, 1)), Some(2));
    assert_eq!(raw.block_request(WRITE_ZEROES, 0, &range(0, 1, 2)), Some(2));
    assert_eq!(raw.block_request(DISCARD, 0, &[0; 15]), Some(1));
    assert_eq!(raw.block_request(99, 0, &[]), Some(2), "an unknown request is unsupported");
}

#[test]
fn a_delta_is_found_again_and_the_disk_under_it_is_shared() {
    let image = Image::new("base", 128 * 512);
    let before = image.content();
    let delta = Image(std::env::temp_dir().join(format!("dormouse-{}-d", std::process::id())));
    let config = BlockConfig::new(&image.0).delta(&delta.0);
    // Another VM reads the same disk meanwhile.
    let other = VirtIOBlk::<TestHal, _>::new(TestTransport::new(block(
        &BlockConfig::new(&image.0).discard_writes(),
    )));
    let mut other = other.unwrap();
    for round in 0..3u8 {
        let mut driver = VirtIOBlk::<TestHal, _>::new(TestTransport::new(block(&config))).unwrap();
        let mut sector = [0; 512];
        for written in 0..round {
            driver.read_blocks(usize::from(written) * 7, &mut sector).unwrap();
            assert_eq!(sector, [written + 1; 512]);
        }
        driver.write_blocks(usize::from(round) * 7, &[round + 1; 512]).unwrap();
        if round == 1 {
            driver.flush().unwrap();
        }
        let mut all = vec![0; 128 * 512];
        driver.read_blocks(0, &mut all).unwrap();
        assert_eq!(all[512 * 50..], before[512 * 50..]);
    }
    let mut all = vec![0; 128 * 512];
    other.read_blocks(0, &mut all).unwrap();
    assert_eq!(all, before);
    assert_eq!(image.content(), before);
}

#[test]
fn a_disk_has_one_writer_or_many_readers() {
    let image = Image::new("lock", 512);
    let writer = BlockConfig::new(&image.0);
    let reader = writer.clone().read_only();
    let refused = |config| crate::Error::from(Disk::open(config).unwrap_err()).to_string();
    let first = Disk::open(&writer).unwrap();
    assert!(refused(&writer).contains("in use"), "{}", refused(&writer));
    assert!(refused(&reader).contains("delta"), "{}", refused(&reader));
    drop(first);
    let _first = Disk::open(&reader).unwrap();
    let _second = Disk::open(&reader).unwrap();
    let _third = Disk::open(&reader.clone().discard_writes()).unwrap();
    assert!(refused(&writer).contains("in use"));
}

#[test]
fn files_that_are_no_deltas_are_refused() {
    let image = Image::new("under", 64 * 512);
    let config = |delta: &Image| BlockConfig::new(&image.0).delta(&delta.0);
    let refused = |delta: &Image| Disk::open(&config(delta)).unwrap_err().to_string();
    let delta = Image::new("delta", 10);
    assert!(refused(&delta).contains("too short"));
    fs::write(&delta.0, [0; 8192]).unwrap();
    assert!(refused(&delta).contains("mark of a delta"));
    fs::remove_file(&delta.0).unwrap();
    drop(Disk::open(&config(&delta)).unwrap());
    drop(Disk::open(&config(&delta)).unwrap());
    let good = delta.content();
    for (at, expected) in [(8, "another version"), (12, "65 sectors")] {
        let mut bad = good.clone();
        bad[at] ^= 1;
        fs::write(&delta.0, bad).unwrap();
        assert!(refused(&delta).contains(expected), "{}", refused(&delta));
    }
    fs::write(&delta.0, &good[..good.len() - 1]).unwrap();
    assert!(refused(&delta).contains("ends too early"));
}

#[test]
fn threads_do_what_an_io_uring_would() {
    let image = Image::new("workers", 64 * 512);
    let queue = disk_io::with_workers().unwrap();
    let config = BlockConfig::new(&image.0).direct(true);
    let disk = Disk::open(&config).unwrap();
    let device = Block::new(disk, FileIo::new(&queue).unwrap(), &config).unwrap();
    drop(queue);
    let mut driver = VirtIOBlk::<TestHal, _>::new(TestTransport::new(device)).unwrap();
    driver.write_blocks(8, &[9; 4096]).unwrap();
    driver.flush().unwrap();
    let mut read = [0; 4096];
    driver.read_blocks(8, &mut read).unwrap();
    assert_eq!(read, [9; 4096]);
    assert_eq!(image.content()[4096..8192], read);
}

#[test]
fn requests_of_every_size_are_outstanding_together_and_none_is_written_to_too_late() {
    const SECTORS: usize = 4096;
    const SLOT: usize = SECTORS / 8;
    for change in [
        |config| config,
        |config: BlockConfig| config.direct(true),
        |config| BlockConfig::discard_writes(config),
    ] {
        let mut disk = TestDisk::with("outstanding", SECTORS * 512, change);
        let mut model = disk.content();
        let mut state = 7u64;
        let mut random = move |below: usize| {
            state = state.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1);
            (state >> 33) as usize % below
        };
        for round in 0..60 {
            // One request in each eighth of the disk, so that their order does not matter.
            let mut slots: Vec<Outstanding> = (0..5)
                .map(|slot| {
                    let start = random(SLOT);
                    let sectors = 1 + random((SLOT - start).min(200));
                    let bytes = vec![random(256) as u8; sectors * 512];
                    Outstanding::new(slot * SLOT + start, bytes, random(2) == 0)
                })
                .collect();
            for slot in &mut slots {
                slot.submit(&mut disk.driver);
            }
            while slots.iter().any(|slot| !slot.done) {
                let Some(token) = disk.driver.peek_used() else { continue };
                let slot = slots.iter_mut().find(|slot| slot.token == token && !slot.done);
                slot.unwrap().complete(&mut disk.driver, &mut model);
            }
            if round % 7 == 0 {
                disk.driver.flush().unwrap();
            }
        }
        assert_nothing_was_written_too_late();
        let mut all = vec![0; model.len()];
        for (sector, bytes) in all.chunks_mut(SLOT * 512).enumerate() {
            disk.driver.read_blocks(sector * SLOT, bytes).unwrap();
        }
        assert!(all == model);
    }
}

#[test]
fn a_disk_in_many_pieces_has_no_more_of_them_under_way_than_it_may_and_answers_all() {
    const SECTORS: usize = 4096;
    let past_the_cache = |config: BlockConfig| config.direct(true).discard_writes();
    let mut disk = TestDisk::with("pieces", SECTORS * 512, past_the_cache);
    let mut model = disk.content();
    for sector in (0..SECTORS).step_by(2) {
        disk.driver.write_blocks(sector, &[0x5a; 512]).unwrap();
        model[sector * 512..(sector + 1) * 512].fill(0x5a);
    }
    // Each needs half as many operations as it has sectors, all of them more than there may be.
    let mut reads: Vec<_> =
        (0..5).map(|_| Outstanding::new(0, vec![0; SECTORS * 512], false)).collect();
    for read in &mut reads {
        read.submit(&mut disk.driver);
    }
    while reads.iter().any(|read| !read.done) {
        let Some(token) = disk.driver.peek_used() else { continue };
        let read = reads.iter_mut().find(|read| read.token == token && !read.done);
        read.unwrap().complete(&mut disk.driver, &mut model);
    }
}

/// A request that waits for the device.
struct Outstanding {
    sector: usize,
    bytes: Vec<u8>,
    write: bool,
    request: Box<BlkReq>,
    response: Box<BlkResp>,
    token: u16,
    done: bool,
}

impl Outstanding {
    fn new(sector: usize, bytes: Vec<u8>, write: bool) -> Self {
        let (request, response) = (Box::default(), Box::default());
        Self { sector, bytes, write, request, response, token: 0, done: false }
    }

    fn submit(&mut self, driver: &mut VirtIOBlk<TestHal, TestTransport>) {
        let Self { sector, bytes, write, request, response, .. } = self;
        // SAFETY: the buffers stay in their boxes until `complete`.
        self.token = unsafe {
            match write {
                true => driver.write_blocks_nb(*sector, request, bytes, response),
                false => driver.read_blocks_nb(*sector, request, bytes, response),
            }
        }
        .unwrap();
    }

    fn complete(&mut self, driver: &mut VirtIOBlk<TestHal, TestTransport>, model: &mut [u8]) {
        let Self { bytes, request, response, token, .. } = self;
        let range = self.sector * 512..self.sector * 512 + bytes.len();
        // SAFETY: the same buffers as in `submit`.
        unsafe {
            match self.write {
                true => driver.complete_write_blocks(*token, request, bytes, response),
                false => driver.complete_read_blocks(*token, request, bytes, response),
            }
        }
        .unwrap();
        match self.write {
            true => model[range].copy_from_slice(bytes),
            false => assert!(*bytes == model[range]),
        }
        self.done = true;
    }
}

#[test]
fn a_limited_disk_does_all_its_requests_each_when_its_time_comes() {
    let mut disk = TestDisk::with("limited", 64 * 512, |config| {
        config.read_only().queues(2).rate_limit(
            RateLimit::default()
                .bytes_per_second(1 << 20)
                .burst_bytes(1024)
                .operations_per_second(2000)
                .burst_operations(1),
        )
    });
    let content = disk.content();
    for sector in 0..60 {
        // Twice the burst, after which the disk owes.
        let mut read = vec![0; 4 * 512];
        disk.driver.read_blocks(sector, &mut read).unwrap();
        assert_eq!(read, content[sector * 512..(sector + 4) * 512]);
    }
}

#[test]
fn a_disk_over_its_limit_answers_no_more_until_that_is_lifted() {
    let image = Image::new("slow", 64 * 512);
    let slow = RateLimit::default().bytes_per_second(1);
    let config = BlockConfig::new(&image.0).read_only().rate_limit(slow);
    let (transport, handle) = TestTransport::with_handle(block(&config));
    let mut driver = VirtIOBlk::<TestHal, _>::new(transport).unwrap();
    let mut model = image.content();
    let read = |slot: usize| Outstanding::new(slot * 8, vec![0; 4096], false);
    let mut reads: Vec<_> = (0..4).map(read).collect();
    reads.iter_mut().for_each(|read| read.submit(&mut driver));
    handle.serve(0);
    // The first takes the burst, and an hour to be paid for. No other one has begun when it is answered.
    until("the first is answered", || driver.peek_used() == Some(reads[0].token));
    reads[0].complete(&mut driver, &mut model);
    let in_flight = handle.call(|disk, _| Ok(VirtioDevice::in_flight(disk))).unwrap();
    assert_eq!((in_flight, driver.peek_used()), (0, None));
    handle.with(|disk| disk.set_rate_limit(RateLimit::default()));
    for _ in 1..reads.len() {
        until("the others are answered", || driver.peek_used().is_some());
        let token = driver.peek_used();
        let read = reads.iter_mut().find(|read| !read.done && Some(read.token) == token);
        read.unwrap().complete(&mut driver, &mut model);
    }
}

use std::fs::{self, File};
use std::os::unix::fs::{FileExt, MetadataExt};
use std::path::PathBuf;

use virtio_drivers::device::blk::VirtIOBlk;

use super::driver::{TestHal, TestTransport};
use crate::config::RateLimit;
use crate::virtio::Block;

/// A file of random bytes, and a driver of a disk on it.
struct Disk {
    path: PathBuf,
    driver: VirtIOBlk<TestHal, TestTransport>,
}

impl Disk {
    fn new(name: &str, bytes: usize, read_only: bool) -> Self {
        let path = std::env::temp_dir().join(format!("dormouse-{}-{name}", std::process::id()));
        let content: Vec<u8> = (0..bytes).map(|at| (at / 512 * 31 + at) as u8).collect();
        fs::write(&path, content).unwrap();
        let file = File::options().read(true).write(!read_only).open(&path).unwrap();
        let transport = TestTransport::new(Block::new(file, read_only, "dormouse").unwrap());
        Self { path, driver: VirtIOBlk::new(transport).unwrap() }
    }

    fn content(&self) -> Vec<u8> {
        fs::read(&self.path).unwrap()
    }
}

impl Drop for Disk {
    fn drop(&mut self) {
        let _ = fs::remove_file(&self.path);
    }
}

#[test]
fn sectors_are_read_and_written_where_they_are() {
    let mut disk = Disk::new("rw", 64 * 512 + 100, false);
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
    let mut disk = Disk::new("end", 16 * 512, false);
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
    let mut disk = Disk::new("ro", 16 * 512, true);
    assert!(disk.driver.readonly());
    let before = disk.content();
    assert!(disk.driver.write_blocks(0, &[1; 512]).is_err());
    assert_eq!(disk.content(), before);
    disk.driver.read_blocks(0, &mut [0; 512]).unwrap();
}

#[test]
fn the_id_is_the_configured_one() {
    let mut disk = Disk::new("id", 512, false);
    let mut id = [0xff; 20];
    assert_eq!(disk.driver.device_id(&mut id).unwrap(), 8);
    assert_eq!(&id[..9], b"dormouse\0");
}

#[test]
fn a_file_that_shrinks_under_the_guest_gives_errors_not_stale_bytes() {
    let mut disk = Disk::new("short", 64 * 512, false);
    File::options().write(true).open(&disk.path).unwrap().set_len(32 * 512).unwrap();
    assert!(disk.driver.read_blocks(31, &mut [0; 1024]).is_err());
    disk.driver.read_blocks(31, &mut [0; 512]).unwrap();
}

#[test]
fn many_requests_in_any_order_keep_the_disk_equal_to_a_model() {
    let mut disk = Disk::new("model", 256 * 512, false);
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
    assert_eq!(disk.content(), model);
}

#[test]
fn discards_are_holes_and_zeroes_are_zeroes() {
    use super::hostile::RawDriver;

    let disk = Disk::new("holes", 1 << 20, false);
    let file = File::options().read(true).write(true).open(&disk.path).unwrap();
    let blocks = file.metadata().unwrap().blocks();
    let mut raw = RawDriver::new(Block::new(file.try_clone().unwrap(), false, "").unwrap());
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
fn a_limited_disk_does_all_its_requests_each_when_its_time_comes() {
    let mut disk = Disk::new("limited", 64 * 512, false);
    let content = disk.content();
    let mut block = Block::new(File::open(&disk.path).unwrap(), true, "").unwrap();
    block.set_rate_limit(
        RateLimit::default()
            .bytes_per_second(1 << 20)
            .burst_bytes(1024)
            .operations_per_second(2000)
            .burst_operations(1),
    );
    disk.driver = VirtIOBlk::new(TestTransport::new(block)).unwrap();
    for sector in 0..60 {
        // Twice the burst, after which the disk owes.
        let mut read = vec![0; 4 * 512];
        disk.driver.read_blocks(sector, &mut read).unwrap();
        assert_eq!(read, content[sector * 512..(sector + 4) * 512]);
    }
}

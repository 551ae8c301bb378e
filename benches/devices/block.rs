//! Disks, on a file that is in the page cache, beside pread and pwrite of the same sectors.

use std::fs::{self, File};
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use dormouse::BlockConfig;

use crate::report::{Bar, Metric, Unit};
use crate::virtio_guest::{Driver, Order, Sectors, Work};
use crate::{Guest, rates};

const FILE_BYTES: u64 = 128 << 20;
const SECTORS: u64 = FILE_BYTES / 512;

pub fn metrics() -> Vec<Metric> {
    let disk = Disk::new();
    let (random, sequential) = (Order::Random, Order::Sequential);
    let read = |order| Work::BlockRead { sectors: SECTORS, order };
    let write = |order| Work::BlockWrite { sectors: SECTORS, order };
    let (small, large) = ((4096, 32, 16 << 10), (1 << 20, 8, 512));
    vec![
        disk.metric("disk, random reads of 4 KiB", read(random), small, Some(0.7)),
        disk.metric("disk, random writes of 4 KiB", write(random), small, None),
        disk.metric("disk, sequential reads of 1 MiB", read(sequential), large, Some(0.8)),
        disk.metric("disk, sequential writes of 1 MiB", write(sequential), large, None),
    ]
}

/// A file that is gone with it.
struct Disk(PathBuf);

impl Disk {
    fn new() -> Self {
        let path = Path::new(env!("CARGO_TARGET_TMPDIR")).join("devices.disk");
        let content: Vec<u8> = (0..FILE_BYTES).map(|at| (at ^ at >> 9) as u8).collect();
        fs::write(&path, content).expect("a disk image");
        // What is still to be written back would be written back while something is measured.
        File::open(&path).and_then(|file| file.sync_all()).expect("fsync");
        Self(path)
    }

    fn metric(
        &self,
        name: &str,
        work: Work,
        (buffer_bytes, depth, batch): (u32, u16, u64),
        bar: Option<f64>,
    ) -> Metric {
        let driver = Driver { device: 0, work, buffer_bytes, depth, batch };
        let mut guest = Guest::new(&driver, |config| config.block(BlockConfig::new(&self.0)));
        let mut alone = Alone::new(&self.0, &driver);
        let (unit, amount) = match buffer_bytes {
            4096 => (Unit::ThousandsPerSecond, batch as f64 / 1e3),
            _ => (Unit::MibPerSecond, (batch * u64::from(buffer_bytes)) as f64 / 1048576.0),
        };
        let bar = bar.map(Bar::AtLeast);
        rates(name, unit, amount, bar, || guest.batch(|| ()), || alone.batch())
    }
}

impl Drop for Disk {
    fn drop(&mut self) {
        let _ = fs::remove_file(&self.0);
    }
}

/// The same requests by one thread, a system call each, into as many buffers.
struct Alone {
    file: File,
    sectors: Sectors,
    writes: bool,
    buffers: Buffers,
    depth: usize,
    batch: u64,
}

/// Buffers that begin at a page, as the guest's do. The kernel's copy to one that begins 16 bytes
/// behind it, where malloc puts large ones, takes up to three times as long.
struct Buffers {
    memory: Vec<u8>,
    first: usize,
    each: usize,
}

impl Buffers {
    fn new(count: usize, each: usize) -> Self {
        let memory = vec![1; count * each + 4096];
        let first = memory.as_ptr().align_offset(4096);
        Self { memory, first, each }
    }

    fn get(&mut self, index: usize) -> &mut [u8] {
        &mut self.memory[self.first + index * self.each..][..self.each]
    }
}

impl Alone {
    fn new(path: &Path, driver: &Driver) -> Self {
        let (order, writes) = match driver.work {
            Work::BlockRead { order, .. } => (order, false),
            Work::BlockWrite { order, .. } => (order, true),
            work => unreachable!("{work:?} is no disk's"),
        };
        Self {
            file: File::options().read(true).write(true).open(path).expect("the disk image"),
            sectors: Sectors::new(order, SECTORS, driver.buffer_bytes),
            writes,
            buffers: Buffers::new(driver.depth.into(), driver.buffer_bytes as usize),
            depth: driver.depth.into(),
            batch: driver.batch,
        }
    }

    fn batch(&mut self) -> Duration {
        let begin = Instant::now();
        for request in 0..self.batch {
            let sector = self.sectors.next().expect("there is always a next one");
            let buffer = self.buffers.get(request as usize % self.depth);
            let done = if self.writes {
                self.file.write_all_at(buffer, sector * 512)
            } else {
                self.file.read_exact_at(buffer, sector * 512)
            };
            done.expect("a request");
        }
        begin.elapsed()
    }
}

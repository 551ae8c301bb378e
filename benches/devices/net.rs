//! Frames between a guest and a program over a stream socket, beside the same between two threads.
//!
//! The guest polls, and so has a CPU for itself: where there are two, the device thread and the
//! program at the other end share the other one, as the two threads without a VM do not. What those
//! do on one processor is measured too. They write a frame at a time, the device up to 64 KiB of
//! small ones.

use std::io::{Read, Write};
use std::os::unix::net::UnixStream;
use std::thread;
use std::time::{Duration, Instant};

use dormouse::NetConfig;

use crate::report::{Bar, Metric, Unit};
use crate::virtio_guest::{Driver, Work};
use crate::{Guest, rates};

/// `struct virtio_net_hdr` of a frame that is finished.
const HEADER: [u8; 12] = [0; 12];
/// Buffers of the guest, and of a thread that does its work.
const DEPTH: u16 = 128;

pub fn metrics() -> Vec<Metric> {
    let mut metrics = Vec::new();
    for (name, bytes, batch) in [("1,500 B", 1500, 16 << 10), ("64 KiB", 64 << 10, 1 << 10)] {
        // The device sends small frames together, for which the threads have a call each.
        let other = if bytes < 4096 { ", beside a write for each" } else { "" };
        let of_guest = format!("network, frames of {name} from the guest{other}");
        metrics.push(send(&of_guest, bytes, batch));
        metrics.push(receive(&format!("network, frames of {name} to the guest"), bytes, batch));
        metrics.push(on_one_processor(name, bytes, batch));
    }
    metrics
}

fn send(name: &str, bytes: u32, batch: u64) -> Metric {
    let work = Work::Send { queue: 1, header: &HEADER };
    let driver = Driver { device: 0, work, buffer_bytes: bytes, depth: DEPTH, batch };
    let (mut guest, mut peer) = guest(&driver);
    let ours = move || guest.batch(|| read_frames(&mut peer, bytes, batch));
    metric(name, bytes, batch, ours, Threads::new(bytes, batch, DEPTH))
}

fn receive(name: &str, bytes: u32, batch: u64) -> Metric {
    let work = Work::Receive { queue: 0 };
    let driver = Driver { device: 0, work, buffer_bytes: bytes + 4096, depth: DEPTH, batch };
    let (mut guest, mut peer) = guest(&driver);
    let frames = frames(bytes, 1);
    let ours = move || guest.batch(|| write_frames(&mut peer, &frames, batch));
    metric(name, bytes, batch, ours, Threads::new(bytes, batch, 1))
}

fn metric(
    name: &str,
    bytes: u32,
    batch: u64,
    ours: impl FnMut() -> Duration,
    mut floor: Threads,
) -> Metric {
    let mib = (batch * u64::from(bytes)) as f64 / 1048576.0;
    let bar = Some(Bar::AtLeast(0.6));
    rates(name, Unit::MibPerSecond, mib, bar, ours, || floor.batch())
}

/// What two threads move where a guest that polls has the other processor, beside what they move
/// on two.
fn on_one_processor(name: &str, bytes: u32, batch: u64) -> Metric {
    let name = format!("frames of {name} between two threads on one processor");
    let mib = (batch * u64::from(bytes)) as f64 / 1048576.0;
    let (mut pinned, mut free) = (Threads::new(bytes, batch, 1), Threads::new(bytes, batch, 1));
    // A thread of its own, so that no other stays on that processor.
    let on_one = move || {
        let batch = || {
            stay_on_one_processor();
            pinned.batch()
        };
        thread::scope(|scope| scope.spawn(batch).join().expect("frames"))
    };
    rates(&name, Unit::MibPerSecond, mib, None, on_one, || free.batch())
}

/// Keeps this thread, and those that it starts, on one processor.
fn stay_on_one_processor() {
    // SAFETY: the set is a local value; the calls read and write no other memory.
    let pinned = unsafe {
        let mut set: libc::cpu_set_t = std::mem::zeroed();
        libc::CPU_SET(libc::sched_getcpu().max(0) as usize, &mut set);
        libc::sched_setaffinity(0, size_of_val(&set), &set)
    };
    assert_eq!(pinned, 0, "a thread may be kept on a processor");
}

/// The same frames from one thread to another.
struct Threads {
    sockets: (UnixStream, UnixStream),
    frames: Vec<Vec<u8>>,
    bytes: u32,
    batch: u64,
}

impl Threads {
    fn new(bytes: u32, batch: u64, buffers: u16) -> Self {
        let sockets = UnixStream::pair().expect("a pair of sockets");
        Self { sockets, frames: frames(bytes, buffers), bytes, batch }
    }

    fn batch(&mut self) -> Duration {
        let begin = Instant::now();
        let (from, to) = (&mut self.sockets.0, &mut self.sockets.1);
        thread::scope(|scope| {
            scope.spawn(|| write_frames(from, &self.frames, self.batch));
            read_frames(to, self.bytes, self.batch);
        });
        begin.elapsed()
    }
}

fn guest(driver: &Driver) -> (Guest, UnixStream) {
    let (device, peer) = UnixStream::pair().expect("a pair of sockets");
    (Guest::new(driver, |config| config.network(NetConfig::socket(device))), peer)
}

/// Frames, each with its length before it.
fn frames(bytes: u32, buffers: u16) -> Vec<Vec<u8>> {
    let mut frame = bytes.to_be_bytes().to_vec();
    frame.resize(4 + bytes as usize, 0);
    vec![frame; buffers.into()]
}

/// A system call for each frame.
fn write_frames(socket: &mut UnixStream, frames: &[Vec<u8>], count: u64) {
    for frame in frames.iter().cycle().take(count as usize) {
        socket.write_all(frame).expect("a frame");
    }
}

/// As many frames at once as there are.
fn read_frames(socket: &mut UnixStream, bytes: u32, count: u64) {
    let mut buffer = vec![0; 128 << 10];
    let mut left = count * u64::from(4 + bytes);
    while left > 0 {
        let most = left.min(buffer.len() as u64) as usize;
        let read = socket.read(&mut buffer[..most]).expect("frames");
        assert!(read > 0, "the stream ended");
        left -= read as u64;
    }
}

//! Frames between a guest and a program over a stream socket, beside the same between two threads.
//!
//! The guest polls, and so has a CPU for itself: where there are two, the device thread and the
//! program at the other end share the other one, as the two threads without a VM do not.

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

pub fn metrics() -> Vec<Metric> {
    let mut metrics = Vec::new();
    for (name, bytes, batch) in [("1,500 B", 1500, 16 << 10), ("64 KiB", 64 << 10, 1 << 10)] {
        metrics.push(send(&format!("network, frames of {name} from the guest"), bytes, batch));
        metrics.push(receive(&format!("network, frames of {name} to the guest"), bytes, batch));
    }
    metrics
}

fn send(name: &str, bytes: u32, batch: u64) -> Metric {
    let work = Work::Send { queue: 1, header: &HEADER };
    let driver = Driver { device: 0, work, buffer_bytes: bytes, depth: 128, batch };
    let (mut guest, mut peer) = guest(&driver);
    let ours = move || guest.batch(|| read_frames(&mut peer, bytes, batch));
    metric(name, bytes, batch, ours)
}

fn receive(name: &str, bytes: u32, batch: u64) -> Metric {
    let work = Work::Receive { queue: 0 };
    let driver = Driver { device: 0, work, buffer_bytes: bytes + 4096, depth: 128, batch };
    let (mut guest, mut peer) = guest(&driver);
    let ours = move || guest.batch(|| write_frames(&mut peer, bytes, batch));
    metric(name, bytes, batch, ours)
}

fn metric(name: &str, bytes: u32, batch: u64, ours: impl FnMut() -> Duration) -> Metric {
    let (mut from, mut to) = UnixStream::pair().expect("a pair of sockets");
    let floor = || {
        let begin = Instant::now();
        thread::scope(|scope| {
            scope.spawn(|| write_frames(&mut from, bytes, batch));
            read_frames(&mut to, bytes, batch);
        });
        begin.elapsed()
    };
    let mib = (batch * u64::from(bytes)) as f64 / 1048576.0;
    rates(name, Unit::MibPerSecond, mib, Some(Bar::AtLeast(0.6)), ours, floor)
}

fn guest(driver: &Driver) -> (Guest, UnixStream) {
    let (device, peer) = UnixStream::pair().expect("a pair of sockets");
    (Guest::new(driver, |config| config.network(NetConfig::socket(device))), peer)
}

/// A system call for each frame, its length before it.
fn write_frames(socket: &mut UnixStream, bytes: u32, count: u64) {
    let mut frame = bytes.to_be_bytes().to_vec();
    frame.resize(4 + bytes as usize, 0);
    for _ in 0..count {
        socket.write_all(&frame).expect("a frame");
    }
}

/// As many frames at once as there are.
fn read_frames(socket: &mut UnixStream, bytes: u32, count: u64) {
    let mut buffer = vec![0; 128 << 10];
    let mut left = count * u64::from(4 + bytes);
    while left > 0 {
        let most = left.min(buffer.len() as u64) as usize;
        left -= socket.read(&mut buffer[..most]).expect("frames") as u64;
    }
}

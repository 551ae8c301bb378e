//! Ways in for the fuzz targets, which are a crate of their own: bytes are what a guest does.
//!
//! Not a part of the public interface: it is there under cargo-fuzz alone. There is no KVM, and
//! no thread: a doorbell is served where it is rung, and each source after each action.

#![allow(clippy::expect_used, clippy::panic, reason = "what a fuzz target finds is a panic")]

mod guest;
mod input;
mod queue;
mod ram;
mod vsock;

use std::fs::File;
use std::io::{Read, Write};
use std::os::unix::fs::FileExt;
use std::os::unix::net::UnixStream;
use std::sync::{Arc, OnceLock};
use std::thread;

use vmm_sys_util::tempfile::TempFile;

pub use self::queue::virtqueue;
pub use self::vsock::vsock_packet;

use self::guest::Guest;
use self::input::Input;
use super::state::{QueueState, Registers, TransportState};

use super::{Backend, Balloon, Block, DeviceState, Net, Rng, Stream, VirtioDevice};
use crate::config::{BalloonConfig, BlockConfig, NetConfig, RateLimit};
use crate::disk::Disk;
use crate::memory::{FileIo, IoQueue};

const DISK_BYTES: usize = 64 << 10;

/// Requests of a driver that keeps to the rules of the queue, but not to those of a disk.
pub fn block_request(bytes: &[u8]) {
    let mut input = Input::new(bytes);
    let read_only = input.byte() & 1 != 0;
    let (device, file) = disk(read_only);
    let before = content(&file);
    let mut guest = Guest::new(device);
    guest.begin(0, &mut input);
    while !input.is_empty() {
        if let Some(status) = guest.block_request(&mut input) {
            assert!(status <= 2, "there is no status {status:#x}");
        }
    }
    guest.end();
    let after = content(&file);
    assert_eq!(after.len(), before.len(), "a disk changes no size");
    assert!(!read_only || after == before, "a read-only disk was written");
}

/// Bytes from the other end of the network's cable, and whatever the guest does meanwhile.
pub fn net_frame(bytes: &[u8]) {
    let mut input = Input::new(bytes);
    let (device, mut peer) = network();
    let mut guest = Guest::new(device);
    let queue = input.byte() & 1;
    guest.begin(queue.into(), &mut input);
    while !input.is_empty() {
        match input.byte() % 4 {
            0 => {
                // A frame as it should be, but for what the guest has room for.
                let len = usize::from(input.u16());
                let mut frame = (len as u32).to_be_bytes().to_vec();
                frame.resize(4 + len, 0x5a);
                let _ = peer.write(&frame);
            }
            1 => {
                let len = input.byte().into();
                let _ = peer.write(input.bytes(len));
            }
            2 => drop(peer.read(&mut [0; 4096])),
            _ => guest.act(&mut input),
        }
        guest.settle();
    }
    guest.end();
}

/// Any accesses to the registers of any device, with writes to RAM and doorbells between them.
pub fn transport_registers(bytes: &[u8]) {
    let mut input = Input::new(bytes);
    match input.byte() % DEVICES {
        0 => registers(disk(false).0, input),
        1 => registers(disk(true).0, input),
        2 => registers(network().0, input),
        3 => registers(vsock::device(), input),
        4 => registers(balloon(), input),
        _ => registers(entropy(), input),
    }
}

/// A device that goes on from any state, and whatever its guest does then.
pub fn transport_state(bytes: &[u8]) {
    let mut input = Input::new(bytes);
    match input.byte() % DEVICES {
        0 => state(|| disk(false).0, input),
        1 => state(|| disk(true).0, input),
        2 => state(|| network().0, input),
        3 => state(vsock::device, input),
        4 => state(balloon, input),
        _ => state(entropy, input),
    }
}

/// How many kinds of devices there are to choose from.
const DEVICES: u8 = 6;

/// The devices that a state may be one of go on from it, and ring all of their doorbells.
pub(crate) fn saved_state(saved: &TransportState) {
    fn all<D: VirtioDevice + 'static>(device: impl Fn() -> D, saved: &TransportState) {
        restored(Guest::new(device()), device, saved, Input::new(&[0xff; 64]));
    }
    match saved.device {
        DeviceState::Stateless => {
            all(|| disk(false).0, saved);
            all(entropy, saved);
        }
        DeviceState::Net { .. } => all(|| network().0, saved),
        DeviceState::Vsock { .. } => all(vsock::device, saved),
        DeviceState::Balloon { .. } => all(balloon, saved),
    }
}

fn registers(device: impl VirtioDevice + 'static, mut input: Input<'_>) {
    let mut guest = Guest::new(device);
    while !input.is_empty() {
        guest.act(&mut input);
    }
    guest.end();
}

fn state<D: VirtioDevice + 'static>(device: impl Fn() -> D, mut input: Input<'_>) {
    let guest = Guest::new(device());
    let queues = guest.queue_count();
    let own = match guest.state().device {
        DeviceState::Net { mac, .. } if input.byte() != 0 => {
            DeviceState::Net { mac, link_up: input.byte() & 1 != 0 }
        }
        DeviceState::Vsock { .. } if input.byte() != 0 => {
            DeviceState::Vsock { last_port: input.u32() }
        }
        DeviceState::Balloon { .. } if input.byte() != 0 => DeviceState::Balloon {
            num_pages: input.u32(),
            actual: input.u32(),
            stats_buffer: (input.byte() & 1 != 0).then(|| input.u16()),
            stats: None,
        },
        // One of another kind of device is refused.
        _ => DeviceState::Stateless,
    };
    let state = TransportState {
        registers: Registers {
            status: input.u32(),
            driver_features: input.u64(),
            device_features_sel: input.u32(),
            driver_features_sel: input.u32(),
            queue_sel: input.u32(),
            config_generation: input.u32(),
        },
        interrupt_status: input.u32(),
        queues: (0..queues).map(|_| queue_state(&mut input)).collect(),
        device: own,
    };
    restored(guest, device, &state, input);
}

/// Goes on from a state, where that is taken.
fn restored<D: VirtioDevice + 'static>(
    mut guest: Guest<D>,
    device: impl Fn() -> D,
    state: &TransportState,
    mut input: Input<'_>,
) {
    guest.pause();
    if guest.restore(state).is_err() {
        return;
    }
    // What was taken is what is written, and is taken again.
    let taken = guest.state();
    let mut again = Guest::new(device());
    again.pause();
    assert!(again.restore(&taken).is_ok(), "{taken:?} is refused");
    assert_eq!(again.state(), taken);
    guest.resume();
    while !input.is_empty() {
        guest.act(&mut input);
    }
    guest.end();
}

/// A state whose addresses are often good ones.
fn queue_state(input: &mut Input<'_>) -> QueueState {
    QueueState {
        size: match input.byte() {
            power @ 0..=15 => 1 << power,
            _ => input.u16(),
        },
        ready: input.byte() & 1 != 0,
        event_idx: input.byte() & 1 != 0,
        next_avail: input.u16(),
        next_used: input.u16(),
        descriptor_table: input.address(),
        available_ring: input.address(),
        used_ring: input.address(),
    }
}

fn balloon() -> Balloon {
    let config = BalloonConfig::default().deflate_on_oom(true).free_page_reporting(true);
    Balloon::new(config)
}

fn entropy() -> Rng {
    Rng::new(RateLimit::default()).expect("/dev/urandom")
}

/// An interface, and the other end of its cable.
fn network() -> (Net, UnixStream) {
    let (one, other) = UnixStream::pair().expect("a pair of sockets");
    other.set_nonblocking(true).expect("a socket");
    let stream = Stream::new(one).expect("a stream");
    (Net::new(Backend::Stream(stream), &NetConfig::tap("")).expect("/dev/urandom"), other)
}

/// What cannot be done at once is done by one thread, for as long as the process lives.
fn io_queue() -> &'static Arc<IoQueue> {
    static QUEUE: OnceLock<Arc<IoQueue>> = OnceLock::new();
    QUEUE.get_or_init(|| {
        let (queue, workers) = IoQueue::workers().expect("an eventfd");
        thread::spawn(move || workers.work());
        Arc::new(queue)
    })
}

/// A disk of 64 KiB, and its file.
fn disk(read_only: bool) -> (Block, File) {
    let file = TempFile::new_in("/dev/shm".as_ref()).expect("a temporary file");
    file.as_file().write_all_at(&[0x5a; DISK_BYTES], 0).expect("a disk's content");
    let config = BlockConfig::new(file.as_path()).id("fuzzed");
    let config = if read_only { config.read_only() } else { config };
    let io = FileIo::new(io_queue()).expect("an eventfd");
    let disk = Disk::open(&config).expect("a disk");
    let block = Block::new(disk, io, &config).expect("a timer");
    (block, file.into_file())
}

fn content(file: &File) -> Vec<u8> {
    let len = file.metadata().expect("the disk's size").len();
    let mut content = vec![0; len as usize];
    file.read_exact_at(&mut content, 0).expect("the disk's content");
    content
}

//! Limits that are changed while a guest waits for them, and what its devices say that they did.

use std::fs;
use std::io::Read;
use std::os::unix::net::UnixStream;
use std::path::Path;
use std::thread::sleep;
use std::time::{Duration, Instant};

use dormouse::{
    BlockConfig, DeviceMetrics, ErrorKind, MicroVm, NetConfig, RateLimit, Running, VmConfig,
};
use serde::Deserialize;

use crate::guest::Program;
use crate::scratch::Scratch;
use crate::virtio_guest::{Driver, Order, Work};
use crate::{Output, PATIENCE, config, output};

/// Requests of a batch, and how many of them may be under way.
const BATCH: u64 = 500;
const DEPTH: u16 = 8;
/// More than a device without a limit takes for a batch.
const UNLIMITED: Duration = Duration::from_millis(100);

/// A batch would take minutes.
fn slow() -> RateLimit {
    RateLimit::default().operations_per_second(2).burst_operations(4)
}

/// A guest that has begun a batch.
fn begun(
    work: Work,
    buffer_bytes: u32,
    with: impl FnOnce(VmConfig) -> VmConfig,
) -> (MicroVm<Running>, Output) {
    let driver = Driver { device: 0, work, buffer_bytes, depth: DEPTH, batch: BATCH };
    let (writer, output) = output();
    let config = with(config(&Program::Driver(driver.image())).memory_mib(64).console(writer));
    let vm = MicroVm::create(config).unwrap().start().unwrap();
    assert_eq!(output.next(), b'B');
    vm.console_input(b".").unwrap();
    assert_eq!(output.next(), b'(');
    (vm, output)
}

/// The counters of the only device, which are the same after a trip through JSON.
fn metrics(vm: &MicroVm<Running>) -> DeviceMetrics {
    let metrics = vm.metrics();
    let text = serde_json::to_string(&metrics).unwrap();
    assert_eq!(serde_json::from_str::<Vec<DeviceMetrics>>(&text).unwrap(), metrics);
    metrics[0]
}

/// How many reads the only device, a disk, has done.
fn reads(vm: &MicroVm<Running>) -> u64 {
    let DeviceMetrics::Block(metrics) = metrics(vm) else { panic!("no disk") };
    metrics.reads
}

#[test]
fn the_limit_of_a_disk_is_lifted_while_its_guest_waits() {
    let scratch = Scratch::new();
    let image = scratch.join("image");
    fs::write(&image, vec![7; 1 << 20]).unwrap();
    let work = Work::BlockRead { sectors: 2048, order: Order::Sequential };
    let disk = BlockConfig::new(&image).rate_limit(slow());
    let (vm, output) = begun(work, 4096, |config| config.block(disk));
    let begin = Instant::now();
    while reads(&vm) == 0 {
        assert!(begin.elapsed() < PATIENCE, "nothing is read");
        sleep(Duration::from_millis(1));
    }
    sleep(UNLIMITED);
    assert!(reads(&vm) < BATCH / 2, "the batch is not limited");
    assert!(output.so_far().is_empty());
    vm.set_disk_rate_limit(0, RateLimit::default()).unwrap();
    assert_eq!(output.next(), b')');
    let DeviceMetrics::Block(metrics) = metrics(&vm) else { panic!("no disk") };
    assert_eq!((metrics.reads, metrics.read_bytes, metrics.errors), (BATCH, BATCH * 4096, 0));

    for refused in [
        vm.set_disk_rate_limit(1, slow()),
        vm.set_network_rate_limits(0, slow(), slow()),
        vm.set_entropy_rate_limit(slow()),
    ] {
        assert_eq!(refused.unwrap_err().kind(), &ErrorKind::Config);
    }
}

#[test]
fn the_limit_of_a_network_is_lifted_while_its_guest_waits() {
    let (near, mut far) = UnixStream::pair().unwrap();
    let work = Work::Send { queue: 1, header: &[0; 12] };
    let network = NetConfig::socket(near).transmit_rate_limit(slow());
    let (vm, output) = begun(work, 100, |config| config.network(network));
    // Those of the burst come, and the next ones one by one.
    let mut frame = [0; 104];
    (0..4).for_each(|_| far.read_exact(&mut frame).unwrap());
    sleep(UNLIMITED);
    let DeviceMetrics::Net(sent) = metrics(&vm) else { panic!("no network") };
    assert!(sent.tx_frames < BATCH / 2, "the batch is not limited");
    assert!(output.so_far().is_empty());
    vm.set_network_rate_limits(0, RateLimit::default(), RateLimit::default()).unwrap();
    (4..BATCH).for_each(|_| far.read_exact(&mut frame).unwrap());
    assert_eq!(output.next(), b')');
    let DeviceMetrics::Net(metrics) = metrics(&vm) else { panic!("no network") };
    assert_eq!((metrics.tx_frames, metrics.tx_bytes), (BATCH, BATCH * 100));
    assert_eq!((metrics.tx_dropped, metrics.rx_frames, metrics.link_changes), (0, 0, 0));
}

#[test]
fn limits_that_were_changed_are_those_of_who_wakes() {
    let scratch = Scratch::new();
    let image = scratch.join("image");
    fs::write(&image, vec![7; 1 << 20]).unwrap();
    let (near, _far) = UnixStream::pair().unwrap();
    let config = config(&Program::Memory)
        .block(BlockConfig::new(&image))
        .network(NetConfig::socket(near))
        .entropy(true);
    let vm = MicroVm::create(config).unwrap().start().unwrap();
    let limit = |rate| RateLimit::default().bytes_per_second(rate);
    vm.set_disk_rate_limit(0, limit(1_234_567_001)).unwrap();
    vm.set_network_rate_limits(0, limit(1_234_567_002), limit(1_234_567_003)).unwrap();
    vm.set_entropy_rate_limit(limit(1_234_567_004)).unwrap();
    let woken = vm.suspend(scratch.join("asleep")).unwrap().resume().unwrap();
    woken.pause().unwrap().snapshot(scratch.join("saved")).unwrap();
    for name in ["asleep", "saved"] {
        let SavedConfig { blocks, networks, entropy_rate_limit } = saved(&scratch.join(name));
        assert_eq!(blocks[0].rate_limit, limit(1_234_567_001), "{name}");
        assert_eq!(networks[0].receive_limit, limit(1_234_567_002), "{name}");
        assert_eq!(networks[0].transmit_limit, limit(1_234_567_003), "{name}");
        assert_eq!(entropy_rate_limit, limit(1_234_567_004), "{name}");
    }
}

/// The limits in a snapshot's `state`, which docs/snapshot-format.md describes.
fn saved(directory: &Path) -> SavedConfig {
    #[derive(Deserialize)]
    struct State {
        config: SavedConfig,
    }
    let state = fs::read(directory.join("state")).unwrap();
    let State { config } = rmp_serde::from_slice(&state[24..state.len() - 4]).unwrap();
    config
}

#[derive(Deserialize)]
struct SavedConfig {
    blocks: Vec<SavedBlock>,
    networks: Vec<SavedNetwork>,
    entropy_rate_limit: RateLimit,
}

#[derive(Deserialize)]
struct SavedBlock {
    rate_limit: RateLimit,
}

#[derive(Deserialize)]
struct SavedNetwork {
    receive_limit: RateLimit,
    transmit_limit: RateLimit,
}

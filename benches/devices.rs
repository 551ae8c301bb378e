//! What virtio devices do in a second, beside the same work without a VM; and what they cost while
//! nobody uses them. A bare-metal driver, so that it runs at full speed on any /dev/kvm.
//!
//! `cargo bench --bench devices` prints a table, with `-- --json` one JSON object a line; with
//! `-- --svg FILE` it draws the distributions.

#[path = "../tests/payload/guest.rs"]
mod guest;
mod report;
#[path = "../tests/payload/virtio_guest.rs"]
mod virtio_guest;
#[path = "../tests/payload/vsock_guest.rs"]
mod vsock_guest;

#[path = "devices/block.rs"]
mod block;
#[path = "devices/idle.rs"]
mod idle;
#[path = "devices/net.rs"]
mod net;
#[path = "devices/tap.rs"]
mod tap;
#[path = "devices/vsock.rs"]
mod vsock;

use std::io::{self, Write};
use std::sync::mpsc::{Receiver, Sender, channel};
use std::time::{Duration, Instant};

use dormouse::{Created, Kernel, MicroVm, Paused, VmConfig};
use guest::Program;
use report::{Bar, Metric, Unit, report};
use virtio_guest::Driver;

const WARM_UP: usize = 2;
const ROUNDS: usize = 20;

fn main() {
    let taps = tap::enter_network();
    let mut metrics = block::metrics();
    match taps.and_then(|()| tap::metrics()) {
        Ok(taps) => metrics.extend(taps),
        Err(error) => {
            eprintln!("no taps are measured, which takes the right to make them: {error}")
        }
    }
    metrics.extend(net::metrics());
    metrics.extend(vsock::metrics());
    metrics.push(idle::metric());
    report(&metrics, "without a VM");
}

/// A paused VM whose guest drives one queue, a batch at a time.
struct Guest {
    vm: Option<MicroVm<Paused>>,
    output: Receiver<(u8, Instant)>,
}

impl Guest {
    /// `configure` adds the devices.
    fn new(driver: &Driver, configure: impl FnOnce(VmConfig) -> VmConfig) -> Self {
        Self::prepared(driver.image(), configure, |_| ()).0
    }

    /// The same for any driver, and what `prepare` makes before it runs.
    fn prepared<T>(
        driver: Vec<u8>,
        configure: impl FnOnce(VmConfig) -> VmConfig,
        prepare: impl FnOnce(&MicroVm<Created>) -> T,
    ) -> (Self, T) {
        let kernel = Kernel::bytes(guest::elf(&Program::Driver(driver)));
        let (sender, output) = channel();
        let config = VmConfig::new(kernel).memory_mib(128).console(Stamped(sender));
        let vm = MicroVm::create(configure(config)).expect("create");
        let prepared = prepare(&vm);
        let vm = vm.start().expect("start");
        assert_eq!(output.recv().expect("the guest's first byte").0, b'B');
        (Self { vm: Some(vm.pause().expect("pause")), output }, prepared)
    }

    /// How long the guest works at a batch, and the host at `meanwhile`, which is called when the
    /// guest begins.
    fn batch(&mut self, meanwhile: impl FnOnce()) -> Duration {
        let paused = self.vm.take().expect("a VM that is not lost");
        let vm = paused.resume().expect("resume");
        vm.console_input(b".").expect("a running guest");
        let (byte, begin) = self.output.recv().expect("the guest's begin");
        assert_eq!(byte, b'(');
        meanwhile();
        let host_end = Instant::now();
        let (byte, end) = self.output.recv().expect("the guest's end");
        assert_eq!(byte, b')', "a request failed");
        self.vm = Some(vm.pause().expect("pause"));
        end.max(host_end) - begin
    }
}

/// Sends each byte with its instant.
struct Stamped(Sender<(u8, Instant)>);

impl Write for Stamped {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        let now = Instant::now();
        for &byte in bytes {
            let _ = self.0.send((byte, now));
        }
        Ok(bytes.len())
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

/// Rates of ours and of the floor, measured in turn, so that both see the same machine.
fn rates(
    name: &str,
    unit: Unit,
    amount: f64,
    bar: Option<Bar>,
    mut ours: impl FnMut() -> Duration,
    mut floor: impl FnMut() -> Duration,
) -> Metric {
    let mut metric =
        Metric { name: name.to_owned(), unit, ours: Vec::new(), floor: Vec::new(), bar };
    for round in 0..WARM_UP + ROUNDS {
        let (ours, floor) = (ours(), floor());
        if round >= WARM_UP {
            metric.ours.push(amount / ours.as_secs_f64());
            metric.floor.push(amount / floor.as_secs_f64());
        }
    }
    metric
}

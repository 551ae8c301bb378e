//! What suspended VMs, restored ones and clones cost: beside the raw KVM calls, or the copy of the
//! same bytes, that do the same. Bare-metal guest, so that it runs at full speed on any /dev/kvm;
//! all files are on a tmpfs.
//!
//! `cargo bench --bench snapshot` prints a table, with `-- --json` one JSON object a line; with
//! `-- --svg FILE` it draws the distributions; `-- --seconds N` makes and ends VMs for so long
//! instead of 5 s.

#[path = "../tests/payload/guest.rs"]
mod guest;
mod report;

#[path = "snapshot/churn.rs"]
mod churn;
#[path = "snapshot/clones.rs"]
mod clones;
#[path = "snapshot/floor.rs"]
mod floor;
#[path = "snapshot/restore.rs"]
mod restore;
#[path = "snapshot/save.rs"]
mod save;
#[path = "snapshot/scratch.rs"]
mod scratch;

use std::io::{self, Write};
use std::sync::mpsc::{Receiver, Sender, channel};
use std::thread;
use std::time::{Duration, Instant};

use dormouse::{Kernel, MicroVm, Paused, RestoreOptions, Running, VmConfig};
use guest::Program;
use report::{Bar, Metric, Unit, micros, report};
use scratch::Scratch;

const WARM_UP: usize = 5;
const ROUNDS: usize = 100;
/// What each guest has in its memory.
const PRESENT_MIB: u8 = 64;
/// The sizes that show whether the size of a guest's memory matters.
const SIZES: [(&str, u32); 2] = [("256 MiB", 256), ("2 GiB", 2048)];

fn main() {
    let scratch = Scratch::new();
    let mut metrics = restore::metrics(&scratch);
    metrics.extend(save::metrics(&scratch));
    metrics.extend(clones::metrics(&scratch));
    metrics.extend(churn::metrics(&scratch));
    // `Metric`s of one unit make one table.
    metrics.sort_by_key(|metric| metric.unit as u8);
    report(&metrics, "the floor");
}

/// Times of ours and of the floor, measured in turn, so that both see the same machine.
fn in_turn(
    name: String,
    bar: Option<f64>,
    mut ours: impl FnMut() -> Duration,
    mut floor: impl FnMut() -> Duration,
) -> Metric {
    let mut metric = times(name, bar);
    for round in 0..WARM_UP + ROUNDS {
        let ours = ours();
        settle();
        let floor = floor();
        settle();
        if round >= WARM_UP {
            metric.ours.push(micros(ours));
            metric.floor.push(micros(floor));
        }
    }
    metric
}

/// Times of ours, which have no floor.
fn alone(name: String, bar: Option<f64>, mut ours: impl FnMut() -> Duration) -> Metric {
    let mut metric = times(name, bar);
    for round in 0..WARM_UP + ROUNDS {
        let ours = ours();
        settle();
        if round >= WARM_UP {
            metric.ours.push(micros(ours));
        }
    }
    metric
}

fn times(name: String, bar: Option<f64>) -> Metric {
    let bar = bar.map(Bar::AtMost);
    Metric { name, unit: Unit::Micros, ours: Vec::new(), floor: Vec::new(), bar }
}

fn figure(name: &str, unit: Unit, value: f64, bar: Option<Bar>) -> Metric {
    Metric { name: name.to_owned(), unit, ours: vec![value], floor: Vec::new(), bar }
}

/// Lets the kernel finish with the VM before: closing one sleeps in RCU grace periods.
fn settle() {
    thread::sleep(Duration::from_millis(25));
}

/// A guest that does what it is told, and what it said.
struct Guest {
    vm: MicroVm<Running>,
    said: Receiver<(u8, Instant)>,
}

impl Guest {
    /// With so much in its memory.
    fn boot(memory_mib: u32, fill_mib: u8) -> Self {
        let (console, said) = console();
        let kernel = Kernel::bytes(guest::elf(&Program::Memory));
        let config = VmConfig::new(kernel).memory_mib(memory_mib).console(console);
        let vm = MicroVm::create(config).expect("create").start().expect("start");
        let guest = Self { vm, said };
        guest.hears("B>");
        guest.type_in(&[b'f', fill_mib]);
        guest.hears("f");
        guest
    }

    /// The same, in the middle of writing dots.
    fn in_dots(memory_mib: u32, fill_mib: u8) -> Self {
        let guest = Self::boot(memory_mib, fill_mib);
        guest.type_in(b"x");
        guest.hears(".");
        guest
    }

    fn type_in(&self, bytes: &[u8]) {
        self.vm.console_input(bytes).expect("a running guest");
    }

    fn hears(&self, text: &str) {
        for expected in text.bytes() {
            assert_eq!(self.said.recv().expect("the guest's answer").0, expected);
        }
    }

    fn pause(self) -> MicroVm<Paused> {
        self.vm.pause().expect("pause")
    }
}

/// Options of a VM whose output is heard.
fn listening() -> (RestoreOptions, Receiver<(u8, Instant)>) {
    let (console, said) = console();
    (RestoreOptions::new().console(console), said)
}

fn console() -> (Stamped, Receiver<(u8, Instant)>) {
    let (sender, said) = channel();
    (Stamped { sender, in_dots: false }, said)
}

/// Sends each byte with its instant, but of dots in a row the first only.
struct Stamped {
    sender: Sender<(u8, Instant)>,
    in_dots: bool,
}

impl Write for Stamped {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        for &byte in bytes {
            let repeated = self.in_dots && byte == b'.';
            self.in_dots = byte == b'.';
            if !repeated {
                let _ = self.sender.send((byte, Instant::now()));
            }
        }
        Ok(bytes.len())
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

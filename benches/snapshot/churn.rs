//! How many VMs two threads make, run and end in a second, and what is left of them.

use std::env;
use std::fs;
use std::thread;
use std::time::{Duration, Instant};

use dormouse::{Kernel, MicroVm, Snapshot, VmConfig};

use crate::clones::kib;
use crate::guest::{self, Program};
use crate::report::{Bar, Metric, Unit};
use crate::scratch::Scratch;
use crate::{Guest, PRESENT_MIB, console, figure, listening};

const THREADS: usize = 2;
const RATE: f64 = 200.0;
/// What the process may hold more of after thousands of VMs. The C library's arenas, in which each
/// thread that ends leaves holes, grow by 3 MiB in the first 40,000 VMs; with one arena it is 0.2 MiB.
const GROWTH_KIB: f64 = 1024.0;

pub fn metrics(scratch: &Scratch) -> Vec<Metric> {
    let kernel = Kernel::bytes(guest::elf(&Program::Halt));
    let mut metrics = churn("create", || create(&kernel));
    let base = Guest::in_dots(256, PRESENT_MIB).pause().snapshot(scratch.empty("churn"));
    let base = base.expect("snapshot");
    metrics.extend(churn("restore", || restore(&base)));
    metrics
}

fn create(kernel: &Kernel) {
    let (console, said) = console();
    let config = VmConfig::new(kernel.clone()).memory_mib(256).console(console);
    let vm = MicroVm::create(config).expect("create").start().expect("start");
    assert_eq!(said.recv().expect("the guest's first byte").0, b'B');
    drop(vm);
}

fn restore(base: &Snapshot) {
    let (options, said) = listening();
    let vm = base.restore_with(&options).expect("restore").resume().expect("resume");
    assert_eq!(said.recv().expect("a dot").0, b'.');
    drop(vm);
}

/// Samples are the VMs of each second. What is held is compared at the middle and at the end: what
/// leaks, leaks in the second half as well.
fn churn(how: &str, one: impl Fn() + Sync) -> Vec<Metric> {
    let second = |_| run(Duration::from_secs(1), &one);
    let middle = seconds().div_ceil(2);
    second(0);
    let mut rates = figure("", Unit::VmsPerSecond, 0.0, Some(Bar::AtLeast(RATE)));
    rates.name = format!("{how}, run and drop on {THREADS} threads");
    rates.ours = (0..middle).map(second).collect();
    let before = held();
    rates.ours.extend((middle..seconds()).map(second));
    let after = held();
    let left = |what: &str, unit, value, bar| {
        let name = format!("{what} after {how}, run and drop");
        figure(&name, unit, value, Some(Bar::AtMost(bar)))
    };
    vec![
        rates,
        left("descriptors more", Unit::Count, after.0 - before.0, 0.0),
        left("memory more", Unit::Kib, after.1 - before.1, GROWTH_KIB),
    ]
}

/// VMs in a second.
fn run(time: Duration, one: &(impl Fn() + Sync)) -> f64 {
    let begin = Instant::now();
    let work = || {
        let mut count = 0u32;
        while begin.elapsed() < time {
            one();
            count += 1;
        }
        count
    };
    let count: u32 = thread::scope(|scope| {
        let threads: Vec<_> = (0..THREADS).map(|_| scope.spawn(work)).collect();
        threads.into_iter().map(|thread| thread.join().expect("no panic")).sum()
    });
    f64::from(count) / begin.elapsed().as_secs_f64()
}

/// Descriptors, and KiB of memory, once the last VM is closed.
fn held() -> (f64, f64) {
    thread::sleep(Duration::from_secs(1));
    let descriptors = fs::read_dir("/proc/self/fd").expect("/proc").count();
    (descriptors as f64, kib("/proc/self/status", "VmRSS:").expect("VmRSS"))
}

/// What follows `--seconds`.
fn seconds() -> usize {
    let mut arguments = env::args().skip_while(|argument| argument != "--seconds").skip(1);
    arguments.next().map_or(5, |seconds| seconds.parse().expect("--seconds N"))
}

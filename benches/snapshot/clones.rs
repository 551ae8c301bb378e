//! What a clone costs in memory, of this process and of the kernel.
//!
//! What the kernel keeps is counted for the machine as a whole, so that whatever else runs on it
//! is counted too.

use std::fs;
use std::thread::sleep;
use std::time::Duration;

use dormouse::{MicroVm, Paused, Snapshot};

use crate::report::{Bar, Metric, Unit};
use crate::scratch::Scratch;
use crate::{Guest, PRESENT_MIB, figure, listening};

const CLONES: usize = 200;
const PAGES: u8 = 16;
const BAR_KIB: f64 = 512.0;

/// Where each part is read: a file of /proc and a line in it, in KiB.
const PARTS: [(&str, &str, &str); 5] = [
    ("proportional set", "/proc/self/smaps_rollup", "Pss:"),
    ("page tables", "/proc/self/status", "VmPTE:"),
    ("KVM's page tables", "/proc/meminfo", "SecPageTables:"),
    ("kernel stacks, machine-wide", "/proc/meminfo", "KernelStack:"),
    ("slab, machine-wide", "/proc/meminfo", "Slab:"),
];

pub fn metrics(scratch: &Scratch) -> Vec<Metric> {
    let base = Guest::boot(256, PRESENT_MIB).pause().snapshot(scratch.empty("clones"));
    let base = base.expect("snapshot");
    // What the first clone alone costs, of the process, is not each clone's.
    drop(written(&base));
    sleep(Duration::from_secs(1));
    let before = parts();
    let clones: Vec<_> = (0..CLONES).map(|_| written(&base)).collect();
    let after = parts();
    drop(clones);
    let each: Vec<f64> =
        after.iter().zip(before).map(|(after, before)| (after - before) / CLONES as f64).collect();
    let name = format!("a clone of {CLONES} that each wrote {PAGES} pages");
    let sum = figure(&name, Unit::Kib, each.iter().sum(), Some(Bar::AtMost(BAR_KIB)));
    let parts = PARTS.iter().zip(each);
    let parts = parts.map(|((part, ..), kib)| figure(&format!("… {part}"), Unit::Kib, kib, None));
    [sum].into_iter().chain(parts).collect()
}

/// A clone that has run and written, and is paused.
fn written(base: &Snapshot) -> MicroVm<Paused> {
    let (options, said) = listening();
    let vm = base.restore_with(&options).expect("restore").resume().expect("resume");
    let guest = Guest { vm, said };
    guest.type_in(&[b'w', PAGES, 1]);
    guest.hears("w");
    guest.pause()
}

fn parts() -> [f64; PARTS.len()] {
    PARTS.map(|(_, file, line)| kib(file, line))
}

/// A line's KiB; none where this kernel does not count them.
pub fn kib(file: &str, line: &str) -> f64 {
    let text = fs::read_to_string(file).expect("/proc");
    let value = text.lines().find_map(|text| text.strip_prefix(line));
    let number = value.and_then(|value| value.split_whitespace().next()?.parse().ok());
    number.unwrap_or(0.0)
}

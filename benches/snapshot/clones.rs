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
    let mut metrics = Vec::new();
    let (mut sum, mut missing) = (0.0, Vec::new());
    for ((part, ..), counts) in PARTS.iter().zip(before.into_iter().zip(after)) {
        let (Some(before), Some(after)) = counts else {
            missing.push(*part);
            continue;
        };
        let each = (after - before) / CLONES as f64;
        sum += each;
        metrics.push(figure(&format!("… {part}"), Unit::Kib, each, None));
    }
    let mut name = format!("a clone of {CLONES} that each wrote {PAGES} pages");
    if !missing.is_empty() {
        name += &format!(" (without {}, which is not counted here)", missing.join(" and "));
    }
    // A sum that lacks a part meets no bar.
    let bar = missing.is_empty().then_some(Bar::AtMost(BAR_KIB));
    metrics.insert(0, figure(&name, Unit::Kib, sum, bar));
    metrics
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

fn parts() -> [Option<f64>; PARTS.len()] {
    PARTS.map(|(_, file, line)| kib(file, line))
}

/// A line's KiB; none where this kernel does not count them.
pub fn kib(file: &str, line: &str) -> Option<f64> {
    let text = fs::read_to_string(file).ok()?;
    let value = text.lines().find_map(|text| text.strip_prefix(line))?;
    value.split_whitespace().next()?.parse().ok()
}

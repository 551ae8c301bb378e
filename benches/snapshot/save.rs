//! What a guest waits for: a pause, a snapshot, the way into memory; and what readers of a snapshot
//! wait for.

use std::fs::{self, File};
use std::io::Write;
use std::time::{Duration, Instant};

use dormouse::{Snapshot, SnapshotOptions};

use crate::report::{Metric, Unit};
use crate::scratch::Scratch;
use crate::{Guest, PRESENT_MIB, SIZES, alone, figure, in_turn, listening};

/// How much more than a copy of the same bytes a snapshot may take.
const BAR: f64 = 1.5;
const PAUSE_MICROS: f64 = 200.0;
const SUSPEND_MICROS: f64 = 2000.0;

pub fn metrics(scratch: &Scratch) -> Vec<Metric> {
    let mut metrics = vec![pause()];
    for (size, memory_mib) in SIZES {
        metrics.push(snapshot(scratch, size, memory_mib));
        metrics.push(in_memory(size, memory_mib, PRESENT_MIB));
    }
    metrics.push(in_memory("2 GiB", 2048, u8::MAX));
    metrics.push(diff(scratch));
    metrics.extend(read(scratch));
    metrics
}

/// A pause and a resume, as long as the caller waits.
fn pause() -> Metric {
    let mut guest = Some(Guest::in_dots(256, PRESENT_MIB).vm);
    alone("pause and resume".to_owned(), Some(PAUSE_MICROS), || {
        let vm = guest.take().expect("put back below");
        let begin = Instant::now();
        let vm = vm.pause().expect("pause").resume().expect("resume");
        let elapsed = begin.elapsed();
        guest = Some(vm);
        elapsed
    })
}

/// A snapshot of all that is there, beside a write of as many bytes to a new file by one thread; a save
/// takes up to four.
fn snapshot(scratch: &Scratch, size: &str, memory_mib: u32) -> Metric {
    let vm = Guest::boot(memory_mib, PRESENT_MIB).pause();
    let bytes = vec![0xa5u8; usize::from(PRESENT_MIB) << 20];
    let ours = || {
        let directory = scratch.empty("full");
        let begin = Instant::now();
        vm.snapshot_with(directory, &SnapshotOptions::new().full(true)).expect("snapshot");
        begin.elapsed()
    };
    let floor = || {
        let path = scratch.empty("copy");
        let begin = Instant::now();
        File::create(&path).and_then(|mut file| file.write_all(&bytes)).expect("a copy");
        let elapsed = begin.elapsed();
        fs::remove_file(path).expect("it is there");
        elapsed
    };
    let name =
        format!("snapshot of {size} with {PRESENT_MIB} MiB present (floor: one thread's copy)");
    in_turn(name, Some(BAR), ours, floor)
}

/// A new VM each time: one that has slept before has less of its own.
fn in_memory(size: &str, memory_mib: u32, present_mib: u8) -> Metric {
    let name = format!("suspend in memory, {size} with {present_mib} MiB present");
    alone(name, Some(SUSPEND_MICROS), || {
        let vm = Guest::boot(memory_mib, present_mib).pause();
        let begin = Instant::now();
        let asleep = vm.suspend_in_memory().expect("suspend");
        let elapsed = begin.elapsed();
        drop(asleep);
        elapsed
    })
}

/// A snapshot of a VM that came from one, and has written 255 pages since.
fn diff(scratch: &Scratch) -> Metric {
    let base = Guest::boot(256, PRESENT_MIB).pause().snapshot(scratch.empty("base"));
    let base = base.expect("snapshot");
    alone("diff snapshot of 255 pages written".to_owned(), None, || {
        let (options, said) = listening();
        let vm = base.restore_with(&options).expect("restore").resume().expect("resume");
        let guest = Guest { vm, said };
        guest.type_in(&[b'w', 255, 1]);
        guest.hears("w");
        let vm = guest.pause();
        let directory = scratch.empty("diff");
        let begin = Instant::now();
        vm.snapshot(directory).expect("snapshot");
        begin.elapsed()
    })
}

/// Opening a snapshot, and comparing its checksums.
fn read(scratch: &Scratch) -> [Metric; 2] {
    let directory = scratch.empty("read");
    drop(Guest::boot(256, PRESENT_MIB).pause().snapshot(&directory).expect("snapshot"));
    let open = || Snapshot::open(&directory).expect("open");
    let opened = alone("open a snapshot".to_owned(), None, || timed(|| drop(open())));
    let snapshot = open();
    let mut verify = figure("verify a snapshot", Unit::MibPerSecond, 0.0, None);
    let rate = |_| {
        let elapsed = timed(|| snapshot.verify().expect("verify"));
        f64::from(PRESENT_MIB) / elapsed.as_secs_f64()
    };
    verify.ours = (0..20).map(rate).collect();
    [opened, verify]
}

fn timed(work: impl FnOnce()) -> Duration {
    let begin = Instant::now();
    work();
    begin.elapsed()
}

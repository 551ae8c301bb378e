//! From a snapshot to the first thing that the guest does.

use std::sync::mpsc::Receiver;
use std::thread::sleep;
use std::time::{Duration, Instant};

use dormouse::{MicroVm, Paused, Pool, PoolOptions, Running, Snapshot};

use crate::floor::Saved;
use crate::report::{Bar, Metric, Unit};
use crate::scratch::Scratch;
use crate::{Guest, PRESENT_MIB, SIZES, console, figure, in_turn, listening, settle};

/// How much more than the floor a resume may take.
const BAR: f64 = 1.3;
/// How much more than the median the slowest may take.
const TAIL: f64 = 3.0;

pub fn metrics(scratch: &Scratch) -> Vec<Metric> {
    let mut metrics = Vec::new();
    for (size, memory_mib) in SIZES {
        let paused = Guest::in_dots(memory_mib, PRESENT_MIB).pause();
        let snapshot = paused.snapshot(scratch.empty("dots")).expect("snapshot");
        drop(paused);
        let saved = Saved::new(scratch, memory_mib, PRESENT_MIB);
        let metric =
            |name: &str, ours: fn(&Snapshot) -> Duration, floor: fn(&Saved) -> Duration| {
                let name = format!("{name}, {size}");
                in_turn(name, Some(BAR), || ours(&snapshot), || floor(&saved))
            };
        let on_shell = metric("restore on a shell → first dot", on_shell, raw_on_shell);
        let tails = tails(&on_shell);
        metrics.push(on_shell);
        metrics.extend(tails);
        let floor = Saved::cold;
        metrics.push(metric("restore with nothing prepared → first dot", cold, floor));
        metrics.push(metric("resume of a restored VM → first dot", ready, raw_ready));
        metrics.push(pool(size, &snapshot, &saved));
        metrics.push(fork(size, memory_mib, &snapshot));
        metrics.push(first_fork(size, memory_mib, &snapshot));
    }
    metrics
}

/// How far the slowest are behind, and those of the floor in the same turns.
fn tails(metric: &Metric) -> [Metric; 2] {
    let tail = |samples: &[f64]| {
        let percentile = |percent| metric.percentile(samples, percent).unwrap_or(0.0);
        percentile(99) / percentile(50)
    };
    let name = format!("{}: p99 over p50", metric.name);
    let of_floor = format!("… of the floor, {}", metric.name);
    [
        figure(&name, Unit::Times, tail(&metric.ours), Some(Bar::AtMost(TAIL))),
        figure(&of_floor, Unit::Times, tail(&metric.floor), None),
    ]
}

fn on_shell(snapshot: &Snapshot) -> Duration {
    let shell = snapshot.prepare().expect("prepare");
    settle();
    let (options, said) = listening();
    let begin = Instant::now();
    resume(snapshot.restore_on(shell, &options).expect("restore"), &said, begin)
}

fn raw_on_shell(saved: &Saved) -> Duration {
    let prepared = saved.prepare();
    settle();
    let begin = Instant::now();
    prepared.restore();
    prepared.run() - begin
}

fn cold(snapshot: &Snapshot) -> Duration {
    let (options, said) = listening();
    let begin = Instant::now();
    resume(snapshot.restore_with(&options).expect("restore"), &said, begin)
}

fn ready(snapshot: &Snapshot) -> Duration {
    let (options, said) = listening();
    let vm = snapshot.restore_with(&options).expect("restore");
    settle();
    resume(vm, &said, Instant::now())
}

fn raw_ready(saved: &Saved) -> Duration {
    let prepared = saved.prepare();
    prepared.restore();
    settle();
    let begin = Instant::now();
    prepared.run() - begin
}

/// A VM out of a pool, which keeps one ready.
fn pool(size: &str, snapshot: &Snapshot, saved: &Saved) -> Metric {
    let ours = || {
        // It makes the next one ready beside the one that is measured, as it does for anyone.
        let (options, said) = listening();
        let options = PoolOptions::new().min(1).max(1).restore(options);
        let pool = Pool::new(snapshot.clone(), options).expect("pool");
        while pool.ready() == 0 {
            sleep(Duration::from_millis(1));
        }
        settle();
        let begin = Instant::now();
        resume(pool.acquire().expect("a ready VM"), &said, begin)
    };
    in_turn(format!("VM of a pool → first dot, {size}"), Some(BAR), ours, || raw_ready(saved))
}

/// A clone of a paused VM that has had one, beside a restore on a shell.
fn fork(size: &str, memory_mib: u32, snapshot: &Snapshot) -> Metric {
    let mut parent = Guest::in_dots(memory_mib, PRESENT_MIB).pause();
    drop(parent.fork(1).expect("the first fork"));
    let name = format!("fork on a shell → first dot of the clone, {size} (floor: ours on a shell)");
    in_turn(name, Some(BAR), || clone(&mut parent), || on_shell(snapshot))
}

/// A clone of a VM that has run since the last one: its state is read before.
fn first_fork(size: &str, memory_mib: u32, snapshot: &Snapshot) -> Metric {
    let mut parent = Some(Guest::in_dots(memory_mib, PRESENT_MIB).pause());
    let ours = || {
        let vm = parent.take().expect("put back below").resume().expect("resume");
        sleep(Duration::from_millis(2));
        let mut vm = vm.pause().expect("pause");
        let elapsed = clone(&mut vm);
        parent = Some(vm);
        elapsed
    };
    let name = format!("… the first fork after a pause, {size} (floor: ours on a shell)");
    in_turn(name, None, ours, || on_shell(snapshot))
}

fn clone(vm: &mut MicroVm<Paused>) -> Duration {
    let (console, said) = console();
    let mut console = Some(console);
    let shell = vm.prepare().expect("prepare");
    settle();
    let begin = Instant::now();
    let clones = vm.fork_on(vec![shell], |_| {
        dormouse::RestoreOptions::new().console(console.take().expect("one clone"))
    });
    resume(clones.expect("fork").remove(0), &said, begin)
}

/// Runs the VM until its first dot, and ends it.
fn resume(vm: MicroVm<Paused>, said: &Receiver<(u8, Instant)>, begin: Instant) -> Duration {
    let vm: MicroVm<Running> = vm.resume().expect("resume");
    let (byte, instant) = said.recv().expect("a dot");
    assert_eq!(byte, b'.');
    drop(vm);
    instant - begin
}

//! A save as its caller sees it: how far it is, how it is broken off, what is on the disk when.

use std::env;
use std::fs::{self, File};
use std::ops::ControlFlow;
use std::os::unix::fs::FileExt;
use std::path::Path;
use std::process::{Command, Stdio};
use std::sync::{Arc, Mutex};

use dormouse::{BlockConfig, ErrorKind, MicroVm, Paused, SaveStage, Snapshot, SnapshotOptions};

use crate::scratch::Scratch;
use crate::snapshot::Guest;
use crate::tracer::{Call, trace};
use crate::{Output, resources};

/// A guest in its tenth page of threes, with a disk of its own and one under a delta.
fn guest(directory: &Path) -> (MicroVm<Paused>, Output) {
    for name in ["own", "base"] {
        fs::write(directory.join(name), vec![1; 3 << 20]).unwrap();
    }
    let own = BlockConfig::new(directory.join("own"));
    let base = BlockConfig::new(directory.join("base")).delta(directory.join("delta"));
    let guest = Guest::boot_with(|config| config.block(own).block(base));
    guest.write(10, 3);
    guest.pause()
}

#[test]
fn a_save_tells_how_far_it_is_and_may_be_broken_off_at_each_stage() {
    let scratch = Scratch::new();
    let (vm, output) = guest(&scratch.0);
    let place = scratch.join("place");
    let seen = Arc::new(Mutex::new(Vec::new()));
    let watched = |stop: Option<SaveStage>| {
        let seen = Arc::clone(&seen);
        SnapshotOptions::new().progress(move |progress| {
            assert!(progress.total_bytes.is_none_or(|total| progress.bytes <= total));
            seen.lock().unwrap().push(progress.stage);
            if stop == Some(progress.stage) {
                return ControlFlow::Break(());
            }
            ControlFlow::Continue(())
        })
    };
    vm.snapshot_with(&place, &watched(None)).unwrap();
    let mut stages = std::mem::take(&mut *seen.lock().unwrap());
    stages.dedup();
    assert_eq!(stages, [SaveStage::Disk(0), SaveStage::Disk(1), SaveStage::Memory]);
    let names = scratch.names();
    for stage in stages {
        let error = vm.snapshot_with(&place, &watched(Some(stage))).unwrap_err();
        assert_eq!(error.kind(), &ErrorKind::Interrupted, "{stage:?}");
        assert_eq!(seen.lock().unwrap().last(), Some(&stage), "what came after it was done too");
        assert_eq!(scratch.names(), names, "{stage:?}");
        Snapshot::open(&place).unwrap().verify().unwrap();
    }
    let guest = Guest::resumed(vm, output);
    assert_eq!(guest.sum(20), 30);
    guest.off();
}

#[test]
fn two_who_save_a_vm_at_once_both_have_it_and_it_has_its_disks() {
    let scratch = Scratch::new();
    let (vm, output) = guest(&scratch.0);
    for round in 0..5 {
        let save = |name: &str| vm.snapshot(scratch.join(&format!("{name}-{round}")));
        let (one, other) = std::thread::scope(|scope| {
            let other = scope.spawn(|| save("other"));
            (save("one"), other.join().unwrap())
        });
        one.unwrap().verify().unwrap();
        other.unwrap().verify().unwrap();
    }
    let guest = Guest::resumed(vm, output);
    guest.off();
}

#[test]
fn verify_finds_a_flip_in_each_file_of_a_disk() {
    let scratch = Scratch::new();
    let (vm, _output) = guest(&scratch.0);
    vm.snapshot(scratch.join("first")).unwrap();
    let first = Snapshot::open(scratch.join("first")).unwrap();
    let options = dormouse::RestoreOptions::new().disk_base(1, scratch.join("base"));
    let second = first.restore_with(&options).unwrap().snapshot(scratch.join("second")).unwrap();
    for (snapshot, names) in
        [(first, &["disk-0", "disk-1"][..]), (second, &["disk-0", "disk-0-below", "disk-1"])]
    {
        for name in names {
            let path = snapshot.directory().unwrap().join(name);
            let file = File::options().read(true).write(true).open(path).unwrap();
            let len = file.metadata().unwrap().len();
            for at in [0, 4100, len / 2, len - 1] {
                let mut byte = [0];
                file.read_exact_at(&mut byte, at).unwrap();
                file.write_all_at(&[byte[0] ^ 8], at).unwrap();
                let error = snapshot.verify().unwrap_err();
                assert!(error.to_string().contains(&format!("{name} is damaged")), "{error}");
                file.write_all_at(&byte, at).unwrap();
            }
            snapshot.verify().unwrap();
        }
    }
}

/// Set for the process that is traced: where its files may be.
const TRACED: &str = "DORMOUSE_TEST_SYNCED";
const BEGIN: &str = "/nowhere/a-save-that-is-synced";
const MIDDLE: &str = "/nowhere/a-save-that-is-not";

#[test]
fn all_is_on_the_disk_before_a_synced_snapshot_is_in_its_place() {
    const NAME: &str = "all_is_on_the_disk_before_a_synced_snapshot_is_in_its_place";
    if let Some(directory) = env::var_os(TRACED) {
        let (vm, _output) = guest(Path::new(&directory));
        std::io::stdin().read_line(&mut String::new()).unwrap();
        for (mark, sync) in [(BEGIN, true), (MIDDLE, false)] {
            File::open(mark).unwrap_err();
            let options = SnapshotOptions::new().sync(sync);
            vm.snapshot_with(Path::new(&directory).join("place"), &options).unwrap();
        }
        return;
    }
    if !resources::alone(NAME) {
        return;
    }
    let scratch = Scratch::new();
    let child = Command::new(env::current_exe().unwrap())
        .args(["--test-threads=1", "--nocapture", NAME])
        .env(TRACED, &scratch.0)
        .stdin(Stdio::piped())
        .spawn()
        .unwrap();
    let trace = trace(child).unwrap();
    assert!(trace.status.success(), "{}", trace.status);
    let at = |path: &str| {
        trace.calls.iter().position(|call| call.path.as_deref() == Some(Path::new(path))).unwrap()
    };
    let (begin, middle) = (at(BEGIN), at(MIDDLE));
    let is_sync = |call: &&Call| matches!(call.number, libc::SYS_fsync | libc::SYS_fdatasync);
    let (synced, other) = (&trace.calls[begin..middle], &trace.calls[middle..]);
    assert_eq!(other.iter().filter(is_sync).count(), 0);
    let renamed = synced.iter().rposition(|call| call.number == libc::SYS_renameat2).unwrap();
    // `state`, the memory, two disks, and the directory; then the directory around it.
    let (before, after) = synced.split_at(renamed);
    assert_eq!([before, after].map(|calls| calls.iter().filter(is_sync).count()), [5, 1]);
}

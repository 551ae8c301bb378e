//! Snapshots that somebody else wrote, moved or replaced: what they cannot do to this host, and to
//! VMs that come from another.

use std::fs;
use std::os::unix::fs::symlink;
use std::path::Path;
use std::process::Command;
use std::thread::sleep;
use std::time::{Duration, Instant};

use dormouse::{
    BlockConfig, ErrorKind, MicroVm, NetConfig, Paused, RestoreOptions, Snapshot, SnapshotOptions,
    UserNetwork, VmConfig, VsockConfig,
};

use crate::scratch::Scratch;
use crate::snapshot::Guest;
use crate::{Output, PATIENCE};

/// A guest in its tenth page of these values, with what a test adds to its configuration.
fn guest(value: u8, with: impl FnOnce(VmConfig) -> VmConfig) -> (MicroVm<Paused>, Output) {
    let guest = Guest::boot_with(with);
    guest.write(10, value);
    guest.pause()
}

fn refusal<T>(result: Result<T, dormouse::Error>) -> String {
    let Err(error) = result else { panic!("it was taken") };
    assert_eq!(error.kind(), &ErrorKind::Snapshot, "{error:?}");
    format!("{error:?}")
}

#[test]
fn links_in_a_snapshot_lead_nowhere() {
    let scratch = Scratch::new();
    let base = scratch.join("base");
    let image = scratch.disk("image");
    drop(guest(1, |config| config.block(BlockConfig::new(&image))).0.snapshot(&base).unwrap());
    drop(Snapshot::open(&base).unwrap().restore().unwrap());
    for name in ["state", "memory-0", "disk-0"] {
        let (own, elsewhere) = (base.join(name), scratch.join("elsewhere"));
        fs::rename(&own, &elsewhere).unwrap();
        symlink(&elsewhere, &own).unwrap();
        let text = refusal(Snapshot::open(&base));
        assert!(text.contains(name) && text.contains("a symbolic link"), "{text}");
        fs::remove_file(&own).unwrap();
        fs::rename(&elsewhere, &own).unwrap();
    }
    assert!(!scratch.join("elsewhere").exists());
    // The directory itself may be where somebody put a link to it.
    symlink(&base, scratch.join("link")).unwrap();
    drop(Snapshot::open(scratch.join("link")).unwrap().restore().unwrap());
}

#[test]
fn taps_and_programs_of_a_snapshot_need_leave() {
    let scratch = Scratch::new();
    let [text, passt, ran] = ["text", "stand-in", "ran"].map(|name| scratch.join(name));
    fs::write(&text, format!("#!/bin/sh\necho >> {}\nexec sleep 1000\n", ran.display())).unwrap();
    // By another process: what is open for writing cannot be executed, and a process that another test starts has a copy
    // of all descriptors of this one.
    let made = Command::new("install").arg("-m755").args([&text, &passt]).status().unwrap();
    assert!(made.success());
    let user = NetConfig::user(UserNetwork::new().program(&passt));
    let (vm, _output) = guest(1, |config| config.network(user));
    let snapshot = vm.snapshot(scratch.join("base")).unwrap();
    // It is a process of its own, and comes to it in its own time.
    let begin = Instant::now();
    while !ran.exists() {
        assert!(begin.elapsed() < PATIENCE, "the stand-in does not run");
        sleep(Duration::from_millis(1));
    }
    drop(vm);
    fs::remove_file(&ran).unwrap();
    let text = refusal(snapshot.restore());
    assert!(text.contains("stand-in") && text.contains("RestoreOptions::network"), "{text}");
    assert!(!ran.exists(), "a snapshot chose a program of this host");
    let own = RestoreOptions::new().network(0, NetConfig::pair().unwrap().0);
    drop(snapshot.restore_with(&own).unwrap());
    assert!(!ran.exists());
    drop(snapshot.restore_with(&RestoreOptions::new().outside_paths(true)).unwrap());
}

#[test]
fn an_interface_with_a_descriptor_is_saved_and_connected_anew() {
    let scratch = Scratch::new();
    let (one, _other) = NetConfig::pair().unwrap();
    let (mut vm, output) = guest(2, |config| config.network(one));
    let saved = vm.snapshot(scratch.join("base")).unwrap();
    let leave = RestoreOptions::new().outside_paths(true);
    for result in [saved.restore(), saved.restore_with(&leave)] {
        let text = refusal(result);
        assert!(text.contains("RestoreOptions::network"), "{text}");
    }
    refusal(vm.fork(1));
    let connect = || RestoreOptions::new().network(0, NetConfig::pair().unwrap().0);
    drop(saved.restore_with(&connect()).unwrap());
    drop(vm.fork_with(2, |_| connect()).unwrap());
    // One that sleeps here still has its own.
    let vm = vm.suspend(scratch.join("asleep")).unwrap().resume().unwrap();
    let vm = vm.pause().unwrap().suspend_in_memory().unwrap().resume().unwrap();
    let guest = Guest { vm, output };
    assert_eq!(guest.sum(20), 20);
    guest.off();
}

#[test]
fn a_suspended_vm_wakes_from_its_own_files_only_and_removes_no_others() {
    let scratch = Scratch::new();
    let place = scratch.join("place");
    let (one, _output) = guest(1, |config| config);
    let (two, output) = guest(2, |config| config);
    let one = one.suspend(&place).unwrap();
    let two = two.suspend(&place).unwrap();
    let failed = one.resume().unwrap_err();
    assert!(failed.error.to_string().contains("another snapshot"), "{}", failed.error);
    drop(failed.vm.terminate());
    let guest = Guest { vm: two.resume().unwrap(), output };
    assert_eq!(guest.sum(20), 20);
    guest.off();
}

#[test]
fn a_snapshot_that_was_replaced_is_itself_or_is_refused() {
    let scratch = Scratch::new();
    let (place, image) = (scratch.join("place"), scratch.disk("image"));
    let (vm, _output) = guest(1, |config| config);
    let old = vm.snapshot(&place).unwrap();
    let (vm, _output) = guest(2, |config| config.block(BlockConfig::new(&image)));
    let new = vm.snapshot(&place).unwrap();
    assert_eq!(Guest::restore(&old).sum(10), 10);
    assert_eq!(Guest::restore(&new).sum(10), 20);
    // Its disks are those of the next one.
    vm.snapshot_with(&place, &SnapshotOptions::new().full(true)).unwrap();
    for text in [refusal(new.restore()), refusal(new.verify())] {
        assert!(text.contains("another snapshot"), "{text}");
    }
    old.verify().unwrap();
}

#[test]
fn a_snapshot_is_opened_whole_while_others_take_its_place() {
    let scratch = Scratch::new();
    let place = scratch.join("place");
    let vms = [1, 2].map(|value| guest(value, |config| config).0);
    vms[0].snapshot(&place).unwrap();
    std::thread::scope(|scope| {
        let saves = scope.spawn(|| {
            for vm in vms.iter().cycle().take(200) {
                vm.snapshot(&place).unwrap();
            }
        });
        while !saves.is_finished() {
            Snapshot::open(&place).unwrap().verify().unwrap();
        }
    });
    assert_eq!(scratch.names(), ["place"]);
}

#[test]
fn a_disk_that_changed_while_its_guest_slept_is_refused() {
    let scratch = Scratch::new();
    let (image, delta) = (scratch.disk("image"), scratch.join("delta"));
    let block = BlockConfig::new(&image).delta(&delta);
    let (vm, _output) = guest(1, |config| config.block(block));
    let asleep = vm.suspend(scratch.join("asleep")).unwrap();
    let options = RestoreOptions::new().outside_paths(true);
    let saved = Snapshot::open(scratch.join("asleep")).unwrap();
    drop(saved.restore_with(&options).unwrap());
    let text = refusal(saved.restore_with(&RestoreOptions::new().disk_base(0, &image)));
    assert!(text.contains("delta"), "{text}");
    let touched = fs::File::options().write(true).open(&delta).unwrap();
    touched.set_modified(std::time::SystemTime::UNIX_EPOCH).unwrap();
    let changed = |error: dormouse::Error| {
        assert_eq!(error.kind(), &ErrorKind::Disk, "{error:?}");
        assert!(error.to_string().contains("time of modification"), "{error:?}");
    };
    changed(saved.restore_with(&options).unwrap_err());
    changed(asleep.resume().unwrap_err().error);
}

#[test]
fn a_socket_and_a_disk_elsewhere_need_leave_however_they_are_named() {
    let scratch = Scratch::new();
    let base = scratch.join("base");
    // Such a path begins as the snapshot's directory does.
    let socket = Path::new(&base).join("..").join("socket");
    fs::create_dir(&base).unwrap();
    let vsock = VsockConfig::default().unix_socket(&socket);
    let (vm, _output) = guest(1, |config| config.vsock(vsock));
    let snapshot = vm.snapshot(&base).unwrap();
    drop(vm);
    let text = refusal(snapshot.restore());
    assert!(text.contains("outside of its directory"), "{text}");
    let given = RestoreOptions::new().vsock_unix_socket(scratch.join("socket-2"));
    drop(snapshot.restore_with(&given).unwrap());
}

#[test]
fn a_note_of_what_was_written_is_no_order() {
    let scratch = Scratch::new();
    let base = scratch.join("base");
    let (vm, _output) = guest(1, |config| config);
    drop(vm.snapshot(&base).unwrap());
    for note in [&b"DORMOUSE"[..], &[0xff; 100], &[]] {
        fs::write(base.join("written"), note).unwrap();
        assert_eq!(Guest::restore(&Snapshot::open(&base).unwrap()).sum(10), 10);
    }
}

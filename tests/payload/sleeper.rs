//! VMs that sleep in files and are found again: by another process, once at a time, as themselves.

use std::fs;
use std::io::{BufRead, BufReader, Write};
use std::path::Path;
use std::process::{Child, Command, Stdio};

use dormouse::{
    BlockConfig, Error, ErrorKind, MicroVm, NetConfig, Paused, RestoreOptions, Snapshot, Suspended,
    VmConfig,
};

use crate::guest::Program;
use crate::scratch::Scratch;
use crate::snapshot::Guest;
use crate::{Output, config, output};

const DIRECTORY: &str = "DORMOUSE_TEST_SLEEPER";

/// A guest in its tenth page of ones, with what a test adds to its configuration.
fn guest(with: impl FnOnce(VmConfig) -> VmConfig) -> (MicroVm<Paused>, Output) {
    let guest = Guest::boot_with(with);
    guest.write(10, 1);
    guest.pause()
}

fn open(directory: &Path) -> Result<MicroVm<Suspended>, Error> {
    MicroVm::<Suspended>::open(directory)
}

/// The guest in these files, awake, and what it says.
fn wake(directory: &Path) -> Result<Guest, Error> {
    let (writer, output) = output();
    let options = RestoreOptions::new().console(writer).outside_paths(true);
    let vm = MicroVm::<Suspended>::open_with(directory, &options)?.resume()?;
    Ok(Guest { vm, output })
}

fn refusal<T>(result: Result<T, Error>, kind: &ErrorKind) -> String {
    let Err(error) = result else { panic!("it was taken") };
    assert_eq!(error.kind(), kind, "{error:?}");
    error.to_string()
}

/// Wakes the guest, says so, and suspends it again when it is told to.
fn other_process(directory: &Path) {
    let guest = wake(directory).unwrap();
    assert_eq!(guest.sum(20), 10);
    println!("awake");
    let mut line = String::new();
    std::io::stdin().read_line(&mut line).unwrap();
    guest.write(20, 1);
    drop(guest.vm.suspend(directory).unwrap());
}

/// A process that has woken the guest in these files.
fn woken_elsewhere(directory: &Path) -> Child {
    let mut child = Command::new(std::env::current_exe().unwrap())
        .args(["--test-threads=1", "--nocapture", "a_vm_that_sleeps_is_found_and_woken_by_others"])
        .env(DIRECTORY, directory)
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .spawn()
        .unwrap();
    let mut lines = BufReader::new(child.stdout.take().unwrap()).lines();
    assert!(lines.any(|line| line.unwrap().ends_with("awake")));
    // Whoever writes to a pipe that is closed is ended by it.
    std::thread::spawn(move || lines.count());
    child
}

#[test]
fn a_vm_that_sleeps_is_found_and_woken_by_others_but_by_one_at_a_time() {
    if let Some(directory) = std::env::var_os(DIRECTORY) {
        return other_process(Path::new(&directory));
    }
    let scratch = Scratch::new();
    let (place, image) = (scratch.join("asleep"), scratch.disk("image"));
    let (vm, _output) = guest(|config| config.block(BlockConfig::new(&image)));
    let before = vm.suspend(&place).unwrap();

    // One that is killed gives it up.
    let mut child = woken_elsewhere(&place);
    let failed = before.resume().unwrap_err();
    assert_eq!(failed.error.kind(), &ErrorKind::Snapshot);
    assert!(failed.error.to_string().contains("is awake"), "{}", failed.error);
    assert!(refusal(open(&place), &ErrorKind::Snapshot).contains("is awake"));
    // Nor does its end here take the files of the one that is awake there.
    drop(failed.vm.terminate());
    child.kill().unwrap();
    child.wait().unwrap();

    // One that suspends it again has changed it.
    let early = open(&place).unwrap();
    let mut child = woken_elsewhere(&place);
    child.stdin.take().unwrap().write_all(b"\n").unwrap();
    assert!(child.wait().unwrap().success());
    let text = refusal(early.resume().map_err(Error::from), &ErrorKind::Snapshot);
    assert!(text.contains("another snapshot"), "{text}");
    let guest = wake(&place).unwrap();
    assert_eq!(guest.sum(20), 20);
    guest.off();
}

#[test]
fn files_wake_a_vm_again_when_it_is_over_until_a_disk_has_changed() {
    let scratch = Scratch::new();
    let (place, image) = (scratch.join("asleep"), scratch.disk("image"));
    let (vm, output) = guest(|config| config.block(BlockConfig::new(&image)));
    let asleep = vm.suspend(&place).unwrap();
    let one = Guest { vm: asleep.resume().unwrap(), output };
    one.write(10, 7);
    assert!(refusal(open(&place), &ErrorKind::Snapshot).contains("is awake"));
    // Awake is also who is paused.
    let (vm, _output) = one.pause();
    assert!(refusal(open(&place), &ErrorKind::Snapshot).contains("is awake"));
    drop(vm);
    let two = wake(&place).unwrap();
    assert_eq!(two.sum(10), 10);
    two.off();
    let opened = open(&place).unwrap();
    let touched = fs::File::options().write(true).open(&image).unwrap();
    touched.set_modified(std::time::SystemTime::UNIX_EPOCH).unwrap();
    for result in [open(&place).map(drop), opened.resume().map(drop).map_err(Error::from)] {
        let text = refusal(result, &ErrorKind::Disk);
        assert!(text.contains("image") && text.contains("time of modification"), "{text}");
    }
    fs::remove_file(&image).unwrap();
    assert!(refusal(open(&place), &ErrorKind::Disk).contains("image"));
}

#[test]
fn a_snapshot_and_a_copy_of_one_that_sleeps_are_nobody() {
    let scratch = Scratch::new();
    let (vm, _output) = guest(|config| config);
    drop(vm.snapshot(scratch.join("base")).unwrap());
    let asleep = vm.suspend(scratch.join("asleep")).unwrap().into_snapshot().unwrap();
    drop(asleep.merge(scratch.join("merged")).unwrap());
    drop(asleep.restore().unwrap().snapshot(scratch.join("clone")).unwrap());
    for name in ["base", "merged", "clone"] {
        let text = refusal(open(&scratch.join(name)), &ErrorKind::Snapshot);
        assert!(text.contains("no VM that was suspended"), "{text}");
        assert!(text.contains("`Snapshot::restore`"), "{text}");
        drop(Snapshot::open(scratch.join(name)).unwrap().restore().unwrap());
    }
    assert!(refusal(open(&scratch.join("nowhere")), &ErrorKind::Snapshot).contains("nowhere"));
    // One that went to cold storage is itself again.
    asleep.pack(scratch.join("cold")).unwrap();
    drop(Snapshot::unpack(scratch.join("cold"), scratch.join("warm")).unwrap());
    let guest = wake(&scratch.join("warm")).unwrap();
    assert_eq!(guest.sum(10), 10);
    guest.off();
}

#[test]
fn one_that_wakes_is_given_what_no_file_keeps_and_chooses_nothing_unasked() {
    let scratch = Scratch::new();
    let (place, image) = (scratch.join("asleep"), scratch.disk("image"));
    let (one, _other) = NetConfig::pair().unwrap();
    let (vm, _output) = guest(|config| config.block(BlockConfig::new(&image)).network(one));
    drop(vm.suspend(&place).unwrap());
    let refused = |options: &RestoreOptions, kind| {
        refusal(MicroVm::<Suspended>::open_with(&place, options), kind)
    };
    let text = refusal(open(&place), &ErrorKind::Snapshot);
    assert!(text.contains("RestoreOptions::network"), "{text}");
    let connected = RestoreOptions::new().network(0, NetConfig::pair().unwrap().0);
    assert!(refused(&connected, &ErrorKind::Snapshot).contains("outside of its directory"));
    let delta = connected.clone().outside_paths(true).disk_delta(0, scratch.join("delta"));
    assert!(refused(&delta, &ErrorKind::Config).contains("has the deltas that it had"));
    // The disk is at another place by now.
    let moved = scratch.join("moved");
    fs::rename(&image, &moved).unwrap();
    let (writer, output) = output();
    let options = connected.disk_base(0, &moved).console(writer);
    let vm = MicroVm::<Suspended>::open_with(&place, &options).unwrap().resume().unwrap();
    let guest = Guest { vm, output };
    assert_eq!(guest.sum(10), 10);
    // And is its own there, to be written.
    let other = MicroVm::create(config(&Program::Halt).block(BlockConfig::new(&moved)));
    assert!(refusal(other, &ErrorKind::Disk).contains("in use"));
    guest.off();
}

//! What an embedding process has of its VMs: nothing that it did not ask for. Traced, from the first VM to the
//! last drop.

use std::env;
use std::fs::{self, File};
use std::io;
use std::path::Path;
use std::process::{Command, Stdio};

use dormouse::{BlockConfig, MicroVm, Snapshot, Suspended, VsockConfig};

use crate::resources::{self, signals};
use crate::scratch::Scratch;
use crate::snapshot::Guest;
use crate::tracer::{Call, Trace, trace};

/// Set for the process that is traced: where its files may be.
const TRACED: &str = "DORMOUSE_TEST_TRACED";
const BEGIN: &str = "/nowhere/the-first-vm-is-next";
const END: &str = "/nowhere/the-last-vm-is-gone";

/// A VM's whole life: booted, paused, saved, cloned, asleep in memory and in files, awake, over.
fn story(directory: &Path) {
    let disk = BlockConfig::new(directory.join("disk"));
    let guest = Guest::boot_with(|config| {
        config.vcpus(2).entropy(true).block(disk).vsock(VsockConfig::default())
    });
    guest.write(10, 1);
    let (mut vm, output) = guest.pause();
    let snapshot = vm.snapshot(directory.join("snapshot")).unwrap();
    let clones = vm.fork(2).unwrap();
    let vm = vm.suspend_in_memory().unwrap().resume().unwrap();
    let guest = Guest { vm, output };
    assert_eq!(guest.sum(20), 10);
    for clone in clones {
        drop(clone.resume().unwrap().terminate());
    }
    drop(snapshot);
    let snapshot = Snapshot::open(directory.join("snapshot")).unwrap();
    drop(snapshot.restore().unwrap().resume().unwrap());
    drop(guest.pause().0.suspend(directory.join("asleep")).unwrap());
    let woken = MicroVm::<Suspended>::open(directory.join("asleep")).unwrap().resume().unwrap();
    drop(woken.terminate());
}

/// The process that is traced.
fn traced(directory: &Path) {
    io::stdin().read_line(&mut String::new()).unwrap();
    let (before, held) = (signals(), resources::now());
    File::open(BEGIN).unwrap_err();
    story(directory);
    File::open(END).unwrap_err();
    assert_eq!(signals(), before);
    resources::assert_back_to(&held);
}

/// The calls from the first VM to the last drop.
fn of_story(trace: &Trace) -> &[Call] {
    let at = |path: &str| {
        trace.calls.iter().position(|call| call.path.as_deref() == Some(Path::new(path))).unwrap()
    };
    &trace.calls[at(BEGIN) + 1..at(END)]
}

#[test]
fn a_process_has_nothing_of_its_vms_that_it_did_not_ask_for() {
    const NAME: &str = "a_process_has_nothing_of_its_vms_that_it_did_not_ask_for";
    if let Some(directory) = env::var_os(TRACED) {
        return traced(Path::new(&directory));
    }
    if !resources::alone(NAME) {
        return;
    }
    let scratch = Scratch::new();
    let directory = scratch.join("own");
    fs::create_dir(&directory).unwrap();
    fs::write(directory.join("disk"), vec![1; 64 << 10]).unwrap();
    let child = Command::new(env::current_exe().unwrap())
        .args(["--test-threads=1", "--nocapture", NAME])
        .env(TRACED, &directory)
        .env("TMPDIR", &directory)
        .stdin(Stdio::piped())
        .spawn()
        .unwrap();
    let trace = trace(child).unwrap();
    assert!(trace.status.success(), "{}", trace.status);
    assert_eq!(trace.signals, [0; 0], "no signal is delivered");
    let calls = of_story(&trace);
    assert!(calls.iter().any(|call| call.path.as_deref() == Some(Path::new("/dev/kvm"))));
    for call in calls {
        check(call, &directory);
    }
}

fn check(call: &Call, directory: &Path) {
    match call.number {
        // Asking is no change.
        libc::SYS_rt_sigaction => assert_eq!(call.args[1], 0, "a signal handler: {call:?}"),
        libc::SYS_ioctl => {
            assert!(!is_of_terminals(call.args[1]), "a call of terminals: {call:?}");
        }
        libc::SYS_execve | libc::SYS_execveat => panic!("another program: {call:?}"),
        _ => assert!(!call.is_fork(), "another process: {call:?}"),
    }
    if let Some(path) = &call.path {
        let is_own = path.starts_with(directory);
        let is_device = ["/dev/kvm", "/dev/urandom"].iter().any(|name| path == Path::new(name));
        // What the kernel says of this process, and how many processors it may use.
        let is_of_kernel = path.starts_with("/proc/self") || path.starts_with("/sys/fs/cgroup");
        let is_asked_for = is_own || is_device || is_of_kernel && call.is_read_only();
        assert!(is_asked_for, "another file: {call:?}");
    }
}

/// TCGETS to TIOCGEXCL, but FIONREAD, FIONBIO and those to close at exec, which all files have.
fn is_of_terminals(request: u64) -> bool {
    let of_files = [0x541b, 0x5421, 0x5450, 0x5451, 0x5452, 0x5460];
    (0x5400..0x5480).contains(&(request as u32)) && !of_files.contains(&(request as u32))
}

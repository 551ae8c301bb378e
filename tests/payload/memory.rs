//! Where a VM's memory is, as the host's kernel sees it.

use std::fs;
use std::os::fd::AsRawFd;
use std::path::{Path, PathBuf};

use dormouse::{MicroVm, Paused, RestoreOptions, Snapshot};

use crate::resources::{self, MEMORY, Resources, alone, mapped};
use crate::scratch::Scratch;
use crate::snapshot::Guest;

/// KiB of a snapshot's memory that this process has present: all, and of its own.
fn present(snapshot: &Snapshot) -> (u64, u64) {
    let name = snapshot.directory().unwrap().join("memory-0");
    let maps = fs::read_to_string("/proc/self/smaps").unwrap();
    let (mut is_ours, mut found) = (false, (0, 0));
    for line in maps.lines() {
        let (key, value) = line.split_once(' ').unwrap();
        if !key.ends_with(':') {
            is_ours = Path::new(line.rsplit(' ').next().unwrap()) == name;
        }
        let kib = || value.trim().trim_end_matches(" kB").parse::<u64>().unwrap();
        match key {
            "Rss:" if is_ours => found.0 += kib(),
            "Anonymous:" if is_ours => found.1 += kib(),
            _ => {}
        }
    }
    found
}

#[test]
fn a_restore_reads_no_page_and_writes_one() {
    let scratch = Scratch::new();
    let guest = Guest::boot();
    guest.write(100, 1);
    let snapshot = guest.pause().0.snapshot(scratch.join("base")).unwrap();
    assert_eq!(present(&snapshot), (0, 0));
    let options = RestoreOptions::new().populate(false);
    let vm = snapshot.restore_with(&options).unwrap();
    // The page with the VM's generation.
    assert_eq!(present(&snapshot), (4, 4));
    let mut vms: Vec<MicroVm<Paused>> = snapshot.fork(9).unwrap();
    vms.push(vm);
    assert_eq!(present(&snapshot), (40, 40));
    drop(vms);
    snapshot.verify().unwrap();
}

#[test]
fn a_vm_that_sleeps_in_memory_is_a_sealed_file_and_nothing_else() {
    if !alone("memory::a_vm_that_sleeps_in_memory_is_a_sealed_file_and_nothing_else") {
        return;
    }
    drop(Guest::boot());
    let before = resources::settled();
    let guest = Guest::boot();
    guest.write(30, 5);
    assert_ne!(mapped(MEMORY), [""; 0]);
    let (vm, output) = guest.pause();
    let asleep = vm.suspend_in_memory().unwrap();
    let file = Resources { descriptors: before.descriptors + 1, ..before.clone() };
    resources::assert_back_to(&file);
    // The memory went with the last of the threads.
    assert_eq!(mapped(MEMORY), [""; 0]);
    let is_memory = |path: &PathBuf| {
        let target = fs::read_link(path).unwrap_or_default();
        target.to_string_lossy().starts_with(MEMORY)
    };
    let entries = fs::read_dir("/proc/self/fd").unwrap().map(|entry| entry.unwrap().path());
    let memory: Vec<_> = entries.filter(is_memory).collect();
    assert_eq!(memory.len(), 1);
    // What is opened anew is the same file; the kernel says whether it may be written to.
    let file = fs::File::open(&memory[0]).unwrap();
    // SAFETY: the call has no memory arguments.
    let seals = unsafe { libc::fcntl(file.as_raw_fd(), libc::F_GET_SEALS) };
    let sizes = libc::F_SEAL_GROW | libc::F_SEAL_SHRINK | libc::F_SEAL_SEAL;
    assert_eq!(seals & sizes, sizes);
    assert_ne!(seals & (libc::F_SEAL_FUTURE_WRITE | libc::F_SEAL_WRITE), 0);
    drop(file);
    let guest = Guest { vm: asleep.resume().unwrap(), output };
    assert_eq!(guest.sum(30), 150);
    guest.off();
    resources::assert_back_to(&before);
}

#[test]
fn a_vm_in_memory_becomes_files_when_it_is_merged_into_a_directory() {
    let scratch = Scratch::new();
    let guest = Guest::boot();
    guest.write(10, 4);
    let vm = guest.pause().0;
    let in_memory = vm.suspend_in_memory().unwrap().into_snapshot().unwrap();
    let merged = in_memory.merge(scratch.join("merged")).unwrap();
    drop(in_memory);
    merged.verify().unwrap();
    assert_eq!(Guest::restore(&merged).sum(10), 40);
}

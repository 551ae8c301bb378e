//! Snapshots, suspended VMs and clones of a guest that does what it is told with its memory.

use std::fs;
use std::ops::ControlFlow;
use std::path::Path;
use std::process::Command;
use std::thread::sleep;
use std::time::Duration;

use dormouse::{
    ErrorKind, ExitStatus, MicroVm, Paused, Pool, PoolOptions, RestoreOptions, Running, Snapshot,
    SnapshotOptions, Suspended, VmConfig,
};

use crate::guest::Program;
use crate::resources::{self, MEMORY, alone, mapped};
use crate::scratch::Scratch;
use crate::{Output, PATIENCE, config, output};

/// A guest that runs, and what it says.
pub struct Guest {
    pub vm: MicroVm<Running>,
    pub output: Output,
}

impl Guest {
    pub fn boot() -> Self {
        Self::boot_with(|config| config)
    }

    /// With what a test adds to its configuration.
    pub fn boot_with(with: impl FnOnce(VmConfig) -> VmConfig) -> Self {
        let (writer, output) = output();
        let config = with(config(&Program::Memory).console(writer));
        let vm = MicroVm::create(config).unwrap().start().unwrap();
        assert_eq!([output.next(), output.next()], *b"B>");
        Self { vm, output }
    }

    pub fn restore(snapshot: &Snapshot) -> Self {
        let (options, output) = listening();
        Self { vm: snapshot.restore_with(&options).unwrap().resume().unwrap(), output }
    }

    /// Writes a value to the first byte of so many pages.
    pub fn write(&self, pages: u8, value: u8) {
        self.vm.console_input([b'w', pages, value]).unwrap();
        assert_eq!(self.output.next(), b'w');
    }

    /// The sum of the first bytes of so many pages.
    pub fn sum(&self, pages: u8) -> u32 {
        self.vm.console_input([b's', pages]).unwrap();
        u32::from_le_bytes(std::array::from_fn(|_| self.output.next()))
    }

    pub fn resumed(vm: MicroVm<Paused>, output: Output) -> Self {
        Self { vm: vm.resume().unwrap(), output }
    }

    pub fn pause(self) -> (MicroVm<Paused>, Output) {
        (self.vm.pause().unwrap(), self.output)
    }

    pub fn off(self) {
        self.vm.console_input("q").unwrap();
        let ended = self.vm.wait_timeout(PATIENCE).unwrap();
        assert_eq!(ended.exit_status(), &ExitStatus::PoweredOff);
    }
}

fn listening() -> (RestoreOptions, Output) {
    let (writer, output) = output();
    (RestoreOptions::new().console(writer), output)
}

/// A guest in its tenth page of ones, saved to `dir`.
fn saved(dir: &Path) -> Snapshot {
    let guest = Guest::boot();
    guest.write(10, 1);
    guest.pause().0.snapshot(dir).unwrap()
}

#[test]
fn the_original_goes_on_after_a_snapshot_and_the_restored_goes_its_own_way() {
    let scratch = Scratch::new();
    let guest = Guest::boot();
    guest.write(10, 7);
    let (vm, output) = guest.pause();
    let snapshot = vm.snapshot(scratch.join("base")).unwrap();
    let original = Guest::resumed(vm, output);
    assert_eq!(original.sum(10), 70);
    original.write(10, 9);
    let clone = Guest::restore(&snapshot);
    assert_eq!(clone.sum(10), 70);
    clone.write(5, 1);
    assert_eq!((original.sum(10), clone.sum(10)), (90, 40));
    snapshot.verify().unwrap();
    original.off();
    clone.off();
    assert_eq!(Guest::restore(&Snapshot::open(scratch.join("base")).unwrap()).sum(10), 70);
    assert_eq!(scratch.names(), ["base"]);
}

#[test]
fn clones_of_a_paused_vm_and_the_vm_itself_never_see_one_another() {
    let guest = Guest::boot();
    guest.write(20, 3);
    let (mut vm, output) = guest.pause();
    let clones = vm.fork(5).unwrap();
    let later = vm.fork(1).unwrap();
    let original = Guest::resumed(vm, output);
    original.write(20, 100);
    let mut guests: Vec<_> =
        clones.into_iter().chain(later).map(|clone| clone.resume().unwrap()).collect();
    for (clone, value) in guests.iter().zip(1..) {
        clone.console_input([b'w', 2, value]).unwrap();
    }
    for (clone, value) in guests.iter().zip(1u32..) {
        // A clone has no console writer; what it says is in its tail.
        clone.console_input([b's', 20]).unwrap();
        let expected = [&b"w"[..], &(18 * 3 + 2 * value).to_le_bytes()].concat();
        let begin = std::time::Instant::now();
        while !clone.console().tail().as_bytes().ends_with(&expected) {
            assert!(begin.elapsed() < PATIENCE, "{:?}", clone.console());
            sleep(Duration::from_millis(1));
        }
    }
    assert_eq!(original.sum(20), 2000);
    // A later clone is one of what the VM is then.
    let (mut vm, output) = original.pause();
    let (options, said) = listening();
    let clone = vm.fork_with(1, |_| options.clone()).unwrap().pop().unwrap();
    assert_eq!(Guest::resumed(clone, said).sum(20), 2000);
    let original = Guest::resumed(vm, output);
    // A clone of a clone, of a VM that has ended.
    let last = guests.pop().unwrap();
    original.off();
    let mut last = last.pause().unwrap();
    let of_a_clone = last.fork(1).unwrap().pop().unwrap();
    drop((last, guests));
    let of_a_clone = of_a_clone.resume().unwrap();
    of_a_clone.console_input("q").unwrap();
    assert!(of_a_clone.wait_timeout(PATIENCE).unwrap().exit_status().is_clean());
}

#[test]
fn thirty_two_clones_have_thirty_two_generation_ids() {
    use std::os::unix::fs::FileExt;
    /// Where the guest is told to look.
    const GENERATION: u64 = 0xd_f028;
    let scratch = Scratch::new();
    let (mut vm, _output) = Guest::boot().pause();
    let id = |vm: &MicroVm<Paused>, name: String| {
        let options = SnapshotOptions::new().full(true);
        drop(vm.snapshot_with(scratch.join(&name), &options).unwrap());
        let memory = fs::File::open(scratch.join(&name).join("memory-0")).unwrap();
        let mut id = [0; 16];
        memory.read_exact_at(&mut id, GENERATION).unwrap();
        u128::from_le_bytes(id)
    };
    let mut seen = std::collections::HashSet::from([0]);
    assert!(seen.insert(id(&vm, "original".to_owned())));
    for (at, clone) in vm.fork(32).unwrap().iter().enumerate() {
        assert!(seen.insert(id(clone, at.to_string())), "clone {at} is like another");
    }
    // It is the same VM as before.
    assert!(!seen.insert(id(&vm, "again".to_owned())));
}

#[test]
fn a_suspended_vm_is_files_only_and_wakes_as_it_was() {
    if !alone("snapshot::a_suspended_vm_is_files_only_and_wakes_as_it_was") {
        return;
    }
    let scratch = Scratch::new();
    drop(Guest::boot());
    let before = resources::settled();
    let guest = Guest::boot();
    guest.write(30, 5);
    assert_ne!(mapped(MEMORY), [""; 0]);
    let suspended = guest.vm.suspend(scratch.join("asleep")).unwrap();
    resources::assert_back_to(&before);
    // Neither the memory of before, which went with the last of the threads, nor that in the files.
    let files = fs::canonicalize(scratch.join("asleep")).unwrap();
    let files = files.to_str().unwrap();
    assert_eq!([mapped(MEMORY), mapped(files)].concat(), [""; 0]);
    let vm = suspended.resume().unwrap();
    let guest = Guest { vm, output: guest.output };
    assert_eq!(guest.sum(30), 150);
    assert_ne!(mapped(files), [""; 0]);
    guest.off();
    resources::assert_back_to(&before);
    assert_eq!(scratch.names(), ["asleep"]);
}

#[test]
fn a_suspended_vm_whose_files_are_away_becomes_a_snapshot_when_they_are_back() {
    let scratch = Scratch::new();
    let (place, away) = (scratch.join("asleep"), scratch.join("away"));
    let suspended = Guest::boot().vm.suspend(&place).unwrap();
    fs::rename(&place, &away).unwrap();
    let failed = suspended.into_snapshot().unwrap_err();
    assert_eq!(failed.error.kind(), &ErrorKind::Snapshot);
    fs::rename(&away, &place).unwrap();
    failed.vm.into_snapshot().unwrap().verify().unwrap();
}

#[test]
fn a_suspended_vm_that_is_terminated_leaves_no_files() {
    let scratch = Scratch::new();
    let suspended = Guest::boot().vm.suspend(scratch.join("asleep")).unwrap();
    assert_eq!(suspended.terminate().exit_status(), &ExitStatus::Terminated);
    assert_eq!(scratch.names(), [""; 0]);
}

#[test]
fn a_vm_that_sleeps_in_memory_wakes_and_becomes_clones() {
    let guest = Guest::boot();
    guest.write(10, 4);
    let (vm, output) = guest.pause();
    let suspended: MicroVm<Suspended> = vm.suspend_in_memory().unwrap();
    let vm = suspended.resume().unwrap();
    let guest = Guest { vm, output };
    assert_eq!(guest.sum(10), 40);
    guest.write(1, 8);
    let (vm, output) = guest.pause();
    let snapshot = vm.suspend_in_memory().unwrap().into_snapshot().unwrap();
    drop(output);
    for _ in 0..3 {
        let clone = Guest::restore(&snapshot);
        assert_eq!(clone.sum(10), 44);
        clone.write(10, 0);
    }
}

#[test]
fn another_process_opens_the_snapshot_and_the_guest_goes_on() {
    const DIRECTORY: &str = "DORMOUSE_TEST_SNAPSHOT";
    if let Some(dir) = std::env::var_os(DIRECTORY) {
        let guest = Guest::restore(&Snapshot::open(dir).unwrap());
        assert_eq!(guest.sum(10), 10);
        return guest.off();
    }
    let scratch = Scratch::new();
    drop(saved(&scratch.join("base")));
    let output = Command::new(std::env::current_exe().unwrap())
        .args(["--test-threads=1", "another_process_opens_the_snapshot"])
        .env(DIRECTORY, scratch.join("base"))
        .output()
        .unwrap();
    let text = String::from_utf8_lossy(&output.stdout);
    assert!(output.status.success() && text.contains("1 passed"), "{text}");
}

#[test]
fn ten_generations_hold_the_same_registers_and_what_each_has_written() {
    let scratch = Scratch::new();
    let mut snapshot = saved(&scratch.join("0"));
    let first = snapshot.facts();
    for generation in 1..=10u8 {
        let guest = Guest::restore(&snapshot);
        assert_eq!(guest.sum(30), u32::from(10 + generation - 1));
        guest.vm.console_input([b'w', 10 + generation, 1]).unwrap();
        assert_eq!(guest.output.next(), b'w');
        snapshot = guest.pause().0.snapshot(scratch.join(&generation.to_string())).unwrap();
        let facts = snapshot.facts();
        assert_eq!(facts.msrs, first.msrs);
        assert_eq!(facts.cpuid, first.cpuid);
        assert_eq!(facts.memory_layers, 1 + usize::from(generation));
        snapshot.verify().unwrap();
    }
    // Each is whole without those before it.
    for generation in 0..10 {
        fs::remove_dir_all(scratch.join(&generation.to_string())).unwrap();
    }
    let snapshot = Snapshot::open(scratch.join("10")).unwrap();
    assert_eq!(Guest::restore(&snapshot).sum(30), 20);
    let merged = snapshot.merge(scratch.join("merged")).unwrap();
    assert_eq!(merged.facts().memory_layers, 1);
    fs::remove_dir_all(scratch.join("10")).unwrap();
    merged.verify().unwrap();
    assert_eq!(Guest::restore(&merged).sum(30), 20);
}

#[test]
fn a_save_that_is_interrupted_leaves_the_vm_and_the_old_snapshot() {
    let scratch = Scratch::new();
    let old = saved(&scratch.join("base"));
    let guest = Guest::boot();
    guest.write(10, 2);
    let (vm, output) = guest.pause();
    let options = SnapshotOptions::new().progress(|_| ControlFlow::Break(()));
    let error = vm.snapshot_with(scratch.join("base"), &options).unwrap_err();
    assert_eq!(error.kind(), &ErrorKind::Interrupted);
    assert_eq!(scratch.names(), ["base"]);
    assert_eq!(Guest::restore(&old).sum(10), 10);
    let failed = vm.suspend_with(scratch.join("base"), &options).unwrap_err();
    let guest = Guest::resumed(failed.vm, output);
    assert_eq!(guest.sum(10), 20);
}

#[test]
fn a_directory_with_other_things_in_it_is_not_touched() {
    let scratch = Scratch::new();
    fs::write(scratch.join("thesis.txt"), "years of work").unwrap();
    let failed = Guest::boot().vm.suspend(&scratch.0).unwrap_err();
    assert_eq!(failed.error.kind(), &ErrorKind::Snapshot);
    assert!(failed.error.to_string().contains("thesis.txt"), "{}", failed.error);
    assert!(failed.vm.exit_status().is_none());
    assert_eq!(scratch.names(), ["thesis.txt"]);
}

#[test]
fn what_is_no_snapshot_is_refused_with_the_reason() {
    let scratch = Scratch::new();
    let base = scratch.join("base");
    saved(&base);
    let refusal = |dir: &Path| {
        let error = Snapshot::open(dir).unwrap_err();
        assert_eq!(error.kind(), &ErrorKind::Snapshot, "{error}");
        error.to_string()
    };
    assert!(refusal(&scratch.join("nowhere")).contains("nowhere"));
    assert!(refusal(&scratch.0).contains("state"));

    let state = fs::read(base.join("state")).unwrap();
    let put = |bytes: &[u8]| fs::write(base.join("state"), bytes).unwrap();
    // Inside of the header and of the checksum at the end, at each byte; between them here and there.
    let ends = (0..64).chain(state.len() - 64..state.len());
    for len in ends.chain((64..state.len()).step_by(state.len() / 97 + 1)) {
        put(&state[..len]);
        refusal(&base);
    }
    let mut seed = 1u64;
    for _ in 0..1000 {
        seed = seed.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
        let bit = (seed >> 20) as usize % (state.len() * 8);
        let mut flipped = state.clone();
        flipped[bit / 8] ^= 1 << (bit % 8);
        put(&flipped);
        refusal(&base);
    }
    let mut newer = state.clone();
    newer[8] = 2;
    put(&newer);
    assert!(refusal(&base).contains("version 2"));
    put(&state);
    Snapshot::open(&base).unwrap().verify().unwrap();

    // Memory that is cut would be a fault of the guest.
    let memory = base.join("memory-0");
    let len = fs::metadata(&memory).unwrap().len();
    fs::File::options().write(true).open(&memory).unwrap().set_len(len - 4096).unwrap();
    assert!(refusal(&base).contains("layer 0"));
    fs::remove_file(&memory).unwrap();
    assert!(refusal(&base).contains("memory-0"));
}

#[test]
fn verify_finds_any_flip_in_memory() {
    use std::os::unix::fs::FileExt;
    let scratch = Scratch::new();
    let base = scratch.join("base");
    let snapshot = saved(&base);
    let memory = fs::File::options().read(true).write(true).open(base.join("memory-0")).unwrap();
    let len = memory.metadata().unwrap().len();
    // In the guest's code, in a page of zeros, at both ends.
    for at in [0x110_0000, 0x100_0001, 0, 4095, len / 2 + 17, len - 1] {
        let mut byte = [0];
        memory.read_exact_at(&mut byte, at).unwrap();
        memory.write_all_at(&[byte[0] ^ 4], at).unwrap();
        let error = snapshot.verify().unwrap_err();
        assert_eq!(error.kind(), &ErrorKind::Snapshot);
        memory.write_all_at(&byte, at).unwrap();
        snapshot.verify().unwrap();
    }
}

#[test]
fn a_guest_goes_on_from_a_packed_snapshot_of_several_layers() {
    let scratch = Scratch::new();
    let guest = Guest::restore(&saved(&scratch.join("base")));
    guest.write(3, 7);
    let second = guest.pause().0.snapshot(scratch.join("second")).unwrap();
    assert_eq!(second.facts().memory_layers, 2);
    second.pack_with(scratch.join("cold"), &SnapshotOptions::new().sync(true)).unwrap();
    let facts = second.facts();
    drop(second);
    for name in ["base", "second"] {
        fs::remove_dir_all(scratch.join(name)).unwrap();
    }
    let unpacked = Snapshot::unpack(scratch.join("cold"), scratch.join("warm")).unwrap();
    assert_eq!(scratch.names(), ["cold", "warm"]);
    assert_eq!(unpacked.facts(), facts);
    unpacked.verify().unwrap();
    let guest = Guest::restore(&unpacked);
    assert_eq!(guest.sum(10), 28);
    guest.off();
    // What was never in a directory has nothing to pack.
    let (vm, _output) = Guest::restore(&unpacked).pause();
    let in_memory = vm.suspend_in_memory().unwrap().into_snapshot().unwrap();
    let error = in_memory.pack(scratch.join("colder")).unwrap_err();
    assert_eq!(error.kind(), &ErrorKind::Snapshot);
    assert!(error.to_string().contains("in memory"), "{error}");
    assert_eq!(scratch.names(), ["cold", "warm"]);
}

#[test]
fn a_pool_keeps_vms_ready_and_counts_those_in_use() {
    let scratch = Scratch::new();
    let snapshot = saved(&scratch.join("base"));
    let options = PoolOptions::new().min(2).max(3).timeout(Duration::from_millis(50));
    let pool = Pool::new(snapshot, options).unwrap();
    let begin = std::time::Instant::now();
    while pool.ready() < 2 {
        assert!(begin.elapsed() < PATIENCE);
        sleep(Duration::from_millis(1));
    }
    let mut taken: Vec<_> = (0..3).map(|_| pool.acquire().unwrap()).collect();
    assert_eq!(pool.in_use(), 3);
    assert_eq!(pool.acquire().unwrap_err().kind(), &ErrorKind::Timeout);
    // One that ends makes room, in whatever state it was.
    let one = taken.pop().unwrap().resume().unwrap();
    assert_eq!(pool.acquire().unwrap_err().kind(), &ErrorKind::Timeout);
    drop(one.terminate());
    let one = pool.acquire().unwrap();
    drop(pool);
    // Those in use outlive the pool.
    let one = one.resume().unwrap();
    one.console_input("q").unwrap();
    assert!(one.wait_timeout(PATIENCE).unwrap().exit_status().is_clean());
}

#[test]
fn restored_and_dropped_vms_leave_nothing_behind() {
    if !alone("snapshot::restored_and_dropped_vms_leave_nothing_behind") {
        return;
    }
    let scratch = Scratch::new();
    let snapshot = saved(&scratch.join("base"));
    drop(snapshot.restore().unwrap().resume().unwrap());
    let before = resources::settled();
    for _ in 0..100 {
        let vm = snapshot.restore().unwrap().resume().unwrap();
        drop(vm.pause().unwrap().fork(1).unwrap());
    }
    resources::assert_back_to(&before);
}

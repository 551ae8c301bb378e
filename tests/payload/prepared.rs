//! What is ready before a VM is wanted: shells, and the pages that its guest will write.

use dormouse::{ErrorKind, MicroVm, Phase, RestoreOptions, Running, Snapshot};

use crate::output;
use crate::scratch::Scratch;
use crate::snapshot::Guest;

/// A guest that answers, of a VM with so much memory and so many vCPUs.
fn guest(memory_mib: u32, vcpus: u8) -> Guest {
    Guest::boot_with(|config| config.memory_mib(memory_mib).vcpus(vcpus))
}

fn populated(vm: &MicroVm<Running>) -> bool {
    vm.timings().iter().any(|timing| timing.phase == Phase::Populate)
}

#[test]
fn vms_on_prepared_shells_go_on_as_any_other() {
    let scratch = Scratch::new();
    let original = guest(32, 1);
    original.write(10, 3);
    let (mut vm, said) = original.pause();
    let snapshot = vm.snapshot(scratch.join("base")).unwrap();
    let shells = [(); 3].map(|()| vm.prepare().unwrap());
    let (writers, outputs): (Vec<_>, Vec<_>) = shells.iter().map(|_| output()).unzip();
    let mut writers = writers.into_iter();
    let options = |_| RestoreOptions::new().console(writers.next().unwrap());
    let clones = vm.fork_on(shells.into(), options).unwrap();
    let (writer, restored_says) = output();
    let shell = snapshot.prepare().unwrap();
    let restored = snapshot.restore_on(shell, &RestoreOptions::new().console(writer)).unwrap();
    let mut guests = vec![Guest::resumed(vm, said), Guest::resumed(restored, restored_says)];
    guests.extend(clones.into_iter().zip(outputs).map(|(vm, output)| Guest::resumed(vm, output)));
    for (guest, value) in guests.iter().zip(1..) {
        guest.write(5, value);
    }
    for (guest, value) in guests.iter().zip(1u32..) {
        assert_eq!(guest.sum(10), 15 + 5 * value);
    }
    for guest in guests {
        guest.off();
    }
}

#[test]
fn a_shell_for_another_kind_of_vm_is_refused() {
    let scratch = Scratch::new();
    let saved = |guest: Guest, name: &str| guest.pause().0.snapshot(scratch.join(name)).unwrap();
    let snapshot = saved(guest(32, 1), "base");
    for (other, name) in [(guest(64, 1), "more-memory"), (guest(32, 2), "more-vcpus")] {
        let shell = saved(other, name).prepare().unwrap();
        let error = snapshot.restore_on(shell, &RestoreOptions::new()).unwrap_err();
        assert_eq!(error.kind(), &ErrorKind::Snapshot, "{name}: {error:?}");
    }
    Guest::restore(&snapshot).off();
}

#[test]
fn pages_that_a_restored_guest_writes_are_there_at_once_in_the_next() {
    let scratch = Scratch::new();
    let base = scratch.join("base");
    let original = guest(32, 1);
    original.write(20, 2);
    let snapshot = original.pause().0.snapshot(&base).unwrap();
    let first = Guest::restore(&snapshot);
    assert!(!populated(&first.vm) && !base.join("written").exists());
    first.write(10, 9);
    drop(first.pause());
    assert!(base.join("written").exists());

    // By whoever opens it, with the content that was saved.
    for snapshot in [snapshot, Snapshot::open(&base).unwrap()] {
        let next = Guest::restore(&snapshot);
        assert!(populated(&next.vm));
        assert_eq!(next.sum(20), 40);
        let (writer, said) = output();
        let options = RestoreOptions::new().populate(false).console(writer);
        let without = Guest::resumed(snapshot.restore_with(&options).unwrap(), said);
        assert!(!populated(&without.vm));
        assert_eq!(without.sum(20), 40);
        snapshot.verify().unwrap();
    }
}

#[test]
fn a_snapshot_forks_into_vms_of_their_own() {
    let scratch = Scratch::new();
    let original = guest(32, 1);
    original.write(10, 1);
    let snapshot = original.pause().0.snapshot(scratch.join("base")).unwrap();
    let (writers, outputs): (Vec<_>, Vec<_>) = (0..4).map(|_| output()).unzip();
    let mut writers = writers.into_iter();
    let options = |_| RestoreOptions::new().console(writers.next().unwrap());
    let vms = snapshot.fork_with(4, options).unwrap();
    let guests: Vec<_> =
        vms.into_iter().zip(outputs).map(|(vm, output)| Guest::resumed(vm, output)).collect();
    for (guest, value) in guests.iter().zip(2..) {
        guest.write(1, value);
    }
    let sums: Vec<_> = guests.iter().map(|guest| guest.sum(10)).collect();
    assert_eq!(sums, [11, 12, 13, 14]);
    assert_eq!(snapshot.fork(2).unwrap().len(), 2);
}

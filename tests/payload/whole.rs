//! A snapshot is whole by itself: where its VM came from may go.

use std::fs;
use std::path::PathBuf;

use dormouse::{BlockConfig, MicroVm, Paused, RestoreOptions, Snapshot, Suspended};

use crate::guest::Program;
use crate::scratch::Scratch;
use crate::snapshot::Guest;
use crate::virtio_guest::{Driver, Order, Work};
use crate::{Output, config, output};

/// A guest that writes a batch to its disk, which is a file of its own, when it is told to.
fn guest(scratch: &Scratch) -> (MicroVm<Paused>, Output, PathBuf) {
    let image = scratch.join("image");
    fs::write(&image, vec![7; 64 << 10]).unwrap();
    let work = Work::BlockWrite { sectors: 128, order: Order::Sequential };
    let driver = Driver { device: 0, work, buffer_bytes: 4096, depth: 4, batch: 4 };
    let (writer, output) = output();
    let config = config(&Program::Driver(driver.image())).memory_mib(64).console(writer);
    let vm = MicroVm::create(config.block(BlockConfig::new(&image))).unwrap().start().unwrap();
    assert_eq!(output.next(), b'B');
    let guest = Guest { vm, output };
    write(&guest);
    let (vm, output) = guest.pause();
    (vm, output, image)
}

/// Four requests, all of which succeed.
fn write(guest: &Guest) {
    guest.vm.console_input(b".").unwrap();
    assert_eq!([guest.output.next(), guest.output.next()], *b"()");
}

fn restored(snapshot: &Snapshot) -> Guest {
    let (writer, output) = output();
    let vm = snapshot.restore_with(&RestoreOptions::new().console(writer)).unwrap();
    Guest::resumed(vm, output)
}

/// How many of the disk's sectors the delta in a snapshot has.
fn sectors(scratch: &Scratch, name: &str) -> u32 {
    let delta = fs::read(scratch.join(name).join("disk-0")).unwrap();
    delta[4096..8192].iter().map(|byte| byte.count_ones()).sum()
}

#[test]
fn a_snapshot_of_a_restored_vm_stands_without_the_one_that_it_came_from() {
    let scratch = Scratch::new();
    let (vm, _output, image) = guest(&scratch);
    let mut snapshot = vm.snapshot(scratch.join("0")).unwrap();
    drop(vm);
    fs::remove_file(image).unwrap();
    for generation in 1..4u32 {
        let guest = restored(&snapshot);
        write(&guest);
        let name = generation.to_string();
        snapshot = guest.pause().0.snapshot(scratch.join(&name)).unwrap();
        fs::remove_dir_all(scratch.join(&(generation - 1).to_string())).unwrap();
        snapshot.verify().unwrap();
        // Each has what those before it wrote.
        assert_eq!(sectors(&scratch, &name), 32 * generation);
    }
    // Nor does a merged one, or one that was packed, need another; nor one in the place of its origin.
    let merged = snapshot.merge(scratch.join("merged")).unwrap();
    merged.pack(scratch.join("cold")).unwrap();
    for name in ["3", "merged"] {
        fs::remove_dir_all(scratch.join(name)).unwrap();
    }
    let warm = Snapshot::unpack(scratch.join("cold"), scratch.join("warm")).unwrap();
    for _ in 0..2 {
        let guest = restored(&Snapshot::open(scratch.join("warm")).unwrap());
        write(&guest);
        drop(guest.pause().0.snapshot(scratch.join("warm")).unwrap());
    }
    drop(warm);
    write(&restored(&Snapshot::open(scratch.join("warm")).unwrap()));
    assert_eq!(scratch.names(), ["cold", "warm"]);
}

#[test]
fn a_clone_is_saved_and_sleeps_without_the_vm_that_it_came_from() {
    let scratch = Scratch::new();
    let (mut vm, _output, _image) = guest(&scratch);
    let (writers, outputs): (Vec<_>, Vec<_>) = (0..3).map(|_| output()).unzip();
    let mut writers = writers.into_iter();
    let options = |_| RestoreOptions::new().console(writers.next().unwrap());
    let clones = vm.fork_with(3, options).unwrap();
    drop(vm);
    let clones = clones.into_iter().zip(outputs);
    let mut clones = clones.map(|(vm, output)| {
        let guest = Guest::resumed(vm, output);
        write(&guest);
        guest.pause()
    });
    let (saved, _said) = clones.next().unwrap();
    drop(saved.snapshot(scratch.join("saved")).unwrap());
    drop(saved);
    let (in_files, _said) = clones.next().unwrap();
    drop(in_files.suspend(scratch.join("asleep")).unwrap());
    let (in_memory, output) = clones.next().unwrap();
    let in_memory = in_memory.suspend_in_memory().unwrap();
    drop(clones);

    write(&Guest { vm: in_memory.resume().unwrap(), output });
    write(&restored(&Snapshot::open(scratch.join("saved")).unwrap()));
    for _ in 0..2 {
        let (writer, output) = crate::output();
        let options = RestoreOptions::new().console(writer);
        let asleep = MicroVm::<Suspended>::open_with(scratch.join("asleep"), &options).unwrap();
        let guest = Guest { vm: asleep.resume().unwrap(), output };
        write(&guest);
        drop(guest.vm.suspend(scratch.join("asleep")).unwrap());
    }
    // As the clone, and each time that it woke.
    assert_eq!(sectors(&scratch, "asleep"), 32 * 3);
}

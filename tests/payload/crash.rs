//! Saves that are cut short: by a kill at any moment, and by a disk that is full.

use std::fs;
use std::io::{BufRead, BufReader};
use std::path::Path;
use std::process::{Command, Stdio};
use std::thread::sleep;
use std::time::Duration;

use dormouse::{BlockConfig, ErrorKind, Snapshot};

use crate::PATIENCE;
use crate::scratch::{MOUNT, Scratch};
use crate::snapshot::Guest;

const DIRECTORY: &str = "DORMOUSE_TEST_CRASH";

/// Saves a guest to the same place for ever, each time with another number in ten pages: one that comes
/// from there, where a snapshot is, and else one that boots.
fn save_for_ever(directory: &Path) -> ! {
    let mut guest = match Snapshot::open(directory) {
        Ok(snapshot) => Guest::restore(&snapshot),
        Err(_) => Guest::boot_with(|config| {
            config.block(BlockConfig::new(directory.with_extension("disk")))
        }),
    };
    for value in (1..=200).cycle() {
        guest.write(10, value);
        let (vm, output) = guest.pause();
        if value == 1 {
            println!("saving");
        }
        vm.snapshot(directory).unwrap();
        guest = Guest::resumed(vm, output);
    }
    unreachable!("the cycle has no end")
}

#[test]
fn a_kill_at_any_moment_of_a_save_leaves_a_snapshot_that_is_right() {
    if let Some(directory) = std::env::var_os(DIRECTORY) {
        save_for_ever(Path::new(&directory));
    }
    let scratch = Scratch::new();
    let directory = scratch.join("base");
    fs::write(scratch.join("base.disk"), vec![1; 256 << 10]).unwrap();
    let mut seed = 7u64;
    let (mut longest, mut verified) = (0x3fff, 0);
    for round in 0..200 {
        // Every fourth time, in the first save of all.
        let is_first = round % 4 == 0;
        if is_first && directory.exists() {
            fs::remove_dir_all(&directory).unwrap();
        }
        let had_one = directory.exists();
        let mut child = Command::new(std::env::current_exe().unwrap())
            .args(["--test-threads=1", "--nocapture", "a_kill_at_any_moment"])
            .env(DIRECTORY, &directory)
            .stdout(Stdio::piped())
            .stderr(Stdio::null())
            .spawn()
            .unwrap();
        let mut lines = BufReader::new(child.stdout.take().unwrap()).lines();
        assert!(lines.any(|line| line.unwrap().ends_with("saving")), "round {round}");
        seed = seed.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
        let micros = if is_first { 0x7ff } else { longest };
        sleep(Duration::from_micros(seed >> 32 & micros));
        child.kill().unwrap();
        child.wait().unwrap();

        // What the kill left is not taken for a snapshot, and goes with the next save.
        let is_left = |name: &String| !["base", "base.disk"].contains(&name.as_str());
        let left: Vec<_> = scratch.names().into_iter().filter(is_left).collect();
        assert!(left.len() <= 1, "{left:?}");
        if let [left] = &left[..] {
            assert!(left.starts_with(".base.partial-"), "{left}");
        }
        if !had_one && !directory.exists() {
            if round % 4 == 3 {
                // None of four came to its end: saves take longer here.
                longest = 2 * longest + 1;
                assert!(Duration::from_micros(longest) < PATIENCE, "no save comes to its end");
            }
            continue;
        }
        let snapshot = Snapshot::open(&directory).unwrap_or_else(|error| panic!("{error:?}"));
        snapshot.verify().unwrap();
        verified += 1;
        if round % 10 == 0 {
            let sum = Guest::restore(&snapshot).sum(10);
            assert!(sum > 0 && sum.is_multiple_of(10), "{sum}");
        }
    }
    assert!(verified >= 20, "{verified} snapshots");
}

/// A small file system, in a mount namespace of this process's own.
fn mount_small(directory: &Path) {
    let run = |program: &str, args: &[&str]| {
        let status = Command::new(program).args(args).status().unwrap();
        assert!(status.success(), "{program} {args:?}");
    };
    run("mount", &["-t", "tmpfs", "-o", "size=600k", "tmpfs", directory.to_str().unwrap()]);
}

#[test]
fn a_full_disk_leaves_the_old_snapshot_and_the_vm() {
    const INSIDE: &str = "DORMOUSE_TEST_MOUNT";
    let name = "crash::a_full_disk_leaves_the_old_snapshot_and_the_vm";
    if std::env::var_os(INSIDE).is_none() {
        // A mount needs a namespace; a namespace needs a process of one thread.
        let output = Command::new("unshare")
            .args(["--user", "--map-root-user", "--mount", "--"])
            .arg(std::env::current_exe().unwrap())
            .args(["--test-threads=1", "--exact", "--nocapture", name])
            .env(INSIDE, "1")
            .output()
            .unwrap();
        let text = String::from_utf8_lossy(&output.stdout);
        let errors = String::from_utf8_lossy(&output.stderr);
        assert!(output.status.success() && text.contains("1 passed"), "{text}{errors}");
        return;
    }
    let scratch = Scratch::new();
    let small = scratch.join(MOUNT);
    fs::create_dir(&small).unwrap();
    mount_small(&small);
    let directory = small.join("base");
    let guest = Guest::boot();
    guest.write(10, 3);
    let (vm, output) = guest.pause();
    vm.snapshot(&directory).unwrap();
    let guest = Guest::resumed(vm, output);
    // Two hundred pages are 800 KiB.
    guest.write(200, 5);
    let (vm, output) = guest.pause();
    let error = vm.snapshot(&directory).unwrap_err();
    assert_eq!(error.kind(), &ErrorKind::Snapshot, "{error:?}");
    assert!(error.to_string().contains("No space left on device"), "{error}");
    let names: Vec<_> =
        fs::read_dir(&small).unwrap().map(|entry| entry.unwrap().file_name()).collect();
    assert_eq!(names, ["base"]);
    let guest = Guest::resumed(vm, output);
    assert_eq!(guest.sum(200), 1000);
    let failed = guest.vm.suspend(&directory).unwrap_err();
    let guest = Guest { vm: failed.vm, output: guest.output };
    assert_eq!(guest.sum(10), 50);
    guest.off();
    // In the middle of a disk, which is more than there is room for.
    let image = scratch.join("image");
    fs::write(&image, vec![1; 700 << 10]).unwrap();
    let guest = Guest::boot_with(|config| config.block(BlockConfig::new(&image)));
    let (vm, output) = guest.pause();
    let error = vm.snapshot(&directory).unwrap_err();
    assert!(error.to_string().contains("No space left on device"), "{error}");
    assert_eq!(fs::read_dir(&small).unwrap().count(), 1);
    Guest::resumed(vm, output).off();
    let old = Snapshot::open(&directory).unwrap();
    old.verify().unwrap();
    assert_eq!(Guest::restore(&old).sum(10), 30);
}

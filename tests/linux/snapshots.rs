//! Stock kernels that are suspended, resumed and cloned in the middle of their work.

use std::collections::HashSet;
use std::fs;
use std::io::{Read, Write};
use std::path::Path;
use std::process::Command;
use std::thread::sleep;
use std::time::{Duration, Instant, SystemTime};

use dormouse::{
    BlockConfig, Clock, Cmdline, ErrorKind, MicroVm, Paused, RestoreOptions, Running, Snapshot,
    VmConfig, VsockConfig,
};

use crate::devices::{DISK, Image, config, config_with};
use crate::vsock::connect;
use crate::wall_clock::WallClock;
use crate::{COMPLAINTS, PATIENCE, Release, Scratch, Transcript, guest_tool, programs};

/// Does what is typed, line by line.
const SHELL: &str = "stty -echo; echo ready; while read -r line; do eval \"$line\"; done";

/// A guest that does what is typed.
struct Guest {
    vm: MicroVm<Running>,
    transcript: Transcript,
}

impl Guest {
    fn boot(config: VmConfig) -> Self {
        let transcript = Transcript::default();
        let vm = MicroVm::create(config.console(transcript.clone())).unwrap().start().unwrap();
        transcript.wait_for("ready\n");
        Self { vm, transcript }
    }

    fn restore(snapshot: &Snapshot, clock: Clock) -> Self {
        let transcript = Transcript::default();
        let options = RestoreOptions::new().outside_paths(true).clock(clock);
        let vm = snapshot.restore_with(&options.console(transcript.clone())).unwrap();
        Self { vm: vm.resume().unwrap(), transcript }
    }

    /// What a command writes.
    fn ask(&self, command: &str) -> String {
        let before = self.transcript.text().len();
        let mut heard = (self.transcript.length(), Instant::now());
        self.vm.console_input(format!("{command}; echo =$?=\n")).unwrap();
        loop {
            let text = self.transcript.text();
            let answer = text.get(before..).unwrap_or_default();
            if let Some((answer, _)) = answer.split_once("=0=\n") {
                return answer.to_owned();
            }
            // What its devices have done says who waits for whom.
            let missing = || format!("no answer to {command:?}, with {:?}", self.vm.metrics());
            self.transcript.listen(&mut heard, missing);
            sleep(Duration::from_millis(20));
        }
    }

    fn pause(self) -> MicroVm<Paused> {
        self.vm.pause().unwrap()
    }

    /// Nothing that a kernel says when it has lost its way.
    fn is_sane(&self) {
        let log = self.ask("dmesg");
        for complaint in COMPLAINTS {
            assert!(!log.contains(complaint), "{log}");
        }
    }
}

/// A sum that is made again and again, and must always be the same.
const COMPUTE: &str = "dd if=/dev/urandom of=/data bs=1k count=512 2>/dev/null; sum=$(sha256sum </data); \
    (while [ \"$(sha256sum </data)\" = \"$sum\" ]; do echo x >>/rounds; done; echo >/broken) & true";

/// Writes pieces to the disk for ever, and reads each again before the next.
const WRITE: &str = "(at=0; while [ ! -e /enough ]; do at=$((at + 1)); seek=$((at % 16 * 64)); \
    dd if=/dev/urandom of=/piece bs=4k count=64 2>/dev/null; \
    dd if=/piece of=/dev/vda bs=4k seek=$seek oflag=direct conv=fsync 2>/dev/null; \
    dd if=/dev/vda bs=4k skip=$seek count=64 iflag=direct 2>/dev/null | cmp - /piece || echo >/broken; \
    done; echo $at >/written) & true";

const FIO: &str = "(fio --output=/log --eta=never --name=verify --filename=/dev/vda --rw=randwrite \
    --bsrange=4k-64k --size=24m --io_size=24m --direct=1 --ioengine=libaio --iodepth=8 --verify=crc32c \
    --verify_fatal=1 --do_verify=1 --randrepeat=0 --rate=6m >/dev/null 2>&1; echo $? >/fio) & true";

/// A guest that computes and writes is saved in the middle, again and again, and each that comes
/// of it finds everything as it should be.
fn generations(config: VmConfig, count: usize, write: &str, done: &str) {
    let scratch = Scratch::new("generations");
    let image = Image::new("generations", 32);
    let disk = BlockConfig::new(&image.0).delta(scratch.0.join("delta"));
    let mut guest = Guest::boot(config.block(disk));
    guest.ask(COMPUTE);
    guest.ask(write);
    let mut first = None;
    for generation in 0..count {
        let dir = scratch.0.join(generation.to_string());
        let vm = guest.pause();
        let snapshot = vm.snapshot(&dir).unwrap();
        let facts = snapshot.facts();
        let first = first.get_or_insert(facts.clone());
        assert_eq!((&facts.msrs, &facts.cpuid), (&first.msrs, &first.cpuid));
        if generation == 0 {
            snapshot.verify().unwrap();
        }
        drop(vm);
        guest = Guest::restore(&snapshot, Clock::Advance);
        // It goes on computing, and all is as it should be.
        guest.ask(
            "rounds=$(wc -l </rounds); while [ $(wc -l </rounds) -le $rounds ]; do sleep 0.1; done",
        );
        assert_eq!(guest.ask("ls /broken 2>/dev/null; true"), "");
    }
    let answer = guest.ask(done);
    assert!(answer.contains("exit 0\n"), "{answer}");
    assert_eq!(guest.ask("ls /broken 2>/dev/null; true"), "");
    guest.is_sane();
}

fn ten_generations(release: Release, vcpus: u8) {
    let config = config(release, DISK, SHELL).vcpus(vcpus);
    let done = "echo >/enough; while [ ! -e /written ]; do sleep 0.1; done; echo exit 0";
    generations(config, 10, WRITE, done);
}

/// fio is saved in the middle of its writes, twice, and then reads what it wrote.
fn fio_goes_on(release: Release, vcpus: u8) {
    let add = |initramfs| programs::add(initramfs, "fio");
    let config = config_with(release, DISK, SHELL, add).memory_mib(512).vcpus(vcpus);
    // It says how far it is, at most ten minutes long.
    let done = "for second in $(seq 600); do [ -e /fio ] && break; cat /sys/block/vda/stat; sleep 1; done; \
        echo exit $(cat /fio); cat /log";
    generations(config, 2, FIO, done);
}

#[test]
fn ten_generations_of_linux_6_12_on_2_vcpus() {
    ten_generations(Release::Linux6_12, 2);
}

#[test]
fn ten_generations_of_linux_6_12_on_1_vcpu() {
    ten_generations(Release::Linux6_12, 1);
}

#[test]
fn ten_generations_of_linux_6_1_on_1_vcpu() {
    ten_generations(Release::Linux6_1, 1);
}

#[test]
fn ten_generations_of_linux_6_1_on_2_vcpus() {
    ten_generations(Release::Linux6_1, 2);
}

#[test]
fn fio_goes_on_under_linux_6_12_on_1_vcpu() {
    fio_goes_on(Release::Linux6_12, 1);
}

#[test]
fn fio_goes_on_under_linux_6_12_on_2_vcpus() {
    fio_goes_on(Release::Linux6_12, 2);
}

#[test]
fn fio_goes_on_under_linux_6_1_on_1_vcpu() {
    fio_goes_on(Release::Linux6_1, 1);
}

#[test]
fn fio_goes_on_under_linux_6_1_on_2_vcpus() {
    fio_goes_on(Release::Linux6_1, 2);
}

/// 32 clones of one VM: nothing random is the same in two of them.
fn clones_differ(vcpus: u8) {
    let add =
        |initramfs: dormouse::InitramfsBuilder| initramfs.host_file("bin/guest-tool", guest_tool());
    let config = config_with(Release::Linux6_12, &[], SHELL, add).memory_mib(128);
    let guest = Guest::boot(config.vcpus(vcpus));
    let original = guest.ask(RANDOM);
    let mut vm = guest.pause();
    let mut seen: HashSet<String> = original.lines().map(str::to_owned).collect();
    for (at, clone) in vm.fork(32).unwrap().into_iter().enumerate() {
        let clone = clone.resume().unwrap();
        // The driver of VMGenID says in the kernel's log that this is a clone, and has made it another then.
        let answer = of_a_clone(&clone, &format!("{HEARD}; {RANDOM}"));
        let (heard, answer) = answer.split_once('\n').unwrap();
        assert_eq!(heard, "1", "how often clone {at} has heard that it is one");
        let lines: Vec<_> = answer.lines().collect();
        assert_eq!(lines.len(), 4, "{answer}");
        for line in lines {
            assert!(seen.insert(line.to_owned()), "clone {at} has {line} like another");
        }
    }
}

/// How often the kernel has said that it is a clone: once, within half a minute.
const HEARD: &str = "left=300; until dmesg | grep -q 'virtual machine fork' || [ $((left -= 1)) = 0 ]; do sleep 0.1; done; \
    dmesg | grep -c 'virtual machine fork'";

/// What differs from clone to clone, a line each.
const RANDOM: &str = "guest-tool random; cat /proc/sys/kernel/random/uuid; head -c 16 /dev/urandom | hexdump -v -e '1/1 \"%02x\"'; echo; \
    head -c 4 /dev/urandom | sha256sum";

/// The answer of a VM without a writer, out of its console's tail.
fn of_a_clone(vm: &MicroVm<Running>, command: &str) -> String {
    let mark = format!("mark-{}", SystemTime::UNIX_EPOCH.elapsed().unwrap().as_nanos());
    vm.console_input(format!("echo {mark}; {command}; echo =$?=\n")).unwrap();
    let begin = Instant::now();
    loop {
        let tail = vm.console().tail().replace('\r', "");
        let answer = tail.split_once(&format!("{mark}\n")).map(|(_, answer)| answer);
        if let Some((answer, _)) = answer.and_then(|answer| answer.split_once("=0=\n")) {
            return answer.to_owned();
        }
        assert!(begin.elapsed() < PATIENCE, "no answer to {command:?} in:\n{tail}");
        sleep(Duration::from_millis(20));
    }
}

#[test]
fn thirty_two_clones_of_linux_6_12_on_1_vcpu_share_no_random_bytes() {
    clones_differ(1);
}

/// Each processor has random numbers of its own.
#[test]
fn thirty_two_clones_of_linux_6_12_on_2_vcpus_share_no_random_bytes() {
    clones_differ(2);
}

fn now() -> i64 {
    SystemTime::UNIX_EPOCH.elapsed().unwrap().as_secs() as i64
}

/// The guest's wall clock is as late as this, in seconds.
fn lateness(guest: &Guest) -> i64 {
    let before = now();
    let guests: i64 = guest.ask("date +%s").trim().parse().unwrap();
    // It was read between two looks at the host's.
    let after = now();
    if guests < before { before - guests } else { (after - guests).min(0) }
}

/// Both clocks, read in one second of the first: `u` and `d`, in seconds.
const READ_CLOCKS: &str = "while u=$(cut -d. -f1 /proc/uptime); d=$(date +%s); \
    [ $(cut -d. -f1 /proc/uptime) != $u ]; do :; done";

/// Time, timers and sleeps of a guest that slept, on this clock.
fn clocks_are_right(name: &str, config: VmConfig, source: &str) {
    let mut clock = WallClock::new();
    let scratch = Scratch::new(name);
    let guest = Guest::boot(config);
    let current = "cat /sys/devices/system/clocksource/clocksource0/current_clocksource";
    assert_eq!(guest.ask(current).trim(), source);
    let start = lateness(&guest);
    guest.ask(&format!(
        "{READ_CLOCKS}; echo $u >/uptime; echo $d >/date; \
        (sleep 100000; echo >/slept) & (sleep 60; echo >/dozed) & true",
    ));
    let mut paused = Instant::now();
    let mut vm = guest.pause();
    for (at, asked) in [1, 60, 86_400].into_iter().enumerate() {
        let dir = scratch.0.join(at.to_string());
        let snapshot = vm.suspend(&dir).unwrap().into_snapshot().unwrap();
        let saving = paused.elapsed();
        // Less than a day where the clock is not ours to set.
        let seconds = clock.pass(asked);
        // Frozen, the guest is late by what it slept and the work around that, and none of its timers has run out.
        let woken = Instant::now();
        let mut frozen = Guest::restore(&snapshot, Clock::Freeze);
        let late = lateness(&frozen) - start;
        let work = (saving + woken.elapsed()).as_secs() as i64 + 2;
        assert!((seconds - 1..=seconds + work).contains(&late), "{late} s, {work} s of work");
        assert_eq!(frozen.ask("ls /slept 2>/dev/null; true"), "");
        if at == 0 {
            // Nor do they go on in its next sleep, from which it wakes with what it woke with.
            let Guest { vm, transcript } = frozen;
            let asleep = vm.pause().unwrap().suspend_in_memory().unwrap();
            let saving = saving + woken.elapsed();
            let more = seconds + clock.pass(5);
            let woken = Instant::now();
            frozen = Guest { vm: asleep.resume().unwrap(), transcript };
            let late = lateness(&frozen) - start;
            let work = (saving + woken.elapsed()).as_secs() as i64 + 2;
            assert!((more - 1..=more + work).contains(&late), "{late} s, {work} s of work");
        }
        drop(frozen);
        let guest = Guest::restore(&snapshot, Clock::Advance);
        // Right; or as far from it as before, or nearer: what KVM shows a guest whose processors' TSCs are not
        // one runs at the rate that it knew when it was loaded, and begins anew with each restore.
        let late = lateness(&guest);
        let range = start.min(0) - 1..=start.max(0) + 1;
        assert!(range.contains(&late), "{late} s late after {seconds} s, and {start} s before");
        let dozed = guest.ask("sleep 1; ls /dozed 2>/dev/null; true");
        assert_eq!(dozed == "/dozed\n", at > 0, "{dozed:?} after {seconds} s");
        assert_eq!(guest.ask("ls /slept 2>/dev/null; true"), "");
        let uptime = "echo $(($(cut -d. -f1 /proc/uptime) - $(cat /uptime)))";
        let uptime: i64 = guest.ask(uptime).trim().parse().unwrap();
        assert!(uptime >= seconds, "up for {uptime} s after {seconds} s");
        // CLOCK_MONOTONIC went on by as much as the wall clock.
        let apart = format!("{READ_CLOCKS}; echo $((d - $(cat /date) - u + $(cat /uptime)))");
        let apart: i64 = guest.ask(&apart).trim().parse().unwrap();
        assert!((-2..=2).contains(&apart), "{apart} s apart after {seconds} s");
        // Sleeps that begin now end.
        guest.ask("sleep 1");
        guest.is_sane();
        paused = Instant::now();
        vm = guest.pause();
    }
}

fn kvm_clock_is_right(name: &str, release: Release, vcpus: u8) {
    clocks_are_right(name, config(release, &[], SHELL).vcpus(vcpus), "kvm-clock");
}

#[test]
fn clocks_of_linux_6_12_on_1_vcpu_are_right_after_a_second_a_minute_and_a_day() {
    kvm_clock_is_right("clocks-6.12-1", Release::Linux6_12, 1);
}

#[test]
fn clocks_of_linux_6_12_on_2_vcpus_are_right_after_a_second_a_minute_and_a_day() {
    kvm_clock_is_right("clocks-6.12-2", Release::Linux6_12, 2);
}

#[test]
fn clocks_of_linux_6_1_on_1_vcpu_are_right_after_a_second_a_minute_and_a_day() {
    kvm_clock_is_right("clocks-6.1-1", Release::Linux6_1, 1);
}

#[test]
fn clocks_of_linux_6_1_on_2_vcpus_are_right_after_a_second_a_minute_and_a_day() {
    kvm_clock_is_right("clocks-6.1-2", Release::Linux6_1, 2);
}

#[test]
fn a_guest_that_counts_by_its_tsc_is_right_after_a_second_a_minute_and_a_day() {
    let config = config(Release::Linux6_12, &[], SHELL);
    let cmdline = Cmdline::default().push("quiet clocksource=tsc tsc=reliable").unwrap();
    clocks_are_right("clocks-tsc", config.cmdline(cmdline), "tsc");
}

/// A guest wakes in a process of its own, which runs this very test.
fn another_process_wakes(test: &str, release: Release, vcpus: u8) {
    const DIRECTORY: &str = "DORMOUSE_TEST_SNAPSHOT";
    if let Some(dir) = std::env::var_os(DIRECTORY) {
        let guest = Guest::restore(&Snapshot::open(dir).unwrap(), Clock::Advance);
        assert_eq!(guest.ask("cat /kept"), "something\n");
        return guest.is_sane();
    }
    let scratch = Scratch::new(test);
    let dir = scratch.0.join("asleep");
    let guest = Guest::boot(config(release, &[], SHELL).vcpus(vcpus));
    guest.ask("echo something >/kept");
    drop(guest.vm.suspend(&dir).unwrap());
    let output = Command::new(std::env::current_exe().unwrap())
        .args(["--test-threads=1", "--exact", &format!("snapshots::{test}")])
        .env(DIRECTORY, &dir)
        .output()
        .unwrap();
    let text = String::from_utf8_lossy(&output.stdout);
    assert!(output.status.success() && text.contains("1 passed"), "{text}");
}

#[test]
fn another_process_wakes_linux_6_12_on_2_vcpus() {
    another_process_wakes("another_process_wakes_linux_6_12_on_2_vcpus", Release::Linux6_12, 2);
}

#[test]
fn another_process_wakes_linux_6_1_on_1_vcpu() {
    another_process_wakes("another_process_wakes_linux_6_1_on_1_vcpu", Release::Linux6_1, 1);
}

/// What a clone writes to its disk, nobody else reads; and where a snapshot goes, those after it stand.
#[test]
fn disks_of_clones_are_their_own() {
    let scratch = Scratch::new("disks");
    let [image, own] = ["clones", "clones-own"].map(|name| Image::new(name, 16));
    for image in [&image, &own] {
        fs::write(&image.0, vec![b'0'; 16 << 20]).unwrap();
    }
    let disks = [
        BlockConfig::new(&image.0).delta(scratch.0.join("delta")),
        BlockConfig::new(&image.0).discard_writes(),
        BlockConfig::new(&own.0),
    ];
    let config = config(Release::Linux6_12, DISK, SHELL);
    let guest = Guest::boot(disks.into_iter().fold(config, VmConfig::block));
    let write = |guest: &Guest, value: u32| {
        guest.ask(&format!(
            "for disk in vda vdb vdc; do yes {value} | tr -d '\\n' | head -c 8192 | \
             dd of=/dev/$disk bs=4k conv=fsync 2>/dev/null; done"
        ));
    };
    let has = |guest: &Guest, value: u32| {
        let read = "for disk in vda vdb vdc; do dd if=/dev/$disk bs=1k count=12 iflag=direct 2>/dev/null | \
            fold -w 1 | sort | uniq -c | tr -d ' ' | tr '\\n' ' '; done; echo";
        assert_eq!(guest.ask(read).trim(), format!("40960 8192{value} ").repeat(3).trim());
    };
    let goes_on = |vm: MicroVm<Paused>, transcript| Guest { vm: vm.resume().unwrap(), transcript };
    write(&guest, 1);
    let transcript = guest.transcript.clone();
    let vm = guest.pause();
    let snapshot = vm.snapshot(scratch.0.join("base")).unwrap();
    let original = goes_on(vm, transcript.clone());
    write(&original, 2);
    let [one, other] = [(); 2].map(|()| Guest::restore(&snapshot, Clock::Advance));
    has(&one, 1);
    write(&one, 3);
    has(&other, 1);
    has(&one, 3);
    has(&original, 2);
    snapshot.verify().unwrap();
    // A fork is a clone too.
    let mut vm = original.pause();
    let said = Transcript::default();
    let options = RestoreOptions::new().console(said.clone());
    let fork = goes_on(vm.fork_with(1, |_| options.clone()).unwrap().remove(0), said);
    let original = goes_on(vm, transcript);
    write(&fork, 4);
    has(&original, 2);
    write(&original, 5);
    has(&fork, 4);
    drop((original, other));
    assert_eq!(fs::read(&image.0).unwrap(), vec![b'0'; 16 << 20], "the base was written to");
    // Neither needs what it came from.
    for (guest, value, name) in [(one, 3, "one"), (fork, 4, "fork")] {
        let saved = guest.pause().snapshot(scratch.0.join(name)).unwrap();
        if name == "one" {
            fs::remove_dir_all(scratch.0.join("base")).unwrap();
        }
        has(&Guest::restore(&saved, Clock::Advance), value);
    }
}

/// A connection does not outlive a restore, and its ends learn of it; the next one works.
#[test]
fn vsock_connections_end_with_a_restore_and_new_ones_work() {
    let scratch = Scratch::new("vsock");
    let modules = ["virtio_mmio", "vmw_vsock_virtio_transport"];
    let add =
        |initramfs: dormouse::InitramfsBuilder| initramfs.host_file("bin/guest-tool", guest_tool());
    let config = config_with(Release::Linux6_12, &modules, SHELL, add);
    let guest = Guest::boot(config.vsock(VsockConfig::default()));
    guest.ask("guest-tool vsock-echo 1000 1000 >/dev/null & true");
    let mut stream = connect(&guest.vm.vsock().unwrap(), 1000);
    stream.write_all(b"before").unwrap();
    stream.read_exact(&mut [0; 6]).unwrap();
    // The guest's end of another connection says when it is over.
    let listener = guest.vm.listen(2000).unwrap();
    guest.ask("(guest-tool vsock-cat 2000 </dev/zero >/dev/null 2>&1; echo >/over) & true");
    let cat = listener.accept_timeout(PATIENCE).unwrap();
    let snapshot = guest.vm.suspend(scratch.0.join("asleep")).unwrap().into_snapshot().unwrap();
    assert!(!matches!(stream.read(&mut [0; 6]), Ok(len) if len > 0));
    drop(cat);

    let guest = Guest::restore(&snapshot, Clock::Advance);
    guest.ask("while [ ! -e /over ]; do sleep 0.1; done");
    for _ in 0..20 {
        let mut stream = guest.vm.connect(1000).unwrap();
        stream.set_read_timeout(Some(PATIENCE)).unwrap();
        stream.write_all(b"after").unwrap();
        let mut text = [0; 5];
        stream.read_exact(&mut text).unwrap();
        assert_eq!(&text, b"after");
    }
    assert_eq!(guest.vm.connect(4242).unwrap_err().kind(), &ErrorKind::Refused);
    guest.is_sane();
}

/// `Path` in an error, as a stranger sees it: a snapshot does not choose files of this host.
#[test]
fn a_snapshot_names_no_files_of_the_host_unless_it_may() {
    let scratch = Scratch::new("outside");
    let image = Image::new("outside", 8);
    let disk = BlockConfig::new(&image.0).read_only();
    let guest = Guest::boot(config(Release::Linux6_12, DISK, SHELL).block(disk));
    drop(guest.vm.suspend(scratch.0.join("asleep")).unwrap());
    let snapshot = Snapshot::open(scratch.0.join("asleep")).unwrap();
    let error = snapshot.restore().unwrap_err();
    assert_eq!(error.kind(), &ErrorKind::Snapshot);
    let fix = error.how_to_fix().unwrap();
    assert!(fix.contains("disk_base") && fix.contains("outside_paths"), "{error}");
    assert!(error.to_string().contains(path(&image.0)), "{error}");
    let options = RestoreOptions::new().disk_base(0, &image.0);
    drop(snapshot.restore_with(&options).unwrap());
}

fn path(path: &Path) -> &str {
    path.to_str().unwrap()
}

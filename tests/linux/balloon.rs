//! The memory balloon under Linux: what it gives back to the host, and that the guest goes on.

use std::fs;
use std::thread::sleep;
use std::time::{Duration, Instant};

use dormouse::{BalloonConfig, BalloonStatus, DeviceMetrics, ExitStatus, MicroVm, Running};

use crate::devices::config;
use crate::resources::alone;
use crate::{PATIENCE, Release, Transcript};

const MIB: u64 = 1 << 20;
const MODULES: &[&str] = &["virtio_mmio", "virtio_balloon"];

/// A VM of 256 MiB with a balloon, whose guest runs `script` after its driver is there.
fn start(release: Release, balloon: BalloonConfig, script: &str) -> (MicroVm<Running>, Transcript) {
    let script = format!(
        "mkdir /t; mount -t tmpfs -o size=240m t /t\n\
         wait_for() {{ while [ ! -e /$1 ]; do sleep 0.1; done; }}\n\
         (while read line; do touch /$line; done) < /dev/ttyS0 &\n\
         {script}\npoweroff -f"
    );
    let transcript = Transcript::default();
    let config = config(release, MODULES, &script)
        .memory_mib(256)
        .balloon(balloon)
        .console(transcript.clone());
    (MicroVm::create(config).unwrap().start().unwrap(), transcript)
}

/// What this process has of the host's memory; it has one VM.
fn resident() -> u64 {
    let statm = fs::read_to_string("/proc/self/statm").unwrap();
    statm.split_whitespace().nth(1).unwrap().parse::<u64>().unwrap() * 4096
}

/// Waits for something of the balloon or of this process.
fn wait_until(vm: &MicroVm<Running>, what: &str, is: impl Fn(&BalloonStatus) -> bool) {
    let begin = Instant::now();
    loop {
        let status = vm.balloon().unwrap();
        if is(&status) {
            return;
        }
        let resident = resident() / MIB;
        assert!(vm.exit_status().is_none(), "{what}: {status:?}\n{}", vm.console().tail());
        assert!(
            begin.elapsed() < PATIENCE,
            "{what}: {status:?}, {resident} MiB resident\n{}",
            vm.console().tail()
        );
        sleep(Duration::from_millis(20));
    }
}

fn ends_well(vm: MicroVm<Running>, transcript: &Transcript) -> String {
    let vm = transcript.end_of(vm);
    let text = transcript.text();
    assert_eq!(vm.exit_status(), &ExitStatus::PoweredOff, "{text}");
    text
}

fn half_and_back(release: Release) {
    let script = r#"
yes dormouse | head -c 4000000 > /data
first=$(sha256sum < /data)
dd if=/dev/zero of=/t/big bs=1M count=150 2>/dev/null; rm /t/big
echo full
n=0
while [ ! -e /stop ]; do
    sum=$(sha256sum < /data); n=$((n + 1))
    [ "$sum" = "$first" ] || echo "wrong: $sum"
done
echo "sums=$n"
dd if=/dev/zero of=/t/big bs=1M count=150 2>/dev/null && echo whole again
dmesg | grep -iE 'oom|out of memory'"#;
    let (vm, transcript) = start(release, BalloonConfig::default(), script);
    transcript.wait_for("full\n");
    let before = resident();
    assert!(before > 150 * MIB, "{before}");
    wait_until(&vm, "statistics", |status| status.stats.is_some());
    vm.set_balloon_mib(128).unwrap();
    wait_until(&vm, "half", |status| status.actual_bytes == 128 * MIB);
    let after = resident();
    assert!(after + 100 * MIB < before, "{} MiB, then {} MiB", before / MIB, after / MIB);

    let asked = std::time::SystemTime::now();
    wait_until(&vm, "new statistics", |status| status.stats.unwrap().taken > asked);
    let stats = vm.balloon().unwrap().stats.unwrap();
    let (memtot, memfree) = (stats.memtot.unwrap(), stats.memfree.unwrap());
    assert!(memfree < memtot && memtot < 128 * MIB, "{stats:?}");
    assert!(stats.minflt.unwrap() > 0 && stats.avail.is_some(), "{stats:?}");
    assert!(stats.caches.is_some() && stats.swap_in == Some(0), "{stats:?}");

    vm.set_balloon_mib(0).unwrap();
    wait_until(&vm, "nothing", |status| status.actual_bytes == 0);
    vm.console_input("stop\n").unwrap();
    let text = ends_well(vm, &transcript);
    let sums = text.split("sums=").nth(1).unwrap().lines().next().unwrap();
    assert!(sums.parse::<u32>().unwrap() > 0, "{text}");
    assert!(!text.contains("wrong") && text.contains("whole again"), "{text}");
    assert!(!text.to_lowercase().contains("memory"), "{text}");
}

#[test]
fn balloon_to_half_and_back_while_linux_6_1_computes() {
    if alone("balloon_to_half_and_back_while_linux_6_1_computes") {
        half_and_back(Release::Linux6_1);
    }
}

#[test]
fn balloon_to_half_and_back_while_linux_6_12_computes() {
    if alone("balloon_to_half_and_back_while_linux_6_12_computes") {
        half_and_back(Release::Linux6_12);
    }
}

#[test]
fn a_guest_that_is_out_of_memory_takes_it_from_the_balloon() {
    if !alone("a_guest_that_is_out_of_memory_takes_it_from_the_balloon") {
        return;
    }
    let script = r#"
echo ready; wait_for go
dd if=/dev/zero of=/t/big bs=1M count=100 2>/dev/null && echo "all=$(wc -c < /t/big)"
dmesg | grep -iE 'killed process'"#;
    let balloon = BalloonConfig::default().deflate_on_oom(true);
    let (vm, transcript) = start(Release::Linux6_12, balloon, script);
    transcript.wait_for("ready\n");
    // Less than 100 MiB are left to the guest then.
    vm.set_balloon_mib(150).unwrap();
    wait_until(&vm, "the balloon", |status| status.actual_bytes == 150 * MIB);
    vm.console_input("go\n").unwrap();
    transcript.wait_for("all=");
    let text = ends_well(vm, &transcript);
    assert!(text.contains(&format!("all={}\n", 100 * MIB)), "{text}");
    assert!(!text.to_lowercase().contains("killed"), "{text}");
}

#[test]
fn memory_that_the_guest_frees_goes_back_to_the_host_by_itself() {
    if !alone("memory_that_the_guest_frees_goes_back_to_the_host_by_itself") {
        return;
    }
    let script = r#"
dd if=/dev/zero of=/t/big bs=1M count=150 2>/dev/null; echo full; wait_for free
rm /t/big; wait_for again
dd if=/dev/zero of=/t/big bs=1M count=150 2>/dev/null &&
    echo "size=$(wc -c < /t/big) others=$(tail -c 4000000 /t/big | tr -d '\0' | wc -c)""#;
    let balloon = BalloonConfig::default().free_page_reporting(true);
    let (vm, transcript) = start(Release::Linux6_12, balloon, script);
    transcript.wait_for("full\n");
    let before = resident();
    assert!(before > 150 * MIB, "{before}");
    vm.console_input("free\n").unwrap();
    wait_until(&vm, "reports", |_| resident() + 100 * MIB < before);
    let reported = vm.metrics().iter().find_map(|metrics| match metrics {
        DeviceMetrics::Balloon(metrics) => Some(metrics.reported_bytes),
        _ => None,
    });
    assert!(reported.unwrap() > 100 * MIB, "{reported:?}");
    vm.console_input("again\n").unwrap();
    let text = ends_well(vm, &transcript);
    assert!(text.contains(&format!("size={} others=0\n", 150 * MIB)), "{text}");
}

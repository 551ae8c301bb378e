//! What idle VMs cost: how often the library's threads wake up for them.

use std::fs;
use std::path::Path;
use std::thread::sleep;
use std::time::{Duration, Instant};

use dormouse::{BlockConfig, Kernel, MicroVm, NetConfig, Running, VmConfig, VsockConfig};

use crate::guest::{self, Program};
use crate::report::{Bar, Metric, Unit};

const VMS: usize = 100;

/// Wake-ups of all threads of the library, for 100 VMs with devices that halted.
pub fn metric() -> Metric {
    let disk = Path::new(env!("CARGO_TARGET_TMPDIR")).join("idle.disk");
    fs::write(&disk, vec![0; 1 << 20]).expect("a disk image");
    let kernel = Kernel::bytes(guest::elf(&Program::Halt));
    // Every two of them are connected.
    let pairs = (0..VMS / 2).map(|_| NetConfig::pair().expect("a pair of sockets"));
    let vms: Vec<MicroVm<Running>> = pairs
        .flat_map(<[NetConfig; 2]>::from)
        .map(|network| {
            let block = BlockConfig::new(&disk).read_only();
            let config = VmConfig::new(kernel.clone()).memory_mib(32).block(block).network(network);
            let config = config.entropy(true).vsock(VsockConfig::default());
            MicroVm::create(config).expect("create").start().expect("start")
        })
        .collect();
    // Until every guest has halted.
    sleep(Duration::from_secs(1));
    let begin = Instant::now();
    let before = switches();
    sleep(Duration::from_secs(2));
    let after = switches();
    let rate = after.count.saturating_sub(before.count) as f64 / begin.elapsed().as_secs_f64();
    drop(vms);
    let _ = fs::remove_file(&disk);
    // A zero that was read from no threads would be none: a vCPU's each, and the device thread.
    let (seen, expected) = (before.threads.min(after.threads), VMS + 1);
    let seen = match seen == expected && before.count > 0 {
        true => String::new(),
        false => format!(" ({seen} threads of {expected} were seen)"),
    };
    Metric {
        name: format!("wake-ups of {VMS} idle VMs with disk, network, vsock and entropy{seen}"),
        unit: Unit::PerSecond,
        ours: vec![rate],
        floor: Vec::new(),
        bar: Some(Bar::AtMost(0.0)),
    }
}

/// How often threads were switched from so far.
#[derive(Default)]
struct Switches {
    /// Those of vCPUs and devices. Where io_uring is forbidden, there are some of disks too.
    threads: usize,
    count: u64,
}

/// Those of the library.
fn switches() -> Switches {
    let mut all = Switches::default();
    for task in fs::read_dir("/proc/self/task").expect("/proc").flatten() {
        // A thread may be gone by now.
        let status = fs::read_to_string(task.path().join("status")).unwrap_or_default();
        if status.starts_with("Name:\tdormouse-") {
            let counts = status.lines().filter_map(|line| line.split_once("ctxt_switches:"));
            let counts = counts.map(|(_, count)| count.trim().parse::<u64>().expect("a count"));
            all.count += counts.sum::<u64>();
            let name = status.trim_start_matches("Name:\tdormouse-");
            all.threads += usize::from(name.starts_with("vcpu") || name.starts_with("device"));
        }
    }
    all
}

//! What a process holds, and how often it wakes up.

use std::fs;
use std::thread;
use std::time::{Duration, Instant};

/// What this process holds.
pub struct Held {
    /// Its own memory, and the kernel's tables for it.
    pub bytes: i64,
    /// What else the kernel would have memory for.
    pub descriptors_and_threads: i64,
}

impl Held {
    pub fn now() -> Self {
        let status = fs::read_to_string("/proc/self/status").expect("/proc");
        let kib = |name: &str| {
            let line = status.lines().find_map(|line| line.strip_prefix(name)).expect(name);
            line.trim().trim_end_matches(" kB").parse::<i64>().expect("a number")
        };
        let bytes = (kib("RssAnon:") + kib("RssShmem:") + kib("VmPTE:")) * 1024;
        let count = |of: &str| fs::read_dir(of).expect("/proc").count() as i64;
        let descriptors_and_threads = count("/proc/self/fd") + count("/proc/self/task");
        Self { bytes, descriptors_and_threads }
    }

    pub fn since(&self, before: &Self) -> Self {
        Self {
            bytes: self.bytes - before.bytes,
            descriptors_and_threads: self.descriptors_and_threads - before.descriptors_and_threads,
        }
    }
}

/// How often threads of this process, but the one that asks, wake up in a second in which nobody wants anything.
pub fn wakeups_in_a_second() -> f64 {
    let begin = Instant::now();
    let before = switches();
    thread::sleep(Duration::from_secs(5));
    let after = switches();
    assert_eq!(before.len(), after.len(), "threads came or went");
    let count = after.iter().sum::<u64>() - before.iter().sum::<u64>();
    count as f64 / begin.elapsed().as_secs_f64()
}

fn switches() -> Vec<u64> {
    let own = thread_name();
    let tasks = fs::read_dir("/proc/self/task").expect("/proc").flatten();
    let status = tasks.filter_map(|task| fs::read_to_string(task.path().join("status")).ok());
    let others = status.filter(|status| !status.contains(&own));
    others
        .map(|status| {
            let counts = status.lines().filter_map(|line| line.split_once("ctxt_switches:"));
            counts.map(|(_, count)| count.trim().parse::<u64>().expect("a count")).sum()
        })
        .collect()
}

/// How the status of the calling thread, the process's first, tells itself apart.
fn thread_name() -> String {
    format!("\nPid:\t{}\n", std::process::id())
}

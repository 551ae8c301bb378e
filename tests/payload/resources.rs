//! What a process holds: descriptors, threads, mappings. And a process of one's own to count
//! them in, because tests run side by side.

use std::fs;
use std::process::Command;
use std::thread::sleep;
use std::time::{Duration, Instant};

use crate::PATIENCE;

#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Resources {
    pub descriptors: usize,
    pub threads: usize,
    pub mappings: usize,
}

/// What this process holds now.
pub fn now() -> Resources {
    let entries = |path: &str| fs::read_dir(path).unwrap().count();
    Resources {
        descriptors: entries("/proc/self/fd"),
        threads: thread_names().len(),
        mappings: fs::read_to_string("/proc/self/maps").unwrap().lines().count(),
    }
}

/// Threads, without those that the kernel has for an io_uring: they come as it needs them, show among the process's own,
/// and stay for 5 s after their work.
fn thread_names() -> Vec<String> {
    let tasks = fs::read_dir("/proc/self/task").unwrap();
    // One that ends meanwhile has no name any more.
    let names = tasks.filter_map(|task| fs::read_to_string(task.unwrap().path().join("comm")).ok());
    names.filter(|name| !name.starts_with("iou-")).map(|name| name.trim_end().to_owned()).collect()
}

/// What it holds once no thread is left of VMs that are gone, and nothing changes any more.
pub fn settled() -> Resources {
    settled_with(0)
}

/// The same, with so many threads of VMs that stay.
pub fn settled_with(threads: usize) -> Resources {
    let begin = Instant::now();
    let mut last = None;
    loop {
        let names = thread_names();
        let ours = names.iter().filter(|name| name.starts_with("dormouse-")).count();
        match (ours == threads).then(now) {
            Some(now) if last.as_ref() == Some(&now) => return now,
            now => last = now,
        }
        assert!(begin.elapsed() < PATIENCE, "{threads} threads of VMs are to stay: {names:?}");
        sleep(Duration::from_millis(200));
    }
}

/// glibc keeps up to 40 MiB of the stacks of threads that are gone: 20 of 2 MiB, each with a
/// guard page. Whatever grows with each VM is more than that after a hundred of them.
const CACHED_STACKS: usize = 2 * 20;

/// Waits until this process holds what it held before.
pub fn assert_back_to(before: &Resources) {
    let begin = Instant::now();
    loop {
        let now = now();
        let back = now.descriptors == before.descriptors
            && now.threads == before.threads
            && now.mappings <= before.mappings + CACHED_STACKS;
        if back {
            return;
        }
        assert!(begin.elapsed() < PATIENCE, "before: {before:?}, now: {now:?}");
        sleep(Duration::from_millis(20));
    }
}

/// The memory of VMs, by the name that it has in `/proc`.
pub const MEMORY: &str = "/memfd:dormouse-memory";

/// The mappings of this process of files with this in their names.
pub fn mapped(name: &str) -> Vec<String> {
    let maps = fs::read_to_string("/proc/self/maps").unwrap();
    maps.lines().filter(|line| line.contains(name)).map(str::to_owned).collect()
}

/// What the kernel says of signals to this thread and process: those blocked, ignored, caught.
pub fn signals() -> Vec<String> {
    let status = fs::read_to_string("/proc/thread-self/status").unwrap();
    let masks = ["SigBlk:", "SigIgn:", "SigCgt:"];
    let is_mask = |line: &&str| masks.iter().any(|mask| line.starts_with(mask));
    status.lines().filter(is_mask).map(str::to_owned).collect()
}

/// Whether this process runs the named test alone. The first time it does not: then the test is
/// run again in a process of its own, and its end is checked here.
pub fn alone(test: &str) -> bool {
    const ALONE: &str = "DORMOUSE_TEST_ALONE";
    if std::env::var_os(ALONE).is_some() {
        return true;
    }
    let output = Command::new(std::env::current_exe().unwrap())
        .args(["--test-threads=1", "--nocapture", test])
        .env(ALONE, "1")
        // An arena for each thread would be a mapping for each thread.
        .env("MALLOC_ARENA_MAX", "1")
        .output()
        .unwrap();
    let text = String::from_utf8_lossy(&output.stdout);
    let errors = String::from_utf8_lossy(&output.stderr);
    assert!(output.status.success(), "{text}{errors}");
    assert!(text.contains("1 passed"), "{text}");
    false
}

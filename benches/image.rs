//! What it takes to make a root file system of an image of 100 MB, beside what umoci takes for the same image, in
//! turn; what of the host's memory; and what a second use takes. No guest is run.
//!
//! `cargo bench --all-features --bench image` prints a table, with `-- --json` one JSON object a line; with
//! `-- --svg FILE` it draws the distributions.

mod report;

use std::env;
use std::fs;
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::time::{Duration, Instant};

use dormouse::{Image, ImageCache};
use report::{Bar, Metric, Unit, micros, report};
use tokio::runtime::{Builder, Runtime};

const ROUNDS: usize = 10;
/// Processes whose memory is measured.
const PROCESSES: usize = 3;
const SECOND_USES: usize = 100;
/// What a process of this benchmark that only unpacks is told: the layout and its cache.
const ONLY: &str = "--only-unpack";

fn main() {
    let arguments: Vec<String> = env::args().collect();
    let runtime = Builder::new_multi_thread().enable_all().build().expect("tokio");
    if let Some(at) = arguments.iter().position(|argument| argument == ONLY) {
        unpack(&runtime, Path::new(&arguments[at + 1]), Path::new(&arguments[at + 2]));
        println!("{}", peak_kib());
        return;
    }
    let scratch = Scratch::new();
    let (layout, megabytes) = make_image(&scratch.0);
    let name = format!("unpack an image of {megabytes} MB");
    let mut both = metric(&name, Unit::Micros, Some(Bar::AtMost(1.0 / 0.7)));
    for round in 0..=ROUNDS {
        let (cache, bundle) = (scratch.0.join("cache"), scratch.0.join("bundle"));
        let ours = unpack(&runtime, &layout, &cache);
        let floor = umoci(&scratch.0, &bundle);
        fs::remove_dir_all(cache).expect("a cache");
        fs::remove_dir_all(bundle).expect("a bundle");
        // The first of each warms the host up.
        if round > 0 {
            both.ours.push(micros(ours));
            both.floor.push(micros(floor));
        }
    }
    let cache = scratch.0.join("kept");
    unpack(&runtime, &layout, &cache);
    let mut second = metric("a second use of it", Unit::Micros, Some(Bar::AtMost(20_000.0)));
    second.ours = (0..SECOND_USES).map(|_| micros(unpack(&runtime, &layout, &cache))).collect();
    let mut memory =
        metric("peak memory of a process that unpacks it", Unit::Kib, Some(Bar::AtMost(131_072.0)));
    memory.ours = (0..PROCESSES).map(|_| peak_of_a_process(&scratch.0, &layout)).collect();
    report(&[both, second, memory], "umoci unpack");
}

fn metric(name: &str, unit: Unit, bar: Option<Bar>) -> Metric {
    Metric { name: name.to_owned(), unit, ours: Vec::new(), floor: Vec::new(), bar }
}

fn unpack(runtime: &Runtime, layout: &Path, cache: &Path) -> Duration {
    let begin = Instant::now();
    let cache = ImageCache::open(cache).expect("a cache");
    let image = runtime.block_on(Image::open(layout).unpack(&cache)).expect("a root file system");
    let took = begin.elapsed();
    assert!(image.path().exists());
    took
}

fn umoci(directory: &Path, bundle: &Path) -> Duration {
    let begin = Instant::now();
    let mut command = program("umoci");
    command.current_dir(directory).args(["unpack", "--image", "layout:big"]).arg(bundle);
    // Without root's rights it gives files to whom it may.
    if fs::metadata("/proc/self").expect("/proc").uid() != 0 {
        command.arg("--rootless");
    }
    succeed(command);
    begin.elapsed()
}

/// The most memory that a process had which unpacks the image, and does nothing else.
fn peak_of_a_process(directory: &Path, layout: &Path) -> f64 {
    let cache = directory.join("memory");
    let mut command = Command::new(env::current_exe().expect("this program"));
    let output = command.arg(ONLY).args([layout, &cache]).stderr(Stdio::inherit()).output();
    fs::remove_dir_all(cache).expect("a cache");
    let text = String::from_utf8(output.expect("a process").stdout).expect("a number");
    text.trim().parse().expect("a number")
}

/// Resident pages at their most (proc_pid_status(5), VmHWM).
fn peak_kib() -> u64 {
    let status = fs::read_to_string("/proc/self/status").expect("/proc");
    let line = status.lines().find_map(|line| line.strip_prefix("VmHWM:")).expect("VmHWM");
    line.split_whitespace().next().expect("a number").parse().expect("a number")
}

// --- the image ----------------------------------------------------------------------------------------

/// An image of three layers: the two of the testbed's image of nginx and Python, and over them the programs that
/// tests use. Returns the layout and the size of its files.
fn make_image(directory: &Path) -> (PathBuf, u64) {
    let mut tar = Command::new(root().join("bin/busybox"));
    let programs = directory.join("programs.tar");
    tar.args(["tar", "-cf"]).arg(&programs).arg("-C").arg(root());
    succeed(tar.args(PROGRAMS.map(|name| format!("usr/bin/{name}"))));
    let layers = gunzip_layers(directory);
    let all: Vec<_> = layers.iter().chain([&programs]).collect();
    let names: Vec<_> = all.iter().map(|path| path.to_str().expect("a path")).collect();
    let mut skopeo = program("skopeo");
    skopeo.current_dir(directory).args(["--insecure-policy", "copy", "--quiet"]);
    skopeo.arg(format!("tarball:{}", names.join(":"))).arg("oci:layout:big");
    succeed(skopeo);
    let bytes: u64 = all.iter().map(|path| fs::metadata(path).expect("a layer").len()).sum();
    (directory.join("layout"), bytes / 1_000_000)
}

const PROGRAMS: [&str; 3] = ["docker-registry", "skopeo", "umoci"];

/// The unpacked layers of the testbed's image, the lowest first: the only blobs that are large.
fn gunzip_layers(directory: &Path) -> Vec<PathBuf> {
    let blobs = fs::read_dir(root().join("images/blobs/sha256")).expect("the testbed's images");
    let blobs = blobs.map(|entry| entry.expect("a blob").path());
    let size = |path: &PathBuf| fs::metadata(path).expect("a blob").len();
    let mut large: Vec<_> = blobs.filter(|path| size(path) > 100_000).collect();
    large.sort_by_key(size);
    let unpack = |(number, path): (usize, &PathBuf)| {
        let unpacked = directory.join(format!("layer-{number}.tar"));
        let mut gunzip = Command::new(root().join("bin/busybox"));
        gunzip.args(["gunzip", "-c"]).arg(path);
        succeed(gunzip.stdout(fs::File::create(&unpacked).expect("a file")));
        unpacked
    };
    large.iter().enumerate().map(unpack).collect()
}

fn root() -> PathBuf {
    env::var_os("DORMOUSE_GUEST_ROOT").expect("start it by `cargo bench`").into()
}

/// A program of the testbed, which finds the libraries that came with it.
fn program(name: &str) -> Command {
    let mut command = Command::new(root().join("usr/bin").join(name));
    command.env("LD_LIBRARY_PATH", root().join("usr/lib/x86_64-linux-gnu"));
    command
}

fn succeed(mut command: impl std::borrow::BorrowMut<Command>) {
    let command = command.borrow_mut();
    let status = command.status().expect("a program");
    assert!(status.success(), "{command:?}: {status}");
}

/// A directory that goes with the benchmark.
struct Scratch(PathBuf);

impl Scratch {
    fn new() -> Self {
        let path = env::temp_dir().join(format!("dormouse-bench-image-{}", std::process::id()));
        fs::create_dir(&path).expect("a directory");
        Self(path)
    }
}

impl Drop for Scratch {
    fn drop(&mut self) {
        let _ = fs::remove_dir_all(&self.0);
    }
}

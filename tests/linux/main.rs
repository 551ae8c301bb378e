//! Stock Debian kernels as guests. They need a KVM that runs ring 0: `tests/testbed` starts a
//! machine that has one where this one does not, and brings the kernels.

mod acpi;
mod agent;
mod balloon;
mod boot;
mod console;
mod cpu;
#[cfg(feature = "registry")]
mod debian_image;
mod devices;
mod disks;
#[cfg(feature = "endpoint")]
mod endpoint;
mod ends;
mod images;
mod network;
mod programs;
#[cfg(feature = "registry")]
mod registry;
#[path = "../payload/resources.rs"]
#[allow(dead_code, reason = "nothing is counted here")]
mod resources;
#[cfg(feature = "registry")]
mod servers;
#[cfg(feature = "session")]
mod session;
mod snapshots;
mod vsock;
mod wall_clock;

use std::env;
use std::fs;
use std::io::{self, Write};
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Arc, Mutex, OnceLock};
use std::time::{Duration, Instant};

use dormouse::{
    Cmdline, Initramfs, InitramfsBuilder, Kernel, MicroVm, Running, Terminated, VmConfig,
};

/// How long a guest may be silent: a boot takes some 5 s in the testbed, more when it is busy. Only
/// a failing test waits longer.
pub const PATIENCE: Duration = Duration::from_secs(180);

/// What a kernel says in its log when it has lost its way. With `quiet` only the worst of it comes to the console.
pub const COMPLAINTS: [&str; 7] =
    ["soft lockup", "stall", "BUG", "WARNING", "Oops", "I/O error", "blocked for more than"];

/// The two kernels that the tests use.
#[derive(Clone, Copy, Debug)]
pub enum Release {
    Linux6_1,
    Linux6_12,
}

impl Release {
    pub fn prefix(self) -> &'static str {
        match self {
            Self::Linux6_1 => "6.1.",
            Self::Linux6_12 => "6.12.",
        }
    }

    /// The kernel in its package; one handle for all tests, so that it is unpacked once.
    pub fn kernel(self) -> Kernel {
        static KERNELS: [OnceLock<Kernel>; 2] = [OnceLock::new(), OnceLock::new()];
        KERNELS[self as usize].get_or_init(|| Kernel::deb(self.package())).clone()
    }

    /// The directory of the kernel's modules.
    pub fn modules_dir(self) -> PathBuf {
        let entries = fs::read_dir(guest_root().join("lib/modules")).expect("modules");
        let mut found = entries
            .map(|entry| entry.unwrap())
            .filter(|entry| entry.file_name().to_str().unwrap().starts_with(self.prefix()));
        found.next().expect("modules of this release").path()
    }

    /// The kernel's Debian package.
    pub fn package(self) -> PathBuf {
        let debs = PathBuf::from(env::var_os("DORMOUSE_GUEST_DEBS").expect("run by tests/testbed"));
        let prefix = format!("linux-image-{}", self.prefix());
        let entries = fs::read_dir(debs).expect("packages").map(|entry| entry.unwrap().path());
        let mut found =
            entries.filter(|path| path.file_name().unwrap().to_str().unwrap().starts_with(&prefix));
        found.next().expect("a kernel package of this release")
    }
}

/// Where busybox, the other programs and the unpacked kernels are.
pub fn guest_root() -> PathBuf {
    env::var_os("DORMOUSE_GUEST_ROOT").expect("run by tests/testbed").into()
}

/// The program for guests, tests/testbed/guest-tool.rs.
pub fn guest_tool() -> PathBuf {
    env::var_os("DORMOUSE_GUEST_TOOL").expect("run by tests/testbed").into()
}

/// An initramfs with busybox, whose init runs `script` with /proc, /sys and /dev mounted.
pub fn initramfs(script: &str) -> InitramfsBuilder {
    let init = format!(
        "#!/bin/busybox sh\n\
         /bin/busybox mkdir -p /proc /sys /dev /bin\n\
         /bin/busybox --install -s /bin\n\
         export PATH=/bin\n\
         mount -t proc proc /proc; mount -t sysfs sys /sys; mount -t devtmpfs dev /dev\n\
         # What the console has not sent when the machine is switched off is lost: wait for it.\n\
         poweroff() {{ stty -F /dev/console echo 2>/dev/null; /bin/busybox poweroff \"$@\"; }}\n\
         {script}\n"
    );
    Initramfs::builder()
        .host_file("bin/busybox", guest_root().join("bin/busybox"))
        .file("init", 0o755, init)
}

/// A VM of 128 MiB that runs `script`.
pub fn config(kernel: Kernel, script: &str) -> VmConfig {
    VmConfig::new(kernel)
        .initramfs(initramfs(script).build().expect("an initramfs"))
        .cmdline(Cmdline::default().push("quiet").unwrap())
}

/// Runs a VM to its end. Returns it with all that it wrote.
pub fn run(config: VmConfig) -> (MicroVm<Terminated>, String) {
    let transcript = Transcript::default();
    let vm = MicroVm::create(config.console(transcript.clone())).expect("create");
    let vm = transcript.end_of(vm.start().unwrap());
    (vm, transcript.text())
}

/// A path that no other test has, in this process or another, though it calls its own by the same name.
pub fn unique(parent: &Path, name: &str) -> PathBuf {
    static COUNT: AtomicUsize = AtomicUsize::new(0);
    let count = COUNT.fetch_add(1, Ordering::Relaxed);
    parent.join(format!("dormouse-{name}-{}-{count}", std::process::id()))
}

/// A directory that goes with the test.
pub struct Scratch(pub PathBuf);

impl Scratch {
    pub fn new(name: &str) -> Self {
        Self::below(&env::temp_dir(), name)
    }

    pub fn below(parent: &Path, name: &str) -> Self {
        let path = unique(parent, name);
        let _ = fs::remove_dir_all(&path);
        fs::create_dir(&path).unwrap();
        Self(path)
    }
}

impl Drop for Scratch {
    fn drop(&mut self) {
        let _ = fs::remove_dir_all(&self.0);
    }
}

/// Everything that a guest wrote.
#[derive(Clone, Default)]
pub struct Transcript(Arc<Mutex<Vec<u8>>>);

impl Transcript {
    pub fn text(&self) -> String {
        String::from_utf8_lossy(&self.0.lock().unwrap()).replace('\r', "")
    }

    /// Waits until the guest has written `text`.
    pub fn wait_for(&self, text: &str) {
        let mut heard = (self.length(), Instant::now());
        while !self.text().contains(text) {
            self.listen(&mut heard, || format!("no {text:?}"));
            std::thread::sleep(Duration::from_millis(20));
        }
    }

    /// Waits until the guest has ended.
    pub fn end_of(&self, mut vm: MicroVm<Running>) -> MicroVm<Terminated> {
        let mut heard = (self.length(), Instant::now());
        loop {
            vm = match vm.wait_timeout(Duration::from_secs(1)) {
                Ok(vm) => return vm,
                Err(failed) => failed.vm,
            };
            self.listen(&mut heard, || "no end".to_owned());
        }
    }

    pub fn length(&self) -> usize {
        self.0.lock().unwrap().len()
    }

    /// Panics where the guest has been silent for too long. `heard` is what it had written, and when.
    pub fn listen(&self, heard: &mut (usize, Instant), missing: impl FnOnce() -> String) {
        if heard.0 < self.length() {
            *heard = (self.length(), Instant::now());
        }
        assert!(heard.1.elapsed() < PATIENCE, "{} in:\n{}", missing(), self.text());
    }
}

impl Write for Transcript {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        self.0.lock().unwrap().extend(bytes);
        Ok(bytes.len())
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

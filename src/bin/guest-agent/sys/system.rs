//! What only the system's first process does: mounts, modules, the clock, the machine's end.

use std::ffi::{CString, OsStr, c_char, c_int, c_long, c_ulong, c_void};
use std::fs::File;
use std::io;
use std::os::fd::AsRawFd;
use std::os::unix::ffi::OsStrExt;
use std::path::Path;
use std::process;
use std::ptr;
use std::time::Duration;

use super::{checked, ioctl};

const CLOCK_REALTIME: c_int = 0;
const RB_POWER_OFF: c_int = 0x4321_fedc;
const RNDADDENTROPY: c_ulong = 0x4008_5203;
const RNDRESEEDCRNG: c_ulong = 0x5207;
const RLIMIT_NOFILE: c_int = 7;
const MNT_DETACH: c_int = 2;
#[cfg(target_arch = "x86_64")]
const SYS_FINIT_MODULE: c_long = 313;
#[cfg(target_arch = "aarch64")]
const SYS_FINIT_MODULE: c_long = 273;

unsafe extern "C" {
    #[link_name = "mount"]
    fn c_mount(
        source: *const c_char,
        target: *const c_char,
        fs_type: *const c_char,
        flags: c_ulong,
        data: *const c_void,
    ) -> c_int;
    fn umount2(target: *const c_char, flags: c_int) -> c_int;
    fn sethostname(name: *const u8, length: usize) -> c_int;
    fn clock_settime(clock: c_int, time: *const [i64; 2]) -> c_int;
    fn reboot(command: c_int) -> c_int;
    #[link_name = "sync"]
    fn c_sync();
    #[link_name = "kill"]
    fn c_kill(pid: c_int, signal: c_int) -> c_int;
    fn syscall(number: c_long, ...) -> c_long;
    fn setrlimit(resource: c_int, limit: *const [u64; 2]) -> c_int;
}

/// As an ordinary process, as in a test, these would end or change somebody's machine.
fn only_as_init() -> io::Result<()> {
    match process::id() {
        1 => Ok(()),
        _ => Err(io::ErrorKind::PermissionDenied.into()),
    }
}

fn c_text(text: &OsStr) -> io::Result<CString> {
    CString::new(text.as_bytes()).map_err(|_| io::ErrorKind::InvalidInput.into())
}

/// What a mount is like (`MS_…` of mount(2)).
#[derive(Clone, Copy)]
pub(crate) struct MountFlags(c_ulong);

impl MountFlags {
    pub(crate) const NONE: Self = Self(0);
    pub(crate) const READ_ONLY: Self = Self(1);
    /// No set-user-id, no devices, no programs: for the kernel's own file systems.
    pub(crate) const KERNEL: Self = Self(2 | 4 | 8);
    /// No set-user-id, no devices.
    pub(crate) const DATA: Self = Self(2 | 4);
    /// No set-user-id, no programs: for devices.
    pub(crate) const DEVICES: Self = Self(2 | 8);
    pub(crate) const BIND: Self = Self(4096);
    pub(crate) const MOVE: Self = Self(8192);
    const REMOUNT_READ_ONLY: Self = Self(32 | 1);
}

pub(crate) fn mount(
    source: &Path,
    target: &Path,
    fs_type: &str,
    flags: MountFlags,
    options: &str,
) -> io::Result<()> {
    only_as_init()?;
    let (source, target) = (c_text(source.as_os_str())?, c_text(target.as_os_str())?);
    let (fs_type, options) = (c_text(OsStr::new(fs_type))?, c_text(OsStr::new(options))?);
    // SAFETY: all four end with a NUL.
    checked(unsafe {
        let options = options.as_ptr().cast();
        c_mount(source.as_ptr(), target.as_ptr(), fs_type.as_ptr(), flags.0, options)
    })?;
    Ok(())
}

pub(crate) fn remount_read_only(target: &Path) -> io::Result<()> {
    mount(Path::new("none"), target, "", MountFlags::REMOUNT_READ_ONLY, "")
}

/// Unmounts; what is still in use, when it is not any more.
pub(crate) fn unmount(target: &Path, lazily: bool) -> io::Result<()> {
    only_as_init()?;
    let target = c_text(target.as_os_str())?;
    // SAFETY: the path ends with a NUL.
    checked(unsafe { umount2(target.as_ptr(), if lazily { MNT_DETACH } else { 0 }) })?;
    Ok(())
}

/// Loads a kernel module.
pub(crate) fn load_module(module: &File) -> io::Result<()> {
    only_as_init()?;
    // SAFETY: the kernel reads the parameters, which end with a NUL.
    let result = unsafe { syscall(SYS_FINIT_MODULE, module.as_raw_fd(), c"".as_ptr(), 0) };
    if result < 0 { Err(io::Error::last_os_error()) } else { Ok(()) }
}

pub(crate) fn set_hostname(name: &str) -> io::Result<()> {
    only_as_init()?;
    // SAFETY: the kernel reads as many bytes as there are.
    checked(unsafe { sethostname(name.as_ptr(), name.len()) })?;
    Ok(())
}

/// Sets CLOCK_REALTIME to so much since 1970.
pub(crate) fn set_wall_clock(since_1970: Duration) -> io::Result<()> {
    only_as_init()?;
    let time = [since_1970.as_secs() as i64, i64::from(since_1970.subsec_nanos())];
    // SAFETY: the kernel reads a `struct timespec`.
    checked(unsafe { clock_settime(CLOCK_REALTIME, &time) })?;
    Ok(())
}

/// Adds a seed to the kernel's random number generator, and makes it count from now on.
pub(crate) fn add_entropy(seed: [u8; 32]) -> io::Result<()> {
    /// `struct rand_pool_info` (random(4)).
    #[repr(C)]
    struct Pool {
        bits: c_int,
        bytes: c_int,
        seed: [u8; 32],
    }
    only_as_init()?;
    let pool = Pool { bits: 256, bytes: 32, seed };
    let random = File::open("/dev/urandom")?;
    // SAFETY: the kernel reads the pool, which is as long as it says.
    checked(unsafe { ioctl(random.as_raw_fd(), RNDADDENTROPY, &pool) })?;
    // SAFETY: the request takes nothing.
    checked(unsafe { ioctl(random.as_raw_fd(), RNDRESEEDCRNG, ptr::null::<c_void>()) })?;
    Ok(())
}

pub(crate) fn sync() {
    // SAFETY: it takes nothing.
    unsafe { c_sync() }
}

/// A signal to every process but the first.
pub(crate) fn kill_all(signal: i32) -> io::Result<()> {
    only_as_init()?;
    // SAFETY: it takes integers.
    checked(unsafe { c_kill(-1, signal) })?;
    Ok(())
}

/// Switches the machine off. Does not come back where that works.
pub(crate) fn power_off() -> io::Result<()> {
    only_as_init()?;
    // SAFETY: it takes an integer.
    checked(unsafe { reboot(RB_POWER_OFF) })?;
    Ok(())
}

/// Lets the agent have as many descriptors as its connections take. What it starts gets back the
/// usual limit (see process.rs).
pub(crate) fn raise_the_limit_of_open_files() -> io::Result<()> {
    only_as_init()?;
    // SAFETY: the kernel reads a `struct rlimit`.
    checked(unsafe { setrlimit(RLIMIT_NOFILE, &[65_536, 524_288]) })?;
    Ok(())
}

/// Has the allocator keep to one heap for all threads, and give back what is free of it.
#[cfg(target_env = "gnu")]
pub(crate) fn keep_memory_small() {
    const M_TRIM_THRESHOLD: c_int = -1;
    const M_MMAP_THRESHOLD: c_int = -3;
    const M_ARENA_MAX: c_int = -8;
    unsafe extern "C" {
        fn mallopt(parameter: c_int, value: c_int) -> c_int;
    }
    // SAFETY: it takes integers, and no other thread runs yet.
    unsafe {
        mallopt(M_ARENA_MAX, 1);
        mallopt(M_TRIM_THRESHOLD, 128 << 10);
        mallopt(M_MMAP_THRESHOLD, 128 << 10);
    }
}

#[cfg(not(target_env = "gnu"))]
pub(crate) fn keep_memory_small() {}

/// Gives back all of the heap that is free, wherever it lies. It takes as long as a few system calls.
#[cfg(target_env = "gnu")]
pub(crate) fn give_memory_back() {
    unsafe extern "C" {
        fn malloc_trim(pad: usize) -> c_int;
    }
    // SAFETY: it takes an integer, and may be called at any time.
    let _ = unsafe { malloc_trim(0) };
}

#[cfg(not(target_env = "gnu"))]
pub(crate) fn give_memory_back() {}

//! The guest's end.

use std::ffi::OsString;
use std::fs;
use std::os::unix::ffi::OsStringExt;
use std::path::{Path, PathBuf};
use std::process;
use std::sync::Mutex;
use std::thread;
use std::time::Duration;

use crate::console::say;
use crate::protocol::{Failure, FailureKind};
use crate::{cgroup, children, entrypoint, mounts, sys};

const SIGTERM: i32 = 15;
const SIGKILL: i32 = 9;
const SIGCONT: i32 = 18;

/// How long killed processes may take to be gone: one that waits for a disk is not at once.
const KILL_PATIENCE: Duration = Duration::from_secs(2);

/// Ends all processes, writes everything to the disks and switches off. Comes back only with an error.
pub(crate) fn shut_down(grace: Duration) -> Result<(), Failure> {
    /// One does it; others wait for the end with it.
    static ONCE: Mutex<()> = Mutex::new(());
    if process::id() != 1 {
        return Err(Failure::new(FailureKind::NotAllowed, "switch off what is no guest"));
    }
    let _once = ONCE.lock();
    // Also those that were frozen for a snapshot or stopped by a terminal.
    let _ = cgroup::thaw();
    ask_to_end();
    let _ = sys::kill_all(SIGCONT);
    if !children::wait_for_all(grace) {
        let _ = sys::kill_all(SIGKILL);
        children::wait_for_all(KILL_PATIENCE);
    }
    sys::sync();
    unmount_all();
    sys::sync();
    let result = sys::power_off().map_err(|error| Failure::of("switch off", &error));
    if let Err(failure) = &result {
        say(&crate::console::describe(failure));
        // Other calls would find a guest without file systems.
        loop {
            thread::park();
        }
    }
    result
}

/// SIGTERM, to all but an entrypoint that has another signal, and what that has started.
fn ask_to_end() {
    match entrypoint::ask_to_end() {
        Some(pid) => {
            for other in entrypoint::others(pid) {
                let _ = sys::kill_process(other, SIGTERM);
            }
        }
        None => {
            let _ = sys::kill_all(SIGTERM);
        }
    }
}

/// Unmounts what can be, the last first; of the rest, as the root, nothing is written any more.
fn unmount_all() {
    let mounts = fs::read("/proc/self/mounts").unwrap_or_default();
    for target in targets(&mounts).iter().rev() {
        if target == Path::new("/") || sys::unmount(target, false).is_err() {
            let _ = sys::remount_read_only(target);
        }
    }
    mounts::close_upper();
}

/// Where what /proc/self/mounts lists is mounted, but for what is the kernel's.
fn targets(mounts: &[u8]) -> Vec<PathBuf> {
    let targets = mounts.split(|byte| *byte == b'\n').filter_map(|line| {
        let mut fields = line.split(|byte| *byte == b' ');
        let (target, fs_type) = (fields.nth(1)?, fields.next()?);
        let kernels = ["proc", "sysfs", "devtmpfs", "devpts", "cgroup2", "rootfs"];
        let is_kernels = kernels.iter().any(|name| name.as_bytes() == fs_type);
        (!is_kernels).then(|| unescaped(target))
    });
    targets.collect()
}

/// A path of /proc/self/mounts, where spaces and the like are written as `\040`.
fn unescaped(path: &[u8]) -> PathBuf {
    let mut bytes = Vec::new();
    let mut rest = path;
    while let Some((&byte, after)) = rest.split_first() {
        let digits = after.get(..3).and_then(|digits| str::from_utf8(digits).ok());
        let escaped = digits.and_then(|digits| u8::from_str_radix(digits, 8).ok());
        match escaped.filter(|_| byte == b'\\') {
            Some(escaped) => {
                bytes.push(escaped);
                rest = &after[3..];
            }
            None => {
                bytes.push(byte);
                rest = after;
            }
        }
    }
    OsString::from_vec(bytes).into()
}

#[cfg(test)]
mod tests {
    use std::ffi::OsStr;
    use std::os::unix::ffi::OsStrExt;

    use super::*;

    #[test]
    fn only_a_guest_is_switched_off() {
        let failure = shut_down(Duration::ZERO).unwrap_err();
        assert_eq!(failure.kind, FailureKind::NotAllowed);
        sys::kill_all(SIGTERM).unwrap_err();
        sys::power_off().unwrap_err();
        sys::unmount(Path::new("/nowhere"), false).unwrap_err();
    }

    #[test]
    fn paths_of_mounts_are_read_with_their_spaces() {
        let cases = [("/a", "/a"), (r"/a\040b\134", r"/a b\"), (r"/a\04", r"/a\04"), (r"\", r"\")];
        for (escaped, path) in cases {
            assert_eq!(unescaped(escaped.as_bytes()), Path::new(path));
        }
        // One name that is no text hides no other.
        let mounts =
            b"proc /proc proc rw 0 0\n/dev/vda / ext4 rw 0 0\nnone /mnt/\xff tmpfs rw 0 0\n";
        let expected = [Path::new("/"), Path::new(OsStr::from_bytes(b"/mnt/\xff"))];
        assert_eq!(targets(mounts), expected);
    }
}

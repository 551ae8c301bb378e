//! Directories in the folder for temporary files, of snapshots that are in memory.

use std::ffi::OsStr;
use std::fs;
use std::io;
use std::os::unix::fs::DirBuilderExt;
use std::path::{Path, PathBuf};
use std::sync::Once;

use super::directory;
use crate::file_lock::LockedFile;
use crate::random::random;

const PREFIX: &str = "dormouse-";
/// Digits of a name that are the host's.
const HOST_DIGITS: usize = 8;

/// A directory there, which goes with this value, or none.
#[derive(Default)]
pub(super) struct Temporary {
    pub(super) path: PathBuf,
    /// Locked: a directory whose lock is free is of a process that is gone.
    directory: Option<LockedFile>,
}

impl Temporary {
    /// Makes one. The first one of a process removes those that others left when they were killed.
    pub(super) fn new() -> io::Result<Self> {
        let (folder, host) = (std::env::temp_dir(), host());
        static SWEPT: Once = Once::new();
        SWEPT.call_once(|| sweep(&folder, &host));
        loop {
            let random: [u8; 16] = random()?;
            let digits = format!("{:032x}", u128::from_ne_bytes(random));
            let path = folder.join(format!("{PREFIX}{host}{}", &digits[HOST_DIGITS..]));
            fs::DirBuilder::new().mode(0o700).create(&path)?;
            match directory::lock_new(&path) {
                Ok(Some(directory)) => return Ok(Self { path, directory: Some(directory) }),
                // Another process that sweeps took it for abandoned before it was locked.
                Ok(None) => {}
                Err(error) => {
                    let _ = fs::remove_dir(&path);
                    return Err(error);
                }
            }
        }
    }
}

impl Drop for Temporary {
    fn drop(&mut self) {
        if self.directory.is_some() {
            directory::remove_snapshot(&self.path);
        }
    }
}

/// What tells this host from others that share the folder, which do not see its locks. What was left under another
/// kernel, or another name of the host, stays.
fn host() -> String {
    let uname = rustix::system::uname();
    let name = [uname.nodename(), uname.release(), uname.version()].map(|name| name.to_bytes());
    format!("{:08x}", crc32fast::hash(&name.concat()))
}

/// Removes what processes that are gone have left in a folder, of those of this host.
fn sweep(folder: &Path, host: &str) {
    let Ok(entries) = fs::read_dir(folder) else { return };
    for entry in entries.flatten().filter(|entry| is_of(host, &entry.file_name())) {
        directory::remove_unlocked(&entry.path());
    }
}

fn is_of(host: &str, name: &OsStr) -> bool {
    let digits = name.to_str().and_then(|name| name.strip_prefix(PREFIX)?.strip_prefix(host));
    digits.is_some_and(|digits| {
        digits.len() == 32 - HOST_DIGITS && digits.bytes().all(|byte| byte.is_ascii_hexdigit())
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_a_killed_process_left_is_removed_and_what_is_in_use_stays() {
        let used = Temporary::new().unwrap();
        let folder = used.path.join("folder");
        fs::create_dir(&folder).unwrap();
        let host = host();
        assert_eq!(host.len(), HOST_DIGITS);
        let name = |host: &str, digit: &str| format!("{PREFIX}{host}{}", digit.repeat(24));
        let at = |digit: &str| folder.join(name(&host, digit));
        let (left, locked, foreign) = (at("1"), at("2"), at("3"));
        let other = folder.join(name("zzzzzzzz", "4"));
        for path in [&left, &locked, &foreign, &other] {
            fs::create_dir(path).unwrap();
            fs::write(path.join("disk-0"), "written").unwrap();
        }
        fs::write(foreign.join("thesis.txt"), "years of work").unwrap();
        std::os::unix::fs::symlink(&locked, at("5")).unwrap();
        let lock = directory::lock_new(&locked).unwrap().unwrap();
        sweep(&folder, &host);
        assert!(!left.exists());
        assert!(locked.join("disk-0").exists() && other.join("disk-0").exists());
        assert!(foreign.join("thesis.txt").exists());
        drop(lock);
        sweep(&folder, &host);
        assert!(!locked.exists());
        fs::remove_dir_all(&folder).unwrap();
        let path = used.path.clone();
        drop(used);
        assert!(!path.exists());
    }
}

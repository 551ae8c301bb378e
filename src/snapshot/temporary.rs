//! Directories in the folder for temporary files, of snapshots that are in memory.

use std::ffi::OsStr;
use std::fs::{self, File};
use std::io;
use std::os::unix::fs::DirBuilderExt;
use std::path::{Path, PathBuf};
use std::sync::Once;

use super::directory;
use crate::random::random;

const PREFIX: &str = "dormouse-";

/// A place for a directory there, which goes with this value.
pub(super) struct Temporary {
    pub(super) path: PathBuf,
    /// Locked: a directory whose lock is free is of a process that is gone.
    directory: Option<File>,
}

impl Temporary {
    /// The place alone.
    pub(super) fn new() -> io::Result<Self> {
        let name = u128::from_ne_bytes(random()?);
        let path = std::env::temp_dir().join(format!("{PREFIX}{name:032x}"));
        Ok(Self { path, directory: None })
    }

    /// The directory. The first one of a process removes those that others left when they were killed.
    pub(super) fn create(&mut self) -> io::Result<()> {
        static SWEPT: Once = Once::new();
        SWEPT.call_once(|| sweep(&std::env::temp_dir()));
        // Another process that sweeps may take one for abandoned that is not locked yet.
        while self.directory.is_none() {
            fs::DirBuilder::new().mode(0o700).create(&self.path)?;
            self.directory = directory::lock_new(&self.path)?;
        }
        Ok(())
    }
}

impl Drop for Temporary {
    fn drop(&mut self) {
        if self.directory.is_some() {
            directory::remove_snapshot(&self.path);
        }
    }
}

/// Removes what processes that are gone have left in a folder.
fn sweep(folder: &Path) {
    let Ok(entries) = fs::read_dir(folder) else { return };
    for entry in entries.flatten().filter(|entry| is_ours(&entry.file_name())) {
        directory::remove_unlocked(&entry.path());
    }
}

fn is_ours(name: &OsStr) -> bool {
    let hex = name.to_str().and_then(|name| name.strip_prefix(PREFIX));
    hex.is_some_and(|hex| hex.len() == 32 && hex.bytes().all(|byte| byte.is_ascii_hexdigit()))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_a_killed_process_left_is_removed_and_what_is_in_use_stays() {
        let mut used = Temporary::new().unwrap();
        used.create().unwrap();
        let folder = used.path.join("folder");
        fs::create_dir(&folder).unwrap();
        let at = |digit: &str| folder.join(format!("{PREFIX}{}", digit.repeat(32)));
        let (left, locked, foreign) = (at("1"), at("2"), at("3"));
        for path in [&left, &locked, &foreign] {
            fs::create_dir(path).unwrap();
            fs::write(path.join("disk-0"), "written").unwrap();
        }
        fs::write(foreign.join("thesis.txt"), "years of work").unwrap();
        std::os::unix::fs::symlink(&locked, at("4")).unwrap();
        let other = folder.join(format!("{PREFIX}1-{}", "2".repeat(30)));
        fs::create_dir(&other).unwrap();
        let lock = directory::lock_new(&locked).unwrap().unwrap();
        sweep(&folder);
        assert!(!left.exists());
        assert!(locked.join("disk-0").exists() && other.exists());
        assert!(foreign.join("thesis.txt").exists());
        drop(lock);
        sweep(&folder);
        assert!(!locked.exists());
        fs::remove_dir_all(&folder).unwrap();
        let path = used.path.clone();
        drop(used);
        assert!(!path.exists());
    }
}

//! A directory on a tmpfs, so that no disk is measured.

use std::fs::{self, File};
use std::path::PathBuf;

/// Goes with its value.
pub struct Scratch(PathBuf);

impl Scratch {
    pub fn new() -> Self {
        let path = PathBuf::from(format!("/dev/shm/dormouse-bench-{}", std::process::id()));
        fs::create_dir(&path).expect("a directory in /dev/shm");
        Self(path)
    }

    /// A place in it, with nothing there.
    pub fn empty(&self, name: &str) -> PathBuf {
        let path = self.0.join(name);
        let _ = fs::remove_dir_all(&path);
        path
    }

    /// A new file that has no name any more.
    #[allow(dead_code, reason = "not every benchmark needs one")]
    pub fn file(&self, name: &str) -> File {
        let path = self.0.join(name);
        let file = File::options().read(true).write(true).create_new(true).open(&path);
        let file = file.expect("a file in /dev/shm");
        fs::remove_file(path).expect("it is there");
        file
    }
}

impl Drop for Scratch {
    fn drop(&mut self) {
        let _ = fs::remove_dir_all(&self.0);
    }
}

//! A directory that goes with its test, whatever became of that.

use std::fs;
use std::io;
use std::path::PathBuf;
use std::process::Command;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::thread::sleep;
use std::time::Duration;

/// Where in its directory a test mounts a file system, if it does.
pub const MOUNT: &str = "small";

/// A directory that goes with the test.
pub struct Scratch(pub PathBuf);

impl Scratch {
    pub fn new() -> Self {
        static COUNT: AtomicUsize = AtomicUsize::new(0);
        let count = COUNT.fetch_add(1, Ordering::Relaxed);
        let path = std::env::temp_dir();
        let path = path.join(format!("dormouse-snapshot-{}-{count}", std::process::id()));
        let _ = fs::remove_dir_all(&path);
        fs::create_dir(&path).unwrap();
        Self(path)
    }

    pub fn join(&self, name: &str) -> PathBuf {
        self.0.join(name)
    }

    /// A file with something in it, to be the disk of a guest.
    pub fn disk(&self, name: &str) -> PathBuf {
        let path = self.join(name);
        fs::write(&path, vec![1; 64 << 10]).unwrap();
        path
    }

    pub fn names(&self) -> Vec<String> {
        let entries = fs::read_dir(&self.0).unwrap();
        let names = entries.map(|entry| entry.unwrap().file_name().into_string().unwrap());
        let mut names: Vec<_> = names.collect();
        names.sort();
        names
    }
}

impl Drop for Scratch {
    fn drop(&mut self) {
        for _ in 0..100 {
            match fs::remove_dir_all(&self.0) {
                Err(error) if error.kind() == io::ErrorKind::ResourceBusy => {
                    let mount = self.join(MOUNT);
                    let _ = Command::new("umount").arg("--lazy").arg(mount).status();
                }
                // The tasks of sessions that nobody has any more may be writing.
                Err(error) if error.kind() == io::ErrorKind::DirectoryNotEmpty => {
                    sleep(Duration::from_millis(10));
                }
                _ => return,
            }
        }
    }
}

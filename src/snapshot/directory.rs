//! The directory of a snapshot: written beside its place, and put there whole, by one rename.
//!
//! So a process that is killed, or a disk that is full, leaves what was there before, and at most
//! a directory `.NAME.partial-…` that nobody takes for a snapshot. The next save to the same
//! place removes it.

use std::fs::{self, File, TryLockError};
use std::io;
use std::os::unix::fs::OpenOptionsExt;
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicU32, Ordering};

use rustix::fs::{CWD, RenameFlags, renameat_with};
use thiserror::Error as ThisError;

/// The file that makes a directory a snapshot.
pub(crate) const STATE: &str = "state";
/// The pages that a resumed guest wrote first.
pub(crate) const WRITTEN: &str = "written";

/// A layer of memory, the bottom one first.
pub(crate) fn memory_name(layer: usize) -> String {
    format!("memory-{layer}")
}

/// The disk at this place of the configuration.
pub(crate) fn disk_name(index: usize) -> String {
    format!("disk-{index}")
}

/// Is this the name of a file that a snapshot has?
fn is_known(name: &str) -> bool {
    let numbered = |prefix: &str| {
        name.strip_prefix(prefix).is_some_and(|rest| {
            !rest.is_empty() && rest.len() <= 4 && rest.bytes().all(|byte| byte.is_ascii_digit())
        })
    };
    name == STATE || name == WRITTEN || numbered("memory-") || numbered("disk-")
}

/// Why a directory cannot be written.
#[derive(Debug, ThisError)]
pub(crate) enum DirectoryError {
    #[error("{} is no name for a snapshot's directory", path.display())]
    Name { path: PathBuf },
    #[error("{} has {name:?} in it, which is not of a snapshot", path.display())]
    Foreign { path: PathBuf, name: String },
    #[error("{} is not a directory", path.display())]
    NotADirectory { path: PathBuf },
    #[error("cannot {attempt} {}", path.display())]
    Io { attempt: &'static str, path: PathBuf, source: io::Error },
}

impl DirectoryError {
    pub(super) fn io(attempt: &'static str, path: &Path) -> impl FnOnce(io::Error) -> Self {
        let path = path.to_owned();
        move |source| Self::Io { attempt, path, source }
    }
}

/// A snapshot's directory while it is written. Dropped before [`commit`](Self::commit), it leaves
/// nothing behind.
#[derive(Debug)]
pub(crate) struct Staging {
    target: PathBuf,
    path: PathBuf,
    /// Locked: a directory whose lock is free is of a process that is gone.
    directory: File,
}

impl Staging {
    /// Begins a directory beside `target`, in the same file system.
    pub(crate) fn begin(target: &Path) -> Result<Self, DirectoryError> {
        let no_name = || DirectoryError::Name { path: target.to_owned() };
        let name = target.file_name().and_then(|name| name.to_str()).ok_or_else(no_name)?;
        check_target(target)?;
        let parent = parent(target);
        remove_abandoned(parent, name);
        static COUNT: AtomicU32 = AtomicU32::new(0);
        let count = COUNT.fetch_add(1, Ordering::Relaxed);
        let path = parent.join(format!(".{name}.partial-{}-{count}", std::process::id()));
        fs::create_dir(&path).map_err(DirectoryError::io("create", &path))?;
        let open = || -> io::Result<File> {
            let directory = File::open(&path)?;
            match directory.try_lock() {
                Err(TryLockError::Error(error)) if error.kind() != io::ErrorKind::Unsupported => {
                    Err(error)
                }
                _ => Ok(directory),
            }
        };
        let directory = open().map_err(|source| {
            let _ = fs::remove_dir(&path);
            DirectoryError::Io { attempt: "open", path: path.clone(), source }
        })?;
        Ok(Self { target: target.to_owned(), path, directory })
    }

    /// Where a file of it is, until the commit.
    pub(crate) fn path(&self, name: &str) -> PathBuf {
        self.path.join(name)
    }

    /// Creates a file in it, to be written and read.
    pub(crate) fn create(&self, name: &str) -> Result<File, DirectoryError> {
        let path = self.path(name);
        let mut options = File::options();
        options.read(true).write(true).create_new(true).mode(0o600);
        options.open(&path).map_err(DirectoryError::io("create", &path))
    }

    /// Puts the directory into its place, and with `sync` on the disk before. A snapshot that was
    /// there is gone afterwards.
    pub(crate) fn commit(self, sync: bool) -> Result<(), DirectoryError> {
        let target = self.target.clone();
        if sync {
            self.sync().map_err(DirectoryError::io("sync", &self.path))?;
        }
        check_target(&target)?;
        // What was there comes to where this was, and goes when `self` does.
        let exchanged = renameat_with(CWD, &self.path, CWD, &target, RenameFlags::EXCHANGE);
        match exchanged {
            Ok(()) => {}
            // Nothing is there yet, or the file system cannot exchange.
            Err(rustix::io::Errno::NOENT) => self.rename(&target)?,
            Err(rustix::io::Errno::INVAL | rustix::io::Errno::NOSYS) => {
                let _ = fs::remove_dir(&target);
                let aside = self.path.with_extension("old");
                let had = fs::rename(&target, &aside).is_ok();
                self.rename(&target)?;
                if had {
                    remove_snapshot(&aside);
                }
            }
            Err(errno) => return Err(DirectoryError::io("replace", &target)(errno.into())),
        }
        if sync {
            let parent = parent(&target);
            let synced = File::open(parent).and_then(|parent| parent.sync_all());
            synced.map_err(DirectoryError::io("sync", parent))?;
        }
        Ok(())
    }

    fn rename(&self, target: &Path) -> Result<(), DirectoryError> {
        fs::rename(&self.path, target).map_err(DirectoryError::io("create", target))
    }

    fn sync(&self) -> io::Result<()> {
        for entry in fs::read_dir(&self.path)? {
            File::open(entry?.path())?.sync_all()?;
        }
        self.directory.sync_all()
    }
}

impl Drop for Staging {
    fn drop(&mut self) {
        remove_snapshot(&self.path);
    }
}

/// Removes the files of a snapshot and their directory, as far as it has no others.
pub(crate) fn remove_snapshot(path: &Path) {
    let Ok(entries) = fs::read_dir(path) else { return };
    // Without its state it is no snapshot any more, however far the rest comes.
    let _ = fs::remove_file(path.join(STATE));
    for entry in entries.flatten() {
        if entry.file_name().to_str().is_some_and(is_known) {
            let _ = fs::remove_file(entry.path());
        }
    }
    let _ = fs::remove_dir(path);
}

/// The directory that a path is in.
fn parent(path: &Path) -> &Path {
    match path.parent() {
        Some(parent) if !parent.as_os_str().is_empty() => parent,
        _ => Path::new("."),
    }
}

/// Only a snapshot, or nothing, is replaced.
fn check_target(target: &Path) -> Result<(), DirectoryError> {
    let entries = match fs::read_dir(target) {
        Ok(entries) => entries,
        Err(error) => match error.kind() {
            io::ErrorKind::NotFound => return Ok(()),
            io::ErrorKind::NotADirectory => {
                return Err(DirectoryError::NotADirectory { path: target.to_owned() });
            }
            _ => return Err(DirectoryError::io("read", target)(error)),
        },
    };
    for entry in entries {
        let name = entry.map_err(DirectoryError::io("read", target))?.file_name();
        if !name.to_str().is_some_and(is_known) {
            let name = name.to_string_lossy().into_owned();
            return Err(DirectoryError::Foreign { path: target.to_owned(), name });
        }
    }
    Ok(())
}

/// Removes what processes left that were killed while they wrote a snapshot of this name.
fn remove_abandoned(parent: &Path, name: &str) {
    let prefix = format!(".{name}.partial-");
    let Ok(entries) = fs::read_dir(parent) else { return };
    for entry in entries.flatten() {
        let partial = entry.file_name().to_str().is_some_and(|name| name.starts_with(&prefix));
        if !partial {
            continue;
        }
        let lock = File::open(entry.path()).map(|directory| (directory.try_lock(), directory));
        if let Ok((Ok(()), _directory)) = lock {
            remove_snapshot(&entry.path());
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// A directory that goes with the test.
    struct Scratch(PathBuf);

    impl Scratch {
        fn new(name: &str) -> Self {
            let path = std::env::temp_dir();
            let path = path.join(format!("dormouse-{name}-{}", std::process::id()));
            let _ = fs::remove_dir_all(&path);
            fs::create_dir(&path).unwrap();
            Self(path)
        }

        fn names(&self) -> Vec<String> {
            let entries = fs::read_dir(&self.0).unwrap();
            let names = entries.map(|entry| entry.unwrap().file_name().into_string().unwrap());
            let mut names: Vec<_> = names.collect();
            names.sort();
            names
        }
    }

    impl Drop for Scratch {
        fn drop(&mut self) {
            let _ = fs::remove_dir_all(&self.0);
        }
    }

    fn save(target: &Path, content: &str) -> Result<(), DirectoryError> {
        let staging = Staging::begin(target)?;
        drop(staging.create(&memory_name(0))?);
        fs::write(staging.path(STATE), content).unwrap();
        staging.commit(true)
    }

    #[test]
    fn a_snapshot_takes_its_place_and_that_of_another() {
        let scratch = Scratch::new("replace");
        let target = scratch.0.join("base");
        for content in ["one", "two", "three"] {
            save(&target, content).unwrap();
            assert_eq!(fs::read_to_string(target.join(STATE)).unwrap(), content);
            assert_eq!(scratch.names(), ["base"]);
        }
        // An empty directory is a place too.
        let empty = scratch.0.join("empty");
        fs::create_dir(&empty).unwrap();
        save(&empty, "four").unwrap();
        assert_eq!(scratch.names(), ["base", "empty"]);
    }

    #[test]
    fn one_that_is_given_up_leaves_what_was_there() {
        let scratch = Scratch::new("given-up");
        let target = scratch.0.join("base");
        save(&target, "old").unwrap();
        let staging = Staging::begin(&target).unwrap();
        drop(staging.create(STATE).unwrap());
        assert_eq!(scratch.names().len(), 2);
        drop(staging);
        assert_eq!(scratch.names(), ["base"]);
        assert_eq!(fs::read_to_string(target.join(STATE)).unwrap(), "old");
    }

    #[test]
    fn what_a_killed_process_left_goes_with_the_next_save() {
        let scratch = Scratch::new("abandoned");
        let abandoned = scratch.0.join(".base.partial-1-0");
        fs::create_dir(&abandoned).unwrap();
        fs::write(abandoned.join(STATE), "half").unwrap();
        let target = scratch.0.join("base");
        let alive = Staging::begin(&target).unwrap();
        assert!(!abandoned.exists());
        save(&target, "new").unwrap();
        assert!(alive.path(".").exists(), "another save of this process was taken away");
    }

    #[test]
    fn directories_with_other_things_are_never_replaced() {
        let scratch = Scratch::new("foreign");
        fs::write(scratch.0.join("thesis.txt"), "years of work").unwrap();
        let refusal = save(&scratch.0, "new").unwrap_err().to_string();
        assert!(refusal.contains("thesis.txt"), "{refusal}");
        let refusal = save(&scratch.0.join("thesis.txt"), "new").unwrap_err().to_string();
        assert!(refusal.contains("not a directory"), "{refusal}");
        for path in ["/", "..", "."] {
            assert!(save(Path::new(path), "new").is_err());
        }
        assert_eq!(scratch.names(), ["thesis.txt"]);
    }
}

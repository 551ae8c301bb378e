//! The directory of a snapshot: written beside its place, and put there whole, by one rename.
//!
//! So a process that is killed, or a disk that is full, leaves what was there before, and at most
//! a directory `.NAME.partial-…` that nobody takes for a snapshot. The next save to the same
//! place removes it.

use std::fs::{self, File};
use std::io::{self, Write};
use std::os::fd::AsFd;
use std::os::unix::fs::{MetadataExt, OpenOptionsExt};
use std::path::{self, Path, PathBuf};
use std::sync::atomic::{AtomicU32, Ordering};

use rustix::fs::{
    AtFlags, CWD, Dir, Mode, OFlags, RenameFlags, openat, renameat, renameat_with, unlinkat,
};
use thiserror::Error as ThisError;

use crate::disk::BELOW;
use crate::file_lock::{Locked, LockedFile};
use crate::random::random;

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
    let numbered = |name: &str, prefix: &str| {
        name.strip_prefix(prefix).is_some_and(|rest| {
            !rest.is_empty() && rest.len() <= 4 && rest.bytes().all(|byte| byte.is_ascii_digit())
        })
    };
    // The part of one that is being written, or was when its process was killed.
    let part = name.strip_prefix(WRITTEN).and_then(|rest| rest.strip_prefix('.'));
    let is_part =
        part.is_some_and(|hex| hex.len() == 32 && hex.bytes().all(|byte| byte.is_ascii_hexdigit()));
    let is_disk = numbered(name.strip_suffix(BELOW).unwrap_or(name), "disk-");
    name == STATE || name == WRITTEN || is_part || numbered(name, "memory-") || is_disk
}

/// A snapshot's directory, kept open: another may take its path, and what is read has to be all
/// of one.
#[derive(Debug)]
pub(super) struct OpenDirectory {
    /// Absolute, so that it means the same when the process goes elsewhere.
    pub(super) path: PathBuf,
    directory: File,
}

impl OpenDirectory {
    pub(super) fn open(path: &Path) -> io::Result<Self> {
        let directory = open_directory(CWD, path, OFlags::empty())?;
        Ok(Self { path: path::absolute(path)?, directory })
    }

    /// Opens a file in it for reading. Whoever wrote the snapshot may have put a link there, to a
    /// file that is not theirs to show, or what is no file.
    pub(super) fn file(&self, name: &str) -> io::Result<File> {
        let flags = OFlags::RDONLY | OFlags::CLOEXEC | OFlags::NOFOLLOW | OFlags::NONBLOCK;
        let file = match openat(&self.directory, name, flags, Mode::empty()) {
            Err(rustix::io::Errno::LOOP) => return Err(no_file("a symbolic link")),
            opened => File::from(opened?),
        };
        match file.metadata()?.is_file() {
            true => Ok(file),
            false => Err(no_file("not a regular file")),
        }
    }

    /// The directory, opened once more: a lock on it is another one.
    pub(super) fn reopen(&self) -> io::Result<File> {
        reopen(&self.directory)
    }

    /// Puts a file into it whole, or not at all, whatever has its path by now.
    pub(super) fn replace_file(&self, name: &str, bytes: &[u8]) -> io::Result<()> {
        let part = format!("{name}.{:032x}", u128::from_ne_bytes(random()?));
        let flags = OFlags::WRONLY | OFlags::CREATE | OFlags::EXCL | OFlags::CLOEXEC;
        let file = openat(&self.directory, &part, flags, Mode::RUSR | Mode::WUSR)?;
        let renamed = File::from(file)
            .write_all(bytes)
            .and_then(|()| Ok(renameat(&self.directory, &part, &self.directory, name)?));
        if renamed.is_err() {
            let _ = unlinkat(&self.directory, &part, AtFlags::empty());
        }
        renamed
    }

    /// Removes what there is of the snapshot, whatever has its path by now; and its directory, where it has no others.
    pub(super) fn remove(&self) {
        remove_files(&self.directory);
        // Another one that took the path is not empty.
        let _ = fs::remove_dir(&self.path);
    }

    /// Whether the path still leads here. As it is open, no other directory looks the same.
    pub(super) fn is_in_place(&self) -> bool {
        let identity = |metadata: fs::Metadata| (metadata.dev(), metadata.ino());
        let there = fs::metadata(&self.path).map(identity);
        let here = self.directory.metadata().map(identity);
        matches!((there, here), (Ok(there), Ok(here)) if there == here)
    }
}

fn no_file(what: &'static str) -> io::Error {
    io::Error::new(io::ErrorKind::InvalidInput, what)
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
    /// As it was named, and absolute.
    place: PathBuf,
    /// The same without links.
    target: PathBuf,
    path: PathBuf,
    /// Locked: a directory whose lock is free is of a process that is gone.
    directory: LockedFile,
}

impl Staging {
    /// Begins a directory beside `target`, in the same file system.
    pub(crate) fn begin(target: &Path) -> Result<Self, DirectoryError> {
        let no_name = || DirectoryError::Name { path: target.to_owned() };
        let name = target.file_name().and_then(|name| name.to_str()).ok_or_else(no_name)?;
        check_target(target)?;
        let place = path::absolute(target).map_err(DirectoryError::io("find", target))?;
        // Where a link leads: a rename would take the link itself for what is to be replaced.
        let linked = match fs::canonicalize(target) {
            Err(source) if target.is_symlink() => {
                let path = target.to_owned();
                return Err(DirectoryError::Io { attempt: "follow the link", path, source });
            }
            linked => linked.ok(),
        };
        // As long as that takes the process may go elsewhere.
        let target = linked.as_deref().unwrap_or(&place);
        let name = target.file_name().and_then(|name| name.to_str()).unwrap_or(name);
        let parent = parent(target);
        remove_abandoned(parent, name);
        loop {
            static COUNT: AtomicU32 = AtomicU32::new(0);
            let count = COUNT.fetch_add(1, Ordering::Relaxed);
            let path = parent.join(format!(".{name}.partial-{}-{count}", std::process::id()));
            fs::create_dir(&path).map_err(DirectoryError::io("create", &path))?;
            match lock_new(&path) {
                Ok(Some(directory)) => {
                    let target = target.to_owned();
                    return Ok(Self { place, target, path, directory });
                }
                // Another save of this name took it for abandoned: it finds the next one locked.
                Ok(None) => {}
                Err(source) => {
                    let _ = fs::remove_dir(&path);
                    return Err(DirectoryError::Io { attempt: "open", path, source });
                }
            }
        }
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

    /// The directory, as it is found in its place from the [`commit`](Self::commit) on.
    pub(super) fn open(&self) -> Result<OpenDirectory, DirectoryError> {
        let directory = reopen(&self.directory).map_err(DirectoryError::io("open", &self.path))?;
        Ok(OpenDirectory { path: self.place.clone(), directory })
    }

    /// Puts the directory into its place, and with `sync` on the disk before. A snapshot that was
    /// there is gone afterwards; where this fails, it is as it was, unless it is the last sync that
    /// fails where a file system cannot exchange two directories.
    pub(crate) fn commit(self, sync: bool) -> Result<(), DirectoryError> {
        let target = self.target.clone();
        // Nothing is opened any more once the place is another's.
        let parent = match sync {
            true => {
                self.sync().map_err(DirectoryError::io("sync", &self.path))?;
                let parent = parent(&target);
                Some(File::open(parent).map_err(DirectoryError::io("open", parent))?)
            }
            false => None,
        };
        check_target(&target)?;
        self.exchange(&target)?;
        match parent.map_or(Ok(()), |parent| parent.sync_all()) {
            Ok(()) => Ok(()),
            Err(error) => {
                let _ = self.exchange_back(&target);
                Err(DirectoryError::io("sync", &target)(error))
            }
        }
    }

    /// Comes to the place; what was there comes to where this was, and goes when `self` does.
    fn exchange(&self, target: &Path) -> Result<(), DirectoryError> {
        let rename = |flags| renameat_with(CWD, &self.path, CWD, target, flags);
        let exchanged = match rename(RenameFlags::EXCHANGE) {
            // Nothing is there yet; or there is by now, by another save.
            Err(rustix::io::Errno::NOENT) => match rename(RenameFlags::empty()) {
                Err(rustix::io::Errno::NOTEMPTY | rustix::io::Errno::EXIST) => {
                    rename(RenameFlags::EXCHANGE)
                }
                renamed => renamed,
            },
            exchanged => exchanged,
        };
        match exchanged {
            Ok(()) => Ok(()),
            // The file system cannot exchange.
            Err(rustix::io::Errno::INVAL | rustix::io::Errno::NOSYS) => {
                let _ = fs::remove_dir(target);
                let mut aside = self.path.clone().into_os_string();
                aside.push("-old");
                let aside = PathBuf::from(aside);
                let had = fs::rename(target, &aside).is_ok();
                let renamed = fs::rename(&self.path, target);
                if had {
                    // To where what was there goes; or back, where that failed.
                    let _ = fs::rename(&aside, if renamed.is_ok() { &self.path } else { target });
                }
                renamed.map_err(DirectoryError::io("create", target))
            }
            Err(errno) => Err(DirectoryError::io("replace", target)(errno.into())),
        }
    }

    /// What was there comes to its place again, or nothing, and this goes.
    fn exchange_back(&self, target: &Path) -> io::Result<()> {
        match renameat_with(CWD, target, CWD, &self.path, RenameFlags::EXCHANGE) {
            Err(rustix::io::Errno::NOENT) => fs::rename(target, &self.path),
            exchanged => Ok(exchanged?),
        }
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
    if let Ok(directory) = open_directory(CWD, path, OFlags::empty()) {
        remove_files(&directory);
        let _ = fs::remove_dir(path);
    }
}

fn remove_files(directory: &File) {
    // Without its state it is no snapshot any more, however far the rest comes.
    let _ = unlinkat(directory, STATE, AtFlags::empty());
    let Ok(entries) = Dir::read_from(directory) else { return };
    for entry in entries.flatten() {
        if entry.file_name().to_str().is_ok_and(is_known) {
            let _ = unlinkat(directory, entry.file_name(), AtFlags::empty());
        }
    }
}

fn reopen(directory: &File) -> io::Result<File> {
    open_directory(directory, Path::new("."), OFlags::empty())
}

fn open_directory(at: impl AsFd, path: &Path, more: OFlags) -> io::Result<File> {
    let flags = OFlags::RDONLY | OFlags::DIRECTORY | OFlags::CLOEXEC | more;
    Ok(openat(at, path, flags, Mode::empty())?.into())
}

/// Opens and locks a directory that was just made; `None` where it was removed before.
pub(super) fn lock_new(path: &Path) -> io::Result<Option<LockedFile>> {
    let directory = match File::open(path) {
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(None),
        opened => opened?,
    };
    match LockedFile::exclusive_now(directory)? {
        Locked::Ours(directory) | Locked::NoLocks(directory) => {
            Ok((directory.metadata()?.nlink() > 0).then_some(directory))
        }
        Locked::Taken => Ok(None),
    }
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
        let name = match entry {
            Ok(entry) => entry.file_name(),
            // Another save has replaced it meanwhile.
            Err(error) if error.kind() == io::ErrorKind::NotFound => return check_target(target),
            Err(error) => return Err(DirectoryError::io("read", target)(error)),
        };
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
        remove_unlocked(&entry.path());
    }
}

/// Removes a directory that nobody has locked, as [`remove_snapshot`] does.
pub(super) fn remove_unlocked(path: &Path) {
    // In a folder of many anybody may give such a name to a link to a snapshot, or to a FIFO.
    let Ok(directory) = open_directory(CWD, path, OFlags::NOFOLLOW) else { return };
    if let Ok(Locked::Ours(directory)) = LockedFile::exclusive_now(directory) {
        remove_files(&directory);
        let _ = fs::remove_dir(path);
    }
}

#[cfg(test)]
mod tests;

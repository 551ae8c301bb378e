//! Root file systems that were made before, by their content.
//!
//! A file gets its name when it is whole and on the disk; its maker holds the lock of that name, so that of
//! several processes one makes it and the others wait. Whoever uses a file has it locked too, shared, so that
//! nobody removes what is used.

use std::fs::{self, DirBuilder, File, OpenOptions};
use std::io;
use std::os::unix::fs::{DirBuilderExt, FileExt, MetadataExt, OpenOptionsExt};
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::thread;
use std::time::Duration;

use rustix::fs::{Timespec, Timestamps, UTIME_NOW, UTIME_OMIT, futimens};

use super::ImageError;
use super::rootfs::is_whole;
use crate::error::Error;
use crate::file_lock::{Locked, LockedFile};

/// How often is looked whether another process is done.
const LOCK_POLL: Duration = Duration::from_millis(20);

/// A directory with root file systems of images, for any number of processes at once.
///
/// Each is there once, whichever images and tags have it, under the digests of its layers. Nothing
/// is removed by itself: see [`evict`](Self::evict). Clones are of the same cache.
#[derive(Clone, Debug)]
pub struct ImageCache {
    directory: Arc<Path>,
}

/// A kind of file that the cache has.
#[derive(Clone, Copy, Debug)]
pub(super) enum Shelf {
    Roots,
    #[cfg(feature = "registry")]
    Blobs,
}

/// A file of the cache that is in use.
#[derive(Clone, Debug)]
pub(super) struct Cached {
    pub(super) path: PathBuf,
    /// Locked, shared.
    pub(super) file: Arc<LockedFile>,
}

/// A name that nobody else makes a file for now.
#[derive(Debug)]
pub(super) struct Reserved {
    place: PathBuf,
    partial: PathBuf,
    file: File,
    /// Locked while the file is made.
    _lock: LockedFile,
    is_done: bool,
}

impl Shelf {
    fn name(self) -> &'static str {
        match self {
            Self::Roots => "roots",
            #[cfg(feature = "registry")]
            Self::Blobs => "blobs",
        }
    }
}

const SHELVES: &[&str] = &["roots", "blobs"];
const LOCKS: &str = "locks";
const PARTIAL: &str = "partial";

impl ImageCache {
    /// The cache in this directory, which is made where it is not there, for this user alone. It has to be on
    /// a file system of its host that has locks (flock). Some 0.1 ms.
    ///
    /// # Errors
    ///
    /// [`ErrorKind::File`](crate::ErrorKind::File) where it cannot be made.
    pub fn open(directory: impl AsRef<Path>) -> Result<Self, Error> {
        let directory = directory.as_ref();
        let fault = ImageError::cache;
        let directory = std::path::absolute(directory).map_err(fault(directory))?;
        for name in SHELVES.iter().chain(&[LOCKS, PARTIAL]) {
            let path = directory.join(name);
            let made = DirBuilder::new().recursive(true).mode(0o700).create(&path);
            made.map_err(fault(&path))?;
        }
        Ok(Self { directory: directory.into() })
    }

    /// Where it is.
    pub fn directory(&self) -> &Path {
        &self.directory
    }

    /// The room that it takes on its disk, in bytes.
    ///
    /// # Errors
    ///
    /// [`ErrorKind::File`](crate::ErrorKind::File) where it cannot be read.
    pub fn used_bytes(&self) -> Result<u64, Error> {
        Ok(self.files()?.iter().map(|file| file.bytes).sum())
    }

    /// Removes what was not used for longest, until no more than `keep_bytes` of room are taken, and what
    /// processes that ended left half-made. What is in use stays: by an [`Image`](crate::Image) or a VM of any process.
    /// What sleeps in files is not asked: a session that is suspended, a snapshot and a template do not wake without
    /// the root file systems that they stand on. Have an [`Image`](crate::Image) of each of those open meanwhile.
    /// Returns how many bytes that freed. It blocks, for as long as the removing of files takes.
    ///
    /// # Errors
    ///
    /// [`ErrorKind::File`](crate::ErrorKind::File) where it cannot be read or written.
    pub fn evict(&self, keep_bytes: u64) -> Result<u64, Error> {
        let mut files = self.files()?;
        files.sort_by_key(|file| (!file.is_partial, file.used));
        let mut taken: u64 = files.iter().map(|file| file.bytes).sum();
        let mut freed = 0;
        for file in files {
            if !file.is_partial && taken <= keep_bytes {
                break;
            }
            if remove_unused(&self.directory, &file).map_err(ImageError::cache(&file.path))? {
                taken -= file.bytes;
                freed += file.bytes;
            }
        }
        Ok(freed)
    }

    /// A file that is there, and whole.
    pub(super) fn find(&self, shelf: Shelf, name: &str) -> Result<Option<Cached>, ImageError> {
        let path = self.directory.join(shelf.name()).join(name);
        let found = find(&path, shelf).map_err(ImageError::cache(&path))?;
        Ok(found.map(|file| Cached { path, file: Arc::new(file) }))
    }

    /// Waits until nobody makes this file, and has it found or lets it be made. `wait` is asked now and then
    /// whether to go on waiting.
    pub(super) fn reserve(
        &self,
        shelf: Shelf,
        name: &str,
        mut wait: impl FnMut() -> Result<(), ImageError>,
    ) -> Result<Result<Cached, Reserved>, ImageError> {
        loop {
            if let Some(found) = self.find(shelf, name)? {
                return Ok(Ok(found));
            }
            let lock_path = self.directory.join(LOCKS).join(format!("{}-{name}", shelf.name()));
            let fault = || ImageError::cache(&lock_path);
            let Some(lock) = lock(&lock_path).map_err(fault())? else {
                wait()?;
                thread::sleep(LOCK_POLL);
                continue;
            };
            // Whoever had the lock may have made it.
            if let Some(found) = self.find(shelf, name)? {
                return Ok(Ok(found));
            }
            let partial = self.directory.join(PARTIAL).join(format!("{}-{name}", shelf.name()));
            let file = create(&partial).map_err(ImageError::cache(&partial))?;
            let place = self.directory.join(shelf.name()).join(name);
            return Ok(Err(Reserved { place, partial, file, _lock: lock, is_done: false }));
        }
    }

    fn files(&self) -> Result<Vec<OnShelf>, ImageError> {
        let mut files = Vec::new();
        for shelf in SHELVES.iter().chain(&[PARTIAL]) {
            let directory = self.directory.join(shelf);
            let list = || -> io::Result<Vec<OnShelf>> {
                let mut list = Vec::new();
                for entry in fs::read_dir(&directory)? {
                    let entry = entry?;
                    let metadata = match entry.metadata() {
                        Err(error) if error.kind() == io::ErrorKind::NotFound => continue,
                        metadata => metadata?,
                    };
                    list.push(OnShelf {
                        path: entry.path(),
                        bytes: metadata.blocks() * 512,
                        used: (metadata.atime(), metadata.atime_nsec()),
                        is_partial: *shelf == PARTIAL,
                    });
                }
                Ok(list)
            };
            files.extend(list().map_err(ImageError::cache(&directory))?);
        }
        Ok(files)
    }
}

struct OnShelf {
    path: PathBuf,
    bytes: u64,
    used: (i64, i64),
    is_partial: bool,
}

impl Reserved {
    /// The file to write.
    pub(super) fn file(&self) -> io::Result<File> {
        self.file.try_clone()
    }

    /// Gives the file its name, when it is on the disk.
    pub(super) fn commit(mut self, shelf: Shelf) -> Result<Cached, ImageError> {
        let commit = || -> io::Result<()> {
            self.file.sync_all()?;
            fs::rename(&self.partial, &self.place)?;
            match self.place.parent() {
                Some(parent) => File::open(parent)?.sync_all(),
                None => Ok(()),
            }
        };
        commit().map_err(ImageError::cache(&self.place))?;
        self.is_done = true;
        // While the lock of its name is held: nobody removes what has no user yet.
        let found = find(&self.place, shelf).map_err(ImageError::cache(&self.place))?;
        let path = self.place.clone();
        match found {
            Some(file) => Ok(Cached { path, file: Arc::new(file) }),
            None => Err(ImageError::Cache { path, source: io::ErrorKind::NotFound.into() }),
        }
    }
}

impl Drop for Reserved {
    fn drop(&mut self) {
        if !self.is_done {
            let _ = fs::remove_file(&self.partial);
        }
    }
}

/// A new file, in place of what somebody left who has not the lock any more.
fn create(path: &Path) -> io::Result<File> {
    match fs::remove_file(path) {
        Err(error) if error.kind() != io::ErrorKind::NotFound => return Err(error),
        _ => {}
    }
    OpenOptions::new().read(true).write(true).create_new(true).mode(0o600).open(path)
}

/// The lock of a name, unless another has it.
fn lock(path: &Path) -> io::Result<Option<LockedFile>> {
    let file =
        OpenOptions::new().write(true).create(true).truncate(false).mode(0o600).open(path)?;
    match LockedFile::exclusive_now(file)? {
        Locked::Ours(file) => Ok(is_at(&file, path)?.then_some(file)),
        Locked::Taken => Ok(None),
        Locked::NoLocks(_) => Err(io::ErrorKind::Unsupported.into()),
    }
}

/// Whether a path leads to this file, and to no other that took its name.
fn is_at(file: &File, path: &Path) -> io::Result<bool> {
    let (open, there) = (file.metadata()?, fs::symlink_metadata(path));
    match there {
        Ok(there) => Ok((open.dev(), open.ino()) == (there.dev(), there.ino())),
        Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(false),
        Err(error) => Err(error),
    }
}

fn find(path: &Path, shelf: Shelf) -> io::Result<Option<LockedFile>> {
    let flags = libc::O_NOFOLLOW | libc::O_NONBLOCK;
    let file = match OpenOptions::new().read(true).custom_flags(flags).open(path) {
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(None),
        file => file?,
    };
    // Only who removes it has it locked otherwise, and not for long.
    let file = LockedFile::wait_shared(file)?;
    if !is_at(&file, path)? {
        return Ok(None);
    }
    // Where a disk lost what it had promised to keep, whoever makes it anew puts it in this one's place.
    if matches!(shelf, Shelf::Roots) && !is_root(&file)? {
        return Ok(None);
    }
    // The order of eviction. The time of the change stays: snapshots know the disk by it.
    let now = Timespec { tv_sec: 0, tv_nsec: UTIME_NOW };
    let same = Timespec { tv_sec: 0, tv_nsec: UTIME_OMIT };
    let _ = futimens(&*file, &Timestamps { last_access: now, last_modification: same });
    Ok(Some(file))
}

fn is_root(file: &File) -> io::Result<bool> {
    let mut head = [0; 2048];
    match file.read_exact_at(&mut head, 0) {
        Err(error) if error.kind() == io::ErrorKind::UnexpectedEof => Ok(false),
        read => {
            read?;
            Ok(is_whole(&head, file.metadata()?.len()))
        }
    }
}

/// Removes a file that nobody has locked, and then the lock of its name.
fn remove_unused(directory: &Path, file: &OnShelf) -> io::Result<bool> {
    let (Some(name), Some(shelf)) = (file.path.file_name(), file.path.parent()) else {
        return Ok(false);
    };
    let lock_name = match (file.is_partial, shelf.file_name()) {
        (true, _) | (_, None) => name.to_owned(),
        (false, Some(shelf)) => {
            let mut lock_name = shelf.to_owned();
            lock_name.push("-");
            lock_name.push(name);
            lock_name
        }
    };
    let lock_path = directory.join(LOCKS).join(lock_name);
    let Some(_lock) = lock(&lock_path)? else {
        return Ok(false);
    };
    let opened = match File::open(&file.path) {
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(true),
        opened => opened?,
    };
    let _unused = match LockedFile::exclusive_now(opened)? {
        Locked::Ours(file) => file,
        Locked::Taken => return Ok(false),
        Locked::NoLocks(_) => return Err(io::ErrorKind::Unsupported.into()),
    };
    fs::remove_file(&file.path)?;
    fs::remove_file(&lock_path)?;
    Ok(true)
}

#[cfg(test)]
mod tests;

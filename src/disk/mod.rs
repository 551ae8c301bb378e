//! What backs a disk: a file or a block device of the host, alone or under deltas.
//!
//! It is a stack: the file; frozen deltas, which many VMs may share as they share the file then;
//! and at most one delta of this VM alone, which takes what the guest writes.
//!
//! It says where bytes are, and never moves them itself: the device does, at once from the page
//! cache or through the process's I/O queue. Files are locked (flock) for as long as they are
//! open: two VMs that write to one disk destroy it.

mod checksums;
mod copy;
mod delta;
mod error;
mod extents;
#[cfg(fuzzing)]
pub(crate) mod fuzzing;
mod progress;
mod saved;

use std::collections::VecDeque;
use std::fs::{File, Metadata};
use std::io::{Seek, SeekFrom};
use std::os::unix::fs::{FileTypeExt, MetadataExt, OpenOptionsExt};
use std::path::{Path, PathBuf};
use std::sync::Arc;

use rustix::fs::{OFlags, fcntl_getfl, fcntl_setfl};
use smallvec::SmallVec;

pub(crate) use self::checksums::Checksums;
pub(crate) use self::copy::{copy_file, write_sparse};
use self::delta::Delta;
pub(crate) use self::error::DiskError;
pub(crate) use self::extents::Extents;
pub(crate) use self::progress::Progress;
pub(crate) use self::saved::{BELOW, SavedDisk};
use crate::config::{BlockConfig, FileFacts, Writes};
use crate::file_lock::{Locked, LockedFile};
use crate::memory::{Clear, GuestBytes, Transfer};

/// The unit of a disk's size, and of what a delta remembers.
pub(crate) const SECTOR_BYTES: u64 = 512;
/// What a request has to be a multiple of, and aligned to, to go past the page cache.
const DIRECT_ALIGNMENT: u64 = 4096;

/// A delta keeps a table in memory, of 32 MiB for such a disk; and a file of 8 EiB may be all hole.
const MAX_BYTES_WITH_DELTA: u64 = 64 << 40;

/// An open disk.
#[derive(Debug)]
pub(crate) struct Disk {
    path: PathBuf,
    /// What the file was when it was opened.
    facts: FileFacts,
    file: Arc<LockedFile>,
    /// The same file past the page cache. The lock is the other's.
    direct: Option<Arc<LockedFile>>,
    /// Of others too, the lowest first.
    frozen: Vec<Delta>,
    /// Of this VM alone.
    delta: Option<Delta>,
    sectors: u64,
    read_only: bool,
    change: Change,
}

/// Whether others see that the guest has written to a disk: by the time of a change, which a flush has to bring to the
/// host's own disk once.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Change {
    None,
    Unknown,
    Known,
}

/// A part of a request: bytes of guest RAM, and where they are on the host.
pub(crate) struct Part<'a, 'ram> {
    pub(crate) file: &'a Arc<LockedFile>,
    pub(crate) offset: u64,
    pub(crate) bytes: GuestBytes<'ram>,
    /// Whether the page cache is asked first.
    pub(crate) cached: bool,
    /// The file that has the lock, where `file` is another way to the same.
    pub(crate) locked: Option<&'a Arc<LockedFile>>,
}

/// The parts of a request, in order. Without a delta there is one.
pub(crate) type Parts<'a, 'ram> = SmallVec<[Part<'a, 'ram>; 1]>;

/// A flush under way: groups of operations, each begun when those before it have ended.
#[derive(Debug)]
pub(crate) struct Flush {
    stages: VecDeque<Vec<Transfer>>,
    /// What has to be written again where it fails.
    dirty: Vec<usize>,
}

impl Flush {
    /// The operations that are next, when those before have ended.
    pub(crate) fn next_stage(&mut self) -> Option<Vec<Transfer>> {
        self.stages.pop_front()
    }
}

/// Bytes in a row that one delta has, or where there is none, the file.
struct Piece<'a> {
    len: u64,
    delta: Option<&'a Delta>,
}

/// Finds the pieces of a range in these deltas, the highest of which comes first, and in the file.
fn cut<'a>(deltas: &[&'a Delta], offset: u64, len: u64, pieces: &mut Vec<Piece<'a>>) {
    let Some((top, below)) = deltas.split_first() else {
        return pieces.push(Piece { len, delta: None });
    };
    let mut at = offset;
    for run in top.runs(offset, len) {
        match run.written {
            true => pieces.push(Piece { len: run.len, delta: Some(top) }),
            false => cut(below, at, run.len, pieces),
        }
        at += run.len;
    }
}

impl Disk {
    /// Opens and locks the files of a disk. A delta that is not there is created.
    pub(crate) fn open(config: &BlockConfig) -> Result<Self, DiskError> {
        let path = &config.path;
        let read_only = config.writes == Writes::Refused;
        let writable = config.writes == Writes::ToDisk;
        let file = open(path, writable, 0).map_err(|error| match error {
            DiskError::Open { path, source } if config.expected.is_some() => {
                DiskError::of_known(&path, source)
            }
            error => error,
        })?;
        let metadata =
            file.metadata().map_err(|source| DiskError::Open { path: path.clone(), source })?;
        let kind = metadata.file_type();
        if !kind.is_file() && !kind.is_block_device() {
            return Err(DiskError::Kind { path: path.clone() });
        }
        let file = lock(file, path, writable)?;
        let direct = match config.direct {
            true => Some(Arc::new(open(path, writable, libc::O_DIRECT)?.into())),
            false => None,
        };
        let end = (&*file).seek(SeekFrom::End(0));
        let bytes = end.map_err(|source| DiskError::Open { path: path.clone(), source })?;
        let sectors = bytes / SECTOR_BYTES;
        let facts = facts(&metadata, bytes);
        if let Some(expected) = &config.expected {
            compare(path, expected, &facts)?;
        }
        let has_deltas = !config.frozen.is_empty()
            || matches!(config.writes, Writes::ToDelta(_) | Writes::Discarded);
        if has_deltas && bytes > MAX_BYTES_WITH_DELTA {
            return Err(DiskError::TooLarge { path: path.clone(), bytes });
        }
        let frozen = config.frozen.iter().map(|delta| Delta::open_frozen(delta, path, sectors));
        let frozen = frozen.collect::<Result<_, _>>()?;
        let delta = match &config.writes {
            Writes::ToDisk | Writes::Refused => None,
            Writes::ToDelta(delta) => Some(Delta::open(delta, path, sectors)?),
            Writes::Discarded => Some(Delta::temporary(sectors)?),
        };
        let (path, file) = (path.clone(), Arc::new(file));
        let change = Change::None;
        Ok(Self { path, facts, file, direct, frozen, delta, sectors, read_only, change })
    }

    pub(crate) fn sectors(&self) -> u64 {
        self.sectors
    }

    pub(crate) fn is_read_only(&self) -> bool {
        self.read_only
    }

    /// Where the bytes that are to be read are; none where they are in more than so many pieces.
    pub(crate) fn read<'ram>(
        &self,
        offset: u64,
        bytes: GuestBytes<'ram>,
        max: usize,
    ) -> Option<Parts<'_, 'ram>> {
        let mut parts = Parts::new();
        if !self.has_deltas() {
            parts.push(self.part(offset, bytes));
            return Some(parts);
        }
        let mut rest = bytes;
        let mut at = offset;
        let pieces = self.pieces(offset, rest.len());
        if pieces.len() > max {
            return None;
        }
        for piece in pieces {
            let Some((bytes, others)) = rest.split_at(piece.len) else { break };
            parts.push(match piece.delta {
                Some(delta) => delta.part(at, bytes),
                None => self.part(at, bytes),
            });
            at += piece.len;
            rest = others;
        }
        Some(parts)
    }

    fn has_deltas(&self) -> bool {
        self.delta.is_some() || !self.frozen.is_empty()
    }

    /// The deltas, the highest first.
    fn deltas(&self) -> SmallVec<[&Delta; 4]> {
        self.delta.iter().chain(self.frozen.iter().rev()).collect()
    }

    /// Cuts a range of whole sectors where it goes on in another delta, or in the file.
    fn pieces(&self, offset: u64, len: u64) -> Vec<Piece<'_>> {
        let mut pieces = Vec::new();
        cut(&self.deltas(), offset, len, &mut pieces);
        pieces
    }

    /// Where bytes are to be written. [`written`](Self::written) follows when they were.
    pub(crate) fn write<'ram>(&self, offset: u64, bytes: GuestBytes<'ram>) -> Part<'_, 'ram> {
        match &self.delta {
            Some(delta) => delta.part(offset, bytes),
            None => self.part(offset, bytes),
        }
    }

    /// Clears a range. [`written`](Self::written) follows when it was.
    pub(crate) fn clear(&self, offset: u64, len: u64, clear: Clear) -> Transfer {
        match (&self.delta, clear) {
            // What a delta is said to have is read from it, so it has to be zeros.
            (Some(delta), Clear::Discard) => delta.clear(offset, len, Clear::Unmap),
            (Some(delta), clear) => delta.clear(offset, len, clear),
            (None, clear) => Transfer::clear(&self.file, offset, len, clear),
        }
    }

    /// The range has its new content.
    pub(crate) fn written(&mut self, offset: u64, len: u64) {
        if self.change == Change::None {
            self.change = Change::Unknown;
        }
        if let Some(delta) = &mut self.delta {
            delta.mark(offset, len);
        }
    }

    /// What makes everything lasting that was [`written`](Self::written) by now. One flush at a
    /// time.
    pub(crate) fn flush(&mut self) -> Flush {
        // After a power cut its files may be new and their times old: nobody would see that a VM that sleeps there
        // has other disks by now. So the first change goes together with its time.
        let sync = match self.change {
            Change::Unknown => Transfer::sync,
            Change::None | Change::Known => Transfer::data_sync,
        };
        if self.change == Change::Unknown {
            self.change = Change::Known;
        }
        match &mut self.delta {
            Some(delta) => delta.flush(sync),
            None => Flush { stages: VecDeque::from([vec![sync(&self.file)]]), dirty: Vec::new() },
        }
    }

    /// A flush failed: what it took on is for the next one.
    pub(crate) fn flush_failed(&mut self, flush: &Flush) {
        if self.change == Change::Known {
            self.change = Change::Unknown;
        }
        if let Some(delta) = &mut self.delta {
            delta.mark_dirty(&flush.dirty);
        }
    }

    fn part<'ram>(&self, offset: u64, bytes: GuestBytes<'ram>) -> Part<'_, 'ram> {
        let aligned =
            offset.is_multiple_of(DIRECT_ALIGNMENT) && bytes.is_aligned(DIRECT_ALIGNMENT as usize);
        match &self.direct {
            Some(file) if aligned => {
                Part { file, offset, bytes, cached: false, locked: Some(&self.file) }
            }
            _ => Part { file: &self.file, offset, bytes, cached: true, locked: None },
        }
    }
}

/// Whether there is a delta at this path that somebody has written to.
pub(crate) fn is_used_delta(path: &Path) -> bool {
    Delta::is_used(path)
}

fn open(path: &Path, writable: bool, flags: i32) -> Result<File, DiskError> {
    let open = |flags| {
        // O_NONBLOCK: a FIFO would be waited for.
        let mut options = File::options();
        options.read(true).write(writable).custom_flags(flags | libc::O_NONBLOCK).open(path)
    };
    // A guest's reads are no business of the file's time of access. Only its owner may say so.
    let opened = open(flags | libc::O_NOATIME).or_else(|error| match error.raw_os_error() {
        Some(libc::EPERM) => open(flags),
        _ => Err(error),
    });
    // An io_uring takes a file with O_NONBLOCK for one that never blocks, and reads it on the thread that submits:
    // the device thread, whatever its file system has to wait for.
    let opened = opened.and_then(|file| {
        fcntl_setfl(&file, fcntl_getfl(&file)? - OFlags::NONBLOCK)?;
        Ok(file)
    });
    opened.map_err(|source| match source.raw_os_error() {
        Some(libc::EINVAL) if flags & libc::O_DIRECT != 0 => {
            DiskError::NoDirect { path: path.to_owned() }
        }
        _ => DiskError::Open { path: path.to_owned(), source },
    })
}

/// Keeps others from writing to a file, or from using it at all where we write to it.
fn lock(file: File, path: &Path, writable: bool) -> Result<LockedFile, DiskError> {
    let locked = if writable { LockedFile::exclusive(file) } else { LockedFile::shared(file) };
    match locked {
        Ok(Locked::Ours(file) | Locked::NoLocks(file)) => Ok(file),
        Ok(Locked::Taken) => Err(DiskError::InUse { path: path.to_owned() }),
        Err(source) => Err(DiskError::Open { path: path.to_owned(), source }),
    }
}

/// What an open file is recognised by.
fn facts(metadata: &Metadata, bytes: u64) -> FileFacts {
    // The node of a block device says nothing about what is on the device.
    let is_file = metadata.is_file();
    FileFacts {
        bytes,
        modified: is_file.then(|| (metadata.mtime(), metadata.mtime_nsec())),
        inode: is_file.then(|| metadata.ino()),
    }
}

/// Refuses a file that is another one than it was, as far as that was known.
fn compare(path: &Path, expected: &FileFacts, found: &FileFacts) -> Result<(), DiskError> {
    let changed = |fact, expected: String, found: String| {
        Err(DiskError::BaseChanged { path: path.to_owned(), fact, expected, found })
    };
    if expected.bytes != found.bytes {
        return changed("size in bytes", expected.bytes.to_string(), found.bytes.to_string());
    }
    if let (Some(expected), Some(found)) = (expected.modified, found.modified)
        && expected != found
    {
        let words = |(seconds, nanoseconds): (i64, i64)| format!("{seconds}.{nanoseconds:09}");
        return changed("time of modification", words(expected), words(found));
    }
    match (expected.inode, found.inode) {
        (Some(expected), Some(found)) if expected != found => {
            changed("inode", expected.to_string(), found.to_string())
        }
        _ => Ok(()),
    }
}

#[cfg(test)]
mod tests;

//! What backs a disk: a file or a block device of the host, alone or under a private delta.
//!
//! It says where bytes are, and never moves them itself: the device does, at once from the page
//! cache or through the process's I/O queue. Files are locked (flock) for as long as they are
//! open: two VMs that write to one disk destroy it.

mod delta;

use std::collections::VecDeque;
use std::fs::{File, TryLockError};
use std::io::{self, Seek, SeekFrom};
use std::os::unix::fs::{FileTypeExt, OpenOptionsExt};
use std::path::{Path, PathBuf};
use std::sync::Arc;

use smallvec::SmallVec;
use thiserror::Error as ThisError;

use self::delta::Delta;
use crate::config::{BlockConfig, Writes};
use crate::error::{Error, ErrorKind};
use crate::memory::{Clear, GuestBytes, Transfer};

/// The unit of a disk's size, and of what a delta remembers.
pub(crate) const SECTOR_BYTES: u64 = 512;
/// What a request has to be a multiple of, and aligned to, to go past the page cache.
const DIRECT_ALIGNMENT: u64 = 4096;

/// Why a disk cannot be used.
#[derive(Debug, ThisError)]
pub(crate) enum DiskError {
    #[error("cannot open the disk {}", path.display())]
    Open { path: PathBuf, source: io::Error },
    #[error("the disk {} is neither a regular file nor a block device", path.display())]
    Kind { path: PathBuf },
    #[error("the disk {} is in use, and one of its users writes to it", path.display())]
    InUse { path: PathBuf },
    #[error("the file system of {} has no direct I/O", path.display())]
    NoDirect { path: PathBuf },
    #[error("cannot create the delta {}", path.display())]
    CreateDelta { path: PathBuf, source: io::Error },
    #[error("{} is not a delta of a disk, or is damaged: {reason}", path.display())]
    NotADelta { path: PathBuf, reason: &'static str },
    #[error(
        "the delta {} is of a disk of {found} sectors, {} has {expected}",
        path.display(), base.display()
    )]
    OtherBase { path: PathBuf, base: PathBuf, found: u64, expected: u64 },
}

impl From<DiskError> for Error {
    fn from(error: DiskError) -> Self {
        let fix = match &error {
            DiskError::Open { source, .. } => match source.kind() {
                io::ErrorKind::NotFound => {
                    Some("create it first, for example with `truncate -s 1G <file>`")
                }
                io::ErrorKind::PermissionDenied | io::ErrorKind::ReadOnlyFilesystem => {
                    Some("make it readable and writable for this user, or the disk read-only")
                }
                _ => None,
            },
            DiskError::Kind { .. } => None,
            DiskError::InUse { .. } => Some(
                "end its other user, make the disk read-only for all, or give each VM a delta of \
                 its own (BlockConfig::delta, BlockConfig::discard_writes)",
            ),
            DiskError::NoDirect { .. } => Some("leave out BlockConfig::direct"),
            DiskError::CreateDelta { .. } => Some("choose a folder that this user may write to"),
            DiskError::NotADelta { .. } => {
                Some("name another file: one that does not exist yet is created")
            }
            DiskError::OtherBase { .. } => {
                Some("use the disk that the delta was made for, or a new delta")
            }
        };
        let error = Error::new(ErrorKind::Disk, error);
        match fix {
            Some(fix) => error.fix(fix),
            None => error,
        }
    }
}

/// An open disk.
#[derive(Debug)]
pub(crate) struct Disk {
    file: Arc<File>,
    /// The same file past the page cache.
    direct: Option<Arc<File>>,
    delta: Option<Delta>,
    sectors: u64,
    read_only: bool,
}

/// A part of a request: bytes of guest RAM, and where they are on the host.
pub(crate) struct Part<'a, 'ram> {
    pub(crate) file: &'a Arc<File>,
    pub(crate) offset: u64,
    pub(crate) bytes: GuestBytes<'ram>,
    /// Whether the page cache is asked first.
    pub(crate) cached: bool,
}

/// The parts of a request, in order. Without a delta there is one.
pub(crate) type Parts<'a, 'ram> = SmallVec<[Part<'a, 'ram>; 1]>;

/// A flush under way: groups of operations, each begun when those before it have ended.
#[derive(Debug, Default)]
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

impl Disk {
    /// Opens and locks the files of a disk. A delta that is not there is created.
    pub(crate) fn open(config: &BlockConfig) -> Result<Self, DiskError> {
        let path = &config.path;
        let read_only = config.writes == Writes::Refused;
        let writable = config.writes == Writes::ToDisk;
        let mut file = open(path, writable, 0)?;
        let kind = file
            .metadata()
            .map_err(|source| DiskError::Open { path: path.clone(), source })?
            .file_type();
        if !kind.is_file() && !kind.is_block_device() {
            return Err(DiskError::Kind { path: path.clone() });
        }
        lock(&file, path, writable)?;
        let direct = match config.direct {
            true => Some(Arc::new(open(path, writable, libc::O_DIRECT)?)),
            false => None,
        };
        let end = file.seek(SeekFrom::End(0));
        let sectors =
            end.map_err(|source| DiskError::Open { path: path.clone(), source })? / SECTOR_BYTES;
        let delta = match &config.writes {
            Writes::ToDisk | Writes::Refused => None,
            Writes::ToDelta(delta) => Some(Delta::open(delta, path, sectors)?),
            Writes::Discarded => Some(Delta::temporary(sectors)?),
        };
        Ok(Self { file: Arc::new(file), direct, delta, sectors, read_only })
    }

    pub(crate) fn sectors(&self) -> u64 {
        self.sectors
    }

    pub(crate) fn is_read_only(&self) -> bool {
        self.read_only
    }

    /// Where the bytes that are to be read are.
    pub(crate) fn read<'ram>(&self, offset: u64, bytes: GuestBytes<'ram>) -> Parts<'_, 'ram> {
        let mut parts = Parts::new();
        let Some(delta) = &self.delta else {
            parts.push(self.part(offset, bytes));
            return parts;
        };
        let mut rest = bytes;
        let mut at = offset;
        for run in delta.runs(offset, rest.len()) {
            let Some((bytes, others)) = rest.split_at(run.len) else { break };
            parts.push(match run.written {
                true => delta.part(at, bytes),
                false => self.part(at, bytes),
            });
            at += run.len;
            rest = others;
        }
        parts
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
        if let Some(delta) = &mut self.delta {
            delta.mark(offset, len);
        }
    }

    /// What makes everything lasting that was [`written`](Self::written) by now. One flush at a
    /// time.
    pub(crate) fn flush(&mut self) -> Flush {
        match &mut self.delta {
            Some(delta) => delta.flush(),
            None => {
                let stages = VecDeque::from([vec![Transfer::data_sync(&self.file)]]);
                Flush { stages, dirty: Vec::new() }
            }
        }
    }

    /// A flush failed: what it took on is for the next one.
    pub(crate) fn flush_failed(&mut self, flush: &Flush) {
        if let Some(delta) = &mut self.delta {
            delta.mark_dirty(&flush.dirty);
        }
    }

    fn part<'ram>(&self, offset: u64, bytes: GuestBytes<'ram>) -> Part<'_, 'ram> {
        let aligned =
            offset.is_multiple_of(DIRECT_ALIGNMENT) && bytes.is_aligned(DIRECT_ALIGNMENT as usize);
        match &self.direct {
            Some(file) if aligned => Part { file, offset, bytes, cached: false },
            _ => Part { file: &self.file, offset, bytes, cached: true },
        }
    }
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
    opened.map_err(|source| match source.raw_os_error() {
        Some(libc::EINVAL) if flags & libc::O_DIRECT != 0 => {
            DiskError::NoDirect { path: path.to_owned() }
        }
        _ => DiskError::Open { path: path.to_owned(), source },
    })
}

/// Keeps others from writing to a file, or from using it at all where we write to it.
fn lock(file: &File, path: &Path, writable: bool) -> Result<(), DiskError> {
    let locked = if writable { file.try_lock() } else { file.try_lock_shared() };
    match locked {
        Ok(()) => Ok(()),
        Err(TryLockError::WouldBlock) => Err(DiskError::InUse { path: path.to_owned() }),
        Err(TryLockError::Error(source)) if source.kind() == io::ErrorKind::Unsupported => Ok(()),
        Err(TryLockError::Error(source)) => Err(DiskError::Open { path: path.to_owned(), source }),
    }
}

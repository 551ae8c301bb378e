//! Why a disk cannot be opened, saved or checked, and what to do about it.

use std::io;
use std::path::{Path, PathBuf};

use thiserror::Error as ThisError;

use crate::error::{Error, ErrorKind};

const RAISE_LIMIT: &str = "raise the limit of a file's size (ulimit -f)";

/// Why a disk cannot be used.
#[derive(Debug, ThisError)]
pub(crate) enum DiskError {
    #[error("cannot open the disk {}", path.display())]
    Open { path: PathBuf, source: io::Error },
    #[error("the disk {} is not there", path.display())]
    NotThere { path: PathBuf },
    #[error("the delta {} is gone, which was left there for a VM that sleeps", path.display())]
    DeltaGone { path: PathBuf },
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
    #[error("the disk {} has changed: its {fact} was {expected}, and is {found}", path.display())]
    BaseChanged { path: PathBuf, fact: &'static str, expected: String, found: String },
    #[error("the disk {} has {bytes} bytes: below a delta it takes up to 64 TiB", path.display())]
    TooLarge { path: PathBuf, bytes: u64 },
    #[error("cannot save a disk as {}", path.display())]
    Save { path: PathBuf, source: io::Error },
    #[error("saving or checking a disk was interrupted")]
    Interrupted,
    #[error("cannot read the saved disk {}", path.display())]
    Verify { path: PathBuf, source: io::Error },
    #[error("the saved disk {} is damaged: {what}", path.display())]
    Damaged { path: PathBuf, what: String },
    #[error("the VM of the disk is over")]
    Over,
}

impl DiskError {
    /// Why a disk cannot be opened that was there before, or of which a copy is said to be there.
    pub(super) fn of_known(path: &Path, source: io::Error) -> Self {
        let path = path.to_owned();
        match source.kind() {
            io::ErrorKind::NotFound => Self::NotThere { path },
            _ => Self::Open { path, source },
        }
    }

    /// Why what was written over a disk cannot be found any more.
    pub(super) fn of_left_delta(path: &Path, source: io::Error) -> Self {
        match Self::of_known(path, source) {
            Self::NotThere { path } => Self::DeltaGone { path },
            error => error,
        }
    }
}

impl From<DiskError> for Error {
    fn from(error: DiskError) -> Self {
        let fix = match &error {
            DiskError::Open { source, .. } => match source.kind() {
                io::ErrorKind::NotFound => {
                    Some("name a file that is there; `truncate -s 1G <file>` makes an empty one")
                }
                io::ErrorKind::PermissionDenied | io::ErrorKind::ReadOnlyFilesystem => {
                    Some("let this user read it, and write to it unless the disk is read-only")
                }
                _ => None,
            },
            DiskError::NotThere { .. } => Some(
                "bring it back as it was, or name a copy of it with RestoreOptions::disk_base, also for the files \
                 that a session sleeps in (MicroVm::<Suspended>::open_with); unpacking an image again makes a copy \
                 of its root file system",
            ),
            DiskError::DeltaGone { .. } => {
                Some("bring it back as it was: what the guest has written is in it alone")
            }
            DiskError::Kind { .. } => None,
            DiskError::InUse { .. } => Some(
                "end its other user, make the disk read-only for all, or give each VM a delta of \
                 its own (BlockConfig::delta, BlockConfig::discard_writes)",
            ),
            DiskError::NoDirect { .. } => Some("leave out BlockConfig::direct"),
            DiskError::CreateDelta { source, .. } => match source.kind() {
                io::ErrorKind::FileTooLarge => Some(RAISE_LIMIT),
                _ => Some("choose a folder that this user may write to"),
            },
            DiskError::NotADelta { .. } => {
                Some("name another file: one that does not exist yet is created")
            }
            DiskError::OtherBase { .. } => {
                Some("use the disk that the delta was made for, or a new delta")
            }
            DiskError::BaseChanged { .. } => {
                Some("bring back the disk as it was: what lies over it is of use with that alone")
            }
            DiskError::Save { source, .. } => match source.kind() {
                io::ErrorKind::AlreadyExists => Some("choose a path where nothing is"),
                io::ErrorKind::StorageFull => Some("make room, or save it elsewhere"),
                io::ErrorKind::FileTooLarge => Some(RAISE_LIMIT),
                _ => None,
            },
            DiskError::Damaged { .. } => Some("take another snapshot"),
            DiskError::TooLarge { .. } => Some("let the guest write to the disk itself"),
            DiskError::Interrupted | DiskError::Verify { .. } | DiskError::Over => None,
        };
        let error = Error::new(ErrorKind::Disk, error);
        match fix {
            Some(fix) => error.fix(fix),
            None => error,
        }
    }
}

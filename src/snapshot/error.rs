//! Why a snapshot cannot be written, read or restored.

use std::io;
use std::path::{Path, PathBuf};

use thiserror::Error as ThisError;

use super::directory::DirectoryError;
use super::format::FormatError;
use crate::config::ConfigError;
use crate::disk::DiskError;
use crate::error::{Error, ErrorKind};
use crate::memory::MemoryError;

#[derive(Debug, ThisError)]
pub(crate) enum SnapshotError {
    #[error("cannot open {}", path.display())]
    Open { path: PathBuf, source: io::Error },
    #[error("{} is not the state of a snapshot, or is damaged", path.display())]
    State { path: PathBuf, source: FormatError },
    #[error("{} is of a machine that cannot be: {what}", path.display())]
    Impossible { path: PathBuf, what: String },
    #[error("the memory of the snapshot in {} cannot be used", directory.display())]
    Memory { directory: PathBuf, source: MemoryError },
    #[error(
        "the snapshot's disk {index} stands on {}, which is outside of its directory",
        path.display()
    )]
    OutsideDisk { index: usize, path: PathBuf },
    #[error(
        "the snapshot has a UNIX socket at {}, which is outside of its directory", path.display()
    )]
    OutsideSocket { path: PathBuf },
    #[error("the snapshot connects its network interface {index} to {what}, which is the host's")]
    OutsideNetwork { index: usize, what: String },
    #[error("the snapshot says what of the host its agent's service {name:?} is connected to")]
    OutsideService { name: String },
    #[error(
        "the snapshot's network interface {index} had a descriptor of the process that wrote it"
    )]
    NoNetwork { index: usize },
    #[error("another snapshot is in {} by now", directory.display())]
    Replaced { directory: PathBuf },
    #[error("{} is a snapshot, and no VM that was suspended", directory.display())]
    NotAsleep { directory: PathBuf },
    #[error("the VM in {} is awake: it was woken from there, and is not over", directory.display())]
    Awake { directory: PathBuf },
    #[error("a VM that wakes has the {what} that it had")]
    AsItWas { what: &'static str },
    #[error("there is no disk {index}: the snapshot has {count}, counted from 0")]
    NoDisk { index: usize, count: usize },
    #[error("disk {index} is in the snapshot, and stands on no other file that could be elsewhere")]
    NoBase { index: usize },
    #[error("disk {index} is read-only, and writes nothing to a delta")]
    ReadOnly { index: usize },
    #[error("the delta {} of disk {index} has what another VM has written", path.display())]
    UsedDelta { index: usize, path: PathBuf },
    #[error("the shell was prepared for a VM with other CPUs")]
    OtherShell,
    #[error("the save was interrupted")]
    Interrupted,
    #[error("cannot make a directory for disks in the folder for temporary files")]
    Temporary(#[source] io::Error),
    #[error("cannot read random bytes from the host")]
    Random(#[source] io::Error),
    #[error("cannot write {}", path.display())]
    Write { path: PathBuf, source: io::Error },
    #[error("the snapshot is in memory, and has no files to pack")]
    InMemory,
    #[error("cannot open {}", path.display())]
    OpenArchive { path: PathBuf, source: io::Error },
    #[error("{} is no packed snapshot, or is damaged", path.display())]
    Archive { path: PathBuf, source: ArchiveError },
    #[error("cannot save the guest's memory to {}", path.display())]
    SaveMemory { path: PathBuf, source: MemoryError },
    #[error("cannot share the guest's memory")]
    Freeze(#[source] MemoryError),
    #[error(transparent)]
    Directory(#[from] DirectoryError),
    #[error(transparent)]
    Disk(#[from] DiskError),
    #[error(transparent)]
    Config(#[from] ConfigError),
}

/// Why a file is no packed snapshot.
#[derive(Debug, ThisError)]
pub(crate) enum ArchiveError {
    #[error("it cannot be read")]
    Read(#[source] io::Error),
    #[error("it does not begin with a snapshot's `state`")]
    NoState,
    #[error("{name:?} is in it, which is not of this snapshot, or is there twice")]
    Foreign { name: String },
    #[error("its {name} has {found} bytes instead of {expected}")]
    Size { name: String, found: u64, expected: u64 },
    #[error("it has no {name}")]
    Missing { name: String },
    #[error("it goes on behind its end")]
    Trailing,
}

impl SnapshotError {
    /// Whether the state is no use to any version, or is not there.
    pub(super) fn is_damage(&self) -> bool {
        match self {
            Self::Open { source, .. } => source.kind() == io::ErrorKind::NotFound,
            Self::State { source, .. } => !matches!(source, FormatError::Version { .. }),
            Self::Impossible { .. } => true,
            _ => false,
        }
    }

    pub(super) fn open(path: &Path) -> impl FnOnce(io::Error) -> Self {
        let path = path.to_owned();
        move |source| Self::Open { path, source }
    }
}

impl SnapshotError {
    pub(super) fn open_archive(path: &Path) -> impl FnOnce(io::Error) -> Self {
        let path = path.to_owned();
        move |source| Self::OpenArchive { path, source }
    }

    /// What a save of the memory says.
    pub(super) fn save_memory(path: PathBuf) -> impl FnOnce(MemoryError) -> Self {
        move |source| match source {
            MemoryError::Interrupted => Self::Interrupted,
            source => Self::SaveMemory { path, source },
        }
    }
}

impl From<SnapshotError> for Error {
    fn from(error: SnapshotError) -> Self {
        let error = match error {
            // Their own words are better.
            SnapshotError::Disk(error) => return error.into(),
            error => error,
        };
        let fix = match &error {
            SnapshotError::Interrupted => return Error::new(ErrorKind::Interrupted, error),
            SnapshotError::AsItWas { .. } => {
                return Error::new(ErrorKind::Config, error)
                    .fix("leave them out, or make a clone with `Snapshot::restore_with`");
            }
            SnapshotError::Config(_) | SnapshotError::NoDisk { .. } => {
                return Error::new(ErrorKind::Config, error);
            }
            SnapshotError::NoBase { .. } => {
                return Error::new(ErrorKind::Config, error)
                    .fix("leave `RestoreOptions::disk_base` out for it");
            }
            SnapshotError::ReadOnly { .. } => {
                return Error::new(ErrorKind::Config, error)
                    .fix("leave `RestoreOptions::disk_delta` out for it");
            }
            SnapshotError::Open { source, .. } if source.kind() == io::ErrorKind::NotFound => {
                Some("name a directory that `MicroVm::snapshot` or `MicroVm::suspend` wrote")
            }
            SnapshotError::State { source: FormatError::Version { .. }, .. } => {
                Some("use the version of dormouse that wrote it, or save the VM again")
            }
            SnapshotError::InMemory => {
                Some("save the VM to a directory, with `MicroVm::snapshot` or `MicroVm::suspend`")
            }
            SnapshotError::OpenArchive { source, .. }
                if source.kind() == io::ErrorKind::NotFound =>
            {
                Some("name a file that `Snapshot::pack` wrote")
            }
            SnapshotError::OtherShell => {
                Some("prepare it with `prepare` of the same snapshot or VM")
            }
            SnapshotError::UsedDelta { .. } => {
                Some("choose a path where no file is: it is created")
            }
            SnapshotError::OutsideDisk { .. } => Some(
                "name the file with `RestoreOptions::disk_base`, or, where whoever wrote the snapshot \
                 is trusted, allow it with `RestoreOptions::outside_paths(true)`",
            ),
            SnapshotError::OutsideSocket { .. } => Some(
                "name a path with `RestoreOptions::vsock_unix_socket`, or, where whoever wrote the \
                 snapshot is trusted, allow it with `RestoreOptions::outside_paths(true)`",
            ),
            SnapshotError::OutsideNetwork { .. } => Some(
                "connect it with `RestoreOptions::network`, or, where whoever wrote the snapshot is \
                 trusted, allow it with `RestoreOptions::outside_paths(true)`",
            ),
            SnapshotError::OutsideService { .. } => Some(
                "connect it with `RestoreOptions::service`, or, where whoever wrote the snapshot is \
                 trusted, allow it with `RestoreOptions::outside_paths(true)`",
            ),
            SnapshotError::NoNetwork { .. } => Some(
                "connect it with `RestoreOptions::network` for each VM, for sessions by `Sessions::open_with`",
            ),
            SnapshotError::NotAsleep { .. } => {
                Some("make VMs of it with `Snapshot::open` and `Snapshot::restore`")
            }
            SnapshotError::Awake { .. } => Some(
                "suspend or end that one, or make a clone with `Snapshot::open` and `Snapshot::restore`",
            ),
            SnapshotError::Replaced { .. } => {
                Some("save each VM to a directory of its own, and open it again")
            }
            SnapshotError::Directory(
                DirectoryError::Foreign { .. } | DirectoryError::NotADirectory { .. },
            ) => Some("choose a path where nothing is, or a snapshot that may be replaced"),
            _ => None,
        };
        let error = Error::new(ErrorKind::Snapshot, error);
        match fix {
            Some(fix) => error.fix(fix),
            None => error,
        }
    }
}

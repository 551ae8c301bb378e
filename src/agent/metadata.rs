//! What files of the guest are, and what they are called.

use std::ffi::{OsStr, OsString};
use std::os::unix::ffi::OsStrExt;
use std::path::Path;
use std::time::{Duration, SystemTime};

use crate::protocol::{Bytes, FileKind, Stat};

/// A path, as messages have it.
pub(super) fn path_bytes(path: &Path) -> Bytes {
    Bytes::from(path.as_os_str().as_bytes())
}

/// What a file of the guest is, in the guest's words.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Metadata(pub(super) Stat);

/// The kind of a file.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
#[non_exhaustive]
pub enum FileType {
    /// A regular file.
    File,
    /// A directory.
    Directory,
    /// A symbolic link.
    Symlink,
    /// A device, a pipe, or a socket.
    Other,
}

impl Metadata {
    /// The kind.
    pub fn file_type(&self) -> FileType {
        match self.0.kind {
            FileKind::File => FileType::File,
            FileKind::Directory => FileType::Directory,
            FileKind::Symlink => FileType::Symlink,
            FileKind::Other => FileType::Other,
        }
    }

    /// Whether it is a directory.
    pub fn is_dir(&self) -> bool {
        self.file_type() == FileType::Directory
    }

    /// Permission bits, with those of set-user-id, set-group-id and sticky.
    pub fn mode(&self) -> u32 {
        self.0.mode & 0o7777
    }

    /// The user that it belongs to.
    pub fn uid(&self) -> u32 {
        self.0.uid
    }

    /// The group that it belongs to.
    pub fn gid(&self) -> u32 {
        self.0.gid
    }

    /// The size in bytes.
    pub fn len(&self) -> u64 {
        self.0.size
    }

    /// Whether there is nothing in it.
    pub fn is_empty(&self) -> bool {
        self.0.size == 0
    }

    /// When it was last written, where that is a time that this host can express.
    pub fn modified(&self) -> Option<SystemTime> {
        let since = Duration::from_nanos(self.0.modified_ns.unsigned_abs());
        match self.0.modified_ns < 0 {
            false => SystemTime::UNIX_EPOCH.checked_add(since),
            true => SystemTime::UNIX_EPOCH.checked_sub(since),
        }
    }
}

/// An entry of a directory of the guest.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct DirEntry {
    name: OsString,
    metadata: Metadata,
}

impl DirEntry {
    pub(super) fn new(name: OsString, metadata: Metadata) -> Self {
        Self { name, metadata }
    }

    /// Its name, as the guest gives it: it may hold anything.
    pub fn file_name(&self) -> &OsStr {
        &self.name
    }

    /// What it is. Links are not followed.
    pub fn metadata(&self) -> &Metadata {
        &self.metadata
    }
}

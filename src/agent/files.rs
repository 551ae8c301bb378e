//! Files of the guest: one at a time, in streams of any length.

use std::ffi::{OsStr, OsString};
use std::os::unix::ffi::{OsStrExt, OsStringExt};
use std::path::Path;
use std::time::{Duration, SystemTime};

use tokio::io::{AsyncRead, AsyncReadExt, AsyncWriteExt};

use super::open_files::{FileReader, FileWriter};
use super::{Agent, AgentError};
use crate::error::Error;
use crate::protocol::{Bytes, Call, FileKind, MAX_DATA_BYTES, MakeDirectory, Remove, Reply, Stat};

/// As much of a directory as [`Agent::read_dir`] takes.
const LIST_LIMIT: usize = 64 << 20;
/// As much of a file as [`Agent::read`] takes.
const READ_LIMIT: u64 = 64 << 20;

impl Agent {
    /// A file's content, up to 64 MiB.
    ///
    /// # Errors
    ///
    /// [`ErrorKind::File`](crate::ErrorKind::File), with the guest's reason;
    /// [`ErrorKind::Resources`](crate::ErrorKind::Resources) for a larger one, which
    /// [`open`](Self::open) reads; else as every call.
    pub async fn read(&self, path: impl AsRef<Path>) -> Result<Vec<u8>, Error> {
        let mut file = self.open(path).await?;
        let mut content = Vec::new();
        let mut limited = (&mut file).take(READ_LIMIT + 1);
        let read = limited.read_to_end(&mut content).await;
        match read {
            Ok(_) if content.len() as u64 > READ_LIMIT => {
                Err(AgentError::FileSize { limit: READ_LIMIT }.into())
            }
            Ok(_) => Ok(content),
            Err(error) => Err(file.explain(error)),
        }
    }

    /// Opens a file to be read, in a stream.
    ///
    /// # Errors
    ///
    /// [`ErrorKind::File`](crate::ErrorKind::File), with the guest's reason; else as every call.
    pub async fn open(&self, path: impl AsRef<Path>) -> Result<FileReader, Error> {
        FileReader::begin(self.calls(), path.as_ref()).await
    }

    /// Puts a file into the place of what is there, in one step: whoever opens it sees the old or
    /// the new one. It keeps the mode and the owner of the old one; a new one is root's, 0644.
    ///
    /// # Errors
    ///
    /// [`ErrorKind::File`](crate::ErrorKind::File), with the guest's reason, such as a full disk;
    /// the old file stays. Else as every call.
    pub async fn write(
        &self,
        path: impl AsRef<Path>,
        content: impl AsRef<[u8]>,
    ) -> Result<(), Error> {
        self.write_from(path, content.as_ref(), &WriteOptions::new()).await
    }

    /// As [`write`](Self::write), from a stream of any length, such as a `tokio::fs::File`.
    ///
    /// # Errors
    ///
    /// As that one; also where the stream cannot be read.
    pub async fn write_from(
        &self,
        path: impl AsRef<Path>,
        mut content: impl AsyncRead + Unpin,
        options: &WriteOptions,
    ) -> Result<(), Error> {
        let mut file = self.create(path, options).await?;
        let mut piece = vec![0; MAX_DATA_BYTES];
        loop {
            match content.read(&mut piece).await {
                Ok(0) => return file.finish().await,
                Ok(bytes) => {
                    if file.write_all(&piece[..bytes]).await.is_err() {
                        // The guest has said why.
                        return file.finish().await;
                    }
                }
                Err(error) => return Err(AgentError::Source(error).into()),
            }
        }
    }

    /// As [`write`](Self::write), to write to by and by: the file appears at
    /// [`FileWriter::finish`], and never if that is not called.
    ///
    /// # Errors
    ///
    /// As that one.
    pub async fn create(
        &self,
        path: impl AsRef<Path>,
        options: &WriteOptions,
    ) -> Result<FileWriter, Error> {
        FileWriter::begin(self.calls(), path.as_ref(), options).await
    }

    /// What a file is. Links are not followed.
    ///
    /// # Errors
    ///
    /// [`ErrorKind::File`](crate::ErrorKind::File), with the guest's reason; else as every call.
    pub async fn metadata(&self, path: impl AsRef<Path>) -> Result<Metadata, Error> {
        match self.ask(&Call::Stat(bytes(path.as_ref()))).await? {
            Reply::Stat(stat) => Ok(Metadata(stat)),
            other => Err(refused(other)),
        }
    }

    /// What is in a directory, in no order: up to 64 MiB of names and metadata, some 500,000
    /// entries.
    ///
    /// # Errors
    ///
    /// [`ErrorKind::File`](crate::ErrorKind::File), with the guest's reason; else as every call.
    pub async fn read_dir(&self, path: impl AsRef<Path>) -> Result<Vec<DirEntry>, Error> {
        let call = Call::List(bytes(path.as_ref()));
        let mut connection = self.calls().call(&call).await?;
        let (mut entries, mut bytes) = (Vec::new(), 0);
        loop {
            match connection.reply(self.calls().vsock()).await? {
                Reply::Entry(entry) => {
                    // With what is kept beside it: a guest can send many names, and long ones.
                    bytes += entry.name.0.len() + size_of::<DirEntry>();
                    if bytes > LIST_LIMIT {
                        return Err(AgentError::List { limit: LIST_LIMIT }.into());
                    }
                    let name = OsString::from_vec(entry.name.0);
                    entries.push(DirEntry { name, metadata: Metadata(entry.stat) });
                }
                Reply::Done => {
                    self.calls().keep(connection);
                    return Ok(entries);
                }
                other => return Err(refused(other)),
            }
        }
    }

    /// Removes a file, a link, or an empty directory.
    ///
    /// # Errors
    ///
    /// [`ErrorKind::File`](crate::ErrorKind::File), with the guest's reason; else as every call.
    pub async fn remove(&self, path: impl AsRef<Path>) -> Result<(), Error> {
        self.done(&Call::Remove(Remove { path: bytes(path.as_ref()), recursive: false })).await
    }

    /// Removes a directory with all that is in it, or a file.
    ///
    /// # Errors
    ///
    /// As [`remove`](Self::remove).
    pub async fn remove_all(&self, path: impl AsRef<Path>) -> Result<(), Error> {
        self.done(&Call::Remove(Remove { path: bytes(path.as_ref()), recursive: true })).await
    }

    /// Makes a directory, and those above it; it may be there. Mode 0755.
    ///
    /// # Errors
    ///
    /// As [`remove`](Self::remove).
    pub async fn create_dir_all(&self, path: impl AsRef<Path>) -> Result<(), Error> {
        let make = MakeDirectory { path: bytes(path.as_ref()), mode: 0o755, parents: true };
        self.done(&Call::MakeDirectory(make)).await
    }
}

pub(super) fn bytes(path: &Path) -> Bytes {
    Bytes::from(path.as_os_str().as_bytes())
}

pub(super) fn refused(reply: Reply) -> Error {
    match reply {
        Reply::Failed(failure) => AgentError::Guest(failure).into(),
        _ => AgentError::Unexpected.into(),
    }
}

/// How a file is written.
#[derive(Clone, Debug, Default)]
pub struct WriteOptions {
    pub(super) mode: Option<u32>,
    pub(super) owner: Option<(u32, u32)>,
    pub(super) sync: bool,
}

impl WriteOptions {
    /// As [`Agent::write`] does.
    pub fn new() -> Self {
        Self::default()
    }

    /// Permission bits, whatever those of an old file are.
    #[must_use]
    pub fn mode(mut self, mode: u32) -> Self {
        self.mode = Some(mode & 0o7777);
        self
    }

    /// User and group, by number.
    #[must_use]
    pub fn owner(mut self, uid: u32, gid: u32) -> Self {
        self.owner = Some((uid, gid));
        self
    }

    /// Whether the file is on its disk (fsync) before it takes its place. Off unless set.
    #[must_use]
    pub fn sync(mut self, on: bool) -> Self {
        self.sync = on;
        self
    }
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
    /// Its name, as the guest gives it: it may hold anything.
    pub fn file_name(&self) -> &OsStr {
        &self.name
    }

    /// What it is. Links are not followed.
    pub fn metadata(&self) -> &Metadata {
        &self.metadata
    }
}

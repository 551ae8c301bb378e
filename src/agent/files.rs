//! Files of the guest: one at a time, in streams of any length.

use std::ffi::OsString;
use std::os::unix::ffi::OsStringExt;
use std::path::Path;

use tokio::io::{AsyncRead, AsyncReadExt, AsyncWriteExt};

use super::metadata::{DirEntry, Metadata, path_bytes};
use super::open_files::{FileReader, FileWriter, WriteOptions};
use super::{Agent, AgentError};
use crate::error::Error;
use crate::protocol::{Call, MAX_DATA_BYTES, MakeDirectory, Remove, Reply};

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
    /// [`open`](Self::open) reads; else as [every call](crate::Agent#errors-of-every-call).
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
    /// [`ErrorKind::File`](crate::ErrorKind::File), with the guest's reason; else as
    /// [every call](crate::Agent#errors-of-every-call).
    pub async fn open(&self, path: impl AsRef<Path>) -> Result<FileReader, Error> {
        FileReader::begin(self.calls(), path.as_ref()).await
    }

    /// Puts a file into the place of what is there, in one step: whoever opens it sees the old or
    /// the new one. It keeps the mode and the owner of the old one; a new one is root's, 0644.
    ///
    /// # Errors
    ///
    /// [`ErrorKind::File`](crate::ErrorKind::File), with the guest's reason, such as a full disk;
    /// the old file stays. Else as [every call](crate::Agent#errors-of-every-call).
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
    /// [`ErrorKind::File`](crate::ErrorKind::File), with the guest's reason; else as
    /// [every call](crate::Agent#errors-of-every-call).
    pub async fn metadata(&self, path: impl AsRef<Path>) -> Result<Metadata, Error> {
        match self.ask(&Call::Stat(path_bytes(path.as_ref()))).await? {
            Reply::Stat(stat) => Ok(Metadata(stat)),
            other => Err(AgentError::refused(other).into()),
        }
    }

    /// What is in a directory, in no order: up to 64 MiB of names and metadata, some 500,000
    /// entries.
    ///
    /// # Errors
    ///
    /// [`ErrorKind::File`](crate::ErrorKind::File), with the guest's reason; else as
    /// [every call](crate::Agent#errors-of-every-call).
    pub async fn read_dir(&self, path: impl AsRef<Path>) -> Result<Vec<DirEntry>, Error> {
        let call = Call::List(path_bytes(path.as_ref()));
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
                    entries.push(DirEntry::new(name, Metadata(entry.stat)));
                }
                Reply::Done => {
                    self.calls().keep(connection);
                    return Ok(entries);
                }
                other => return Err(AgentError::refused(other).into()),
            }
        }
    }

    /// Removes a file, a link, or an empty directory.
    ///
    /// # Errors
    ///
    /// [`ErrorKind::File`](crate::ErrorKind::File), with the guest's reason; else as
    /// [every call](crate::Agent#errors-of-every-call).
    pub async fn remove(&self, path: impl AsRef<Path>) -> Result<(), Error> {
        self.done(&Call::Remove(Remove { path: path_bytes(path.as_ref()), recursive: false })).await
    }

    /// Removes a directory with all that is in it, or a file.
    ///
    /// # Errors
    ///
    /// As [`remove`](Self::remove).
    pub async fn remove_all(&self, path: impl AsRef<Path>) -> Result<(), Error> {
        self.done(&Call::Remove(Remove { path: path_bytes(path.as_ref()), recursive: true })).await
    }

    /// Makes a directory, and those above it; it may be there. Mode 0755.
    ///
    /// # Errors
    ///
    /// As [`remove`](Self::remove).
    pub async fn create_dir_all(&self, path: impl AsRef<Path>) -> Result<(), Error> {
        let make = MakeDirectory { path: path_bytes(path.as_ref()), mode: 0o755, parents: true };
        self.done(&Call::MakeDirectory(make)).await
    }
}

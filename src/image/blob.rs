//! A part of a file: what an archive holds, or a file as a whole.

use std::fs::File;
use std::io::{self, Read};
use std::os::unix::fs::FileExt;
use std::sync::Arc;

use super::skip::Skip;
use crate::file_lock::LockedFile;

/// Bytes of a file, from an offset on. Clones share the file, and each has a position of its own.
#[derive(Clone, Debug)]
pub(super) struct Blob {
    file: Arc<LockedFile>,
    begin: u64,
    len: u64,
    at: u64,
}

impl Blob {
    /// All of a file.
    pub(super) fn whole(file: File) -> io::Result<Self> {
        let len = file.metadata()?.len();
        Ok(Self { file: Arc::new(file.into()), begin: 0, len, at: 0 })
    }

    /// The same, of a file that others use too.
    #[cfg(feature = "registry")]
    pub(super) fn shared(file: Arc<LockedFile>) -> io::Result<Self> {
        let len = file.metadata()?.len();
        Ok(Self { file, begin: 0, len, at: 0 })
    }

    /// A part of this one, which lies in it.
    pub(super) fn part(&self, begin: u64, len: u64) -> Option<Self> {
        let end = begin.checked_add(len)?;
        let file = Arc::clone(&self.file);
        (end <= self.len).then(|| Self { file, begin: self.begin + begin, len, at: 0 })
    }

    pub(super) fn len(&self) -> u64 {
        self.len
    }

    /// How much of it has been read.
    pub(super) fn position(&self) -> u64 {
        self.at
    }
}

impl Read for Blob {
    fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        let left = usize::try_from(self.len - self.at).unwrap_or(usize::MAX);
        let wanted = left.min(buffer.len());
        let read = self.file.read_at(&mut buffer[..wanted], self.begin + self.at)?;
        self.at += read as u64;
        Ok(read)
    }
}

impl Skip for Blob {
    fn skip(&mut self, bytes: u64) -> io::Result<()> {
        if bytes > self.len - self.at {
            return Err(io::ErrorKind::UnexpectedEof.into());
        }
        self.at += bytes;
        Ok(())
    }
}

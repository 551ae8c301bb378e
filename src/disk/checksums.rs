//! Checksums of a saved disk, by which any change of it is found.
//!
//! A CRC-32 (ISO-HDLC, as in gzip) for each 1 MiB that has something but zeros. What is not listed
//! is zeros: so a hole may become zeros on disk and back, and a sparse file costs what it holds.

use std::fs::File;
use std::io::{self, Seek, SeekFrom};
use std::ops::ControlFlow;
use std::os::unix::fs::FileExt;
use std::path::Path;

use serde::{Deserialize, Serialize};

use super::progress::Progress;
use super::{DiskError, extents};

const CHUNK_BYTES: u64 = 1 << 20;

/// What a file had when it was saved.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct Checksums {
    /// The file's length.
    pub(super) bytes: u64,
    /// The chunks that are not zeros, by their number, in ascending order.
    chunks: Vec<(u64, u32)>,
}

/// Why there is no list of checksums.
#[derive(Debug)]
pub(super) enum Failed {
    Interrupted,
    Io(io::Error),
}

impl From<io::Error> for Failed {
    fn from(error: io::Error) -> Self {
        Self::Io(error)
    }
}

impl Checksums {
    /// Reads the data of a file, and calls `progress` with the length of each piece.
    pub(super) fn of(mut file: &File, progress: &mut Progress<'_>) -> Result<Self, Failed> {
        let bytes = file.seek(SeekFrom::End(0))?;
        let mut buffer = vec![0; CHUNK_BYTES as usize];
        let mut chunks = Vec::new();
        let mut at = 0;
        while let Some(data) = extents::next(file, at, bytes)? {
            let chunk = data.start / CHUNK_BYTES;
            let start = chunk * CHUNK_BYTES;
            let len = (bytes - start).min(CHUNK_BYTES);
            let content = buffer.get_mut(..len as usize).unwrap_or_default();
            file.read_exact_at(content, start)?;
            if content.iter().any(|byte| *byte != 0) {
                chunks.push((chunk, crc32fast::hash(content)));
            }
            if progress(len) == ControlFlow::Break(()) {
                return Err(Failed::Interrupted);
            }
            at = start + len;
        }
        Ok(Self { bytes, chunks })
    }

    /// Reads a file, and says where it is not what it was.
    pub(super) fn verify(&self, path: &Path, progress: &mut Progress<'_>) -> Result<(), DiskError> {
        let damaged = |what| DiskError::Damaged { path: path.to_owned(), what };
        let found = super::open(path, false, 0).and_then(|file| {
            Self::of(&file, progress).map_err(|failed| match failed {
                Failed::Interrupted => DiskError::Interrupted,
                Failed::Io(source) => DiskError::Verify { path: path.to_owned(), source },
            })
        })?;
        if found.bytes != self.bytes {
            return Err(damaged(format!("it has {} bytes, not {}", found.bytes, self.bytes)));
        }
        if found.chunks == self.chunks {
            return Ok(());
        }
        let pairs = found.chunks.iter().zip(&self.chunks);
        let first = pairs.filter(|(found, saved)| found != saved).map(|(a, b)| a.0.min(b.0)).next();
        let common = found.chunks.len().min(self.chunks.len());
        let rest = found.chunks.get(common).or(self.chunks.get(common)).map(|chunk| chunk.0);
        let chunk = first.or(rest).unwrap_or(0);
        Err(damaged(format!("the 1 MiB at {:#x} has changed", chunk.saturating_mul(CHUNK_BYTES))))
    }
}

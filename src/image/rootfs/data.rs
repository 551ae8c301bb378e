//! The data of files, written in the order in which layers bring it.

use std::fs::File;
use std::io;
use std::os::unix::fs::FileExt;

use rustix::fs::{FallocateFlags, fallocate};

/// The block of EROFS: kernels before 6.4 know no other than their page.
pub(in crate::image) const BLOCK: u64 = 4096;
/// Data is written so much at a time.
const BUFFER_BYTES: usize = 1 << 20;
/// Zeros are left out in pieces of this size: the host's file is sparse.
const PIECE: usize = 64 << 10;

/// A file that is written from its begin to its end, and has holes where there would be zeros.
#[derive(Debug)]
pub(in crate::image) struct DataArea {
    file: File,
    /// Where the buffer belongs.
    at: u64,
    buffer: Vec<u8>,
}

impl DataArea {
    /// Begins at `at`, in a file that has nothing from there on.
    pub(in crate::image) fn new(file: File, at: u64) -> Self {
        Self { file, at, buffer: Vec::with_capacity(BUFFER_BYTES) }
    }

    pub(in crate::image) fn position(&self) -> u64 {
        self.at + self.buffer.len() as u64
    }

    pub(in crate::image) fn write(&mut self, mut bytes: &[u8]) -> io::Result<()> {
        while !bytes.is_empty() {
            let room = BUFFER_BYTES - self.buffer.len();
            let (now, later) = bytes.split_at(room.min(bytes.len()));
            self.buffer.extend_from_slice(now);
            bytes = later;
            if self.buffer.len() == BUFFER_BYTES {
                self.flush()?;
            }
        }
        Ok(())
    }

    /// As many zeros.
    pub(in crate::image) fn zeros(&mut self, bytes: u64) -> io::Result<()> {
        let room = (BUFFER_BYTES - self.buffer.len()) as u64;
        if bytes >= room {
            self.flush()?;
            self.at += bytes;
        } else {
            self.buffer.resize(self.buffer.len() + bytes as usize, 0);
        }
        Ok(())
    }

    /// Zeros up to the next block.
    pub(in crate::image) fn align(&mut self) -> io::Result<()> {
        self.zeros(self.position().wrapping_neg() % BLOCK)
    }

    /// Makes zeros of blocks that no file has any more: they take no room, and the same image is the same
    /// bytes whatever lay below.
    pub(in crate::image) fn discard(&mut self, offset: u64, bytes: u64) -> io::Result<()> {
        self.flush()?;
        let flags = FallocateFlags::PUNCH_HOLE | FallocateFlags::KEEP_SIZE;
        match fallocate(&self.file, flags, offset, bytes) {
            Err(rustix::io::Errno::OPNOTSUPP) => self.overwrite(offset, bytes),
            result => Ok(result?),
        }
    }

    fn overwrite(&self, mut offset: u64, mut bytes: u64) -> io::Result<()> {
        let zeros = vec![0; PIECE];
        while bytes > 0 {
            let now = bytes.min(PIECE as u64);
            self.file.write_all_at(&zeros[..now as usize], offset)?;
            (offset, bytes) = (offset + now, bytes - now);
        }
        Ok(())
    }

    /// Writes out what there is, and gives the file back, as long as what was written.
    pub(in crate::image) fn finish(mut self) -> io::Result<File> {
        self.flush()?;
        self.file.set_len(self.at)?;
        Ok(self.file)
    }

    fn flush(&mut self) -> io::Result<()> {
        let (mut begin, mut end) = (0, 0);
        // Neighbours that are not zeros go together.
        for piece in self.buffer.chunks(PIECE) {
            if piece.iter().all(|&byte| byte == 0) {
                self.write_out(begin, end)?;
                begin = end + piece.len();
            }
            end += piece.len();
        }
        self.write_out(begin, end)?;
        self.at += self.buffer.len() as u64;
        self.buffer.clear();
        Ok(())
    }

    fn write_out(&self, begin: usize, end: usize) -> io::Result<()> {
        self.file.write_all_at(&self.buffer[begin..end], self.at + begin as u64)
    }
}

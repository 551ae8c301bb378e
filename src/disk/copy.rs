//! Saving a disk: a copy of its file, or one delta of all that lies over it. Where the file is itself a
//! copy that some snapshot has, the next one has it too, by another name: each is whole by itself.
//!
//! A file system that can share blocks (FICLONE: btrfs, XFS) does; elsewhere the kernel copies
//! what is no hole (copy_file_range), and where it cannot, we do. The copy is then read once for its
//! checksums, from the page cache that it was just written to. Nothing is synced to the disk here.

use std::fs::{self, File};
use std::io;
use std::ops::ControlFlow;
use std::os::fd::AsRawFd;
use std::os::unix::fs::{FileExt, OpenOptionsExt};
use std::path::Path;

use rustix::fs::{AtFlags, CWD, copy_file_range, ioctl_ficlone, linkat};

use super::checksums::{Checksums, Failed};
use super::delta::Delta;
use super::progress::Progress;
use super::saved::{Base, SavedDisk, below_path};
use super::{Disk, extents};
use crate::disk::DiskError;
use crate::memory;

/// What is copied between two looks at whether to go on.
const PIECE_BYTES: u64 = 4 << 20;
/// Zeros of this length become a hole where we copy ourselves.
const BLOCK_BYTES: usize = 4096;
const BUFFER_BYTES: usize = 1 << 20;

impl Disk {
    /// Leaves the disk where it is, for a guest that sleeps, and with `sync` on the host's disk; what
    /// would be gone with the disk, or with the snapshot that it stands on, is saved.
    ///
    /// # Errors
    ///
    /// As [`save`](Self::save).
    pub(crate) fn leave(
        &mut self,
        to: &Path,
        whole: Option<&Checksums>,
        sync: bool,
        progress: &mut Progress<'_>,
    ) -> Result<SavedDisk, DiskError> {
        let has_name = self.delta.as_ref().is_none_or(|delta| delta.has_name());
        if self.read_only || !self.frozen.is_empty() || !has_name || whole.is_some() {
            return self.save(to, whole, progress);
        }
        let failed = |source| DiskError::Save { path: to.to_owned(), source };
        // The guest's last write is in its time of modification.
        let metadata = self.file.metadata().map_err(failed)?;
        let facts = super::facts(&metadata, self.facts.bytes);
        let path = fs::canonicalize(&self.path).map_err(failed)?;
        let delta = match &mut self.delta {
            Some(delta) => Some(delta.settle().map_err(failed)?),
            None => None,
        };
        if sync {
            let written = self.delta.as_ref().map_or(&**self.file, |delta| delta.file());
            written.sync_all().map_err(failed)?;
        }
        Ok(SavedDisk::Left { base: Base { path, facts }, delta })
    }

    /// Saves the disk as it is now: what the guest wrote is complete, flushed or not. No request
    /// may be under way, and none may come meanwhile.
    ///
    /// A disk without deltas that the guest writes to becomes a copy of its file at `to`; what
    /// lies over a file becomes one delta at `to`. Where the file is a copy that a snapshot has, it is
    /// `whole`, and its checksums are known: it is saved too, beside `to`. Of a file that the guest
    /// only reads there is nothing to save. Costs a reading of what is saved, and its writing where
    /// blocks cannot be shared. The files are new, and there only if this succeeds; they are the
    /// caller's to sync.
    ///
    /// # Errors
    ///
    /// `to` exists, there is no room, or `progress` breaks off.
    pub(crate) fn save(
        &self,
        to: &Path,
        whole: Option<&Checksums>,
        progress: &mut Progress<'_>,
    ) -> Result<SavedDisk, DiskError> {
        let failed = |error| match error {
            Failed::Interrupted => DiskError::Interrupted,
            Failed::Io(source) => DiskError::Save { path: to.to_owned(), source },
        };
        if !self.has_deltas() && self.read_only {
            return Ok(SavedDisk::ReadOnly { base: self.base().map_err(failed)? });
        }
        if !self.has_deltas() {
            let data = create(to, progress, |file, progress| self.save_file(file, progress));
            return Ok(SavedDisk::Raw { data: data.map_err(failed)? });
        }
        let below = below_path(to);
        if whole.is_some() {
            self.share_file(&below, progress).map_err(failed)?;
        }
        let data = create(to, progress, |file, progress| self.save_deltas(file, progress));
        if data.is_err() && whole.is_some() {
            let _ = fs::remove_file(&below);
        }
        let data = data.map_err(failed)?;
        match whole.cloned() {
            Some(below) => Ok(SavedDisk::Layered { below, data }),
            None => Ok(SavedDisk::Delta { base: self.base().map_err(failed)?, data }),
        }
    }

    fn base(&self) -> Result<Base, Failed> {
        // It may have lost its name, or be about to be used from another folder.
        let path = fs::canonicalize(&self.path).or_else(|_| std::path::absolute(&self.path))?;
        Ok(Base { path, facts: self.facts })
    }

    /// Gives the file another name, or where that cannot be, another file its content.
    fn share_file(&self, to: &Path, progress: &mut Progress<'_>) -> Result<(), Failed> {
        // By what is open, whatever has become of its name.
        let open = format!("/proc/self/fd/{}", self.file.as_raw_fd());
        if linkat(CWD, open, CWD, to, AtFlags::SYMLINK_FOLLOW).is_ok() {
            return Ok(());
        }
        let copy = |file: &File, progress: &mut Progress<'_>| self.save_file(file, progress);
        create(to, progress, copy).map(|_| ())
    }

    fn save_file(&self, to: &File, progress: &mut Progress<'_>) -> Result<(), Failed> {
        if ioctl_ficlone(to, &**self.file).is_ok() {
            return Ok(());
        }
        memory::set_len(to, self.facts.bytes)?;
        copy((&self.file, 0), (to, 0), self.facts.bytes, progress)
    }

    /// Merges all deltas into one.
    fn save_deltas(&self, to: &File, progress: &mut Progress<'_>) -> Result<(), Failed> {
        let mut merged = Delta::create(to.try_clone()?.into(), self.sectors)?;
        let deltas = self.deltas();
        let mut used: Vec<(u64, u64)> = deltas.iter().flat_map(|delta| delta.used()).collect();
        used.sort_unstable();
        used.dedup();
        let end = self.sectors * super::SECTOR_BYTES;
        for (offset, len) in used {
            let mut at = offset;
            for piece in self.pieces(offset, len.min(end.saturating_sub(offset))) {
                if let Some(delta) = piece.delta {
                    copy(delta.place(at), merged.place(at), piece.len, progress)?;
                    merged.mark(at, piece.len);
                }
                at += piece.len;
            }
        }
        Ok(merged.write_bitmap()?)
    }
}

/// Makes a file, and the checksums of what was written to it. Where that fails there is no file.
fn create(
    path: &Path,
    progress: &mut Progress<'_>,
    write: impl FnOnce(&File, &mut Progress<'_>) -> Result<(), Failed>,
) -> Result<Checksums, Failed> {
    let mut options = File::options();
    // What is on a disk is its owner's alone, as what is in memory.
    options.read(true).write(true).create_new(true).mode(0o600);
    let file = options.open(path)?;
    let written = write(&file, progress).and_then(|()| Checksums::of(&file, progress));
    written.inspect_err(|_| {
        let _ = fs::remove_file(path);
    })
}

/// Copies a saved file, with its holes, to one that is empty. Where `progress` breaks off, the
/// error is of the kind `Interrupted`.
pub(crate) fn copy_file(from: &File, to: &File, progress: &mut Progress<'_>) -> io::Result<()> {
    if ioctl_ficlone(to, from).is_ok() {
        return Ok(());
    }
    let len = from.metadata()?.len();
    memory::set_len(to, len)?;
    copy((from, 0), (to, 0), len, progress).map_err(|failed| match failed {
        Failed::Interrupted => io::ErrorKind::Interrupted.into(),
        Failed::Io(error) => error,
    })
}

/// Copies `len` bytes from a place in one file to a place of another that is zeros so far.
fn copy(
    (from, source): (&File, u64),
    (to, target): (&File, u64),
    len: u64,
    progress: &mut Progress<'_>,
) -> Result<(), Failed> {
    let (mut at, end) = (source, source + len);
    let mut by_kernel = true;
    while let Some(data) = extents::next(from, at, end)? {
        at = data.start;
        while at < data.end {
            let len = (data.end - at).min(PIECE_BYTES);
            let done = copy_some((from, at), (to, target + (at - source)), len, &mut by_kernel)?;
            at += done;
            if progress(done) == ControlFlow::Break(()) {
                return Err(Failed::Interrupted);
            }
        }
    }
    Ok(())
}

/// Copies some of `len` bytes, and says how many.
fn copy_some(
    (from, mut source): (&File, u64),
    (to, mut target): (&File, u64),
    len: u64,
    by_kernel: &mut bool,
) -> io::Result<u64> {
    if *by_kernel {
        let (at, into) = (Some(&mut source), Some(&mut target));
        match copy_file_range(from, at, to, into, len as usize) {
            Ok(done) if done > 0 => return Ok(done as u64),
            // Between two kinds of file systems, or from a block device.
            _ => *by_kernel = false,
        }
    }
    let mut buffer = vec![0; BUFFER_BYTES.min(len as usize)];
    from.read_exact_at(&mut buffer, source)?;
    write_sparse(to, &buffer, target)?;
    Ok(buffer.len() as u64)
}

/// Writes what is not zero to a place that is zeros so far.
pub(crate) fn write_sparse(to: &File, bytes: &[u8], at: u64) -> io::Result<()> {
    for (block, bytes) in bytes.chunks(BLOCK_BYTES).enumerate() {
        if bytes.iter().any(|byte| *byte != 0) {
            to.write_all_at(bytes, at + (block * BLOCK_BYTES) as u64)?;
        }
    }
    Ok(())
}

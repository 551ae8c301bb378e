//! A snapshot in one file, for cold storage: its directory as a tar archive, compressed with zstd.
//!
//! Nothing of it is a format of our own: `tar --zstd -x` makes a directory of it that can be
//! opened too. docs/snapshot-format.md says what is in it.

use std::cell::Cell;
use std::fs::{self, File};
use std::io::{self, BufReader, Read, Seek, Write};
use std::ops::ControlFlow;
use std::os::unix::fs::OpenOptionsExt;
use std::path::{Path, PathBuf};

use tar::{Archive, Builder, Entries, Entry, HeaderMode};
use zstd::stream::{read::Decoder, write::Encoder};

use super::directory::{OpenDirectory, STATE, Staging, WRITTEN, memory_name};
use super::error::{ArchiveError, SnapshotError};
use super::options::{SaveStage, SnapshotOptions};
use super::save::put_into_place;
use super::{Place, Snapshot, State, format};
use crate::disk::{Extents, write_sparse};
use crate::error::Error;
use crate::input_file;
use crate::memory;
use crate::random::random;

/// zstd's own default.
const LEVEL: i32 = 3;
/// What zstd may keep to unpack: 8 MiB, which levels up to 19 stay within.
const MAX_WINDOW_LOG: u32 = 23;
/// What describes a file in the archive: mostly the list of its extents, of 24 bytes each.
const MAX_HEADER_BYTES: u64 = 16 << 20;
/// A file with more of them is packed with its holes, as zeros.
const MAX_EXTENTS: usize = 500_000;
const BUFFER_BYTES: usize = 1 << 20;

impl Snapshot {
    /// Packs the snapshot into one file, for cold storage: a tar archive of its directory,
    /// compressed with zstd. It takes reading all of the memory and disks that is not zero, at
    /// some 300 MiB a second. The file appears at its place whole or not at all.
    ///
    /// Files that the guest's disks stand on and that are not in the directory are not in the
    /// archive either.
    ///
    /// ```no_run
    /// use dormouse::Snapshot;
    ///
    /// Snapshot::open("base")?.pack("base.tar.zst")?;
    /// // Months later, perhaps elsewhere:
    /// let base = Snapshot::unpack("base.tar.zst", "base")?;
    /// # Ok::<(), dormouse::Error>(())
    /// ```
    ///
    /// # Errors
    ///
    /// [`ErrorKind::Snapshot`](crate::ErrorKind::Snapshot) where the file cannot be written, and for
    /// a snapshot in memory.
    pub fn pack(&self, file: impl AsRef<Path>) -> Result<(), Error> {
        self.pack_with(file, &SnapshotOptions::default())
    }

    /// As [`pack`](Self::pack), in a way of one's own; `full` has no meaning here.
    ///
    /// # Errors
    ///
    /// As `pack`; [`ErrorKind::Interrupted`](crate::ErrorKind::Interrupted) where the progress
    /// says so.
    pub fn pack_with(
        &self,
        file: impl AsRef<Path>,
        options: &SnapshotOptions,
    ) -> Result<(), Error> {
        let Place::Directory(directory) = &self.0.place else {
            return Err(SnapshotError::InMemory.into());
        };
        let path = file.as_ref();
        let files = self.open_files(directory)?;
        let interrupted = Cell::new(false);
        let packed = Partial::create(path).and_then(|partial| {
            write(files, &partial.file, options, &interrupted)?;
            partial.commit(options.sync)
        });
        packed.map_err(|source| match interrupted.get() {
            true => SnapshotError::Interrupted.into(),
            false => SnapshotError::Write { path: path.to_owned(), source }.into(),
        })
    }

    /// Makes a snapshot's directory of what [`pack`](Self::pack) made, and opens it. Holes become
    /// holes again. It takes as long as writing the memory and disks; zstd's checksum is compared, so
    /// that no damage goes unnoticed. The directory appears whole or not at all, and takes the
    /// place of a snapshot that is there.
    ///
    /// # Errors
    ///
    /// [`ErrorKind::Snapshot`](crate::ErrorKind::Snapshot) for what is no packed snapshot, is damaged
    /// or of another version, and where the directory cannot be written.
    pub fn unpack(file: impl AsRef<Path>, directory: impl AsRef<Path>) -> Result<Self, Error> {
        Self::unpack_with(file, directory, &SnapshotOptions::default())
    }

    /// As [`unpack`](Self::unpack), in a way of one's own; `full` has no meaning here. Who unpacks
    /// what others have packed watches its progress: files may be as large as the archive says.
    ///
    /// # Errors
    ///
    /// As `unpack`; [`ErrorKind::Interrupted`](crate::ErrorKind::Interrupted) where the progress
    /// says so.
    pub fn unpack_with(
        file: impl AsRef<Path>,
        directory: impl AsRef<Path>,
        options: &SnapshotOptions,
    ) -> Result<Self, Error> {
        let (path, directory) = (file.as_ref(), directory.as_ref());
        let file = input_file::open(path).map_err(SnapshotError::open_archive(path))?;
        let staging = Staging::begin(directory).map_err(SnapshotError::from)?;
        Unpacking { archive: path, staging: &staging, options }.run(file)?;
        Ok(put_into_place(staging, options.sync)?)
    }
}

impl Snapshot {
    /// The files to pack, `state` first: it says which others there are.
    fn open_files(&self, directory: &OpenDirectory) -> Result<Vec<(String, File)>, SnapshotError> {
        let mut names = vec![STATE.to_owned()];
        names.extend(self.0.state.files().map(|(name, _)| name));
        // Opened anew: what the snapshot has open is at a position that others move.
        let open = |name: String| match directory.file(&name) {
            Ok(file) => Ok((name, file)),
            Err(source) => Err(SnapshotError::open(&directory.path.join(name))(source)),
        };
        let mut files = names.into_iter().map(open).collect::<Result<Vec<_>, _>>()?;
        files.extend(directory.file(WRITTEN).ok().map(|file| (WRITTEN.to_owned(), file)));
        Ok(files)
    }
}

fn write(
    files: Vec<(String, File)>,
    to: &File,
    options: &SnapshotOptions,
    interrupted: &Cell<bool>,
) -> io::Result<()> {
    let extents = files.iter().map(|(_, file)| Extents::of(file));
    let extents = extents.collect::<io::Result<Vec<_>>>()?;
    let total = extents.iter().map(|extents| extents.bytes).sum();
    let mut encoder = Encoder::new(to, LEVEL)?;
    encoder.include_checksum(true)?;
    let mut archive = Builder::new(Watched { encoder, done: 0, total, options, interrupted });
    archive.mode(HeaderMode::Deterministic);
    for ((name, mut file), extents) in files.into_iter().zip(extents) {
        file.rewind()?;
        archive.sparse(extents.count <= MAX_EXTENTS);
        archive.append_file(name, &mut file)?;
    }
    archive.into_inner()?.encoder.finish()?;
    Ok(())
}

/// Tells how much went through, and breaks off.
struct Watched<'a> {
    encoder: Encoder<'static, &'a File>,
    done: u64,
    total: u64,
    options: &'a SnapshotOptions,
    interrupted: &'a Cell<bool>,
}

impl Write for Watched<'_> {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        let before = self.done;
        let written = self.encoder.write(bytes)?;
        self.done += written as u64;
        let is_new_piece = before / BUFFER_BYTES as u64 != self.done / BUFFER_BYTES as u64;
        // The archive's own headers are not counted in the total.
        let done = self.done.min(self.total);
        if is_new_piece
            && self.options.report(SaveStage::Archive, done, Some(self.total)).is_break()
        {
            self.interrupted.set(true);
            return Err(io::Error::other("interrupted"));
        }
        Ok(written)
    }

    fn flush(&mut self) -> io::Result<()> {
        self.encoder.flush()
    }
}

/// A file that is written beside its place, and is gone unless it gets there.
struct Partial {
    /// Absolute, so that it means the same when the process goes elsewhere.
    target: PathBuf,
    path: PathBuf,
    file: File,
}

impl Partial {
    fn create(target: &Path) -> io::Result<Self> {
        let target = std::path::absolute(target)?;
        let name = target.file_name().ok_or(io::ErrorKind::InvalidInput)?;
        let mut partial = std::ffi::OsString::from(".");
        partial.push(name);
        partial.push(format!(".partial-{:032x}", u128::from_ne_bytes(random()?)));
        let path = target.with_file_name(partial);
        // What is in a guest's memory is its owner's alone.
        let file = File::options().write(true).create_new(true).mode(0o600).open(&path)?;
        Ok(Self { target, path, file })
    }

    fn commit(self, sync: bool) -> io::Result<()> {
        if sync {
            self.file.sync_all()?;
        }
        fs::rename(&self.path, &self.target)?;
        match self.target.parent() {
            Some(parent) if sync => File::open(parent)?.sync_all(),
            _ => Ok(()),
        }
    }
}

impl Drop for Partial {
    fn drop(&mut self) {
        // Where it has got to its place, nothing has this name.
        let _ = fs::remove_file(&self.path);
    }
}

/// Archives are read through this: each part of one may take so many bytes.
struct Bounded<'a, R> {
    reader: R,
    left: &'a Cell<u64>,
}

impl<R: Read> Read for Bounded<'_, R> {
    fn read(&mut self, target: &mut [u8]) -> io::Result<usize> {
        if self.left.get() == 0 && !target.is_empty() {
            return Err(io::Error::new(io::ErrorKind::InvalidData, "a header has no end"));
        }
        let len = target.len().min(usize::try_from(self.left.get()).unwrap_or(usize::MAX));
        let read = self.reader.read(target.get_mut(..len).unwrap_or_default())?;
        self.left.set(self.left.get().saturating_sub(read as u64));
        Ok(read)
    }
}

/// An archive on its way to a directory.
struct Unpacking<'a> {
    archive: &'a Path,
    staging: &'a Staging,
    options: &'a SnapshotOptions,
}

impl Unpacking<'_> {
    /// Writes the files.
    fn run(&self, file: File) -> Result<(), SnapshotError> {
        let left = Cell::new(0);
        let decoder = Decoder::new(file).and_then(|mut decoder| {
            decoder.window_log_max(MAX_WINDOW_LOG)?;
            Ok(decoder.single_frame())
        });
        let reader =
            Bounded { reader: decoder.map_err(|error| self.unreadable(error))?, left: &left };
        let mut archive = Archive::new(reader);
        let mut entries = archive.entries().map_err(|error| self.unreadable(error))?;
        let state = self.state(&mut entries, &left)?;
        let mut expected: Vec<_> = state.files().collect();
        expected.push((WRITTEN.to_owned(), 0));
        let total = expected.iter().map(|(_, bytes)| *bytes).fold(0, u64::saturating_add);
        let mut done = 0;
        while let Some(mut entry) = self.next(&mut entries, &left)? {
            let name = name_of(&entry);
            let Some(at) = expected.iter().position(|(known, _)| *known == name) else {
                return Err(self.refuse(ArchiveError::Foreign { name }));
            };
            let (_, bytes) = expected.swap_remove(at);
            if name == WRITTEN {
                self.written(&mut entry)?;
                continue;
            }
            if entry.size() != bytes {
                let found = entry.size();
                return Err(self.refuse(ArchiveError::Size { name, found, expected: bytes }));
            }
            self.copy(&mut entry, &name, bytes, (&mut done, total))?;
        }
        if let Some((name, _)) = expected.into_iter().find(|(name, _)| name != WRITTEN) {
            return Err(self.refuse(ArchiveError::Missing { name }));
        }
        self.end(archive.into_inner())
    }

    /// The first file, which says what the others are.
    fn state<R: Read>(
        &self,
        entries: &mut Entries<'_, R>,
        left: &Cell<u64>,
    ) -> Result<State, SnapshotError> {
        let mut entry =
            self.next(entries, left)?.ok_or_else(|| self.refuse(ArchiveError::NoState))?;
        if name_of(&entry) != STATE {
            return Err(self.refuse(ArchiveError::NoState));
        }
        let bytes = input_file::read_bounded(&mut entry, format::MAX_STATE_BYTES);
        let bytes = bytes.map_err(|error| self.unreadable(error))?;
        let (state, bytes) = State::read(bytes, &self.archive.join(STATE))?;
        let path = self.staging.path(STATE);
        let written = self.staging.create(STATE)?.write_all(&bytes);
        written.map_err(|source| SnapshotError::Write { path, source })?;
        Ok(state)
    }

    /// The next regular file.
    fn next<'e, R: Read>(
        &self,
        entries: &mut Entries<'e, R>,
        left: &Cell<u64>,
    ) -> Result<Option<Entry<'e, R>>, SnapshotError> {
        left.set(MAX_HEADER_BYTES);
        let Some(entry) = entries.next() else { return Ok(None) };
        let entry = entry.map_err(|error| self.unreadable(error))?;
        let kind = entry.header().entry_type();
        if !kind.is_file() && !kind.is_gnu_sparse() {
            return Err(self.refuse(ArchiveError::Foreign { name: name_of(&entry) }));
        }
        left.set(entry.size().saturating_add(MAX_HEADER_BYTES));
        Ok(Some(entry))
    }

    fn copy(
        &self,
        entry: &mut impl Read,
        name: &str,
        bytes: u64,
        (done, total): (&mut u64, u64),
    ) -> Result<(), SnapshotError> {
        let path = self.staging.path(name);
        let failed = |source| SnapshotError::Write { path: path.clone(), source };
        let file = self.staging.create(name)?;
        memory::set_len(&file, bytes).map_err(failed)?;
        let mut buffer = vec![0; BUFFER_BYTES];
        let mut at = 0;
        while at < bytes {
            let len = (bytes - at).min(BUFFER_BYTES as u64) as usize;
            let piece = buffer.get_mut(..len).unwrap_or_default();
            entry.read_exact(piece).map_err(|error| self.unreadable(error))?;
            write_sparse(&file, piece, at).map_err(failed)?;
            at += len as u64;
            *done += len as u64;
            if let ControlFlow::Break(()) =
                self.options.report(SaveStage::Archive, *done, Some(total))
            {
                return Err(SnapshotError::Interrupted);
            }
        }
        Ok(())
    }

    /// The pages that are worth having: of use, and no more.
    fn written(&self, entry: &mut impl Read) -> Result<(), SnapshotError> {
        let bytes = input_file::read_bounded(entry, format::MAX_STATE_BYTES);
        let bytes = bytes.map_err(|error| self.unreadable(error))?.unwrap_or_default();
        let path = self.staging.path(WRITTEN);
        let written = self.staging.create(WRITTEN)?.write_all(&bytes);
        written.map_err(|source| SnapshotError::Write { path, source })
    }

    /// Reads the little that follows the files: behind it is zstd's checksum.
    fn end(&self, bounded: Bounded<'_, Decoder<'_, BufReader<File>>>) -> Result<(), SnapshotError> {
        let mut decoder = bounded.reader;
        let rest = input_file::read_bounded(&mut decoder, BUFFER_BYTES as u64);
        let rest = rest.map_err(|error| self.unreadable(error))?;
        let behind = decoder.finish().read(&mut [0]).map_err(|error| self.unreadable(error))?;
        match rest.is_some_and(|rest| rest.iter().all(|byte| *byte == 0)) && behind == 0 {
            true => Ok(()),
            false => Err(self.refuse(ArchiveError::Trailing)),
        }
    }

    fn unreadable(&self, error: io::Error) -> SnapshotError {
        self.refuse(ArchiveError::Read(error))
    }

    fn refuse(&self, source: ArchiveError) -> SnapshotError {
        SnapshotError::Archive { path: self.archive.to_owned(), source }
    }
}

fn name_of<R: Read>(entry: &Entry<'_, R>) -> String {
    String::from_utf8_lossy(&entry.path_bytes()).into_owned()
}

impl State {
    /// The files of memory and disks, and how long they are.
    fn files(&self) -> impl Iterator<Item = (String, u64)> {
        let memory = self.memory.iter().enumerate();
        let memory = memory.map(|(layer, saved)| (memory_name(layer), saved.file_bytes()));
        memory.chain(self.disk_files().map(|(_, name, bytes)| (name, bytes)))
    }
}

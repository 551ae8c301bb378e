//! The guest's first file system: an archive that the kernel unpacks into memory.
//!
//! Source: Linux Documentation/driver-api/early-userspace/buffer-format.rst (cpio "newc").

use std::collections::BTreeMap;
use std::fs;
use std::io;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use cpio::newc;
use serde::{Deserialize, Serialize};
use thiserror::Error as ThisError;

use crate::error::{Error, ErrorKind};
use crate::input_file;
use crate::modules::Modules;

const S_IFDIR: u32 = 0o040_000;
const S_IFCHR: u32 = 0o020_000;
const S_IFREG: u32 = 0o100_000;
const S_IFLNK: u32 = 0o120_000;

/// The largest archive, and file in one, that is read: the kernel wants it below 2 GiB.
const MAX_BYTES: u64 = 2 << 30;

/// Why an initramfs cannot be read or built.
#[derive(Debug, ThisError)]
pub(crate) enum InitramfsError {
    #[error("cannot read {}", path.display())]
    Read { path: PathBuf, source: io::Error },
    #[error("{path:?} is no path for an initramfs: {reason}")]
    Path { path: String, reason: &'static str },
    #[error("{} is larger than {MAX_BYTES} bytes (2 GiB)", path.display())]
    TooLarge { path: PathBuf },
    #[error("cannot write the archive")]
    Write(#[source] io::Error),
}

impl From<InitramfsError> for Error {
    fn from(error: InitramfsError) -> Self {
        Error::new(ErrorKind::Initramfs, error)
    }
}

/// An initramfs: a file, bytes in memory, or built from parts by [`Initramfs::builder`].
///
/// The kernel takes a cpio archive, or several in a row, each plain or compressed in a way that
/// the kernel was built to read. What it holds is not looked at here.
#[derive(Clone, Debug, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Initramfs {
    source: Source,
}

#[derive(Clone, Debug, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
enum Source {
    File(PathBuf),
    #[serde(skip)]
    Bytes(Arc<[u8]>),
}

impl Initramfs {
    /// An archive file, read when a VM is created.
    pub fn file(path: impl Into<PathBuf>) -> Self {
        Self { source: Source::File(path.into()) }
    }

    /// An archive in memory. It does not serialize.
    pub fn bytes(archive: impl Into<Arc<[u8]>>) -> Self {
        Self { source: Source::Bytes(archive.into()) }
    }

    /// Builds an archive in memory, file by file.
    pub fn builder() -> InitramfsBuilder {
        InitramfsBuilder::default()
    }

    /// The archive's bytes, to keep or to look at.
    ///
    /// # Errors
    ///
    /// [`ErrorKind::Initramfs`] where the file cannot be read.
    pub fn read(&self) -> Result<Arc<[u8]>, Error> {
        Ok(self.load()?)
    }

    /// Where it comes from.
    #[cfg(feature = "image")]
    pub(crate) fn input_file(&self) -> input_file::InputFile<'_> {
        match &self.source {
            Source::File(path) => input_file::InputFile::File(path),
            Source::Bytes(bytes) => input_file::InputFile::Bytes(bytes),
        }
    }

    pub(crate) fn load(&self) -> Result<Arc<[u8]>, InitramfsError> {
        match &self.source {
            Source::Bytes(bytes) => Ok(Arc::clone(bytes)),
            Source::File(path) => read_bounded(path).map(Arc::from),
        }
    }
}

/// Builds an [`Initramfs`] from parts. Directories above a file are made by themselves, a later
/// entry replaces an earlier one of the same path, and equal input gives equal bytes: everything
/// belongs to root and has no time.
///
/// ```no_run
/// use dormouse::Initramfs;
///
/// let initramfs = Initramfs::builder()
///     .host_file("bin/busybox", "/bin/busybox")
///     .file("init", 0o755, "#!/bin/busybox sh\necho hello\n/bin/busybox poweroff -f\n")
///     .build()?;
/// # Ok::<(), dormouse::Error>(())
/// ```
#[derive(Clone, Debug, Default)]
pub struct InitramfsBuilder {
    entries: BTreeMap<String, Entry>,
    modules: BTreeMap<PathBuf, Vec<String>>,
}

#[derive(Clone, Debug)]
enum Entry {
    Directory { mode: u32 },
    File { mode: u32, content: Vec<u8> },
    HostFile { path: PathBuf },
    Symlink { target: String },
    CharDevice { mode: u32, major: u32, minor: u32 },
}

impl InitramfsBuilder {
    /// A file with these permission bits and this content.
    #[must_use]
    pub fn file(self, path: &str, mode: u32, content: impl Into<Vec<u8>>) -> Self {
        self.entry(path, Entry::File { mode, content: content.into() })
    }

    /// A copy of a file of the host, executable where that one is. It is read by
    /// [`build`](Self::build).
    #[must_use]
    pub fn host_file(self, path: &str, host_path: impl Into<PathBuf>) -> Self {
        self.entry(path, Entry::HostFile { path: host_path.into() })
    }

    /// Modules of the guest's kernel, such as `virtio_blk`, with all that they depend on: as
    /// `lib/modules/NN-name.ko`, unpacked, in the order in which `insmod` takes them. What is
    /// built into the kernel is left out. `dir` is a release's directory of modules, which
    /// [`Kernel::modules_dir`](crate::Kernel::modules_dir) knows of an installed kernel.
    ///
    /// A guest's init loads them so:
    ///
    /// ```sh
    /// for module in /lib/modules/*.ko; do insmod "$module"; done
    /// ```
    #[must_use]
    pub fn modules<S: Into<String>>(
        mut self,
        dir: impl Into<PathBuf>,
        names: impl IntoIterator<Item = S>,
    ) -> Self {
        let list = self.modules.entry(dir.into()).or_default();
        list.extend(names.into_iter().map(Into::into));
        self
    }

    /// A directory with these permission bits.
    #[must_use]
    pub fn directory(self, path: &str, mode: u32) -> Self {
        self.entry(path, Entry::Directory { mode })
    }

    /// A symbolic link.
    #[must_use]
    pub fn symlink(self, path: &str, target: &str) -> Self {
        self.entry(path, Entry::Symlink { target: target.to_owned() })
    }

    /// A character device, such as `dev/console` (5, 1).
    #[must_use]
    pub fn char_device(self, path: &str, mode: u32, major: u32, minor: u32) -> Self {
        self.entry(path, Entry::CharDevice { mode, major, minor })
    }

    fn entry(mut self, path: &str, entry: Entry) -> Self {
        let path = path.trim_matches('/').to_owned();
        self.entries.insert(path, entry);
        self
    }

    /// Reads the host's files and writes the archive: one copy of everything in memory.
    ///
    /// # Errors
    ///
    /// [`ErrorKind::Initramfs`]: a file of the host cannot be read, a module is not there, or a
    /// path is empty, holds a NUL byte, or leads through `.` or `..`, or below what is no directory.
    pub fn build(mut self) -> Result<Initramfs, Error> {
        for (dir, names) in std::mem::take(&mut self.modules) {
            for (at, module) in (0..).zip(Modules::in_directory(dir).load(&names, &[])?) {
                let path = format!("lib/modules/{at:02}-{}.ko", module.name);
                self = self.file(&path, 0o644, module.content.as_slice());
            }
        }
        let mut archive = Vec::new();
        for (inode, (path, entry)) in (1..).zip(self.with_parents()?) {
            write_entry(&mut archive, inode, &path, entry)?;
        }
        newc::trailer(&mut archive).map_err(InitramfsError::Write)?;
        Ok(Initramfs::bytes(archive))
    }

    /// The entries in an order in which every directory comes before what it holds.
    fn with_parents(self) -> Result<BTreeMap<String, Entry>, InitramfsError> {
        let mut all = self.entries.clone();
        for path in self.entries.keys() {
            check_path(path)?;
            for (at, _) in path.match_indices('/') {
                let above = all.entry(path[..at].to_owned());
                if !matches!(
                    above.or_insert(Entry::Directory { mode: 0o755 }),
                    Entry::Directory { .. }
                ) {
                    let reason =
                        "what is above it is no directory; behind a link, name where that leads";
                    return Err(InitramfsError::Path { path: path.clone(), reason });
                }
            }
        }
        Ok(all)
    }
}

fn check_path(path: &str) -> Result<(), InitramfsError> {
    let bad = |reason| Err(InitramfsError::Path { path: path.to_owned(), reason });
    if path.is_empty() {
        return bad("it is empty");
    }
    if path.contains('\0') {
        return bad("it holds a NUL byte");
    }
    if path.split('/').any(|part| matches!(part, "" | "." | "..")) {
        return bad("it has an empty part, `.` or `..`");
    }
    Ok(())
}

fn write_entry(
    archive: &mut Vec<u8>,
    inode: u32,
    path: &str,
    entry: Entry,
) -> Result<(), InitramfsError> {
    let header = newc::Builder::new(path).ino(inode).nlink(1);
    // Permission bits alone: the type is the entry's.
    let header_mode = |mode: u32| mode & 0o7777;
    let (header, content) = match entry {
        Entry::Directory { mode } => {
            (header.mode(S_IFDIR | header_mode(mode)).nlink(2), Vec::new())
        }
        Entry::File { mode, content } => (header.mode(S_IFREG | header_mode(mode)), content),
        Entry::HostFile { path } => {
            let (mode, content) = read_host_file(&path)?;
            (header.mode(S_IFREG | mode), content)
        }
        Entry::Symlink { target } => (header.mode(S_IFLNK | 0o777), target.into_bytes()),
        Entry::CharDevice { mode, major, minor } => (
            header.mode(S_IFCHR | header_mode(mode)).rdev_major(major).rdev_minor(minor),
            Vec::new(),
        ),
    };
    let len = u32::try_from(content.len())
        .map_err(|_| InitramfsError::TooLarge { path: PathBuf::from(path) })?;
    let mut writer = header.write(archive, len);
    io::Write::write_all(&mut writer, &content).map_err(InitramfsError::Write)?;
    writer.finish().map_err(InitramfsError::Write)?;
    Ok(())
}

fn read_host_file(path: &Path) -> Result<(u32, Vec<u8>), InitramfsError> {
    use std::os::unix::fs::PermissionsExt;

    let content = read_bounded(path)?;
    let mode = fs::metadata(path)
        .map_err(|source| InitramfsError::Read { path: path.into(), source })?
        .permissions()
        .mode();
    Ok((if mode & 0o111 == 0 { 0o644 } else { 0o755 }, content))
}

/// A file's content, at most [`MAX_BYTES`] of it.
fn read_bounded(path: &Path) -> Result<Vec<u8>, InitramfsError> {
    let failed = |source| InitramfsError::Read { path: path.into(), source };
    let file = input_file::open(path).map_err(failed)?;
    let content = input_file::read_bounded(file, MAX_BYTES).map_err(failed)?;
    content.ok_or_else(|| InitramfsError::TooLarge { path: path.into() })
}

#[cfg(test)]
mod tests {
    use super::*;

    fn names(initramfs: &Initramfs) -> Vec<(String, u32)> {
        let bytes = initramfs.load().unwrap();
        let mut rest: &[u8] = &bytes;
        let mut names = Vec::new();
        loop {
            let reader = newc::Reader::new(rest).unwrap();
            if reader.entry().is_trailer() {
                return names;
            }
            names.push((reader.entry().name().to_owned(), reader.entry().mode()));
            rest = reader.finish().unwrap();
        }
    }

    #[test]
    fn parents_are_made_and_come_first() {
        let built = Initramfs::builder()
            .file("/a/b/c", 0o600, "x")
            .symlink("a/link", "b/c")
            .char_device("dev/console", 0o600, 5, 1)
            .directory("a", 0o700)
            .build()
            .unwrap();
        assert_eq!(
            names(&built),
            [
                ("a".into(), 0o040_700),
                ("a/b".into(), 0o040_755),
                ("a/b/c".into(), 0o100_600),
                ("a/link".into(), 0o120_777),
                ("dev".into(), 0o040_755),
                ("dev/console".into(), 0o020_600),
            ]
        );
    }

    #[test]
    fn equal_input_gives_equal_bytes() {
        let build = |names: [&str; 2]| {
            let [a, b] = names;
            let builder = Initramfs::builder().file(a, 0o644, a).file(b, 0o644, b);
            builder.build().unwrap().load().unwrap()
        };
        assert_eq!(build(["x", "y/z"]), build(["y/z", "x"]));
    }

    #[test]
    fn bad_paths_and_missing_files_are_named() {
        for bad in ["", "/", "a//b", "../x", "a/./b", "a\0b"] {
            let error = Initramfs::builder().file(bad, 0o644, "").build().unwrap_err();
            assert_eq!(error.kind(), &ErrorKind::Initramfs, "{bad:?}");
        }
        for above in
            [Initramfs::builder().file("a", 0o644, ""), Initramfs::builder().symlink("a", "b")]
        {
            let error = above.directory("b", 0o755).file("a/c/d", 0o644, "").build().unwrap_err();
            assert!(error.to_string().contains("a/c/d"), "{error}");
        }
        let missing = Initramfs::builder().host_file("a", "/nonexistent/file").build();
        assert!(missing.unwrap_err().to_string().contains("/nonexistent/file"));
    }
}

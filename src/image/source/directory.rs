//! A directory of the host as a root file system.

use std::collections::{BTreeMap, BTreeSet};
use std::fs::{self, File, Metadata};
use std::io::{self, Read, Seek, SeekFrom};
use std::os::fd::{AsRawFd, OwnedFd};
use std::os::unix::ffi::OsStrExt;
use std::os::unix::fs::{FileTypeExt, MetadataExt};
use std::path::{Path, PathBuf};
use std::time::{Duration, SystemTime, UNIX_EPOCH};

use rustix::fs::{
    CWD, Mode, OFlags, ResolveFlags, getxattr, listxattr, major, minor, openat2, readlinkat,
};
use sha2::{Digest as _, Sha256};

use crate::image::ImageError;
use crate::image::digest::Digest;
use crate::image::layer::{Device, LayerFault, Time, Xattr};
use crate::image::rootfs::{Build, Content, Kind, Limits, Node, OnBytes, kept_xattrs};
use crate::input_file;

/// A file that changed this short ago may change again without another time of change.
const SETTLED: Duration = Duration::from_secs(2);
const COPY_BYTES: usize = 256 << 10;
const MAX_XATTR_BYTES: usize = 64 << 10;

/// What lies in a directory, as it was when it was looked at.
#[derive(Debug)]
pub(in crate::image) struct Directory {
    path: PathBuf,
    top: OwnedFd,
    /// Each with its path from there, a directory before what is in it, in order.
    files: Vec<(PathBuf, Metadata)>,
}

impl Directory {
    /// Looks at everything in it. Links are not followed, also not those that somebody puts there meanwhile.
    pub(in crate::image) fn open(path: &Path, limits: &Limits) -> Result<Self, ImageError> {
        let opened = |source| ImageError::Open { path: path.to_owned(), source };
        let flags = OFlags::PATH | OFlags::DIRECTORY | OFlags::CLOEXEC;
        let top = openat2(CWD, path, flags, Mode::empty(), ResolveFlags::empty());
        let top = top.map_err(|error| opened(error.into()))?;
        let metadata = fs::metadata(by_descriptor(&top)).map_err(opened)?;
        let mut files = vec![(PathBuf::new(), metadata)];
        let mut at = 0;
        while let Some((inner, metadata)) = files.get(at) {
            if metadata.is_dir() {
                let list = open_at(&top, inner, metadata).and_then(|place| list(&place, inner));
                let list = list.map_err(|fault| fault.of(&path.join(inner)))?;
                files.extend(list);
            }
            at += 1;
            if files.len() as u64 > limits.entries {
                let fault = LayerFault::Limit { what: "entries", limit: limits.entries };
                return Err(ImageError::Root(fault));
            }
        }
        files.sort_by(|a, b| a.0.cmp(&b.0));
        Ok(Self { path: path.to_owned(), top, files })
    }

    /// What stands for its content: the times of change of all in it, as the kernel sets them whenever
    /// something is written. Where that was a moment ago, no other reading has the same.
    pub(in crate::image) fn key(&self) -> Digest {
        let mut hasher = Sha256::new_with_prefix(b"directory\0");
        let mut newest = (0, 0);
        for (path, metadata) in &self.files {
            let path = path.as_os_str().as_bytes();
            hasher.update((path.len() as u64).to_le_bytes());
            hasher.update(path);
            for number in [metadata.dev(), metadata.ino(), metadata.size(), metadata.mode().into()]
            {
                hasher.update(number.to_le_bytes());
            }
            for time in [metadata.ctime(), metadata.ctime_nsec(), metadata.mtime()] {
                hasher.update(time.to_le_bytes());
            }
            newest = newest.max((metadata.ctime(), metadata.ctime_nsec()));
        }
        let now = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default();
        let settled = now.saturating_sub(SETTLED);
        if newest.0 >= settled.as_secs().cast_signed() {
            hasher.update(now.as_nanos().to_le_bytes());
        }
        Digest::end(hasher)
    }

    /// Bytes of all files, which [`build`](Self::build) copies.
    pub(in crate::image) fn bytes(&self) -> u64 {
        let mut seen = BTreeSet::new();
        let files = self.files.iter().map(|(_, metadata)| metadata);
        let once = files
            .filter(|metadata| metadata.is_file() && seen.insert((metadata.dev(), metadata.ino())));
        once.fold(0, |sum, metadata| sum.saturating_add(metadata.size()))
    }

    /// Makes it the root file system. What belongs to the owner of the directory itself belongs to root there.
    pub(in crate::image) fn build(
        &self,
        build: &mut Build,
        on_bytes: &mut OnBytes<'_>,
    ) -> Result<(), ImageError> {
        let owner = self.files.first().map(|(_, top)| (top.uid(), top.gid()));
        let (uid, gid) = owner.unwrap_or_default();
        let mut several: BTreeMap<(u64, u64), &Path> = BTreeMap::new();
        for (inner, metadata) in &self.files {
            let full = self.path.join(inner);
            let place = open_at(&self.top, inner, metadata).map_err(|fault| fault.of(&full))?;
            let name = inner.as_os_str().as_bytes();
            if metadata.nlink() > 1 && !metadata.is_dir() {
                let identity = (metadata.dev(), metadata.ino());
                if let Some(first) = several.get(&identity) {
                    let link = build.link(name, first.as_os_str().as_bytes());
                    link.map_err(ImageError::Root)?;
                    continue;
                }
            }
            let fault = |source| ImageError::Directory { path: full.clone(), source };
            let Some(kind) = kind(&full, &place, metadata, build, on_bytes)? else { continue };
            if metadata.nlink() > 1 && !metadata.is_dir() {
                several.insert((metadata.dev(), metadata.ino()), inner);
            }
            let xattrs = kept_xattrs(name, xattrs(&by_descriptor(&place)).map_err(fault)?);
            let node = Node {
                kind,
                mode: (metadata.mode() & 0o7777) as u16,
                uid: if metadata.uid() == uid { 0 } else { metadata.uid() },
                gid: if metadata.gid() == gid { 0 } else { metadata.gid() },
                mtime: Time {
                    seconds: metadata.mtime(),
                    nanoseconds: metadata.mtime_nsec() as u32,
                },
                xattrs: xattrs.map_err(ImageError::Root)?,
                names: 0,
            };
            build.put(name, node).map_err(ImageError::Root)?;
        }
        Ok(())
    }
}

/// Why something in the directory cannot be read.
enum Fault {
    /// It is another than the one that was listed.
    Changed,
    Io(io::Error),
}

impl Fault {
    fn of(self, path: &Path) -> ImageError {
        let path = path.to_owned();
        match self {
            Self::Changed => ImageError::Changed { path },
            Self::Io(source) => ImageError::Directory { path, source },
        }
    }
}

impl From<io::Error> for Fault {
    fn from(error: io::Error) -> Self {
        Self::Io(error)
    }
}

/// The very file that was listed, whatever it is, not opened for reading.
fn open_at(top: &OwnedFd, inner: &Path, metadata: &Metadata) -> Result<OwnedFd, Fault> {
    let inner = if inner.as_os_str().is_empty() { Path::new(".") } else { inner };
    let flags = OFlags::PATH | OFlags::NOFOLLOW | OFlags::CLOEXEC;
    let resolve = ResolveFlags::BENEATH | ResolveFlags::NO_SYMLINKS;
    let place = match openat2(top, inner, flags, Mode::empty(), resolve) {
        // A link or nothing, where there was a directory on the way.
        Err(rustix::io::Errno::LOOP | rustix::io::Errno::NOENT | rustix::io::Errno::NOTDIR) => {
            return Err(Fault::Changed);
        }
        place => place.map_err(io::Error::from)?,
    };
    let found = rustix::fs::fstat(&place).map_err(io::Error::from)?;
    let is_same = (found.st_dev, found.st_ino) == (metadata.dev(), metadata.ino());
    if is_same { Ok(place) } else { Err(Fault::Changed) }
}

/// A path to what a descriptor is of, past all names.
fn by_descriptor(place: &OwnedFd) -> PathBuf {
    format!("/proc/self/fd/{}", place.as_raw_fd()).into()
}

fn list(place: &OwnedFd, inner: &Path) -> Result<Vec<(PathBuf, Metadata)>, Fault> {
    let entries = fs::read_dir(by_descriptor(place))?.map(|entry| {
        let entry = entry?;
        Ok((inner.join(entry.file_name()), entry.metadata()?))
    });
    entries.collect::<io::Result<_>>().map_err(Fault::Io)
}

/// What it is; nothing if it is a socket, which only its process gives a meaning.
fn kind(
    path: &Path,
    place: &OwnedFd,
    metadata: &Metadata,
    build: &mut Build,
    on_bytes: &mut OnBytes<'_>,
) -> Result<Option<Kind>, ImageError> {
    let fault = |source| ImageError::Directory { path: path.to_owned(), source };
    let device = Device { major: major(metadata.rdev()), minor: minor(metadata.rdev()) };
    let file_type = metadata.file_type();
    Ok(Some(if file_type.is_dir() {
        Kind::Directory(BTreeMap::new())
    } else if file_type.is_symlink() {
        let target = readlinkat(place, "", Vec::new());
        let target = target.map_err(|error| fault(error.into()))?;
        Kind::Symlink(target.into_bytes().into())
    } else if file_type.is_file() {
        let file = input_file::open(&by_descriptor(place)).map_err(fault)?;
        Kind::File(content(path, file, metadata, build, on_bytes)?)
    } else if file_type.is_char_device() {
        Kind::Char(device)
    } else if file_type.is_block_device() {
        Kind::Block(device)
    } else if file_type.is_fifo() {
        Kind::Fifo
    } else {
        return Ok(None);
    }))
}

/// Copies a file's data, and leaves its holes out.
fn content(
    path: &Path,
    mut file: File,
    metadata: &Metadata,
    build: &mut Build,
    on_bytes: &mut OnBytes<'_>,
) -> Result<Content, ImageError> {
    let fault = |source| ImageError::Directory { path: path.to_owned(), source };
    let changed = || ImageError::Changed { path: path.to_owned() };
    if file.metadata().map_err(fault)?.size() != metadata.size() {
        return Err(changed());
    }
    let size = metadata.size();
    let content = build.begin_file(size).map_err(ImageError::Root)?;
    let (mut at, mut buffer) = (0, vec![0; COPY_BYTES]);
    while at < size {
        let data = rustix::fs::seek(&file, rustix::fs::SeekFrom::Data(at));
        let begin = match data {
            // Nothing but a hole up to the end.
            Err(rustix::io::Errno::NXIO) => size,
            Err(_) => at,
            Ok(begin) => begin.min(size),
        };
        let end =
            rustix::fs::seek(&file, rustix::fs::SeekFrom::Hole(begin)).unwrap_or(size).min(size);
        build.zeros(begin - at).map_err(ImageError::Root)?;
        on_bytes(begin - at).map_err(ImageError::Root)?;
        file.seek(SeekFrom::Start(begin)).map_err(fault)?;
        at = begin;
        while at < end {
            let wanted = usize::try_from(end - at).unwrap_or(usize::MAX).min(COPY_BYTES);
            let read = file.read(&mut buffer[..wanted]).map_err(fault)?;
            if read == 0 {
                return Err(changed());
            }
            build.data(&buffer[..read]).map_err(ImageError::Root)?;
            at += read as u64;
            on_bytes(read as u64).map_err(ImageError::Root)?;
        }
    }
    Ok(content)
}

fn xattrs(path: &Path) -> io::Result<Vec<Xattr>> {
    let mut buffer = vec![0; MAX_XATTR_BYTES];
    let length = match listxattr(path, &mut buffer[..]) {
        Err(rustix::io::Errno::OPNOTSUPP) => return Ok(Vec::new()),
        length => length?,
    };
    let list = buffer[..length].to_vec();
    let names = list.split(|&byte| byte == 0).filter(|name| !name.is_empty());
    let read = names.map(|name| {
        let length = getxattr(path, name, &mut buffer[..])?;
        Ok(Xattr { name: name.to_vec(), value: buffer[..length].to_vec() })
    });
    read.collect()
}

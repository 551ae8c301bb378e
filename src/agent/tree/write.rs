//! A tree of the guest, received and written: nothing outside of where it belongs, whatever the
//! guest says.
//!
//! Each name is one name, made below a directory that is open, and no link is followed, so there
//! is no path that a guest could lead elsewhere.

use std::ffi::OsStr;
use std::fs::File;
use std::io::{self, Seek, Write};
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::os::unix::ffi::OsStrExt;
use std::path::{Path, PathBuf};

use rustix::fs::{
    AtFlags, CWD, Mode, OFlags, Timespec, Timestamps, UTIME_OMIT, fchmod, ftruncate, futimens,
    mkdirat, openat, symlinkat, unlinkat,
};
use rustix::io::Errno;

use super::{BlockingWire, Copied, CopyLimits, MAX_DEPTH, TreeError, on_host};
use crate::agent::AgentError;
use crate::protocol::{Channel, Entry, Frame, Node, Stat, Wire};

/// What the host's system calls can count to.
const MAX_FILE_BYTES: u64 = i64::MAX as u64;

/// Writes what comes to a path.
pub(super) fn receive(
    wire: &mut BlockingWire,
    path: &Path,
    limits: &CopyLimits,
) -> Result<Copied, TreeError> {
    let mut writer = Writer::new(path, limits);
    loop {
        let node: Node = wire.message()?;
        match node {
            Node::File(entry) => {
                let mut file = writer.file(&entry)?;
                writer.fill(wire, &mut file)?;
                writer.finish_file(&file, &entry.stat)?;
            }
            Node::Directory(entry) => writer.enter(&entry)?,
            Node::Symlink(link) => writer.symlink(&link.entry, &link.target.0)?,
            Node::Leave => writer.leave()?,
            Node::End => break,
            Node::Failed(failure) => return Err(AgentError::Guest(failure).into()),
            Node::Hole(_) => return Err(hostile("a hole outside of a file")),
        }
    }
    if !writer.open.is_empty() {
        return Err(hostile("a directory without its end"));
    }
    Ok(writer.copied)
}

fn hostile(what: &'static str) -> TreeError {
    AgentError::Tree { what }.into()
}

/// What a file system gives to a file at least.
const BLOCK_BYTES: u64 = 4096;

struct Writer<'a> {
    root: &'a Path,
    limits: &'a CopyLimits,
    /// The directories that the next node is in, from the top; with what those shall be in the end that were not there.
    open: Vec<(OwnedFd, Option<Stat>)>,
    /// For errors.
    path: PathBuf,
    copied: Copied,
    /// What may have been taken of the disk: of a block, a byte between two holes takes all.
    taken: u64,
}

impl<'a> Writer<'a> {
    fn new(root: &'a Path, limits: &'a CopyLimits) -> Self {
        let (path, copied) = (root.to_owned(), Copied::default());
        Self { root, limits, open: Vec::new(), path, copied, taken: 0 }
    }

    /// The directory, and the name in it, of a node.
    fn place<'b>(&'b self, entry: &'b Entry) -> Result<(BorrowedFd<'b>, &'b Path), TreeError> {
        let name = &entry.name.0[..];
        let Some((directory, _)) = self.open.last() else {
            return match (name.is_empty(), self.copied.entries) {
                (true, 1) => Ok((CWD, self.root)),
                _ => Err(hostile("two roots")),
            };
        };
        let bad = name.is_empty() || name == b"." || name == b".." || name.len() > 255;
        if bad || name.contains(&b'/') || name.contains(&0) {
            return Err(hostile("a name that is none"));
        }
        Ok((directory.as_fd(), Path::new(OsStr::from_bytes(name))))
    }

    fn count(&mut self) -> Result<(), TreeError> {
        self.copied.entries += 1;
        match self.copied.entries > self.limits.entries {
            true => Err(AgentError::Entries { limit: self.limits.entries }.into()),
            false => Ok(()),
        }
    }

    fn take(&mut self, bytes: u64) -> Result<(), TreeError> {
        self.taken = self.taken.saturating_add(bytes);
        match self.taken > self.limits.bytes {
            true => Err(AgentError::TreeSize { limit: self.limits.bytes }.into()),
            false => Ok(()),
        }
    }

    fn failed(&self, entry: &Entry) -> impl FnOnce(Errno) -> TreeError {
        let path = match entry.name.0.is_empty() {
            true => self.path.clone(),
            false => self.path.join(OsStr::from_bytes(&entry.name.0)),
        };
        move |errno| on_host(&path)(errno.into())
    }

    /// A new file, in the place of what is there, if that is no directory.
    fn file(&mut self, entry: &Entry) -> Result<File, TreeError> {
        self.count()?;
        let (directory, name) = self.place(entry)?;
        remove(directory, name).map_err(self.failed(entry))?;
        let flags =
            OFlags::CREATE | OFlags::EXCL | OFlags::WRONLY | OFlags::NOFOLLOW | OFlags::CLOEXEC;
        let file = openat(directory, name, flags, Mode::RUSR | Mode::WUSR);
        Ok(File::from(file.map_err(self.failed(entry))?))
    }

    fn fill(&mut self, wire: &mut BlockingWire, file: &mut File) -> Result<(), TreeError> {
        let path = self.path.clone();
        let mut end = 0u64;
        loop {
            let Frame { channel, bytes } = wire.next()?;
            match channel {
                Channel::Data if bytes.is_empty() => {
                    return ftruncate(&*file, end).map_err(|error| on_host(&path)(error.into()));
                }
                Channel::Data => {
                    self.copied.bytes += bytes.len() as u64;
                    self.take(bytes.len() as u64)?;
                    end += bytes.len() as u64;
                    file.write_all(bytes).map_err(on_host(&path))?;
                }
                Channel::Message => match Node::from_bytes(bytes).map_err(AgentError::Malformed)? {
                    Node::Hole(0) => return Err(hostile("a hole of nothing")),
                    Node::Hole(hole) => {
                        let after = end.checked_add(hole).filter(|end| *end <= MAX_FILE_BYTES);
                        end = after.ok_or_else(|| hostile("a file without an end"))?;
                        self.take(hole.min(BLOCK_BYTES))?;
                        file.seek(io::SeekFrom::Start(end)).map_err(on_host(&path))?;
                    }
                    Node::Failed(failure) => return Err(AgentError::Guest(failure).into()),
                    _ => return Err(hostile("a file in a file")),
                },
                _ => return Err(AgentError::Unexpected.into()),
            }
        }
    }

    fn finish_file(&self, file: &File, stat: &Stat) -> Result<(), TreeError> {
        let set = fchmod(file, mode(stat)).and_then(|()| futimens(file, &times(stat)));
        set.map_err(|error| on_host(&self.path)(error.into()))
    }

    fn symlink(&mut self, entry: &Entry, target: &[u8]) -> Result<(), TreeError> {
        self.count()?;
        if target.contains(&0) {
            return Err(hostile("a link to what is no path"));
        }
        let (directory, name) = self.place(entry)?;
        remove(directory, name).map_err(self.failed(entry))?;
        symlinkat(OsStr::from_bytes(target), directory, name).map_err(self.failed(entry))
    }

    fn enter(&mut self, entry: &Entry) -> Result<(), TreeError> {
        self.count()?;
        if self.open.len() == MAX_DEPTH {
            return Err(hostile("directories that are too deep"));
        }
        let (directory, name) = self.place(entry)?;
        // What was there is the host's, and stays as it is.
        let stat = match mkdirat(directory, name, Mode::RWXU) {
            Ok(()) => Some(entry.stat.clone()),
            Err(Errno::EXIST) => None,
            Err(error) => return Err(self.failed(entry)(error)),
        };
        let flags = OFlags::DIRECTORY | OFlags::NOFOLLOW | OFlags::RDONLY | OFlags::CLOEXEC;
        let opened = openat(directory, name, flags, Mode::empty()).map_err(self.failed(entry))?;
        if !entry.name.0.is_empty() {
            self.path.push(OsStr::from_bytes(&entry.name.0));
        }
        self.open.push((opened, stat));
        Ok(())
    }

    /// A directory gets its mode when nothing is written to it any more.
    fn leave(&mut self) -> Result<(), TreeError> {
        let Some((directory, stat)) = self.open.pop() else {
            return Err(hostile("the end of no directory"));
        };
        if let Some(stat) = stat {
            let set =
                fchmod(&directory, mode(&stat)).and_then(|()| futimens(&directory, &times(&stat)));
            set.map_err(|error| on_host(&self.path)(error.into()))?;
        }
        if !self.open.is_empty() {
            self.path.pop();
        }
        Ok(())
    }
}

fn remove(directory: BorrowedFd<'_>, name: &Path) -> Result<(), Errno> {
    match unlinkat(directory, name, AtFlags::empty()) {
        Ok(()) | Err(Errno::NOENT) => Ok(()),
        Err(error) => Err(error),
    }
}

/// Permissions, and nothing that would give a program of the guest's another user's rights here.
fn mode(stat: &Stat) -> Mode {
    Mode::from_raw_mode(stat.mode & 0o777)
}

fn times(stat: &Stat) -> Timestamps {
    let nanoseconds = stat.modified_ns;
    let modified = Timespec {
        tv_sec: nanoseconds.div_euclid(1_000_000_000),
        tv_nsec: nanoseconds.rem_euclid(1_000_000_000),
    };
    Timestamps {
        last_access: Timespec { tv_sec: 0, tv_nsec: UTIME_OMIT },
        last_modification: modified,
    }
}

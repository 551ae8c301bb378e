//! Trees of files, copied into the guest and out of it.
//!
//! A directory is held by a descriptor and its files are named in it, so that no program of the
//! guest can lead a copy elsewhere by a link that it puts in a directory's place.

use std::ffi::{OsStr, OsString};
use std::fs::{File, Permissions};
use std::io::{self, Seek, SeekFrom, Write};
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::os::unix::ffi::{OsStrExt, OsStringExt};
use std::os::unix::fs::{FileExt, MetadataExt, PermissionsExt, fchown};
use std::path::{Path, PathBuf};

use crate::connection::{Connection, invalid};
use crate::failure::absolute;
use crate::files::{
    MAX_DEPTH, Temporary, follow, metadata_at, open_directory, open_directory_at, remove_tree,
    stat_of,
};
use crate::protocol::{
    Bytes, Channel, Entry, Failure, FailureKind, FileKind, MAX_DATA_BYTES, Node, Stat, Symlink,
};
use crate::sys::{self, DirectoryEntries, open_flags};

/// Why a copy ends early.
enum Stop {
    /// The connection's error: nobody is there to hear of it.
    Connection(io::Error),
    Failure(Failure),
    /// What the host cannot read on: nothing more comes of it.
    HostFailure(Failure),
}

impl From<io::Error> for Stop {
    fn from(error: io::Error) -> Self {
        Self::Connection(error)
    }
}

impl From<Failure> for Stop {
    fn from(failure: Failure) -> Self {
        Self::Failure(failure)
    }
}

fn stopped(verb: &str, path: &Path, error: &io::Error) -> Stop {
    Stop::Failure(Failure::of_path(verb, path, error))
}

/// A directory above the root of a tree, and the root's name in it.
fn root_of(path: &Bytes) -> Result<(PathBuf, OwnedFd, OsString), Failure> {
    let path = absolute(path)?;
    let opened = (|| {
        let path = follow(&path)?;
        // `/` and what ends with `..` have no name of their own.
        Ok(match (path.parent(), path.file_name()) {
            (Some(parent), Some(name)) => (open_directory(parent)?.into(), name.to_owned()),
            _ => (open_directory(&path)?.into(), OsString::from(".")),
        })
    })();
    let (parent, name) = opened.map_err(|e: io::Error| Failure::of_path("open", &path, &e))?;
    Ok((path, parent, name))
}

/// Sends a tree to the host.
pub(crate) fn copy_out(connection: &mut Connection, path: &Bytes) -> io::Result<()> {
    let root = root_of(path).and_then(|(path, parent, name)| {
        let metadata = metadata_at(parent.as_fd(), &name);
        let metadata = metadata.map_err(|e| Failure::of_path("copy", &path, &e))?;
        Ok((path, parent, name, stat_of(&metadata)))
    });
    let (path, parent, name, stat) = match root {
        Ok(root) => root,
        Err(failure) => return connection.answer(Err(failure)),
    };
    connection.answer(Ok(()))?;
    let mut out = CopyOut { connection, path, levels: Vec::new() };
    let result = match out.send(parent.as_fd(), &name, Bytes::default(), stat) {
        Ok(()) => out.walk(),
        Err(stop) => Err(stop),
    };
    connection.send(&match result {
        Ok(()) => Node::End,
        Err(Stop::Failure(failure) | Stop::HostFailure(failure)) => Node::Failed(failure),
        Err(Stop::Connection(error)) => return Err(error),
    })
}

struct CopyOut<'a> {
    connection: &'a mut Connection,
    /// Of the directory that is read.
    path: PathBuf,
    levels: Vec<DirectoryEntries>,
}

impl CopyOut<'_> {
    /// Sends what is in the directories that were begun.
    fn walk(&mut self) -> Result<(), Stop> {
        while let Some(mut entries) = self.levels.pop() {
            let name = entries.next().map_err(|e| stopped("list", &self.path, &e))?;
            let Some(name) = name else {
                self.connection.queue(&Node::Leave)?;
                self.path.pop();
                continue;
            };
            let directory = entries.directory().try_clone_to_owned();
            let directory = directory.map_err(|e| stopped("list", &self.path, &e))?;
            self.levels.push(entries);
            let os_name = OsString::from_vec(name.clone());
            let Ok(metadata) = metadata_at(directory.as_fd(), &os_name) else {
                // It has gone since.
                continue;
            };
            self.path.push(&os_name);
            let depth = self.levels.len();
            self.send(directory.as_fd(), &os_name, Bytes(name), stat_of(&metadata))?;
            if self.levels.len() == depth {
                self.path.pop();
            }
        }
        Ok(())
    }

    /// Sends a file or a link, or begins a directory.
    fn send(
        &mut self,
        parent: BorrowedFd<'_>,
        os_name: &OsStr,
        name: Bytes,
        stat: Stat,
    ) -> Result<(), Stop> {
        match stat.kind {
            FileKind::Other => {}
            FileKind::Symlink => {
                let target = sys::link_target_at(parent, os_name);
                let target = target.map_err(|e| stopped("read", &self.path, &e))?;
                let entry = Entry { name, stat };
                let link = Symlink { entry, target: Bytes(target) };
                self.connection.queue(&Node::Symlink(link))?;
            }
            FileKind::Directory => {
                if self.levels.len() >= MAX_DEPTH {
                    let what = format!("copy what is so deep as {}", self.path.display());
                    return Err(Failure::new(FailureKind::Invalid, what).into());
                }
                let directory = open_directory_at(parent, os_name);
                let directory = directory.map_err(|e| stopped("list", &self.path, &e))?;
                self.levels.push(DirectoryEntries::new(directory));
                self.connection.queue(&Node::Directory(Entry { name, stat }))?;
            }
            FileKind::File => {
                let flags = open_flags::READ | open_flags::NOFOLLOW | open_flags::NONBLOCK;
                let file = sys::open_at(parent, os_name, flags, 0);
                let file = file.map_err(|e| stopped("read", &self.path, &e))?;
                let size = stat.size;
                self.connection.queue(&Node::File(Entry { name, stat }))?;
                self.send_bytes(&file, size)?;
                self.connection.queue_end()?;
            }
        }
        Ok(())
    }

    /// Sends the data of a file, and its holes as such.
    fn send_bytes(&mut self, file: &File, size: u64) -> Result<(), Stop> {
        let mut at = 0;
        // A file that is not sparse is read without asking where its data is.
        let is_sparse = file.metadata().is_ok_and(|file| file.blocks() * 512 < file.size());
        while is_sparse && at < size {
            let data = match sys::seek_data(file, at) {
                Ok(data) => data.unwrap_or(size).min(size),
                // Of a file system that does not say.
                Err(_) => break,
            };
            if data > at {
                self.connection.queue(&Node::Hole(data - at))?;
            }
            let end = sys::seek_hole(file, data).ok().flatten().unwrap_or(size).min(size);
            at = self.send_data(file, data, end)?;
            if at < end {
                return Ok(());
            }
        }
        // The rest, up to its end, which may have moved.
        self.send_data(file, at, u64::MAX)?;
        Ok(())
    }

    fn send_data(&mut self, file: &File, mut at: u64, end: u64) -> Result<u64, Stop> {
        while at < end {
            let max = usize::try_from(end - at).unwrap_or(usize::MAX).min(MAX_DATA_BYTES);
            match self.connection.queue_data(max, |bytes| file.read_at(bytes, at))? {
                Ok(0) => break,
                Ok(count) => at += count as u64,
                Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
                Err(error) => return Err(stopped("read", &self.path, &error)),
            }
        }
        Ok(at)
    }
}

/// Takes a tree from the host.
pub(crate) fn copy_in(connection: &mut Connection, path: &Bytes) -> io::Result<()> {
    let (path, parent, name) = match root_of(path) {
        Ok(root) => root,
        Err(failure) => return connection.answer(Err(failure)),
    };
    connection.answer(Ok(()))?;
    let mut copy = CopyIn { connection, parent, name, path, levels: Vec::new() };
    match copy.run() {
        Ok(()) => connection.answer(Ok(())),
        Err(Stop::Connection(error)) => Err(error),
        Err(Stop::HostFailure(failure)) => connection.answer(Err(failure)),
        Err(Stop::Failure(failure)) => {
            connection.answer(Err(failure))?;
            // The host need not send the rest; what comes of it is thrown away.
            loop {
                let frame = connection.receive()?;
                if frame.channel != Channel::Message {
                    continue;
                }
                if let Node::End | Node::Failed(_) = frame.parse().map_err(invalid)? {
                    return Ok(());
                }
            }
        }
    }
}

struct CopyIn<'a> {
    connection: &'a mut Connection,
    /// The directory above the root, and the root's name in it.
    parent: OwnedFd,
    name: OsString,
    /// Of what is written.
    path: PathBuf,
    levels: Vec<Level>,
}

/// A directory that is filled. It gets its mode, owner and time when it is full, as it may not be for
/// the agent to write to, and is changed by each new file.
struct Level {
    directory: OwnedFd,
    stat: Stat,
    is_new: bool,
}

impl CopyIn<'_> {
    fn run(&mut self) -> Result<(), Stop> {
        loop {
            match self.connection.receive_message()? {
                Node::End if self.levels.is_empty() => return Ok(()),
                Node::Directory(entry) => {
                    let name = self.enter(&entry.name)?;
                    self.begin_directory(name, entry.stat)?;
                }
                Node::File(entry) => {
                    let name = self.enter(&entry.name)?;
                    self.take_file(&name, &entry.stat)?;
                    self.leave();
                }
                Node::Symlink(link) => {
                    let name = self.enter(&link.entry.name)?;
                    let made = self.make_link(&name, &link);
                    made.map_err(|e| stopped("write", &self.path, &e))?;
                    self.leave();
                }
                Node::Leave => {
                    let level = self
                        .levels
                        .pop()
                        .ok_or_else(|| io::Error::from(io::ErrorKind::InvalidData))?;
                    level.finish().map_err(|e| stopped("write", &self.path, &e))?;
                    self.leave();
                }
                Node::Failed(failure) => return Err(Stop::HostFailure(failure)),
                Node::End | Node::Hole(_) => {
                    let what = format!("go on with {}, which was cut off", self.path.display());
                    return Err(Failure::new(FailureKind::Invalid, what).into());
                }
            }
        }
    }

    fn directory(&self) -> BorrowedFd<'_> {
        self.levels.last().map_or(self.parent.as_fd(), |level| level.directory.as_fd())
    }

    /// The name of a node in its directory, checked; the root has that of the path.
    fn enter(&mut self, name: &Bytes) -> Result<OsString, Stop> {
        if self.levels.is_empty() {
            return match name.0.is_empty() {
                true => Ok(self.name.clone()),
                false => Err(Stop::Connection(io::ErrorKind::InvalidData.into())),
            };
        }
        let is_name = !matches!(&name.0[..], b"" | b"." | b"..")
            && !name.0.iter().any(|byte| matches!(byte, b'/' | 0));
        let name = OsStr::from_bytes(&name.0);
        if !is_name {
            let what = format!("copy to the name {}", name.as_bytes().escape_ascii());
            return Err(Failure::new(FailureKind::Invalid, what).into());
        }
        self.path.push(name);
        Ok(name.to_owned())
    }

    fn leave(&mut self) {
        if !self.levels.is_empty() {
            self.path.pop();
        }
    }

    fn begin_directory(&mut self, name: OsString, stat: Stat) -> Result<(), Stop> {
        if self.levels.len() >= MAX_DEPTH {
            return Err(Failure::new(FailureKind::Invalid, "copy so deep a tree").into());
        }
        let opened = (|| {
            let is_new = match sys::make_directory_at(self.directory(), &name, 0o700) {
                Ok(()) => true,
                Err(error) if error.kind() == io::ErrorKind::AlreadyExists => false,
                Err(error) => return Err(error),
            };
            Ok((open_directory_at(self.directory(), &name)?, is_new))
        })();
        let (directory, is_new) = opened.map_err(|e| stopped("enter", &self.path, &e))?;
        self.levels.push(Level { directory, stat, is_new });
        Ok(())
    }

    fn temporary(&self) -> io::Result<Temporary> {
        Ok(Temporary::in_directory(self.directory().try_clone_to_owned()?))
    }

    fn make_link(&self, name: &OsStr, link: &Symlink) -> io::Result<()> {
        let stat = &link.entry.stat;
        let temporary = self.temporary()?;
        temporary.create_symlink(OsStr::from_bytes(&link.target.0))?;
        let directory = temporary.rename(name)?;
        sys::change_owner_at(directory.as_fd(), name, (stat.uid, stat.gid))?;
        sys::set_modified_at(directory.as_fd(), name, stat.modified_ns)
    }

    fn take_file(&mut self, name: &OsStr, stat: &Stat) -> Result<(), Stop> {
        let made = self.temporary().and_then(|temporary| Ok((temporary.create()?, temporary)));
        let (mut file, temporary) = made.map_err(|e| stopped("write", &self.path, &e))?;
        let mut length = 0_u64;
        loop {
            let frame = self.connection.receive()?;
            let written = match frame.channel {
                Channel::Data if frame.bytes.is_empty() => break,
                Channel::Data => {
                    length = length.saturating_add(frame.bytes.len() as u64);
                    file.write_all(frame.bytes)
                }
                Channel::Message => match frame.parse().map_err(invalid)? {
                    Node::Hole(bytes) => {
                        length = length.saturating_add(bytes);
                        file.seek(SeekFrom::Start(length)).map(|_| ())
                    }
                    Node::Failed(failure) => return Err(Stop::HostFailure(failure)),
                    _ => return Err(Failure::new(FailureKind::Invalid, "copy half a file").into()),
                },
                _ => return Err(Stop::Connection(io::ErrorKind::InvalidData.into())),
            };
            written.map_err(|e| stopped("write", &self.path, &e))?;
        }
        let finished = (|| {
            // A hole at the end is not written.
            if file.metadata()?.len() < length {
                file.set_len(length)?;
            }
            fchown(&file, Some(stat.uid), Some(stat.gid))?;
            file.set_permissions(Permissions::from_mode(stat.mode & 0o7777))?;
            let directory = temporary.rename(name)?;
            sys::set_modified_at(directory.as_fd(), name, stat.modified_ns)
        })();
        finished.map_err(|e| stopped("write", &self.path, &e))
    }
}

impl Level {
    fn finish(self) -> io::Result<()> {
        // One that was there keeps what it had.
        if !self.is_new {
            return Ok(());
        }
        let stat = &self.stat;
        fchown(&self.directory, Some(stat.uid), Some(stat.gid))?;
        let directory = File::from(self.directory);
        directory.set_permissions(Permissions::from_mode(stat.mode & 0o7777))?;
        sys::set_modified_at(directory.as_fd(), OsStr::new("."), stat.modified_ns)
    }
}

/// Removes what is on the same file system below a directory, as far as that goes.
pub(crate) fn clear(root: BorrowedFd<'_>, device: u64) {
    let Ok(root) = root.try_clone_to_owned() else { return };
    let mut entries = DirectoryEntries::new(root);
    while let Ok(Some(name)) = entries.next() {
        let name = OsString::from_vec(name);
        let Ok(metadata) = metadata_at(entries.directory(), &name) else { continue };
        if metadata.dev() != device {
            continue;
        }
        let _ = match metadata.is_dir() {
            true => remove_tree(entries.directory(), &name, Some(device)),
            false => sys::remove_at(entries.directory(), &name, false),
        };
    }
}

#[cfg(test)]
#[path = "tests/tree.rs"]
mod tests;

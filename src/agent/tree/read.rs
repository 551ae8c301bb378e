//! A tree of the host, read and sent.

use std::fs::{self, File, Metadata};
use std::io::{self, Read, Seek};
use std::os::unix::ffi::OsStrExt;
use std::os::unix::fs::MetadataExt;
use std::path::Path;

use rustix::fs::{SeekFrom, seek};
use rustix::io::Errno;

use super::{BlockingWire, Copied, MAX_DEPTH, TreeError, on_host};
use crate::agent::AgentError;
use crate::protocol::{Bytes, Entry, FileKind, HEADER_BYTES, MAX_DATA_BYTES, Node, Stat, Symlink};

/// Sends what is at a path, and waits until the guest has it.
pub(super) fn send(wire: &mut BlockingWire, path: &Path) -> Result<Copied, TreeError> {
    let mut sender = Sender { wire, copied: Copied::default(), buffer: Vec::new() };
    sender.node(path, Bytes::default(), 0)?;
    sender.wire.send(&Node::End)?;
    let copied = sender.copied;
    wire.last_word()?;
    Ok(copied)
}

struct Sender<'a> {
    wire: &'a mut BlockingWire,
    copied: Copied,
    buffer: Vec<u8>,
}

impl Sender<'_> {
    fn node(&mut self, path: &Path, name: Bytes, depth: usize) -> Result<(), TreeError> {
        let facts = fs::symlink_metadata(path).map_err(on_host(path))?;
        let kind = facts.file_type();
        let entry = |kind| Entry { name: name.clone(), stat: stat(kind, &facts) };
        if kind.is_symlink() {
            let target = fs::read_link(path).map_err(on_host(path))?;
            let target = Bytes::from(target.as_os_str().as_bytes());
            self.wire.send(&Node::Symlink(Symlink { entry: entry(FileKind::Symlink), target }))?;
        } else if kind.is_file() {
            self.wire.send(&Node::File(entry(FileKind::File)))?;
            self.file(path)?;
        } else if kind.is_dir() {
            if depth == MAX_DEPTH {
                return Err(AgentError::Deep { path: path.to_owned(), limit: MAX_DEPTH }.into());
            }
            self.wire.send(&Node::Directory(entry(FileKind::Directory)))?;
            for child in fs::read_dir(path).map_err(on_host(path))? {
                let child = child.map_err(on_host(path))?;
                let name = Bytes::from(child.file_name().as_bytes());
                self.node(&child.path(), name, depth + 1)?;
            }
            self.wire.send(&Node::Leave)?;
        } else {
            return Ok(());
        }
        self.copied.entries += 1;
        Ok(())
    }

    /// A file's bytes, without those that it does not have.
    fn file(&mut self, path: &Path) -> Result<(), TreeError> {
        let mut file = File::open(path).map_err(on_host(path))?;
        let size = file.metadata().map_err(on_host(path))?.len();
        let mut at = 0;
        while at < size {
            let (data, hole) = next_data(&file, at, size).map_err(on_host(path))?;
            if data > at {
                self.wire.send(&Node::Hole(data - at))?;
            }
            file.seek(io::SeekFrom::Start(data)).map_err(on_host(path))?;
            self.data(&mut file, hole - data).map_err(|error| match error {
                DataError::File(error) => on_host(path)(error),
                DataError::Wire(error) => error,
            })?;
            at = hole;
        }
        self.buffer.resize(HEADER_BYTES, 0);
        self.wire.send_data(&mut self.buffer)
    }

    fn data(&mut self, file: &mut File, mut left: u64) -> Result<(), DataError> {
        while left > 0 {
            let room = usize::try_from(left).unwrap_or(usize::MAX).min(MAX_DATA_BYTES);
            self.buffer.resize(HEADER_BYTES + room, 0);
            let read = file.read(&mut self.buffer[HEADER_BYTES..]).map_err(DataError::File)?;
            if read == 0 {
                // It has become shorter.
                return Ok(());
            }
            let frame = &mut self.buffer[..HEADER_BYTES + read];
            self.wire.send_data(frame).map_err(DataError::Wire)?;
            self.copied.bytes += read as u64;
            left -= read as u64;
        }
        Ok(())
    }
}

enum DataError {
    File(io::Error),
    Wire(TreeError),
}

/// Where the next data begins and ends; both are the file's size if there is none.
fn next_data(file: &File, at: u64, size: u64) -> io::Result<(u64, u64)> {
    let data = match seek(file, SeekFrom::Data(at)) {
        Ok(data) => data.clamp(at, size),
        Err(Errno::NXIO) => return Ok((size, size)),
        Err(Errno::INVAL) => return Ok((at, size)),
        Err(error) => return Err(error.into()),
    };
    let hole = seek(file, SeekFrom::Hole(data)).unwrap_or(size);
    Ok((data, hole.clamp(data, size)))
}

fn stat(kind: FileKind, facts: &Metadata) -> Stat {
    Stat {
        kind,
        mode: facts.mode() & 0o7777,
        // The numbers of this host's users mean nothing in the guest.
        uid: 0,
        gid: 0,
        size: facts.size(),
        modified_ns: facts.mtime().saturating_mul(1_000_000_000).saturating_add(facts.mtime_nsec()),
    }
}

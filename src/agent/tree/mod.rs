//! Trees of files, into the guest and out of it: modes, links, holes.
//!
//! A tree is read and written by blocking calls, on a thread that tokio keeps for those. Dropping
//! the future ends the connection, and with it the copy, after the file that it is at. So does a guest
//! that takes or says nothing for as long as an answer may take.

mod read;
mod write;

#[cfg(test)]
mod tests;

use std::io::{self, Read, Write};
use std::net::Shutdown;
use std::path::{Path, PathBuf};

use rustix::io::Errno;
use rustix::net::{RecvFlags, recv};

use super::connection::lost;
use super::metadata::path_bytes;
use super::patience::{PATIENCE, PatientSocket, silent};
use super::{Agent, AgentError};
use crate::error::Error;
use crate::protocol::{Call, Channel, Frame, HEADER_BYTES, Node, Reply, Wire};

/// Directories below one another, at most: each is an open descriptor.
const MAX_DEPTH: usize = 128;

/// How much a guest may put on the host's disk by [`Agent::copy_out_with`].
#[derive(Clone, Debug)]
pub struct CopyLimits {
    bytes: u64,
    entries: u64,
}

impl Default for CopyLimits {
    /// 16 GiB, and a million files, directories and links.
    fn default() -> Self {
        Self { bytes: 16 << 30, entries: 1 << 20 }
    }
}

impl CopyLimits {
    /// The default ones.
    pub fn new() -> Self {
        Self::default()
    }

    /// Bytes of all files together, of each of their holes 4 KiB at most, as a byte between two of them takes a block of
    /// the disk; 16 GiB unless set.
    #[must_use]
    pub fn bytes(mut self, bytes: u64) -> Self {
        self.bytes = bytes;
        self
    }

    /// Files, directories and links together; 1,048,576 unless set.
    #[must_use]
    pub fn entries(mut self, entries: u64) -> Self {
        self.entries = entries;
        self
    }
}

/// What was copied.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
#[non_exhaustive]
pub struct Copied {
    /// Bytes of all files, without their holes.
    pub bytes: u64,
    /// Files, directories and links, with the one at the top.
    pub entries: u64,
}

impl Agent {
    /// Copies a file, or a directory with all that is in it, into the guest, where it gets the
    /// name `guest`. Modes, links and holes are kept; everything belongs to the guest's root;
    /// devices, pipes and sockets are left out. What is there of a directory stays, but for
    /// files of the same names.
    ///
    /// # Errors
    ///
    /// [`ErrorKind::File`](crate::ErrorKind::File) where it cannot be read here, or written there;
    /// some of it may be there then. Else as [every call](crate::Agent#errors-of-every-call).
    pub async fn copy_in(
        &self,
        host: impl AsRef<Path>,
        guest: impl AsRef<Path>,
    ) -> Result<Copied, Error> {
        let call = Call::CopyIn(path_bytes(guest.as_ref()));
        let host = host.as_ref().to_owned();
        self.copy(&call, move |wire| read::send(wire, &host)).await
    }

    /// Copies a file, or a directory with all that is in it, out of the guest, to the path `host`.
    /// Permissions (not set-user-id and set-group-id), links and holes are kept; everything
    /// belongs to this process's user; devices, pipes and sockets are left out. Directories that are there keep their
    /// mode and time.
    ///
    /// Whatever the guest says its files are, nothing outside of `host` is written: names lead
    /// nowhere, and links are made but never followed.
    ///
    /// # Errors
    ///
    /// As [`copy_in`](Self::copy_in), and [`ErrorKind::Resources`](crate::ErrorKind::Resources)
    /// for more than the default [`CopyLimits`].
    pub async fn copy_out(
        &self,
        guest: impl AsRef<Path>,
        host: impl AsRef<Path>,
    ) -> Result<Copied, Error> {
        self.copy_out_with(guest, host, &CopyLimits::default()).await
    }

    /// As [`copy_out`](Self::copy_out), for at most so much.
    ///
    /// # Errors
    ///
    /// As that one.
    pub async fn copy_out_with(
        &self,
        guest: impl AsRef<Path>,
        host: impl AsRef<Path>,
        limits: &CopyLimits,
    ) -> Result<Copied, Error> {
        let call = Call::CopyOut(path_bytes(guest.as_ref()));
        let (host, limits) = (host.as_ref().to_owned(), limits.clone());
        self.copy(&call, move |wire| write::receive(wire, &host, &limits)).await
    }

    async fn copy(
        &self,
        call: &Call,
        work: impl FnOnce(&mut BlockingWire) -> Result<Copied, TreeError> + Send + 'static,
    ) -> Result<Copied, Error> {
        let mut connection = self.calls().call(call).await?;
        match connection.reply(self.calls().vsock()).await? {
            Reply::Done => {}
            other => return Err(AgentError::refused(other).into()),
        }
        let (stream, ongoing) = connection.into_stream()?;
        let socket = stream.into_std().and_then(|socket| PatientSocket::new(socket, PATIENCE));
        let socket = socket.map_err(AgentError::Socket)?;
        let guard = EndOnDrop(socket.clone());
        let done = tokio::task::spawn_blocking(move || {
            // It goes on here, even if nobody waits for it any more.
            let _ongoing = ongoing;
            let mut wire = BlockingWire { socket, body: Vec::new() };
            let copied = work(&mut wire);
            match copied {
                // The guest says better why its end failed.
                Err(TreeError::Wire) => wire.last_word().and(copied),
                copied => copied,
            }
        });
        let copied = done.await;
        drop(guard);
        match copied {
            Ok(Ok(copied)) => Ok(copied),
            Ok(Err(TreeError::Wire)) => Err(lost(self.calls().vsock())),
            Ok(Err(TreeError::Silent)) => Err(silent()),
            Ok(Err(TreeError::Other(error))) => Err(error),
            Err(_) => Err(AgentError::Lost.into()),
        }
    }
}

/// Ends the copy when nobody waits for it any more.
struct EndOnDrop(PatientSocket);

impl Drop for EndOnDrop {
    fn drop(&mut self) {
        let _ = self.0.socket().shutdown(Shutdown::Both);
    }
}

/// Why a copy ended.
#[derive(Debug)]
enum TreeError {
    /// The connection is over.
    Wire,
    /// The guest neither takes nor says anything.
    Silent,
    Other(Error),
}

impl<E: Into<Error>> From<E> for TreeError {
    fn from(error: E) -> Self {
        Self::Other(error.into())
    }
}

fn on_wire(error: &io::Error) -> TreeError {
    match error.kind() {
        io::ErrorKind::WouldBlock => TreeError::Silent,
        _ => TreeError::Wire,
    }
}

fn on_host(path: &Path) -> impl FnOnce(io::Error) -> TreeError {
    let path: PathBuf = path.to_owned();
    move |source| AgentError::Host { path, source }.into()
}

/// Frames over a socket that blocks.
struct BlockingWire {
    socket: PatientSocket,
    body: Vec<u8>,
}

impl BlockingWire {
    fn send(&mut self, node: &Node) -> Result<(), TreeError> {
        self.send_raw(&Frame::message(node))
    }

    /// Bytes that begin with room for the header.
    fn send_data(&mut self, frame: &mut [u8]) -> Result<(), TreeError> {
        let header = Frame::header(Channel::Data, frame.len() - HEADER_BYTES);
        frame[..HEADER_BYTES].copy_from_slice(&header);
        self.send_raw(frame)
    }

    /// Fails where something was said meanwhile, which is that nothing more is taken.
    fn send_raw(&mut self, bytes: &[u8]) -> Result<(), TreeError> {
        let look = recv(self.socket.socket(), &mut [0; 1], RecvFlags::PEEK | RecvFlags::DONTWAIT);
        if !matches!(look, Err(Errno::AGAIN)) {
            return Err(TreeError::Wire);
        }
        self.socket.write_all(bytes).map_err(|error| on_wire(&error))
    }

    fn next(&mut self) -> Result<Frame<'_>, TreeError> {
        let mut header = [0; HEADER_BYTES];
        self.socket.read_exact(&mut header).map_err(|error| on_wire(&error))?;
        let (channel, length) = Frame::parse_header(header).map_err(AgentError::Malformed)?;
        self.body.clear();
        // As much memory as has come.
        let read = Read::by_ref(&mut self.socket).take(length as u64).read_to_end(&mut self.body);
        match read.map_err(|error| on_wire(&error))? {
            read if read == length => Ok(Frame { channel, bytes: &self.body }),
            _ => Err(TreeError::Wire),
        }
    }

    fn message<T: Wire>(&mut self) -> Result<T, TreeError> {
        Ok(self.next()?.parse().map_err(AgentError::Malformed)?)
    }

    /// `Done`, or what the guest has against it.
    fn last_word(&mut self) -> Result<(), TreeError> {
        match self.message()? {
            Reply::Done => Ok(()),
            other => Err(AgentError::refused(other).into()),
        }
    }
}

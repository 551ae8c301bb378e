//! Connections by a UNIX socket's path, for programs that are not this one.
//!
//! A program connects to the path, writes "CONNECT", a space, a port of the guest and a newline,
//! and reads "OK", a space, a port of the host and a newline when the guest has accepted. A
//! connection of the guest to a port that nobody in this process listens at goes to the socket
//! whose path is this one with an underscore and the port behind it.

use std::collections::HashMap;
use std::io::{self, Read};
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::{Path, PathBuf};
use std::sync::Arc;

use rustix::net::{AddressFamily, SocketAddrUnix, SocketFlags, SocketType, connect, socket_with};

/// Programs that have connected, and not said to which port. More are turned away.
const MAX_CALLERS: usize = 64;
/// As long as a line with the largest port.
const MAX_LINE: usize = "CONNECT 4294967295\n".len();

/// A socket's path. It goes with this value, on a thread that may remove it: the device thread may not.
#[derive(Debug)]
pub(super) struct SocketFile(PathBuf);

impl Drop for SocketFile {
    fn drop(&mut self) {
        let _ = std::fs::remove_file(&self.0);
    }
}

/// The socket at the path, and who came by it.
#[derive(Debug)]
pub(super) struct UnixPath {
    pub(super) file: Arc<SocketFile>,
    pub(super) listener: UnixListener,
    callers: HashMap<u32, Caller>,
}

#[derive(Debug)]
struct Caller {
    socket: UnixStream,
    line: Vec<u8>,
}

/// What a caller has said.
pub(super) enum Call {
    /// It is not finished.
    Unfinished,
    /// It wants a connection to this port.
    Port(u32, UnixStream),
    /// Nothing that makes sense, or it is gone.
    Nonsense,
}

impl UnixPath {
    /// Makes a socket at `path`, where there must be none.
    pub(super) fn new(path: &Path) -> io::Result<Self> {
        // So that it means the same when the process goes elsewhere.
        let absolute = std::path::absolute(path)?;
        let listener = UnixListener::bind(path)?;
        let file = Arc::new(SocketFile(absolute));
        listener.set_nonblocking(true)?;
        Ok(Self { file, listener, callers: HashMap::new() })
    }

    /// The next one who connected.
    pub(super) fn accept(&self) -> io::Result<UnixStream> {
        let (socket, _) = self.listener.accept()?;
        socket.set_nonblocking(true)?;
        Ok(socket)
    }

    pub(super) fn callers(&self) -> usize {
        self.callers.len()
    }

    pub(super) fn has_room(&self) -> bool {
        self.callers.len() < MAX_CALLERS
    }

    pub(super) fn add(&mut self, id: u32, socket: UnixStream) {
        self.callers.insert(id, Caller { socket, line: Vec::new() });
    }

    pub(super) fn has(&self, id: u32) -> bool {
        self.callers.contains_key(&id)
    }

    /// Reads on what a caller says: not a byte further than its line, for the rest is the guest's.
    pub(super) fn read(&mut self, id: u32) -> Call {
        let Some(caller) = self.callers.get_mut(&id) else { return Call::Nonsense };
        let mut byte = [0];
        while caller.line.len() < MAX_LINE && !caller.line.ends_with(b"\n") {
            match (&caller.socket).read(&mut byte) {
                Ok(1) => caller.line.extend(byte),
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => return Call::Unfinished,
                Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
                _ => break,
            }
        }
        let Some(caller) = self.callers.remove(&id) else { return Call::Nonsense };
        match port(&caller.line) {
            Some(port) => Call::Port(port, caller.socket),
            None => Call::Nonsense,
        }
    }

    /// Connects to who listens for this port, where somebody does and has room.
    pub(super) fn connect(&self, port: u32) -> Option<UnixStream> {
        let mut path = self.file.0.clone().into_os_string();
        path.push(format!("_{port}"));
        let flags = SocketFlags::CLOEXEC | SocketFlags::NONBLOCK;
        let socket = socket_with(AddressFamily::UNIX, SocketType::STREAM, flags, None).ok()?;
        connect(&socket, &SocketAddrUnix::new(path).ok()?).ok()?;
        Some(socket.into())
    }
}

fn port(line: &[u8]) -> Option<u32> {
    let digits = line.strip_prefix(b"CONNECT ")?.strip_suffix(b"\n")?;
    if !digits.iter().all(u8::is_ascii_digit) {
        return None;
    }
    std::str::from_utf8(digits).ok()?.parse().ok()
}

//! The host's calls: each has a connection and a thread, which wait for the next one when it is over.

use std::fs;
use std::io;
use std::os::unix::net::UnixStream;
use std::thread;
use std::time::Duration;

use crate::connection::Connection;
use crate::protocol::{Call, Failure, FailureKind, Reply, Usage};
use crate::sys::{CID_HOST, VsockListener};
use crate::threads::Threads;
use crate::{cgroup, exec, files, ports, shutdown, tree};

/// With connections that wait for a call, of which the host keeps few, and with those to ports: of these there are fewer,
/// so that the guest can be asked to sleep or to end however many it has.
static CALLS: Threads = Threads::at_most(ports::MAX_CONNECTIONS + 128);

/// Takes calls for ever.
pub(crate) fn accept(listener: &VsockListener) -> ! {
    loop {
        match listener.accept() {
            Ok((stream, CID_HOST)) => begin(stream),
            // A program of the guest itself, which could become root by this.
            Ok(_) => {}
            // Out of descriptors, or of memory: not for long.
            Err(_) => thread::sleep(Duration::from_millis(20)),
        }
    }
}

fn begin(stream: UnixStream) {
    let Ok(spare) = stream.try_clone() else { return };
    let began = CALLS.spawn(move || {
        // An error is the connection's: nobody is there to hear of it.
        let _ = serve(Connection::new(stream));
    });
    if let Err(error) = began {
        // A few bytes never wait.
        let failure = Failure::of("take one more call", &error);
        let _ = Connection::new(spare).answer(Err(failure));
    }
}

/// Serves one call after the other, until the host closes the connection.
pub(crate) fn serve(mut connection: Connection) -> io::Result<()> {
    let mut call = connection.receive_call()?;
    loop {
        connection = match call {
            Call::Connect(port) => return ports::connect(connection, port),
            Call::Exec(exec) => match exec::serve(connection, &exec)? {
                Some(connection) => connection,
                None => return Ok(()),
            },
            call => {
                answer(&mut connection, call)?;
                connection
            }
        };
        call = connection.receive_next_call()?;
    }
}

/// Serves a call that leaves the connection as it is.
fn answer(connection: &mut Connection, call: Call) -> io::Result<()> {
    let result = match call {
        Call::Exec(_) | Call::Connect(_) => return Err(io::ErrorKind::InvalidInput.into()),
        Call::Read(call) => return files::read(connection, &call),
        Call::Write(call) => return files::write(connection, &call),
        Call::CopyIn(path) => return tree::copy_in(connection, &path),
        Call::CopyOut(path) => return tree::copy_out(connection, &path),
        Call::List(path) => return files::list(connection, &path),
        Call::Stat(path) => files::stat(&path).map(Reply::Stat),
        Call::Remove(call) => files::remove(&call).map(|()| Reply::Done),
        Call::MakeDirectory(call) => files::make_directory(&call).map(|()| Reply::Done),
        Call::Freeze => return freeze(connection),
        Call::Thaw => cgroup::thaw().map(|()| Reply::Done),
        Call::Usage => usage().map(Reply::Usage),
        Call::Shutdown(grace_ms) => {
            let grace = Duration::from_millis(grace_ms.into());
            shutdown::shut_down(grace).map(|()| Reply::Done)
        }
    };
    connection.send(&result.unwrap_or_else(Reply::Failed))
}

/// Stops all programs. Where the host has given it up meanwhile, nobody would let them go on.
fn freeze(connection: &mut Connection) -> io::Result<()> {
    let frozen = cgroup::freeze();
    let is_frozen = frozen.is_ok();
    let told = connection.send(&frozen.map_or_else(Reply::Failed, |()| Reply::Done));
    if is_frozen && told.is_err() {
        let _ = cgroup::thaw();
    }
    told
}

/// How much memory the agent takes.
fn usage() -> Result<Usage, Failure> {
    let read = |path| fs::read_to_string(path).unwrap_or_default();
    let field = |text: &str, name: &str| -> Option<u64> {
        let line = text.lines().find_map(|line| line.strip_prefix(name))?;
        line.split_whitespace().next()?.parse().ok()
    };
    // Not every kernel has the former, which is exact.
    let resident = field(&read("/proc/self/smaps_rollup"), "Rss:");
    match resident.or_else(|| field(&read("/proc/self/status"), "VmRSS:")) {
        Some(kib) => Ok(Usage { resident_bytes: kib.saturating_mul(1024) }),
        None => Err(Failure::new(FailureKind::Other, "read /proc/self/status")),
    }
}

#[cfg(test)]
#[path = "tests/calls.rs"]
mod tests;

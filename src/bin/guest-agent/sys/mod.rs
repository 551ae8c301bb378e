//! What the standard library lacks of the system's calls, each as a safe function. The agent has no
//! other unsafe code. The functions are declared by hand, as the agent is built of the standard
//! library alone (see main.rs); libc, which declares them elsewhere, is linked in any case.

mod clone;
mod files;
mod process;
mod socket;
mod system;

use std::ffi::{c_int, c_ulong};
use std::io;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, FromRawFd, OwnedFd};
use std::time::Duration;

pub(crate) use self::files::{
    DirectoryEntries, change_owner_at, link_target_at, make_directory_at, make_symlink_at, open_at,
    open_flags, remove_at, rename_at, seek_data, seek_hole, set_modified_at,
};
pub(crate) use self::process::{
    CgroupFds, LaunchFault, LaunchStep, Program, WaitStatus, has_children, hold_child_signals,
    kill, kill_process, launch, reap_orphan, wait, wait_for_child_signal,
};
pub(crate) use self::socket::{
    CID_HOST, NetlinkSocket, VsockListener, connect_vsock, connect_vsock_from, guest_cid,
    reset_when_closed, takes_no_more,
};
pub(crate) use self::system::{
    MountFlags, add_entropy, give_memory_back, keep_memory_small, kill_all, load_module, mount,
    power_off, raise_the_limit_of_open_files, remount_read_only, set_hostname, set_wall_clock,
    sync, unmount,
};

pub(crate) const ECHILD: i32 = 10;

const FIONREAD: c_ulong = 0x541b;
const TIOCSWINSZ: c_ulong = 0x5414;
const TIOCSPTLCK: c_ulong = 0x4004_5431;
const TIOCGPTPEER: c_ulong = 0x5441;
const O_RDWR_NOCTTY_CLOEXEC: c_int = 0o2 | 0o400 | 0o2_000_000;
const F_GETFL: c_int = 3;
const F_SETFL: c_int = 4;
const O_NONBLOCK: c_int = 0o4000;

pub(crate) const POLLIN: i16 = 1;
pub(crate) const POLLOUT: i16 = 4;

unsafe extern "C" {
    #[link_name = "poll"]
    fn c_poll(fds: *mut PollFd, count: c_ulong, timeout: c_int) -> c_int;
    fn ioctl(fd: c_int, request: c_ulong, ...) -> c_int;
    fn fcntl(fd: c_int, command: c_int, ...) -> c_int;
}

/// What a call that gives -1 for an error gave.
fn checked(result: c_int) -> io::Result<c_int> {
    if result < 0 { Err(io::Error::last_os_error()) } else { Ok(result) }
}

/// A descriptor that a call gave, which is nobody else's.
fn owned(result: c_int) -> io::Result<OwnedFd> {
    let fd = checked(result)?;
    // SAFETY: the caller has it from a call that has just made it.
    Ok(unsafe { OwnedFd::from_raw_fd(fd) })
}

/// A descriptor to wait for (`struct pollfd`).
#[repr(C)]
#[derive(Clone, Copy)]
pub(crate) struct PollFd {
    fd: c_int,
    events: i16,
    revents: i16,
}

impl PollFd {
    /// Waits for these events, and for errors; for nothing at all without a descriptor.
    pub(crate) fn new(fd: Option<BorrowedFd<'_>>, events: i16) -> Self {
        Self { fd: fd.map_or(-1, |fd| fd.as_raw_fd()), events, revents: 0 }
    }

    /// Whether the descriptor is ready, or has failed: both show in the call that follows.
    pub(crate) fn is_ready(&self) -> bool {
        self.revents != 0
    }

    /// Whether it is ready for one of these, or has failed.
    pub(crate) fn is(&self, events: i16) -> bool {
        self.revents & !(POLLIN | POLLOUT) != 0 || self.revents & events != 0
    }
}

/// Waits until a descriptor is ready, or for so long. A signal ends it early.
pub(crate) fn poll(fds: &mut [PollFd], timeout: Option<Duration>) -> io::Result<()> {
    let timeout = timeout.map_or(-1, |timeout| {
        let ms = timeout.as_nanos().div_ceil(1_000_000);
        c_int::try_from(ms).unwrap_or(c_int::MAX)
    });
    // SAFETY: the kernel reads and writes the elements of the slice.
    let result = unsafe { c_poll(fds.as_mut_ptr(), fds.len() as c_ulong, timeout) };
    match checked(result) {
        Err(error) if error.kind() != io::ErrorKind::Interrupted => Err(error),
        Err(_) => {
            fds.iter_mut().for_each(|fd| fd.revents = 0);
            Ok(())
        }
        Ok(_) => Ok(()),
    }
}

/// Whether both sides of a stream have said all.
pub(crate) fn has_hung_up(fd: impl AsFd) -> bool {
    let mut fds = [PollFd::new(Some(fd.as_fd()), 0)];
    poll(&mut fds, Some(Duration::ZERO)).is_ok() && fds.iter().any(PollFd::is_ready)
}

/// Makes reads and writes return where they would wait.
pub(crate) fn set_nonblocking(fd: impl AsFd) -> io::Result<()> {
    let fd = fd.as_fd().as_raw_fd();
    // SAFETY: these commands take and give integers.
    unsafe {
        let flags = checked(fcntl(fd, F_GETFL))?;
        checked(fcntl(fd, F_SETFL, flags | O_NONBLOCK))?;
    }
    Ok(())
}

/// How many bytes are in a pipe.
pub(crate) fn bytes_to_read(fd: impl AsFd) -> io::Result<usize> {
    let mut bytes: c_int = 0;
    // SAFETY: the kernel writes one int.
    checked(unsafe { ioctl(fd.as_fd().as_raw_fd(), FIONREAD, &mut bytes) })?;
    Ok(usize::try_from(bytes).unwrap_or(0))
}

/// Lets the other side of a pseudoterminal be opened, and opens it.
pub(crate) fn open_terminal_peer(master: impl AsFd) -> io::Result<OwnedFd> {
    let master = master.as_fd().as_raw_fd();
    let unlocked: c_int = 0;
    // SAFETY: the kernel reads one int.
    checked(unsafe { ioctl(master, TIOCSPTLCK, &unlocked) })?;
    // SAFETY: the request takes flags as an integer, and gives a new descriptor.
    owned(unsafe { ioctl(master, TIOCGPTPEER, O_RDWR_NOCTTY_CLOEXEC) })
}

/// Tells a terminal's programs its size.
pub(crate) fn set_terminal_size(fd: impl AsFd, rows: u16, columns: u16) -> io::Result<()> {
    let size = [rows, columns, 0, 0];
    // SAFETY: the kernel reads a `struct winsize`: four numbers of 16 bits.
    checked(unsafe { ioctl(fd.as_fd().as_raw_fd(), TIOCSWINSZ, &size) })?;
    Ok(())
}

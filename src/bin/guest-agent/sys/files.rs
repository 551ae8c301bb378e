//! Files by a directory and a name in it: paths that other programs cannot lead elsewhere with a
//! symbolic link while a tree is walked.

use std::ffi::{CStr, CString, OsStr, c_char, c_int, c_long, c_uint, c_void};
use std::fs::File;
use std::io;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd};
use std::os::unix::ffi::OsStrExt;

use super::{checked, owned};

const AT_SYMLINK_NOFOLLOW: c_int = 0x100;
const AT_REMOVEDIR: c_int = 0x200;
const SEEK_DATA: c_int = 3;
const SEEK_HOLE: c_int = 4;
const UTIME_OMIT: i64 = (1 << 30) - 2;
#[cfg(target_arch = "x86_64")]
const SYS_GETDENTS64: c_long = 217;
#[cfg(target_arch = "aarch64")]
const SYS_GETDENTS64: c_long = 61;

pub(crate) mod open_flags {
    use std::ffi::c_int;

    pub(crate) const READ: c_int = 0;
    pub(crate) const WRITE: c_int = 0o1;
    pub(crate) const CREATE_NEW: c_int = 0o100 | 0o200;
    pub(crate) const NONBLOCK: c_int = 0o4000;
    pub(crate) const CLOEXEC: c_int = 0o2_000_000;
    #[cfg(target_arch = "x86_64")]
    pub(crate) const DIRECTORY: c_int = 0o200_000;
    #[cfg(target_arch = "x86_64")]
    pub(crate) const NOFOLLOW: c_int = 0o400_000;
    #[cfg(target_arch = "aarch64")]
    pub(crate) const DIRECTORY: c_int = 0o40_000;
    #[cfg(target_arch = "aarch64")]
    pub(crate) const NOFOLLOW: c_int = 0o100_000;
    /// Not opened to be read, only to be named.
    pub(crate) const PATH: c_int = 0o10_000_000;
}

unsafe extern "C" {
    fn openat(directory: c_int, path: *const c_char, flags: c_int, ...) -> c_int;
    fn mkdirat(directory: c_int, path: *const c_char, mode: c_uint) -> c_int;
    fn unlinkat(directory: c_int, path: *const c_char, flags: c_int) -> c_int;
    fn symlinkat(target: *const c_char, directory: c_int, path: *const c_char) -> c_int;
    fn readlinkat(directory: c_int, path: *const c_char, buffer: *mut u8, size: usize) -> isize;
    fn renameat(from: c_int, from_path: *const c_char, to: c_int, to_path: *const c_char) -> c_int;
    fn fchownat(
        directory: c_int,
        path: *const c_char,
        owner: c_uint,
        group: c_uint,
        flags: c_int,
    ) -> c_int;
    fn utimensat(
        directory: c_int,
        path: *const c_char,
        times: *const [[i64; 2]; 2],
        flags: c_int,
    ) -> c_int;
    fn lseek64(fd: c_int, offset: i64, whence: c_int) -> i64;
    fn syscall(number: c_long, ...) -> c_long;
}

fn c_name(name: &OsStr) -> io::Result<CString> {
    CString::new(name.as_bytes()).map_err(|_| io::ErrorKind::InvalidInput.into())
}

/// Opens a file of a directory; with [`open_flags`], and a mode if it is made.
pub(crate) fn open_at(
    directory: BorrowedFd<'_>,
    name: &OsStr,
    flags: c_int,
    mode: u32,
) -> io::Result<File> {
    let name = c_name(name)?;
    let flags = flags | open_flags::CLOEXEC;
    // SAFETY: the name ends with a NUL, and the call gives a new descriptor.
    owned(unsafe { openat(directory.as_raw_fd(), name.as_ptr(), flags, mode) }).map(File::from)
}

pub(crate) fn make_directory_at(
    directory: BorrowedFd<'_>,
    name: &OsStr,
    mode: u32,
) -> io::Result<()> {
    let name = c_name(name)?;
    // SAFETY: the name ends with a NUL.
    checked(unsafe { mkdirat(directory.as_raw_fd(), name.as_ptr(), mode) })?;
    Ok(())
}

/// Removes a name: that of a directory, or of anything else.
pub(crate) fn remove_at(
    directory: BorrowedFd<'_>,
    name: &OsStr,
    is_directory: bool,
) -> io::Result<()> {
    let name = c_name(name)?;
    let flags = if is_directory { AT_REMOVEDIR } else { 0 };
    // SAFETY: the name ends with a NUL.
    checked(unsafe { unlinkat(directory.as_raw_fd(), name.as_ptr(), flags) })?;
    Ok(())
}

pub(crate) fn make_symlink_at(
    target: &OsStr,
    directory: BorrowedFd<'_>,
    name: &OsStr,
) -> io::Result<()> {
    let (target, name) = (c_name(target)?, c_name(name)?);
    // SAFETY: both end with a NUL.
    checked(unsafe { symlinkat(target.as_ptr(), directory.as_raw_fd(), name.as_ptr()) })?;
    Ok(())
}

/// Where a symbolic link leads.
pub(crate) fn link_target_at(directory: BorrowedFd<'_>, name: &OsStr) -> io::Result<Vec<u8>> {
    let name = c_name(name)?;
    let mut target = vec![0; 4096];
    // SAFETY: the name ends with a NUL, and the kernel writes at most as many bytes as there are.
    let length = unsafe {
        readlinkat(directory.as_raw_fd(), name.as_ptr(), target.as_mut_ptr(), target.len())
    };
    let length = usize::try_from(length).map_err(|_| io::Error::last_os_error())?;
    target.truncate(length);
    Ok(target)
}

/// Gives a file another name in its directory, in place of what has that name.
pub(crate) fn rename_at(directory: BorrowedFd<'_>, from: &OsStr, to: &OsStr) -> io::Result<()> {
    let (from, to) = (c_name(from)?, c_name(to)?);
    let directory = directory.as_raw_fd();
    // SAFETY: both names end with a NUL.
    checked(unsafe { renameat(directory, from.as_ptr(), directory, to.as_ptr()) })?;
    Ok(())
}

/// Changes who owns a name, without following it.
pub(crate) fn change_owner_at(
    directory: BorrowedFd<'_>,
    name: &OsStr,
    (uid, gid): (u32, u32),
) -> io::Result<()> {
    let name = c_name(name)?;
    // SAFETY: the name ends with a NUL.
    checked(unsafe {
        fchownat(directory.as_raw_fd(), name.as_ptr(), uid, gid, AT_SYMLINK_NOFOLLOW)
    })?;
    Ok(())
}

/// Changes when a name was last changed, without following it; nanoseconds since 1970.
pub(crate) fn set_modified_at(
    directory: BorrowedFd<'_>,
    name: &OsStr,
    modified_ns: i64,
) -> io::Result<()> {
    let name = c_name(name)?;
    const SECOND: i64 = 1_000_000_000;
    let modified = [modified_ns.div_euclid(SECOND), modified_ns.rem_euclid(SECOND)];
    let times = [[0, UTIME_OMIT], modified];
    // SAFETY: the name ends with a NUL, and the kernel reads two of `struct timespec`.
    checked(unsafe {
        utimensat(directory.as_raw_fd(), name.as_ptr(), &times, AT_SYMLINK_NOFOLLOW)
    })?;
    Ok(())
}

/// Where the next data of a sparse file is, from this offset; none if a hole is all that follows.
pub(crate) fn seek_data(file: &File, from: u64) -> io::Result<Option<u64>> {
    seek(file, from, SEEK_DATA)
}

/// Where the next hole is, from this offset.
pub(crate) fn seek_hole(file: &File, from: u64) -> io::Result<Option<u64>> {
    seek(file, from, SEEK_HOLE)
}

fn seek(file: &File, from: u64, whence: c_int) -> io::Result<Option<u64>> {
    const ENXIO: i32 = 6;
    let from = i64::try_from(from).map_err(|_| io::ErrorKind::InvalidInput)?;
    // SAFETY: it takes and gives integers.
    let found = unsafe { lseek64(file.as_raw_fd(), from, whence) };
    match u64::try_from(found) {
        Ok(found) => Ok(Some(found)),
        Err(_) => match io::Error::last_os_error() {
            error if error.raw_os_error() == Some(ENXIO) => Ok(None),
            error => Err(error),
        },
    }
}

/// The names in a directory, without `.` and `..`, read piece by piece.
pub(crate) struct DirectoryEntries {
    directory: OwnedFd,
    buffer: Vec<u8>,
    at: usize,
    end: usize,
}

impl DirectoryEntries {
    pub(crate) fn new(directory: OwnedFd) -> Self {
        Self { directory, buffer: vec![0; 8 << 10], at: 0, end: 0 }
    }

    pub(crate) fn directory(&self) -> BorrowedFd<'_> {
        self.directory.as_fd()
    }

    /// The next name, none behind the last.
    pub(crate) fn next(&mut self) -> io::Result<Option<Vec<u8>>> {
        loop {
            if self.at >= self.end && !self.fill()? {
                return Ok(None);
            }
            match self.parse() {
                Some(name) if name == b"." || name == b".." => {}
                Some(name) => return Ok(Some(name)),
                None => return Err(io::ErrorKind::InvalidData.into()),
            }
        }
    }

    fn fill(&mut self) -> io::Result<bool> {
        let (fd, buffer) = (self.directory.as_raw_fd(), self.buffer.as_mut_ptr().cast::<c_void>());
        // SAFETY: the kernel writes at most as many bytes as there are.
        let length = unsafe { syscall(SYS_GETDENTS64, fd, buffer, self.buffer.len()) };
        self.at = 0;
        self.end = usize::try_from(length).map_err(|_| io::Error::last_os_error())?;
        Ok(self.end > 0)
    }

    /// The name of the next `struct linux_dirent64`: its length is at 16, its name at 19.
    fn parse(&mut self) -> Option<Vec<u8>> {
        let entry = self.buffer.get(self.at..self.end)?;
        let length = u16::from_le_bytes([*entry.get(16)?, *entry.get(17)?]);
        let name = CStr::from_bytes_until_nul(entry.get(19..)?).ok()?.to_bytes().to_vec();
        self.at += usize::from(length).max(1);
        Some(name)
    }
}

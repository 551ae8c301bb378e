//! One operation on a file, with all that it touches: it can be done later, by the kernel or by
//! another thread, whatever becomes of the device that asked for it.

use std::io;
use std::os::fd::AsRawFd;
use std::sync::Arc;

use io_uring::{opcode, squeue, types};

use super::{GuestBuffers, MAX_IOVECS};
use crate::file_lock::LockedFile;

/// The zeros that are written: the same for all, since a guest may ask for many ranges.
static ZEROS: [u8; 64 << 10] = [0; 64 << 10];

/// The same sixteen times, which is what is written at once.
static MORE_ZEROS: Iovecs = Iovecs(
    [libc::iovec { iov_base: (&raw const ZEROS).cast_mut().cast(), iov_len: ZEROS.len() }; 16],
);
const MORE_ZEROS_BYTES: u64 = 1 << 20;

struct Iovecs([libc::iovec; 16]);

// SAFETY: they point to a static that nobody ever writes.
unsafe impl Sync for Iovecs {}

/// An operation that is not done yet.
#[derive(Debug)]
pub(crate) struct Transfer {
    file: Arc<LockedFile>,
    /// Open for as long as it is under way: the one with the lock, where `file` is the same past the
    /// page cache.
    _locked: Option<Arc<LockedFile>>,
    offset: u64,
    kind: Kind,
}

#[derive(Debug)]
enum Kind {
    Read(GuestBuffers),
    Write(GuestBuffers),
    /// Bytes of the host, the first of which are written already.
    WriteBytes {
        bytes: Vec<u8>,
        done: usize,
    },
    Sync {
        data_only: bool,
    },
    /// `len` bytes are to read as zeros, by the first of these ways that the file knows.
    Clear {
        len: u64,
        ways: &'static [Way],
    },
}

/// A way to clear a range of a file.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Way {
    /// Give the space back (FALLOC_FL_PUNCH_HOLE). Block devices do so by writing zeros that may
    /// unmap; one that has no such command keeps its space, though it may know discards.
    Punch,
    /// Keep the space (FALLOC_FL_ZERO_RANGE).
    Zero,
    Write,
    /// Leave the range as it is: to discard is a hint.
    Nothing,
}

/// What the range of a [`Transfer::clear`] is to be afterwards.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Clear {
    /// Given back where that is possible, of any content.
    Discard,
    /// Zeros, given back where that is possible.
    Unmap,
    /// Zeros, with their space kept.
    Keep,
}

/// How far an operation has come.
#[derive(Debug)]
pub(crate) enum Progress {
    /// It is to be done again, for what is left.
    Again,
    Done(io::Result<()>),
}

impl Transfer {
    /// Fills `buffers` from `offset`.
    pub(crate) fn read(file: &Arc<LockedFile>, offset: u64, buffers: GuestBuffers) -> Self {
        Self::new(file, offset, Kind::Read(buffers))
    }

    /// Writes `buffers` at `offset`.
    pub(crate) fn write(file: &Arc<LockedFile>, offset: u64, buffers: GuestBuffers) -> Self {
        Self::new(file, offset, Kind::Write(buffers))
    }

    /// Writes bytes of the host at `offset`.
    pub(crate) fn write_bytes(file: &Arc<LockedFile>, offset: u64, bytes: Vec<u8>) -> Self {
        Self::new(file, offset, Kind::WriteBytes { bytes, done: 0 })
    }

    /// Brings what was written to the disk (fdatasync).
    pub(crate) fn data_sync(file: &Arc<LockedFile>) -> Self {
        Self::new(file, 0, Kind::Sync { data_only: true })
    }

    /// The same, and the file's times (fsync).
    pub(crate) fn sync(file: &Arc<LockedFile>) -> Self {
        Self::new(file, 0, Kind::Sync { data_only: false })
    }

    /// Clears `len` bytes at `offset`.
    pub(crate) fn clear(file: &Arc<LockedFile>, offset: u64, len: u64, clear: Clear) -> Self {
        let ways: &[Way] = match clear {
            Clear::Discard => &[Way::Punch, Way::Nothing],
            Clear::Unmap => &[Way::Punch, Way::Zero, Way::Write],
            Clear::Keep => &[Way::Zero, Way::Write],
        };
        Self::new(file, offset, Kind::Clear { len, ways })
    }

    fn new(file: &Arc<LockedFile>, offset: u64, kind: Kind) -> Self {
        Self { file: Arc::clone(file), _locked: None, offset, kind }
    }

    /// Keeps another file open until it has ended.
    pub(crate) fn keeping(self, locked: Option<&Arc<LockedFile>>) -> Self {
        Self { _locked: locked.cloned(), ..self }
    }

    /// The operation as a submission to an io_uring. The caller keeps `self`, unchanged and
    /// where its buffers point to, until the completion has come.
    pub(super) fn entry(&mut self) -> squeue::Entry {
        let fd = types::Fd(self.file.as_raw_fd());
        let offset = self.offset;
        match &mut self.kind {
            Kind::Read(buffers) => {
                let iovecs = buffers.iovecs();
                opcode::Readv::new(fd, iovecs.as_ptr(), iovecs.len() as u32).offset(offset).build()
            }
            Kind::Write(buffers) => {
                let iovecs = buffers.iovecs();
                opcode::Writev::new(fd, iovecs.as_ptr(), iovecs.len() as u32).offset(offset).build()
            }
            Kind::WriteBytes { bytes, done } => write_entry(fd, offset, &bytes[*done..]),
            Kind::Sync { data_only } => {
                let flags = match data_only {
                    true => types::FsyncFlags::DATASYNC,
                    false => types::FsyncFlags::empty(),
                };
                opcode::Fsync::new(fd).flags(flags).build()
            }
            Kind::Clear { len, ways } => match ways.first() {
                Some(Way::Write) if *len >= MORE_ZEROS_BYTES => {
                    let Iovecs(iovecs) = &MORE_ZEROS;
                    let count = iovecs.len() as u32;
                    opcode::Writev::new(fd, iovecs.as_ptr(), count).offset(offset).build()
                }
                Some(Way::Write) => write_entry(fd, offset, some_zeros(*len)),
                Some(way) if way.mode() != 0 => {
                    opcode::Fallocate::new(fd, *len).offset(offset).mode(way.mode()).build()
                }
                _ => opcode::Nop::new().build(),
            },
        }
    }

    /// Does the operation, or a part of it, and waits for it.
    pub(super) fn run(&mut self) -> io::Result<usize> {
        let fd = self.file.as_raw_fd();
        let at = libc::off_t::try_from(self.offset).map_err(|_| io::ErrorKind::InvalidInput)?;
        let moved = match &mut self.kind {
            Kind::Read(buffers) => {
                let iovecs = buffers.iovecs();
                // SAFETY: the iovecs are pieces of guest RAM that `buffers` keeps mapped.
                unsafe { libc::preadv(fd, iovecs.as_ptr(), iovecs.len() as libc::c_int, at) }
            }
            Kind::Write(buffers) => {
                let iovecs = buffers.iovecs();
                // SAFETY: as above.
                unsafe { libc::pwritev(fd, iovecs.as_ptr(), iovecs.len() as libc::c_int, at) }
            }
            Kind::WriteBytes { bytes, done } => write_at(fd, at, &bytes[*done..]),
            // SAFETY: the call has no memory arguments.
            Kind::Sync { data_only: true } => unsafe { libc::fdatasync(fd) as isize },
            // SAFETY: as above.
            Kind::Sync { data_only: false } => unsafe { libc::fsync(fd) as isize },
            Kind::Clear { len, ways } => match ways.first() {
                Some(Way::Write) if *len >= MORE_ZEROS_BYTES => {
                    let Iovecs(iovecs) = &MORE_ZEROS;
                    // SAFETY: they are zeros that are always there.
                    unsafe { libc::pwritev(fd, iovecs.as_ptr(), iovecs.len() as libc::c_int, at) }
                }
                Some(Way::Write) => write_at(fd, at, some_zeros(*len)),
                Some(way) if way.mode() != 0 => {
                    let len = libc::off_t::try_from(*len).unwrap_or(libc::off_t::MAX);
                    // SAFETY: the call has no memory arguments.
                    unsafe { libc::fallocate(fd, way.mode(), at, len) as isize }
                }
                _ => 0,
            },
        };
        usize::try_from(moved).map_err(|_| io::Error::last_os_error())
    }

    /// Takes the result of one attempt into account.
    pub(super) fn advance(&mut self, result: io::Result<usize>) -> Progress {
        let moved = match result {
            Ok(moved) => moved,
            Err(error) => return self.failed(error),
        };
        let (left, nothing) = match &mut self.kind {
            Kind::Read(buffers) => (buffers.advance(moved), io::ErrorKind::UnexpectedEof),
            Kind::Write(buffers) => (buffers.advance(moved), io::ErrorKind::WriteZero),
            Kind::WriteBytes { bytes, done } => {
                *done = (*done + moved).min(bytes.len());
                ((bytes.len() - *done) as u64, io::ErrorKind::WriteZero)
            }
            Kind::Sync { .. } => return Progress::Done(Ok(())),
            Kind::Clear { len, ways } => {
                if ways.first() != Some(&Way::Write) {
                    return Progress::Done(Ok(()));
                }
                *len = len.saturating_sub(moved as u64);
                (*len, io::ErrorKind::WriteZero)
            }
        };
        self.offset += moved as u64;
        match (left, moved) {
            (0, _) => Progress::Done(Ok(())),
            (_, 0) => Progress::Done(Err(nothing.into())),
            _ => Progress::Again,
        }
    }

    fn failed(&mut self, error: io::Error) -> Progress {
        match (error.raw_os_error(), &mut self.kind) {
            (Some(libc::EINTR | libc::EAGAIN), _) => Progress::Again,
            // EINVAL: a device whose own sectors are larger.
            (Some(libc::EOPNOTSUPP | libc::ENOSYS | libc::EINVAL), Kind::Clear { ways, .. })
                if ways.len() > 1 =>
            {
                *ways = &ways[1..];
                Progress::Again
            }
            _ => Progress::Done(Err(error)),
        }
    }
}

impl Way {
    fn mode(self) -> libc::c_int {
        match self {
            Self::Punch => libc::FALLOC_FL_PUNCH_HOLE | libc::FALLOC_FL_KEEP_SIZE,
            Self::Zero => libc::FALLOC_FL_ZERO_RANGE | libc::FALLOC_FL_KEEP_SIZE,
            Self::Write | Self::Nothing => 0,
        }
    }
}

fn write_entry(fd: types::Fd, offset: u64, bytes: &[u8]) -> squeue::Entry {
    opcode::Write::new(fd, bytes.as_ptr(), bytes.len() as u32).offset(offset).build()
}

fn write_at(fd: libc::c_int, at: libc::off_t, bytes: &[u8]) -> isize {
    // SAFETY: the pointer and the length are those of a slice.
    unsafe { libc::pwrite(fd, bytes.as_ptr().cast(), bytes.len(), at) }
}

/// The zeros of the next write, of which `len` are left.
fn some_zeros(len: u64) -> &'static [u8] {
    let len = usize::try_from(len).unwrap_or(usize::MAX).min(ZEROS.len());
    ZEROS.get(..len).unwrap_or_default()
}

const _: () = {
    assert!(MAX_IOVECS <= u32::MAX as usize);
    assert!(MORE_ZEROS_BYTES == 16 * size_of_val(&ZEROS) as u64);
};

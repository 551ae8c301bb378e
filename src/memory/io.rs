//! Bytes of guest RAM as one sequence, and files read and written right there.
//!
//! A request of a driver is a list of buffers anywhere in guest RAM. [`GuestBytes`] is such a
//! list, checked to be inside the RAM: what is read from a file goes there without a copy.

use std::fs::File;
use std::io;
use std::os::fd::AsRawFd;

use vm_memory::{Bytes, VolatileSlice};

/// The most buffers that one system call takes (IOV_MAX).
pub(super) const MAX_IOVECS: usize = 1024;

/// A sequence of bytes of guest RAM, in pieces.
#[derive(Clone, Debug, Default)]
pub(crate) struct GuestBytes<'ram> {
    pub(super) pieces: Vec<VolatileSlice<'ram>>,
}

impl<'ram> GuestBytes<'ram> {
    pub(crate) fn push(&mut self, piece: VolatileSlice<'ram>) {
        if !piece.is_empty() {
            self.pieces.push(piece);
        }
    }

    pub(crate) fn len(&self) -> u64 {
        self.pieces.iter().map(|piece| piece.len() as u64).sum()
    }

    /// The first `at` bytes, and the others. `None` where there are fewer.
    pub(crate) fn split_at(mut self, at: u64) -> Option<(Self, Self)> {
        let mut left = Self::default();
        let mut missing = usize::try_from(at).ok()?;
        let mut rest = self.pieces.drain(..);
        let mut right = Self::default();
        while missing > 0 {
            let piece = rest.next()?;
            let (taken, kept) = piece.split_at(missing.min(piece.len())).ok()?;
            missing -= taken.len();
            left.push(taken);
            right.push(kept);
        }
        right.pieces.extend(rest);
        Some((left, right))
    }

    /// Copies the first bytes out; returns how many there were.
    pub(crate) fn copy_to(&self, mut target: &mut [u8]) -> usize {
        let whole = target.len();
        for piece in &self.pieces {
            let copied = piece.copy_to(target);
            target = &mut target[copied..];
        }
        whole - target.len()
    }

    /// Copies `source` in, as far as there is room; returns how far.
    pub(crate) fn copy_from(&self, source: &[u8]) -> usize {
        let mut rest = source;
        for piece in &self.pieces {
            let Ok(copied) = piece.write(rest, 0) else { break };
            rest = &rest[copied..];
            if rest.is_empty() {
                break;
            }
        }
        source.len() - rest.len()
    }

    /// Fills the bytes from `file` at `offset`, without a copy.
    ///
    /// # Errors
    ///
    /// What pread says; `UnexpectedEof` where the file ends before the bytes are full.
    pub(crate) fn read_from(&self, file: &File, offset: u64) -> io::Result<()> {
        self.transfer(file, offset, Direction::FromFile)
    }

    /// Writes the bytes to `file` at `offset`, without a copy.
    pub(crate) fn write_to(&self, file: &File, offset: u64) -> io::Result<()> {
        self.transfer(file, offset, Direction::ToFile)
    }

    fn transfer(&self, file: &File, mut offset: u64, direction: Direction) -> io::Result<()> {
        let mut rest = self.clone();
        while !rest.pieces.is_empty() {
            let done = rest.transfer_some(file, offset, direction)?;
            if done == 0 {
                return Err(io::ErrorKind::UnexpectedEof.into());
            }
            offset += done;
            rest = rest.split_at(done).map(|(_, rest)| rest).unwrap_or_default();
        }
        Ok(())
    }

    /// One system call; returns how many bytes it moved.
    fn transfer_some(&self, file: &File, at: u64, direction: Direction) -> io::Result<u64> {
        let guards: Vec<_> =
            self.pieces.iter().take(MAX_IOVECS).map(|piece| piece.ptr_guard_mut()).collect();
        let iovecs: Vec<libc::iovec> = guards
            .iter()
            .map(|guard| libc::iovec { iov_base: guard.as_ptr().cast(), iov_len: guard.len() })
            .collect();
        let at = libc::off_t::try_from(at).map_err(|_| io::ErrorKind::InvalidInput)?;
        let count = iovecs.len() as libc::c_int;
        loop {
            let call = match direction {
                Direction::FromFile => libc::preadv,
                Direction::ToFile => libc::pwritev,
            };
            // SAFETY: each iovec is a piece of guest RAM that `guards` keeps mapped; the guest may
            // change it meanwhile, which the kernel is used to of any program's buffers.
            let moved = unsafe { call(file.as_raw_fd(), iovecs.as_ptr(), count, at) };
            match u64::try_from(moved) {
                Ok(moved) => return Ok(moved),
                Err(_) => {
                    let error = io::Error::last_os_error();
                    if error.kind() != io::ErrorKind::Interrupted {
                        return Err(error);
                    }
                }
            }
        }
    }
}

#[derive(Clone, Copy)]
enum Direction {
    FromFile,
    ToFile,
}

//! Bytes of guest RAM as one sequence, and files read and written right there.
//!
//! A request of a driver is a list of buffers anywhere in guest RAM. [`GuestBytes`] is such a
//! list, checked to be inside the RAM: what is read from a file goes there without a copy.

use std::fs::File;
use std::io;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd};
use std::sync::Arc;

use smallvec::SmallVec;
use vm_memory::{Bytes, VolatileSlice};

use super::GuestRam;

/// The most buffers that one system call takes (IOV_MAX).
pub(super) const MAX_IOVECS: usize = 1024;

/// A sequence of bytes of guest RAM, in pieces.
#[derive(Clone, Debug, Default)]
pub(crate) struct GuestBytes<'ram> {
    /// Most requests have few, which need no allocation.
    pub(super) pieces: SmallVec<[VolatileSlice<'ram>; 2]>,
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

    pub(super) fn pieces(&self) -> &[VolatileSlice<'ram>] {
        &self.pieces
    }

    /// The first `at` bytes, and the others. `None` where there are fewer.
    pub(crate) fn split_at(mut self, at: u64) -> Option<(Self, Self)> {
        let others = self.split_off(at)?;
        Some((self, others))
    }

    /// Keeps the first `at` bytes, and returns the others. `None`, and no change, where there are
    /// fewer. Costs next to nothing where a piece ends there, as where a request's header does.
    pub(crate) fn split_off(&mut self, at: u64) -> Option<Self> {
        let mut missing = usize::try_from(at).ok()?;
        let mut whole = 0;
        while missing > 0 {
            let piece = self.pieces.get(whole)?;
            if missing < piece.len() {
                break;
            }
            missing -= piece.len();
            whole += 1;
        }
        let mut others = Self { pieces: self.pieces.get(whole..)?.into() };
        self.pieces.truncate(whole);
        if missing > 0
            && let Some(first) = others.pieces.first_mut()
        {
            let (kept, other) = first.split_at(missing).ok()?;
            self.pieces.push(kept);
            *first = other;
        }
        Some(others)
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
        self.copy_from_at(0, source)
    }

    /// Copies `source` in behind the first `at` bytes, as far as there is room; returns how far.
    pub(crate) fn copy_from_at(&self, mut at: usize, source: &[u8]) -> usize {
        let mut rest = source;
        for piece in &self.pieces {
            if at >= piece.len() {
                at -= piece.len();
                continue;
            }
            let Ok(copied) = piece.write(rest, at) else { break };
            at = 0;
            rest = &rest[copied..];
            if rest.is_empty() {
                break;
            }
        }
        source.len() - rest.len()
    }

    /// Fills the first bytes from what the page cache has of `file` at `offset`; returns how
    /// many. Fewer than all where the others have to be waited for, or are not there.
    ///
    /// # Errors
    ///
    /// What preadv2 with RWF_NOWAIT says; `Unsupported` where the file cannot do that.
    pub(crate) fn read_cached(&self, file: &File, offset: u64) -> io::Result<u64> {
        self.transfer(file, offset, Direction::FromFile)
    }

    /// Writes the first bytes to the page cache of `file` at `offset`; returns how many. Fewer
    /// than all where the others would have to wait.
    ///
    /// # Errors
    ///
    /// As [`read_cached`](Self::read_cached).
    pub(crate) fn write_cached(&self, file: &File, offset: u64) -> io::Result<u64> {
        self.transfer(file, offset, Direction::ToFile)
    }

    /// The bytes after the first `count`.
    pub(crate) fn skip(self, count: u64) -> Self {
        self.split_at(count).map(|(_, rest)| rest).unwrap_or_default()
    }

    /// Fills the first bytes, `max` at most, from a socket, without a copy and without waiting;
    /// returns how many there were, 0 at the end of the stream.
    ///
    /// # Errors
    ///
    /// What recvmsg says; `WouldBlock` where there is nothing yet.
    pub(crate) fn receive(&self, socket: impl AsFd, max: u64) -> io::Result<u64> {
        let target = match max < self.len() {
            true => self.clone().split_at(max).map(|(target, _)| target).unwrap_or_default(),
            false => self.clone(),
        };
        target.message(socket.as_fd(), libc::MSG_DONTWAIT, |fd, message, flags| {
            // SAFETY: `message` has gathered pieces of guest RAM that stay mapped for the call.
            unsafe { libc::recvmsg(fd, message, flags) }
        })
    }

    /// Sends the bytes to a socket, without a copy and without waiting; returns how many it took.
    ///
    /// # Errors
    ///
    /// What sendmsg says; `WouldBlock` where the socket is full. No signal is raised.
    pub(crate) fn send(&self, socket: impl AsFd) -> io::Result<u64> {
        let flags = libc::MSG_DONTWAIT | libc::MSG_NOSIGNAL;
        self.message(socket.as_fd(), flags, |fd, message, flags| {
            // SAFETY: `message` has gathered pieces of guest RAM that stay mapped for the call.
            unsafe { libc::sendmsg(fd, message, flags) }
        })
    }

    /// One system call on a socket, with the first pieces as its message.
    fn message(
        &self,
        socket: BorrowedFd<'_>,
        flags: libc::c_int,
        call: impl Fn(libc::c_int, *mut libc::msghdr, libc::c_int) -> isize,
    ) -> io::Result<u64> {
        let guards: SmallVec<[_; 4]> =
            self.pieces.iter().take(MAX_IOVECS).map(|piece| piece.ptr_guard_mut()).collect();
        let mut iovecs: SmallVec<[libc::iovec; 4]> = guards
            .iter()
            .map(|guard| libc::iovec { iov_base: guard.as_ptr().cast(), iov_len: guard.len() })
            .collect();
        // SAFETY: zeroes are a message without an address, data and control data.
        let mut message: libc::msghdr = unsafe { std::mem::zeroed() };
        message.msg_iov = iovecs.as_mut_ptr();
        message.msg_iovlen = iovecs.len() as _;
        loop {
            let moved = call(socket.as_raw_fd(), &raw mut message, flags);
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

    /// The same bytes, which hold on to the RAM that they are in. Bytes of another RAM are left
    /// out.
    pub(crate) fn keep(&self, ram: &Arc<GuestRam>) -> GuestBuffers {
        let inside = |piece: &&VolatileSlice<'_>| {
            let start = piece.ptr_guard().as_ptr() as u64;
            ram.slots().any(|slot| {
                start >= slot.host_address
                    && start + piece.len() as u64 <= slot.host_address + slot.len
            })
        };
        let iovecs = self.pieces.iter().filter(inside).map(|piece| libc::iovec {
            iov_base: piece.ptr_guard_mut().as_ptr().cast(),
            iov_len: piece.len(),
        });
        GuestBuffers { iovecs: iovecs.collect(), first: 0, _ram: Arc::clone(ram) }
    }

    /// Whether every piece begins and ends at a multiple of `bytes`, in the host's memory.
    pub(crate) fn is_aligned(&self, bytes: usize) -> bool {
        self.pieces.iter().all(|piece| {
            (piece.ptr_guard().as_ptr() as usize).is_multiple_of(bytes)
                && piece.len().is_multiple_of(bytes)
        })
    }

    /// One system call that does not wait; returns how many bytes it moved.
    fn transfer(&self, file: &File, at: u64, direction: Direction) -> io::Result<u64> {
        let at = libc::off_t::try_from(at).map_err(|_| io::ErrorKind::InvalidInput)?;
        let call = |iovecs: &[libc::iovec]| {
            let (fd, count) = (file.as_raw_fd(), iovecs.len() as libc::c_int);
            // SAFETY: each iovec is a piece of guest RAM that a guard below keeps mapped; the
            // guest may change it meanwhile, which the kernel is used to of any program's buffers.
            unsafe {
                match direction {
                    Direction::FromFile => {
                        libc::preadv2(fd, iovecs.as_ptr(), count, at, libc::RWF_NOWAIT)
                    }
                    Direction::ToFile => {
                        libc::pwritev2(fd, iovecs.as_ptr(), count, at, libc::RWF_NOWAIT)
                    }
                }
            }
        };
        loop {
            let moved = match &self.pieces[..] {
                // Most requests have one buffer, for which no list is made.
                [piece] => {
                    let guard = piece.ptr_guard_mut();
                    call(&[libc::iovec { iov_base: guard.as_ptr().cast(), iov_len: guard.len() }])
                }
                pieces => {
                    let pieces = pieces.iter().take(MAX_IOVECS);
                    let guards: SmallVec<[_; 4]> =
                        pieces.map(|piece| piece.ptr_guard_mut()).collect();
                    let iovecs = guards.iter().map(|guard| libc::iovec {
                        iov_base: guard.as_ptr().cast(),
                        iov_len: guard.len(),
                    });
                    call(&iovecs.collect::<SmallVec<[_; 4]>>())
                }
            };
            let Err(_) = u64::try_from(moved) else { return Ok(moved as u64) };
            let error = io::Error::last_os_error();
            match error.raw_os_error() {
                Some(libc::EINTR) => {}
                Some(libc::EAGAIN) => return Ok(0),
                _ => return Err(error),
            }
        }
    }
}

/// Bytes of guest RAM, in pieces, and the RAM itself: for what the kernel does with them while
/// nobody here waits.
#[derive(Debug)]
pub(crate) struct GuestBuffers {
    iovecs: Vec<libc::iovec>,
    /// Those before have been dealt with.
    first: usize,
    _ram: Arc<GuestRam>,
}

// SAFETY: the pointers are into guest RAM, which is shared by threads anyhow and stays mapped as
// long as `_ram` is held.
unsafe impl Send for GuestBuffers {}

impl GuestBuffers {
    /// What is left, as much as one system call takes.
    pub(super) fn iovecs(&self) -> &[libc::iovec] {
        let left = self.iovecs.get(self.first..).unwrap_or_default();
        &left[..left.len().min(MAX_IOVECS)]
    }

    /// Leaves the next `count` bytes behind; returns how many are left.
    pub(super) fn advance(&mut self, mut count: usize) -> u64 {
        while let Some(iovec) = self.iovecs.get_mut(self.first) {
            let step = count.min(iovec.iov_len);
            iovec.iov_base = iovec.iov_base.wrapping_byte_add(step);
            iovec.iov_len -= step;
            count -= step;
            if iovec.iov_len > 0 {
                break;
            }
            self.first += 1;
        }
        self.iovecs.iter().skip(self.first).map(|iovec| iovec.iov_len as u64).sum()
    }

    /// Copies `source` in, as far as there is room.
    pub(crate) fn copy_from(&self, source: &[u8]) {
        let mut rest = source;
        for iovec in &self.iovecs {
            // SAFETY: the iovec is a piece of guest RAM that `_ram` keeps mapped.
            let piece = unsafe { VolatileSlice::new(iovec.iov_base.cast(), iovec.iov_len) };
            let Ok(copied) = piece.write(rest, 0) else { return };
            rest = &rest[copied..];
        }
    }
}

#[derive(Clone, Copy)]
enum Direction {
    FromFile,
    ToFile,
}

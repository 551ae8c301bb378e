//! Frames between guest RAM and a descriptor: one system call for each, and no copy of ours.

use std::io;
use std::os::fd::{AsRawFd, BorrowedFd};

use smallvec::SmallVec;

use super::GuestBytes;
use super::io::MAX_IOVECS;

/// The pieces that a frame may be read into.
pub(crate) const MAX_FRAME_PIECES: usize = MAX_IOVECS - 1;

impl<'ram> GuestBytes<'ram> {
    /// In how many pieces they are.
    pub(crate) fn count_pieces(&self) -> usize {
        self.pieces.len()
    }

    /// Keeps the first of them.
    pub(crate) fn truncate_pieces(&mut self, pieces: usize) {
        self.pieces.truncate(pieces);
    }

    /// Adds the bytes of another sequence behind these.
    pub(crate) fn append(&mut self, other: &GuestBytes<'ram>) {
        self.pieces.extend_from_slice(&other.pieces);
    }

    /// Reads a frame with one readv: into these bytes, and what they have no room for into
    /// `spare`. Returns its length, which is greater than theirs where some of it went there. They
    /// are in [`MAX_FRAME_PIECES`] at most.
    ///
    /// # Errors
    ///
    /// What readv says, but for a signal.
    pub(crate) fn read_frame(&self, from: BorrowedFd<'_>, spare: &mut [u8]) -> io::Result<usize> {
        let pieces = self.pieces.iter().take(MAX_FRAME_PIECES);
        let guards: SmallVec<[_; 4]> = pieces.map(|piece| piece.ptr_guard_mut()).collect();
        let iovec = |base: *mut u8, len| libc::iovec { iov_base: base.cast(), iov_len: len };
        let mut iovecs: SmallVec<[_; 4]> =
            guards.iter().map(|guard| iovec(guard.as_ptr(), guard.len())).collect();
        iovecs.push(iovec(spare.as_mut_ptr(), spare.len()));
        let count = iovecs.len() as libc::c_int;
        // SAFETY: each iovec is a piece of guest RAM that `guards` keeps mapped, where the guest
        // expects changes at any time, or is `spare`, which is borrowed for this call.
        retried(|| unsafe { libc::readv(from.as_raw_fd(), iovecs.as_ptr(), count) })
    }

    /// Writes these bytes as a frame, with one writev. Returns how many were taken.
    ///
    /// # Errors
    ///
    /// What writev says, but for a signal; `InvalidInput` for a frame in more than 1,024 pieces.
    pub(crate) fn write_frame(&self, to: BorrowedFd<'_>) -> io::Result<usize> {
        self.write(&[], |iovecs| {
            // SAFETY: `write` gives iovecs that are mapped during this call.
            retried(|| unsafe {
                libc::writev(to.as_raw_fd(), iovecs.as_ptr(), iovecs.len() as libc::c_int)
            })
        })
    }

    /// Sends `prefix` and then these bytes over a socket, with one call that does not wait.
    /// Returns how many bytes were taken of both together.
    ///
    /// # Errors
    ///
    /// What sendmsg says, but for a signal: none is sent either where the peer is gone.
    /// `InvalidInput` for bytes in more than 1,023 pieces.
    pub(crate) fn send_frame(&self, to: BorrowedFd<'_>, prefix: &[u8]) -> io::Result<usize> {
        self.write(prefix, |iovecs| {
            // SAFETY: all-zero is a message without address, buffers and control data.
            let mut message: libc::msghdr = unsafe { std::mem::zeroed() };
            message.msg_iov = iovecs.as_mut_ptr();
            message.msg_iovlen = iovecs.len();
            let flags = libc::MSG_NOSIGNAL | libc::MSG_DONTWAIT;
            // SAFETY: `write` gives iovecs that are mapped during this call.
            retried(|| unsafe { libc::sendmsg(to.as_raw_fd(), &message, flags) })
        })
    }

    /// Calls `call` with `prefix` and these bytes, for reading only.
    fn write(
        &self,
        prefix: &[u8],
        call: impl FnOnce(&mut [libc::iovec]) -> io::Result<usize>,
    ) -> io::Result<usize> {
        let guards: SmallVec<[_; 4]> = self.pieces.iter().map(|piece| piece.ptr_guard()).collect();
        let iovec =
            |base: *const u8, len| libc::iovec { iov_base: base.cast_mut().cast(), iov_len: len };
        let prefix = (!prefix.is_empty()).then(|| iovec(prefix.as_ptr(), prefix.len()));
        let pieces = guards.iter().map(|guard| iovec(guard.as_ptr(), guard.len()));
        let mut iovecs: SmallVec<[_; 4]> = prefix.into_iter().chain(pieces).collect();
        // A part of a frame is another frame.
        if iovecs.len() > MAX_IOVECS {
            return Err(io::ErrorKind::InvalidInput.into());
        }
        call(&mut iovecs)
    }
}

/// Repeats a system call that a signal cut short.
fn retried(mut call: impl FnMut() -> libc::ssize_t) -> io::Result<usize> {
    loop {
        match usize::try_from(call()) {
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

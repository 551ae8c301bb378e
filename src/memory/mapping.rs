//! The part of the address space that a region of guest RAM has for good, and what is mapped there.
//!
//! KVM, devices and operations under way know a region by its address: it never moves. What is
//! mapped there changes (MAP_FIXED), in one step that KVM follows.

use std::fs::File;
use std::io;
use std::os::fd::AsRawFd;

/// Addresses that nothing else uses until this is dropped.
#[derive(Debug)]
pub(super) struct Reservation {
    address: usize,
    len: usize,
}

/// What is to be at some addresses.
#[derive(Clone, Copy, Debug)]
pub(super) enum Content<'file> {
    /// Zeros, and nobody else sees what is written.
    Zeros,
    /// The file from an offset on; what is written goes there.
    Shared(&'file File, u64),
    /// The file from an offset on; what is written stays here.
    Private(&'file File, u64),
}

impl Reservation {
    /// Takes addresses for `len` bytes, a multiple of pages. They read as zeros until something
    /// else is mapped: an access that comes too early is a mistake, but no signal.
    pub(super) fn new(len: usize) -> io::Result<Self> {
        Ok(Self { address: map(None, len, Content::Zeros)?, len })
    }

    pub(super) fn address(&self) -> *mut u8 {
        std::ptr::with_exposed_provenance_mut(self.address)
    }

    pub(super) fn len(&self) -> usize {
        self.len
    }

    /// Maps `content` over `len` bytes at `offset`, in place of what was there. Whoever maps
    /// several sees to it that they [stay in this process](Self::keep_to_this_process).
    pub(super) fn map(&self, offset: usize, len: usize, content: Content<'_>) -> io::Result<()> {
        match offset.checked_add(len) {
            Some(end) if end <= self.len => {}
            _ => return Err(io::ErrorKind::InvalidInput.into()),
        }
        map(Some(self.address + offset), len, content).map(|_| ())
    }

    /// Keeps guest RAM out of the children of a fork, which KVM refuses the VM to, and whose copy
    /// would make each write of the guest a fault; and out of core dumps. Advice: a kernel that
    /// does not take it costs time, nothing else.
    pub(super) fn keep_to_this_process(&self) {
        for advice in [libc::MADV_DONTFORK, libc::MADV_DONTDUMP] {
            // SAFETY: the range is ours, and neither advice changes its content.
            unsafe { libc::madvise(self.address().cast(), self.len, advice) };
        }
    }

    /// Has `len` bytes at `offset` present and ready to be written, with their content. Advice
    /// (Linux 5.14): where it is not followed, each page comes when it is touched.
    pub(super) fn populate(&self, offset: usize, len: usize) {
        if offset.checked_add(len).is_some_and(|end| end <= self.len) {
            let start = self.address().wrapping_add(offset).cast();
            // SAFETY: the range is ours, and the advice changes no content.
            unsafe { libc::madvise(start, len, libc::MADV_POPULATE_WRITE) };
        }
    }
}

impl Drop for Reservation {
    fn drop(&mut self) {
        // SAFETY: the range is ours, and whoever had slices of it borrowed its owner.
        unsafe { libc::munmap(self.address().cast(), self.len) };
    }
}

/// Maps `content` anywhere, or at an address that the caller owns.
fn map(at: Option<usize>, len: usize, content: Content<'_>) -> io::Result<usize> {
    let (kind, fd, offset) = match content {
        Content::Zeros => (libc::MAP_PRIVATE | libc::MAP_ANONYMOUS, -1, 0),
        Content::Shared(file, offset) => (libc::MAP_SHARED, file.as_raw_fd(), offset),
        Content::Private(file, offset) => (libc::MAP_PRIVATE, file.as_raw_fd(), offset),
    };
    let fixed = if at.is_some() { libc::MAP_FIXED } else { 0 };
    let address = std::ptr::with_exposed_provenance_mut(at.unwrap_or(0));
    let offset = libc::off_t::try_from(offset).map_err(|_| io::ErrorKind::InvalidInput)?;
    let (access, flags) = (libc::PROT_READ | libc::PROT_WRITE, kind | fixed | libc::MAP_NORESERVE);
    // SAFETY: without an address the kernel finds a free one. With one, the range is inside of a
    // `Reservation`, which holds guest RAM alone: nobody has a reference to it, and all accesses
    // are volatile and expect any bytes at any time.
    let mapped = unsafe { libc::mmap(address, len, access, flags, fd, offset) };
    if mapped == libc::MAP_FAILED {
        return Err(io::Error::last_os_error());
    }
    Ok(mapped.expose_provenance())
}

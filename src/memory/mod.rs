//! Guest RAM: regions of the caller's address space that the guest sees at physical addresses.
//!
//! Reserving a region touches no page: the kernel gives a zeroed page at the first access, of
//! the guest or of a loader. Every access from here is bounds-checked by vm-memory and volatile,
//! because the guest may write at the same time.
//!
//! A region's addresses stay; what is mapped there ([`backing`]) may become an image that many
//! VMs share ([`image`]), and come back from files ([`saved`]).

mod backing;
mod chunks;
mod discard;
mod frames;
mod image;
mod io;
mod io_queue;
mod mapping;
mod memory_file;
mod pages;
mod saved;
mod transfer;
mod turns;
mod written;

use self::backing::Backing;
pub(crate) use self::backing::Save;
pub(crate) use self::chunks::MemoryProgress;
pub(crate) use self::frames::MAX_FRAME_PIECES;
pub(crate) use self::image::{MAX_LAYERS, MemoryImage};
use self::io::MAX_IOVECS;
pub(crate) use self::io::{GuestBuffers, GuestBytes};
#[cfg(test)]
pub(crate) use self::io_queue::Workers;
pub(crate) use self::io_queue::{FileIo, IoQueue};
use self::mapping::Reservation;
pub(crate) use self::memory_file::set_len;
use self::pages::PAGE_BYTES;
pub(crate) use self::pages::PageRun;
pub(crate) use self::saved::SavedMemory;
use self::transfer::Progress;
pub(crate) use self::transfer::{Clear, Transfer};

use std::io::Error as IoError;
use std::sync::{Arc, Mutex};

use thiserror::Error as ThisError;
use vm_memory::{
    Bytes, GuestAddress, GuestMemoryBackend, GuestMemoryMmap, GuestMemoryRegion, GuestRegionMmap,
    MmapRegion,
};

use crate::error::{Error, ErrorKind};

/// Why guest RAM could not be reserved, reached, saved or restored.
#[derive(Debug, ThisError)]
pub(crate) enum MemoryError {
    #[error("cannot reserve {bytes} bytes of guest memory")]
    Reserve { bytes: usize, source: IoError },
    #[error("guest memory regions overlap, are empty or no multiples of 4096 bytes")]
    Layout,
    #[error("cannot write {len} bytes at guest address {address:#x}")]
    Write { address: u64, len: usize, source: vm_memory::GuestMemoryError },
    #[error("cannot read guest memory")]
    Read { source: vm_memory::GuestMemoryError },
    #[error("cannot map guest memory")]
    Map(#[source] IoError),
    #[error("cannot {action}")]
    File { action: &'static str, source: IoError },
    #[error("guest memory has its content already")]
    Mapped,
    #[error("guest memory has no content yet")]
    NotMapped,
    #[error("the memory is of a VM with memory at other addresses")]
    OtherRanges,
    #[error("guest memory does not stand on the image that it is to be compared with")]
    OtherImage,
    #[error("saved memory in {count} layers; there are 1 to {}", image::MAX_LAYERS)]
    Layers { count: usize },
    #[error("saved memory (layer {layer}) cannot be used: {fault}")]
    Saved { layer: usize, fault: &'static str },
    #[error("saved memory (layer {layer}) is damaged in the MiB at {mib} MiB")]
    Damaged { layer: usize, mib: u32 },
    #[error("saving or checking memory was broken off")]
    Interrupted,
}

impl MemoryError {
    /// Makes the error of a system call on a file of memory.
    fn file(action: &'static str) -> impl Fn(IoError) -> Self + Copy {
        move |source| Self::File { action, source }
    }
}

impl From<MemoryError> for Error {
    fn from(error: MemoryError) -> Self {
        let (kind, fix) = match &error {
            MemoryError::Reserve { .. } => (
                ErrorKind::Resources,
                Some(
                    "give the guest less memory, or raise the limit (ulimit -v, \
                     /proc/sys/vm/overcommit_memory, the container's memory limit)",
                ),
            ),
            MemoryError::Map(_) => (
                ErrorKind::Resources,
                Some("raise /proc/sys/vm/max_map_count, or the limit of memory (ulimit -v)"),
            ),
            MemoryError::File { source, .. } => (
                ErrorKind::Resources,
                match source.raw_os_error() {
                    Some(libc::ENOSPC | libc::EDQUOT) => {
                        Some("make room on the file system, or save to another one")
                    }
                    Some(libc::EMFILE | libc::ENFILE) => {
                        Some("raise the limit of open files (ulimit -n)")
                    }
                    Some(libc::EFBIG) => Some("raise the limit of a file's size (ulimit -f)"),
                    _ => None,
                },
            ),
            MemoryError::OtherRanges => {
                (ErrorKind::Snapshot, Some("restore it to a VM with as much memory"))
            }
            MemoryError::Saved { .. }
            | MemoryError::Damaged { .. }
            | MemoryError::Layers { .. } => {
                (ErrorKind::Snapshot, Some("take the snapshot again, or from a copy"))
            }
            MemoryError::OtherImage => (ErrorKind::Snapshot, Some("take a full snapshot")),
            MemoryError::Interrupted => (ErrorKind::Snapshot, None),
            MemoryError::Layout
            | MemoryError::Write { .. }
            | MemoryError::Read { .. }
            | MemoryError::Mapped
            | MemoryError::NotMapped => (ErrorKind::Resources, None),
        };
        let error = Error::new(kind, error);
        match fix {
            Some(fix) => error.fix(fix),
            None => error,
        }
    }
}

/// From this length on, fresh RAM is written through its file: a page that is new then costs
/// 2.2 µs instead of 3.8, since it needs no fault, and is not zeroed first.
const LARGE_BYTES: usize = 64 * 1024;

/// The guest's RAM.
#[derive(Debug)]
pub(crate) struct GuestRam {
    inner: GuestMemoryMmap,
    /// What the regions of `inner` are in, in the same order. They own the addresses.
    regions: Vec<Reservation>,
    ranges: Arc<[(GuestAddress, usize)]>,
    backing: Mutex<Backing>,
}

/// One contiguous range of guest RAM, as KVM wants to know it.
#[derive(Clone, Copy, Debug)]
pub(crate) struct RamSlot {
    pub(crate) guest_address: u64,
    pub(crate) len: u64,
    pub(crate) host_address: u64,
}

impl GuestRam {
    /// Addresses for each `(guest address, length)` range, from the lowest: what KVM wants to
    /// know. Content comes later ([`map_fresh`](Self::map_fresh), [`map_image`](Self::map_image));
    /// what is written before is lost.
    ///
    /// # Errors
    ///
    /// `Layout` for ranges that overlap, have no pages or parts of pages; `Reserve` where there
    /// are not so many addresses.
    pub(crate) fn reserve(ranges: &[(GuestAddress, usize)]) -> Result<Self, MemoryError> {
        let mut regions = Vec::with_capacity(ranges.len());
        let mut mapped = Vec::with_capacity(ranges.len());
        for &(base, len) in ranges {
            if len == 0 || !len.is_multiple_of(PAGE_BYTES) {
                return Err(MemoryError::Layout);
            }
            let region = Reservation::new(len)
                .map_err(|source| MemoryError::Reserve { bytes: len, source })?;
            let (access, flags) = (libc::PROT_READ | libc::PROT_WRITE, libc::MAP_NORESERVE);
            // SAFETY: the reservation is mapped as long as it lives. It is kept beside the
            // region, and whoever has a slice of the region borrows both.
            let mapping = unsafe { MmapRegion::build_raw(region.address(), len, access, flags) };
            let mapping = mapping.map_err(|_| MemoryError::Layout)?;
            mapped.push(GuestRegionMmap::new(mapping, base).ok_or(MemoryError::Layout)?);
            regions.push(region);
        }
        let inner = GuestMemoryMmap::from_regions(mapped).map_err(|_| MemoryError::Layout)?;
        Ok(Self { inner, regions, ranges: ranges.into(), backing: Mutex::new(Backing::Nothing) })
    }

    /// RAM of its own, zeros, for each `(guest address, length)` range.
    ///
    /// # Errors
    ///
    /// As [`reserve`](Self::reserve) and [`map_fresh`](Self::map_fresh).
    #[cfg(any(test, fuzzing))]
    pub(crate) fn fresh(ranges: &[(GuestAddress, usize)]) -> Result<Self, MemoryError> {
        let ram = Self::reserve(ranges)?;
        ram.map_fresh()?;
        Ok(ram)
    }

    /// Addresses for as much memory as this.
    pub(crate) fn reserve_alike(&self) -> Result<Self, MemoryError> {
        Self::reserve(&self.ranges)
    }

    /// The ranges to register with KVM. They stay mapped as long as `self` lives.
    pub(crate) fn slots(&self) -> impl Iterator<Item = RamSlot> + '_ {
        self.inner.iter().map(|region| RamSlot {
            guest_address: region.start_addr().0,
            len: region.len(),
            host_address: region.as_ptr() as u64,
        })
    }

    /// How much there is.
    pub(crate) fn bytes(&self) -> u64 {
        self.inner.iter().map(|region| region.len()).sum()
    }

    /// The memory as vm-memory and its users (linux-loader) know it.
    pub(crate) fn inner(&self) -> &GuestMemoryMmap {
        &self.inner
    }

    /// Copies bytes to a guest physical address.
    pub(crate) fn write(&self, bytes: &[u8], address: GuestAddress) -> Result<(), MemoryError> {
        if bytes.len() >= LARGE_BYTES && self.write_to_file(bytes, address) {
            return Ok(());
        }
        self.inner.write_slice(bytes, address).map_err(|source| MemoryError::Write {
            address: address.0,
            len: bytes.len(),
            source,
        })
    }
}

#[cfg(test)]
mod tests;

//! Guest RAM: regions of the caller's address space that the guest sees at physical addresses.
//!
//! Reserving a region touches no page: the kernel gives a zeroed page at the first access, of
//! the guest or of a loader. Every access from here is bounds-checked by vm-memory and volatile,
//! because the guest may write at the same time.

mod frames;
mod io;

pub(crate) use self::io::GuestBytes;

use thiserror::Error as ThisError;
use vm_memory::{
    Bytes, GuestAddress, GuestMemoryBackend, GuestMemoryMmap, GuestMemoryRegion, MmapRegion,
};

use crate::error::{Error, ErrorKind};

/// Why guest RAM could not be reserved or reached.
#[derive(Debug, ThisError)]
pub(crate) enum MemoryError {
    #[error("cannot reserve {bytes} bytes of guest memory")]
    Reserve { bytes: usize, source: vm_memory::mmap::MmapRegionError },
    #[error("guest memory regions overlap or are empty")]
    Layout,
    #[error("cannot write {len} bytes at guest address {address:#x}")]
    Write { address: u64, len: usize, source: vm_memory::GuestMemoryError },
}

impl From<MemoryError> for Error {
    fn from(error: MemoryError) -> Self {
        match error {
            MemoryError::Reserve { .. } => Error::new(ErrorKind::Resources, error).fix(
                "give the guest less memory, or raise the limit (ulimit -v, \
                 /proc/sys/vm/overcommit_memory, the container's memory limit)",
            ),
            MemoryError::Layout | MemoryError::Write { .. } => {
                Error::new(ErrorKind::Resources, error)
            }
        }
    }
}

/// The guest's RAM.
#[derive(Debug)]
pub(crate) struct GuestRam {
    inner: GuestMemoryMmap,
}

/// Keeps guest RAM out of the children of a fork, which KVM refuses the VM to, and whose copy
/// would make each write of the guest a fault; and out of core dumps. Advice: a kernel that does
/// not take it costs time, nothing else.
fn keep_to_this_process(mapping: &MmapRegion) {
    for advice in [libc::MADV_DONTFORK, libc::MADV_DONTDUMP] {
        // SAFETY: the range is a mapping of ours, and neither advice changes its content.
        unsafe { libc::madvise(mapping.as_ptr().cast(), mapping.size(), advice) };
    }
}

/// One contiguous range of guest RAM, as KVM wants to know it.
#[derive(Clone, Copy, Debug)]
pub(crate) struct RamSlot {
    pub(crate) guest_address: u64,
    pub(crate) len: u64,
    pub(crate) host_address: u64,
}

impl GuestRam {
    /// Reserves private anonymous memory for each `(guest address, length)` range.
    pub(crate) fn anonymous(ranges: &[(GuestAddress, usize)]) -> Result<Self, MemoryError> {
        let mut regions = Vec::with_capacity(ranges.len());
        for &(base, len) in ranges {
            let mapping = MmapRegion::new(len)
                .map_err(|source| MemoryError::Reserve { bytes: len, source })?;
            keep_to_this_process(&mapping);
            let region =
                vm_memory::GuestRegionMmap::new(mapping, base).ok_or(MemoryError::Layout)?;
            regions.push(region);
        }
        let inner = GuestMemoryMmap::from_regions(regions).map_err(|_| MemoryError::Layout)?;
        Ok(Self { inner })
    }

    /// The ranges to register with KVM. They stay mapped as long as `self` lives.
    pub(crate) fn slots(&self) -> impl Iterator<Item = RamSlot> + '_ {
        self.inner.iter().map(|region| RamSlot {
            guest_address: region.start_addr().0,
            len: region.len(),
            host_address: region.as_ptr() as u64,
        })
    }

    /// The memory as vm-memory and its users (linux-loader) know it.
    pub(crate) fn inner(&self) -> &GuestMemoryMmap {
        &self.inner
    }

    /// Copies bytes to a guest physical address.
    pub(crate) fn write(&self, bytes: &[u8], address: GuestAddress) -> Result<(), MemoryError> {
        self.inner.write_slice(bytes, address).map_err(|source| MemoryError::Write {
            address: address.0,
            len: bytes.len(),
            source,
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn write_across_the_end_is_an_error_and_writes_elsewhere_stand() {
        let ram = GuestRam::anonymous(&[(GuestAddress(0), 0x2000)]).unwrap();
        ram.write(&[7; 16], GuestAddress(0x1ff0)).unwrap();
        assert!(ram.write(&[7; 17], GuestAddress(0x1ff0)).is_err());
        assert!(ram.write(&[7], GuestAddress(u64::MAX)).is_err());
    }

    #[test]
    fn absurd_sizes_are_refused_with_a_fix() {
        let error = GuestRam::anonymous(&[(GuestAddress(0), usize::MAX & !0xfff)]).unwrap_err();
        let error = Error::from(error);
        assert_eq!(error.kind(), &ErrorKind::Resources);
        assert!(error.to_string().contains("less memory"), "{error}");
    }
}

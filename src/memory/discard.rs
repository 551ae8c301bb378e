//! Guest RAM given back to the host.
//!
//! Of fresh RAM, whose file nobody else has, the pages become holes of the file (MADV_REMOVE):
//! zeros, when the guest next looks. Of RAM that stands on an image, what was written goes, and
//! the image's page comes back (MADV_DONTNEED). Any content will do: a guest may not rely on what
//! a page holds that was in the balloon or that it reported, without VIRTIO_BALLOON_F_PAGE_POISON
//! (virtio 1.2 §5.5.6.1, §5.5.6.7), which is not offered.

use vm_memory::{GuestAddress, GuestMemoryBackend, VolatileSlice};

use super::backing::Backing;
use super::{GuestBytes, GuestRam, PAGE_BYTES};

impl GuestRam {
    /// Gives back the whole pages in `len` bytes at an address, up to the first that is not RAM.
    /// Returns how many bytes those are. One system call; some 0.2 µs for each page that was
    /// there.
    pub(crate) fn discard(&self, address: GuestAddress, len: usize) -> u64 {
        let backing = self.backing();
        let slices = self.inner.get_slices(address, len);
        slices.map_while(Result::ok).map(|slice| discard(&slice, &backing)).sum()
    }

    /// Gives back the whole pages in each piece, of the first `most` bytes. Returns how many
    /// bytes those are.
    pub(crate) fn discard_bytes(&self, bytes: &GuestBytes<'_>, most: u64) -> u64 {
        // Held all the while, so that what the pages are backed by stays that.
        let backing = self.backing();
        let mut left = usize::try_from(most).unwrap_or(usize::MAX);
        let mut discarded = 0;
        for piece in bytes.pieces() {
            let Ok(piece) = piece.subslice(0, piece.len().min(left)) else { break };
            left -= piece.len();
            discarded += discard(&piece, &backing);
        }
        discarded
    }
}

fn discard(slice: &VolatileSlice<'_>, backing: &Backing) -> u64 {
    let advice = match backing {
        Backing::Nothing => return 0,
        Backing::Fresh(_) => libc::MADV_REMOVE,
        Backing::Image(_) => libc::MADV_DONTNEED,
    };
    let guard = slice.ptr_guard_mut();
    let pointer = guard.as_ptr();
    let before_page = pointer.align_offset(PAGE_BYTES);
    let len = guard.len().saturating_sub(before_page) & !(PAGE_BYTES - 1);
    if len == 0 {
        return 0;
    }
    let first_page = pointer.wrapping_add(before_page).cast();
    // SAFETY: the pages lie inside the slice, which is guest RAM that stays mapped while the
    // slice lives, and that nobody has a Rust reference to. All accesses to it are volatile, and
    // expect any bytes at any time.
    match unsafe { libc::madvise(first_page, len, advice) } {
        0 => len as u64,
        // Only locked or huge pages of the host refuse it. They stay what they are.
        _ => 0,
    }
}

#[cfg(test)]
mod tests {
    use vm_memory::{Bytes, GuestMemoryMmap};

    use super::*;

    fn ram() -> GuestRam {
        let ranges = [(GuestAddress(0), 16 * PAGE_BYTES), (GuestAddress(1 << 20), PAGE_BYTES)];
        let ram = GuestRam::fresh(&ranges).unwrap();
        for (base, len) in ranges {
            ram.write(&vec![7; len], base).unwrap();
        }
        ram
    }

    /// The pages that are zero.
    fn zero_pages(memory: &GuestMemoryMmap) -> Vec<u64> {
        let first_byte = |page: &u64| memory.read_obj::<u8>(GuestAddress(page << 12)).unwrap();
        (0..16).chain([256]).filter(|page| first_byte(page) == 0).collect()
    }

    #[test]
    fn whole_pages_go_and_no_others() {
        let ram = ram();
        assert_eq!(ram.discard(GuestAddress(4096 * 3 + 1), 4096 * 3), 8192);
        assert_eq!(zero_pages(ram.inner()), [4, 5]);
        assert_eq!(ram.discard(GuestAddress(4096 * 7), 4095), 0);
        assert_eq!(ram.discard(GuestAddress(4096 * 7 + 1), 4096), 0);
        assert_eq!(ram.discard(GuestAddress(4096 * 8), 0), 0);
        assert_eq!(zero_pages(ram.inner()), [4, 5]);
    }

    #[test]
    fn what_is_not_ram_stays() {
        let ram = ram();
        assert_eq!(ram.discard(GuestAddress(4096 * 15), 4096 * 9), 4096);
        assert_eq!(ram.discard(GuestAddress(4096 * 16), 4096), 0);
        assert_eq!(ram.discard(GuestAddress(u64::MAX - 4095), 4096), 0);
        assert_eq!(ram.discard(GuestAddress(1 << 20), usize::MAX), 4096);
        assert_eq!(zero_pages(ram.inner()), [15, 256]);
    }

    #[test]
    fn pieces_go_up_to_a_bound() {
        let ram = ram();
        let mut bytes = GuestBytes::default();
        for page in [1, 3, 5] {
            bytes.push(ram.inner().get_slice(GuestAddress(4096 * page), 8000).unwrap());
        }
        assert_eq!(ram.discard_bytes(&bytes, 8000 + 4096), 8192);
        assert_eq!(zero_pages(ram.inner()), [1, 3]);
        assert_eq!(ram.discard_bytes(&bytes, u64::MAX), 3 * 4096);
        assert_eq!(zero_pages(ram.inner()), [1, 3, 5]);
    }
}

//! The guest's RAM.

use vm_memory::GuestAddress;

use crate::memory::GuestRam;

/// Two regions with a hole between them, and nothing at the end of the address space.
pub(super) const RAM: [(u64, usize); 2] = [(0, 0x1_0000), (0x2_0000, 0x1_0000)];

pub(super) fn ram() -> GuestRam {
    let ranges = RAM.map(|(start, len)| (GuestAddress(start), len));
    GuestRam::fresh(&ranges).expect("some RAM")
}

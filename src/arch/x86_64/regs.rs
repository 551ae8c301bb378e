//! Registers of the boot vCPU at its first instruction, and the tables that they point to.
//!
//! Sources: Linux Documentation/arch/x86/boot.rst, "64-bit Boot Protocol"; Xen
//! docs/misc/pvh.pandoc; Intel SDM vol. 3A §3.4.5 (descriptors), §4.5 (paging).

use kvm_bindings::{kvm_regs, kvm_segment, kvm_sregs};

use super::layout;
use crate::memory::{GuestRam, MemoryError};

const CR0_PE: u64 = 1;
const CR0_ET: u64 = 1 << 4;
const CR0_PG: u64 = 1 << 31;
const CR4_PAE: u64 = 1 << 5;
const EFER_LME: u64 = 1 << 8;
const EFER_LMA: u64 = 1 << 10;
/// RFLAGS bit 1 always reads as one.
const RFLAGS_RESERVED: u64 = 2;

/// Page table bits: present, writable, and a 2 MiB page.
const PRESENT_WRITABLE: u64 = 0x3;
const LARGE_PAGE: u64 = 0x80;

/// Descriptor types: code (execute, read, accessed), data (read, write, accessed), busy TSS.
const CODE: u8 = 0xb;
const DATA: u8 = 0x3;
const TSS: u8 = 0xb;

/// Where and how the boot vCPU begins.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Entry {
    /// Long mode, the first GiB mapped one to one, RSI at `boot_params`.
    Linux64 { address: u64 },
    /// 32-bit protected mode without paging, EBX at `hvm_start_info`.
    Pvh { address: u64 },
}

impl Entry {
    /// General registers at the entry.
    pub(crate) fn regs(self) -> kvm_regs {
        match self {
            Self::Linux64 { address } => kvm_regs {
                rip: address,
                rsi: layout::BOOT_PARAMS.0,
                rflags: RFLAGS_RESERVED,
                ..Default::default()
            },
            Self::Pvh { address } => kvm_regs {
                rip: address,
                rbx: layout::PVH_START_INFO.0,
                rflags: RFLAGS_RESERVED,
                ..Default::default()
            },
        }
    }

    /// Changes the reset values of the system registers to those at the entry.
    pub(crate) fn set_sregs(self, sregs: &mut kvm_sregs) {
        let long = matches!(self, Self::Linux64 { .. });
        sregs.cs = segment(1, CODE, long);
        let data = segment(2, DATA, false);
        sregs.ds = data;
        sregs.es = data;
        sregs.fs = data;
        sregs.gs = data;
        sregs.ss = data;
        sregs.tr = task(3);
        sregs.idt.limit = 0;
        sregs.cr0 = CR0_PE | CR0_ET;
        if long {
            sregs.gdt.base = layout::GDT.0;
            sregs.gdt.limit = (size_of_val(&gdt()) - 1) as u16;
            sregs.cr0 |= CR0_PG;
            sregs.cr3 = layout::PML4.0;
            sregs.cr4 = CR4_PAE;
            sregs.efer = EFER_LME | EFER_LMA;
        }
    }

    /// Writes the tables that a 64-bit entry stands on; a PVH entry needs none.
    pub(crate) fn write_tables(self, ram: &GuestRam) -> Result<(), MemoryError> {
        if matches!(self, Self::Pvh { .. }) {
            return Ok(());
        }
        ram.write(&bytes(&gdt()), layout::GDT)?;
        ram.write(&(layout::PDPT.0 | PRESENT_WRITABLE).to_le_bytes(), layout::PML4)?;
        ram.write(&(layout::PD.0 | PRESENT_WRITABLE).to_le_bytes(), layout::PDPT)?;
        let first_gib: Vec<u64> =
            (0..512).map(|page| (page << 21) | LARGE_PAGE | PRESENT_WRITABLE).collect();
        ram.write(&bytes(&first_gib), layout::PD)
    }
}

/// A flat segment at a place in the GDT.
fn segment(index: u16, kind: u8, long: bool) -> kvm_segment {
    kvm_segment {
        base: 0,
        limit: u32::MAX,
        selector: index * 8,
        type_: kind,
        present: 1,
        dpl: 0,
        db: u8::from(!long),
        s: 1,
        l: u8::from(long),
        g: 1,
        avl: 0,
        unusable: 0,
        padding: 0,
    }
}

/// An empty task state segment, which VMX demands.
fn task(index: u16) -> kvm_segment {
    kvm_segment { limit: 0x67, db: 0, s: 0, g: 0, ..segment(index, TSS, false) }
}

/// The GDT of the 64-bit entry: null, code, data, task.
fn gdt() -> [u64; 4] {
    [
        0,
        descriptor(&segment(1, CODE, true)),
        descriptor(&segment(2, DATA, false)),
        descriptor(&task(3)),
    ]
}

/// A segment in the form in which it stands in memory; its base is 0.
fn descriptor(segment: &kvm_segment) -> u64 {
    // With the granularity bit the limit counts pages.
    let limit = u64::from(if segment.g == 1 { segment.limit >> 12 } else { segment.limit });
    let access = u64::from(segment.type_)
        | (u64::from(segment.s) << 4)
        | (u64::from(segment.dpl) << 5)
        | (u64::from(segment.present) << 7);
    let flags = u64::from(segment.avl)
        | (u64::from(segment.l) << 1)
        | (u64::from(segment.db) << 2)
        | (u64::from(segment.g) << 3);
    (limit & 0xffff) | (access << 40) | ((limit >> 16) << 48) | (flags << 52)
}

fn bytes(words: &[u64]) -> Vec<u8> {
    words.iter().flat_map(|word| word.to_le_bytes()).collect()
}

#[cfg(test)]
mod tests {
    use super::*;
    use vm_memory::{Bytes, GuestAddress};

    #[test]
    fn descriptors_are_those_of_the_boot_protocol() {
        assert_eq!(gdt(), [0, 0x00af_9b00_0000_ffff, 0x00cf_9300_0000_ffff, 0x0000_8b00_0000_0067]);
    }

    #[test]
    fn the_first_gib_is_mapped_one_to_one() {
        let ram = GuestRam::fresh(&[(GuestAddress(0), 0x10_0000)]).unwrap();
        Entry::Linux64 { address: 0x100_0000 }.write_tables(&ram).unwrap();
        let read = |address: u64| ram.inner().read_obj::<u64>(GuestAddress(address)).unwrap();
        assert_eq!(read(0x9000), 0xa003);
        assert_eq!(read(0xa000), 0xb003);
        for page in 0..512 {
            assert_eq!(read(0xb000 + page * 8), (page << 21) | 0x83);
        }
    }
}

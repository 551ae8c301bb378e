//! What each boot protocol hands to the kernel in memory: the memory map, the command line's and
//! the initramfs's places, the RSDP's address.
//!
//! Sources: Linux Documentation/arch/x86/{boot,zero-page}.rst; Xen
//! xen/include/public/arch-x86/hvm/start_info.h.

use linux_loader::configurator::linux::LinuxBootConfigurator;
use linux_loader::configurator::pvh::PvhBootConfigurator;
use linux_loader::configurator::{self, BootConfigurator, BootParams};
use linux_loader::loader::bootparam::{boot_e820_entry, boot_params};
use linux_loader::loader::elf::start_info::{
    hvm_memmap_table_entry, hvm_modlist_entry, hvm_start_info,
};

use super::layout;
use super::regs::Entry;
use crate::memory::GuestRam;

const BOOT_FLAG: u16 = 0xaa55;
/// "HdrS".
const HEADER_MAGIC: u32 = 0x5372_6448;
/// A boot loader without a registered number.
const LOADER_UNDEFINED: u8 = 0xff;
const PVH_MAGIC: u32 = 0x336e_c578;

/// Memory types, the same in E820 and PVH.
const RAM: u32 = 1;
const RESERVED: u32 = 2;

/// What a kernel is told, whatever the protocol.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Handover {
    pub(crate) memory_bytes: u64,
    /// Length of the command line without its NUL.
    pub(crate) cmdline_len: u32,
    pub(crate) initramfs: Option<Placed>,
}

/// Bytes that were put into guest RAM.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Placed {
    pub(crate) address: u64,
    pub(crate) len: u64,
}

impl Handover {
    /// Writes the structure of the entry's protocol.
    pub(crate) fn write(&self, entry: Entry, ram: &GuestRam) -> configurator::Result<()> {
        match entry {
            Entry::Linux64 { .. } => {
                let params = BootParams::new(&self.boot_params(), layout::BOOT_PARAMS);
                LinuxBootConfigurator::write_bootparams(&params, ram.inner())
            }
            Entry::Pvh { .. } => {
                PvhBootConfigurator::write_bootparams(&self.pvh_params(), ram.inner())
            }
        }
    }

    /// RAM and what lies between, in ascending order.
    fn memory_map(&self) -> Vec<(u64, u64, u32)> {
        let mut map = vec![
            (0, layout::LOW_RAM_END, RAM),
            (layout::LOW_RAM_END, layout::HIGH_RAM_START - layout::LOW_RAM_END, RESERVED),
        ];
        for (start, len) in layout::ram_ranges(self.memory_bytes) {
            let begin = start.0.max(layout::HIGH_RAM_START);
            let end = start.0 + len as u64;
            map.push((begin, end - begin, RAM));
        }
        map
    }

    fn boot_params(&self) -> boot_params {
        let mut params = boot_params::default();
        params.hdr.boot_flag = BOOT_FLAG;
        params.hdr.header = HEADER_MAGIC;
        params.hdr.type_of_loader = LOADER_UNDEFINED;
        params.hdr.cmd_line_ptr = layout::CMDLINE.0 as u32;
        params.hdr.cmdline_size = self.cmdline_len;
        if let Some(initramfs) = self.initramfs {
            params.hdr.ramdisk_image = initramfs.address as u32;
            params.hdr.ramdisk_size = initramfs.len as u32;
        }
        params.acpi_rsdp_addr = layout::ACPI.0;
        let map = self.memory_map();
        params.e820_entries = map.len() as u8;
        for (slot, (addr, size, type_)) in params.e820_table.iter_mut().zip(map) {
            *slot = boot_e820_entry { addr, size, r#type: type_ };
        }
        params
    }

    fn pvh_params(&self) -> BootParams {
        let map: Vec<hvm_memmap_table_entry> = self
            .memory_map()
            .into_iter()
            .map(|(addr, size, type_)| hvm_memmap_table_entry { addr, size, type_, reserved: 0 })
            .collect();
        let start_info = hvm_start_info {
            magic: PVH_MAGIC,
            version: 1,
            nr_modules: u32::from(self.initramfs.is_some()),
            modlist_paddr: layout::PVH_MODULES.0,
            cmdline_paddr: layout::CMDLINE.0,
            rsdp_paddr: layout::ACPI.0,
            memmap_paddr: layout::PVH_MEMORY_MAP.0,
            memmap_entries: map.len() as u32,
            ..Default::default()
        };
        let mut params = BootParams::new(&start_info, layout::PVH_START_INFO);
        params.set_sections(&map, layout::PVH_MEMORY_MAP);
        if let Some(initramfs) = self.initramfs {
            let module = hvm_modlist_entry {
                paddr: initramfs.address,
                size: initramfs.len,
                ..Default::default()
            };
            params.set_modules(&[module], layout::PVH_MODULES);
        }
        params
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn memory_map_has_the_whole_memory_around_the_hole() {
        let handover = Handover { memory_bytes: 5 << 30, cmdline_len: 0, initramfs: None };
        assert_eq!(
            handover.memory_map(),
            [
                (0, 0x9_fc00, RAM),
                (0x9_fc00, 0x10_0000 - 0x9_fc00, RESERVED),
                (0x10_0000, 0xc000_0000 - 0x10_0000, RAM),
                (1 << 32, 2 << 30, RAM),
            ]
        );
        let small = Handover { memory_bytes: 2 << 20, ..handover };
        assert_eq!(small.memory_map()[2], (0x10_0000, 1 << 20, RAM));
    }
}

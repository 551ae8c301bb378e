//! The guest's physical address map and its port and interrupt numbers.
//!
//! ```text
//!          0x500   GDT of the 64-bit entry          \
//!         0x6000   hvm_start_info, its memory map    |
//!         0x7000   boot_params                       |  the first 640 KiB
//!         0x9000   page tables of the 64-bit entry   |
//!        0x20000   kernel command line              /
//!        0xdf000   the VM's generation, in a page of its own
//!        0xe0000   ACPI tables, the RSDP first
//!        0xffff0   reset vector
//!       0x100000   RAM: the kernel; the initramfs at the end
//!    0xc000_0000   devices, up to 4 GiB: virtio from 0xd000_0000
//!  0x1_0000_0000   the RAM that did not fit below
//! ```

use vm_memory::GuestAddress;

/// The GDT of the 64-bit Linux entry: four descriptors.
pub(crate) const GDT: GuestAddress = GuestAddress(0x500);
/// `hvm_start_info` of a PVH entry.
pub(crate) const PVH_START_INFO: GuestAddress = GuestAddress(0x6000);
/// The module list of a PVH entry: one module, the initramfs.
pub(crate) const PVH_MODULES: GuestAddress = GuestAddress(0x6100);
/// The memory map of a PVH entry.
pub(crate) const PVH_MEMORY_MAP: GuestAddress = GuestAddress(0x6200);
/// `boot_params` of a Linux entry, the "zero page".
pub(crate) const BOOT_PARAMS: GuestAddress = GuestAddress(0x7000);
/// The page tables of a 64-bit entry: one page each of PML4, PDPT and PD.
pub(crate) const PML4: GuestAddress = GuestAddress(0x9000);
pub(crate) const PDPT: GuestAddress = GuestAddress(0xa000);
pub(crate) const PD: GuestAddress = GuestAddress(0xb000);
/// The kernel command line, 2 KiB.
pub(crate) const CMDLINE: GuestAddress = GuestAddress(0x2_0000);
/// The end of conventional memory; what follows is not RAM for the guest.
pub(crate) const LOW_RAM_END: u64 = 0x9_fc00;
/// The VM's generation, 16 bytes: in RAM, in a page that the guest's memory map reserves and that
/// has nothing else, as "Virtual Machine Generation ID" asks for. It does not begin the page,
/// because a PC's option ROMs are looked for at each 2 KiB from here on down.
pub(crate) const VM_GENERATION: GuestAddress = GuestAddress(0xd_f028);
/// The ACPI tables, in the area that a guest scans for the RSDP.
pub(crate) const ACPI: GuestAddress = GuestAddress(0xe_0000);
/// Where a PC's firmware begins after a reset, in real mode: f000:fff0.
pub(crate) const RESET_VECTOR: GuestAddress = GuestAddress(0xf_fff0);
/// Where RAM goes on after the first MiB.
pub(crate) const HIGH_RAM_START: u64 = 0x10_0000;

/// The hole below 4 GiB that RAM leaves to devices.
pub(crate) const DEVICES_START: u64 = 0xc000_0000;
pub(crate) const DEVICES_END: u64 = 1 << 32;

/// The highest end of an initramfs: the kernel's 64-bit entry reads its address as 32 bits, and
/// older kernels want it below 2 GiB (`initrd_addr_max`).
pub(crate) const INITRAMFS_END: u64 = 0x7fff_f000;

/// The interrupt controllers that KVM puts into the machine.
pub(crate) const IOAPIC: u32 = 0xfec0_0000;
pub(crate) const LOCAL_APIC: u32 = 0xfee0_0000;
/// Three pages that KVM needs on Intel hosts, in the last MiB below 4 GiB, where nothing else is.
pub(crate) const KVM_TSS: usize = 0xfffb_d000;

/// Virtio devices: a page each from here, and an interrupt each from the first one that no legacy
/// device has; the IOAPIC has 24 inputs.
const VIRTIO_START: u64 = 0xd000_0000;
const VIRTIO_BYTES: u64 = 0x1000;
const VIRTIO_FIRST_IRQ: u32 = 5;

/// First serial port: 8 ports, interrupt 4.
pub(crate) const SERIAL_PORT: u16 = 0x3f8;
pub(crate) const SERIAL_PORT_COUNT: u8 = 8;
pub(crate) const SERIAL_IRQ: u32 = 4;
/// What ACPI tells the guest of by an interrupt (the Generic Event Device): the line of a second
/// serial port, which there is not.
pub(crate) const EVENT_IRQ: u32 = 3;
/// Keyboard controller, of which only the reset line is there: ports 0x60 to 0x64.
pub(crate) const I8042_PORT: u16 = 0x60;
pub(crate) const I8042_PORT_COUNT: u8 = 5;
/// pvpanic: 1 port.
pub(crate) const PVPANIC_PORT: u16 = 0x505;
/// ACPI sleep control, sleep status and reset registers: 3 ports in a row.
pub(crate) const POWER_PORT: u16 = 0x600;
pub(crate) const POWER_PORT_COUNT: u8 = 3;
/// The reset register, the last of the three.
pub(crate) const RESET_PORT: u16 = POWER_PORT + 2;

/// Where the registers of a virtio device are: address and length.
pub(crate) fn virtio_registers(device: u32) -> (u64, u64) {
    (VIRTIO_START + u64::from(device) * VIRTIO_BYTES, VIRTIO_BYTES)
}

/// The interrupt of a virtio device.
pub(crate) fn virtio_irq(device: u32) -> u32 {
    VIRTIO_FIRST_IRQ + device
}

/// Guest RAM of `bytes` as (address, length) ranges: one, or two around the devices' hole.
pub(crate) fn ram_ranges(bytes: u64) -> Vec<(GuestAddress, usize)> {
    let below = bytes.min(DEVICES_START);
    let mut ranges = vec![(GuestAddress(0), below as usize)];
    if bytes > below {
        ranges.push((GuestAddress(DEVICES_END), (bytes - below) as usize));
    }
    ranges
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_generation_has_a_reserved_page_to_itself() {
        let page = VM_GENERATION.0 & !0xfff;
        assert!(VM_GENERATION.0.is_multiple_of(8) && VM_GENERATION.0 + 16 <= page + 0x1000);
        assert!(page >= LOW_RAM_END && page + 0x1000 <= ACPI.0);
    }

    #[test]
    fn no_two_devices_have_one_interrupt() {
        let virtio: Vec<u32> = (0..19).map(virtio_irq).collect();
        assert!(!virtio.contains(&SERIAL_IRQ) && !virtio.contains(&EVENT_IRQ));
        assert_ne!(SERIAL_IRQ, EVENT_IRQ);
        assert!(virtio.iter().all(|irq| *irq < 24), "the IOAPIC has so many inputs");
    }

    #[test]
    fn ram_leaves_the_hole_to_devices_and_loses_nothing() {
        for bytes in [2 << 20, DEVICES_START, DEVICES_START + 4096, 5 << 30] {
            let ranges = ram_ranges(bytes);
            assert_eq!(ranges.iter().map(|(_, len)| *len as u64).sum::<u64>(), bytes);
            for (start, len) in ranges {
                let end = start.0 + len as u64;
                assert!(end <= DEVICES_START || start.0 >= DEVICES_END);
            }
        }
    }
}

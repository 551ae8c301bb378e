//! All that is left of a BIOS: what stands at the reset vector.
//!
//! A kernel that finds no better way to reboot switches to real mode and jumps there (Linux
//! arch/x86/kernel/reboot.c, BOOT_BIOS; its way on a hardware-reduced machine without EFI).

use super::{acpi, layout};

/// Real-mode code for [`layout::RESET_VECTOR`]: pulls the reset register.
pub(crate) fn reset_code() -> [u8; 9] {
    let [port_low, port_high] = layout::RESET_PORT.to_le_bytes();
    [
        0xb0,
        acpi::RESET_VALUE, // mov al, RESET_VALUE
        0xba,
        port_low,
        port_high, // mov dx, RESET_PORT
        0xee,      // out dx, al
        0xf4,      // hlt
        0xeb,
        0xfd, // jmp to the hlt
    ]
}

//! A bare-metal guest that runs on any /dev/kvm, also on one that emulates ring 0: a few dozen
//! instructions in ring 0, then ring 3 with all I/O ports open.
//!
//! It is an ELF image made in memory from the code below, entered by the 64-bit Linux protocol.
//! The very first instructions write `B` to the serial port; what comes then is a [`Program`].

use std::arch::global_asm;
use std::slice;

global_asm!(
    r#"
    .pushsection .rodata.dormouse_payload, "a"
    .balign 4096
dm_start:
    mov edx, 0x3f8
    mov al, 'B'
    out dx, al
    cmp qword ptr [rip + dm_program], 0
    jne 2f
1:  cli
    hlt
    jmp 1b

    # Ring 3 may use the first pages of 2 MiB: set the user bit in PML4, PDPT and PD.
2:  lea rsp, [rip + dm_stack]
    mov rax, cr3
    and rax, -4096
    or qword ptr [rax], 4
    mov rbx, [rax]
    and rbx, -4096
    or qword ptr [rbx], 4
    # The GiB with the registers of virtio devices, where the program drives any.
    mov rdx, [rip + dm_devices]
    mov [rbx + 24], rdx
    mov rcx, [rbx]
    and rcx, -4096
    mov rdx, [rip + dm_pages]
3:  or qword ptr [rcx], 4
    add rcx, 8
    dec rdx
    jnz 3b
    mov rax, cr3
    mov cr3, rax

    lea rax, [rip + dm_gdt]
    mov [rip + dm_gdtr + 2], rax
    lgdt [rip + dm_gdtr]
    # A KVM that emulates ring 0 asks the I/O permission map in the TSS, not the privilege level.
    mov eax, 0x28
    ltr ax
    push 0x1b
    lea rax, [rip + dm_stack]
    push rax
    push 0x3002
    push 0x23
    lea rax, [rip + dm_start]
    add rax, [rip + dm_program]
    push rax
    iretq

    # A `.` on the serial port about every 0.2 ms, for ever.
dm_heartbeat:
    mov edi, 500000
4:  rdtsc
    mov esi, eax
5:  rdtsc
    sub eax, esi
    cmp eax, edi
    jb 5b
    mov edx, 0x3f8
    mov al, '.'
    out dx, al
    jmp 4b

    # Writes a list of bytes to ports, then spins.
dm_play:
    lea rsi, [rip + dm_script]
6:  movzx edx, word ptr [rsi]
    cmp edx, 0xffff
    je 7f
    mov al, [rsi + 2]
    out dx, al
    add rsi, 3
    jmp 6b
7:  pause
    jmp 7b

    # Echoes the serial port until a `q`.
dm_echo:
8:  mov edx, 0x3fd
    in al, dx
    test al, 1
    jz 8b
    mov edx, 0x3f8
    in al, dx
    cmp al, 'q'
    je dm_off
    out dx, al
    jmp 8b

    # Reads and writes every port that no device answers, in every size, ...
dm_poke:
    mov ebx, 0
9:  mov edx, ebx
    cmp edx, 0x60
    jb 10f
    cmp edx, 0x64
    jbe 12f
10: cmp edx, 0x3f5
    jb 11f
    cmp edx, 0x3ff
    jbe 12f
11: cmp edx, 0x502
    jb 13f
    cmp edx, 0x505
    jbe 12f
    cmp edx, 0x5fd
    jb 13f
    cmp edx, 0x602
    ja 13f
12: inc ebx
    jmp 9b
13: mov eax, -1
    out dx, al
    out dx, ax
    out dx, eax
    in al, dx
    in ax, dx
    in eax, dx
    inc ebx
    cmp ebx, 0x10000
    jb 9b
    # ... and every 2 MiB from the end of RAM to 1 GiB.
    mov rbx, [rip + dm_ram]
14: mov byte ptr [rbx], 1
    mov word ptr [rbx + 2], 2
    mov dword ptr [rbx + 4], 3
    mov qword ptr [rbx + 8], 4
    mov qword ptr [rbx + 0xffc], 5
    mov al, [rbx]
    mov ax, [rbx + 2]
    mov eax, [rbx + 4]
    mov rax, [rbx + 8]
    add rbx, 0x200000
    cmp rbx, 0x40000000
    jb 14b
    cmp rax, -1
    jne dm_fault
dm_off:
    mov edx, 0x600
    mov al, 0x34
    out dx, al
    jmp dm_off

    # An exception without a handler for it.
dm_fault:
    ud2

    # `rep outsb` and `out dx, ax` to the serial port, then off.
dm_string:
    lea rsi, [rip + dm_text]
    mov ecx, 4
    mov edx, 0x3f8
    cld
    rep outsb
    jmp dm_off
dm_text: .ascii "text"

    # Does what the serial port says, and answers each with a byte, or more:
    #   w N V  writes V to the first byte of N pages from 16 MiB + 1 MiB on: `w`
    #   s N    the sum of those bytes, as four bytes
    #   f N    fills N MiB from 32 MiB on with what is not zero: `f`
    #   x      writes dots for ever
    #   q      switches the machine off
dm_memory:
    mov al, '>'
    call dm_put
15: call dm_get
    cmp al, 'w'
    je 16f
    cmp al, 's'
    je 18f
    cmp al, 'f'
    je 20f
    cmp al, 'x'
    je 22f
    cmp al, 'q'
    je dm_off
    jmp 15b
16: call dm_get
    movzx ecx, al
    call dm_get
    mov edi, 0x1100000
17: mov [rdi], al
    add rdi, 0x1000
    dec ecx
    jnz 17b
    mov al, 'w'
    call dm_put
    jmp 15b
18: call dm_get
    movzx ecx, al
    mov edi, 0x1100000
    xor ebx, ebx
19: movzx eax, byte ptr [rdi]
    add ebx, eax
    add rdi, 0x1000
    dec ecx
    jnz 19b
    mov ecx, 4
21: mov al, bl
    call dm_put
    shr ebx, 8
    dec ecx
    jnz 21b
    jmp 15b
20: call dm_get
    movzx ecx, al
    shl ecx, 17
    mov edi, 0x2000000
    mov rax, 0x0123456789abcdef
    cld
    rep stosq
    mov al, 'f'
    call dm_put
    jmp 15b
22: mov al, '.'
    call dm_put
    jmp 22b
dm_get:
    mov edx, 0x3fd
    in al, dx
    test al, 1
    jz dm_get
    mov edx, 0x3f8
    in al, dx
    ret
dm_put:
    mov edx, 0x3f8
    out dx, al
    ret

    .balign 8
dm_gdt:  .quad 0, 0x00af9b000000ffff, 0x00cf93000000ffff, 0x00cff3000000ffff, 0x00affb000000ffff
dm_tss_descriptor: .quad 0, 0
dm_gdtr: .word 55
         .quad 0
    .balign 8
dm_program: .quad 0
dm_pages:   .quad 64
dm_ram:     .quad 0
dm_devices: .quad 0
dm_script:  .space 2048, 0xff
dm_end:
    .set dm_stack, dm_end + 0x8000
    .set dm_tss, dm_end + 0xa000
    .popsection
"#
);

unsafe extern "C" {
    static dm_start: u8;
    static dm_end: u8;
    static dm_program: u8;
    static dm_pages: u8;
    static dm_ram: u8;
    static dm_devices: u8;
    static dm_script: u8;
    static dm_heartbeat: u8;
    static dm_play: u8;
    static dm_echo: u8;
    static dm_poke: u8;
    static dm_fault: u8;
    static dm_string: u8;
    static dm_memory: u8;
    static dm_tss_descriptor: u8;
    static dm_tss: u8;
}

/// What the guest does after its `B`.
#[derive(Clone, Debug)]
#[allow(dead_code, reason = "tests and benchmarks use different programs")]
pub enum Program {
    /// Halts, in ring 0 and with interrupts off: it costs no CPU and never ends.
    Halt,
    /// Writes a `.` about every 0.2 ms.
    Heartbeat,
    /// Writes these bytes to these ports, then spins.
    Script(Vec<(u16, u8)>),
    /// Echoes its serial port; a `q` switches the machine off.
    Echo,
    /// Touches every port and memory that is not there, then switches the machine off. The
    /// guest has this many MiB of RAM, less than 1,024.
    Poke { ram_mib: u64 },
    /// Triple faults.
    Fault,
    /// Writes `text` with one string instruction, then switches the machine off.
    String,
    /// Writes `>`, and then does what its serial port says: see the code. It needs RAM up to what
    /// it is told to fill.
    Memory,
    /// Runs this image, which is loaded at [`DRIVER_ADDRESS`] and entered at its first byte, with
    /// the registers of virtio devices mapped where they are.
    Driver(Vec<u8>),
}

/// Where the code is loaded and entered.
pub const ADDRESS: u64 = 0x100_0000;
/// Zeros behind the code: the stack and the TSS.
const ZERO_BYTES: u64 = 0x2_0000;
/// Where a [`Program::Driver`] is. The page before it maps the registers of virtio devices.
pub const DRIVER_ADDRESS: u64 = ADDRESS + 0x4_1000;
/// The 2 MiB with the registers of virtio devices.
const DEVICES: u64 = 0xd000_0000;

/// The guest as code, to be put at [`ADDRESS`].
pub fn code(program: &Program) -> Vec<u8> {
    let start = &raw const dm_start;
    let offset = |symbol: *const u8| symbol as usize - start as usize;
    let mut driver = Vec::new();
    // SAFETY: both symbols delimit the section above, which is part of this program's image.
    let mut code = unsafe { slice::from_raw_parts(start, offset(&raw const dm_end)) }.to_vec();
    let mut patch = |symbol: *const u8, bytes: &[u8]| {
        code[offset(symbol)..][..bytes.len()].copy_from_slice(bytes);
    };
    let entry = match program {
        Program::Halt => None,
        Program::Heartbeat => Some(&raw const dm_heartbeat),
        Program::Script(writes) => {
            let mut script: Vec<u8> = Vec::new();
            for (port, value) in writes {
                script.extend(port.to_le_bytes());
                script.push(*value);
            }
            assert!(script.len() < 2040, "the script is too long");
            patch(&raw const dm_script, &script);
            Some(&raw const dm_play)
        }
        Program::Echo => Some(&raw const dm_echo),
        Program::Poke { ram_mib } => {
            patch(&raw const dm_pages, &512u64.to_le_bytes());
            patch(&raw const dm_ram, &(ram_mib << 20).to_le_bytes());
            Some(&raw const dm_poke)
        }
        Program::Fault => Some(&raw const dm_fault),
        Program::String => Some(&raw const dm_string),
        Program::Memory => {
            patch(&raw const dm_pages, &512u64.to_le_bytes());
            Some(&raw const dm_memory)
        }
        Program::Driver(image) => {
            let mut directory = vec![0; 0x1000];
            // Present, writable, for users, never cached, and a page of 2 MiB.
            let at = (DEVICES >> 21 & 0x1ff) as usize * 8;
            directory[at..][..8].copy_from_slice(&(DEVICES | 0x97).to_le_bytes());
            driver = [directory, image.clone()].concat();
            let devices = (DRIVER_ADDRESS - 0x1000) | 7;
            patch(&raw const dm_devices, &devices.to_le_bytes());
            patch(&raw const dm_program, &(DRIVER_ADDRESS - ADDRESS).to_le_bytes());
            None
        }
    };
    // An available 64-bit TSS of 64 KiB, all zeros: its permission map begins at 0, and 0 allows.
    let tss = ADDRESS + offset(&raw const dm_tss) as u64;
    let descriptor = 0xffff | (tss & 0xff_ffff) << 16 | 0x89 << 40 | (tss >> 24 & 0xff) << 56;
    patch(&raw const dm_tss_descriptor, &descriptor.to_le_bytes());
    if let Some(entry) = entry {
        patch(&raw const dm_program, &(offset(entry) as u64).to_le_bytes());
    }
    if !driver.is_empty() {
        code.resize((DRIVER_ADDRESS - ADDRESS) as usize - 0x1000, 0);
        code.extend(driver);
    }
    code
}

/// The guest as an ELF image.
pub fn elf(program: &Program) -> Vec<u8> {
    const HEADERS: u64 = 64 + 56;
    let code = code(program);
    let len = code.len() as u64;
    let mut image = Vec::new();
    image.extend(*b"\x7fELF\x02\x01\x01\0\0\0\0\0\0\0\0\0");
    image.extend(2u16.to_le_bytes()); // e_type: executable
    image.extend(62u16.to_le_bytes()); // e_machine: x86-64
    image.extend(1u32.to_le_bytes());
    image.extend(ADDRESS.to_le_bytes()); // e_entry
    image.extend(64u64.to_le_bytes()); // e_phoff
    image.extend(0u64.to_le_bytes());
    image.extend(0u32.to_le_bytes());
    for half in [64u16, 56, 1, 64, 0, 0] {
        image.extend(half.to_le_bytes());
    }
    image.extend(1u32.to_le_bytes()); // p_type: load
    image.extend(7u32.to_le_bytes()); // p_flags
    for word in [HEADERS, ADDRESS, ADDRESS, len, len + ZERO_BYTES, 4096] {
        image.extend(word.to_le_bytes());
    }
    image.extend(code);
    image
}

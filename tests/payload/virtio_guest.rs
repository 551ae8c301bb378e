//! A bare-metal driver of one virtqueue, for [`Program::Driver`](crate::guest::Program::Driver).
//!
//! Rings, descriptors and buffers are made here and are part of the image; the guest only keeps
//! the queue full. It polls, so no interrupt is needed, and nothing of it runs in ring 0. When a
//! byte comes on its serial port it writes `(`, works through a batch of requests, and writes
//! `)`, or `!` at a status that is not 0.

use std::arch::global_asm;
use std::slice;

use crate::guest::DRIVER_ADDRESS;

global_asm!(
    r#"
    .pushsection .rodata.dormouse_driver, "a"
    .balign 4096
dv_start:
    lea rdi, [rip + dv_queue]
    # The writes to registers that bring the device up: pairs of address and value.
    lea rsi, [rip + dv_registers]
1:  mov ebx, [rsi]
    test ebx, ebx
    jz 2f
    mov eax, [rsi + 4]
    mov [rbx], eax
    add rsi, 8
    jmp 1b

    # A byte begins a batch.
2:  mov edx, 0x3fd
    in al, dx
    test al, 1
    jz 2b
    mov edx, 0x3f8
    in al, dx
    mov al, '('
    out dx, al
    mov rax, [rdi + 112]
    mov [rdi + 120], rax
    # Where the driver keeps buffers in the queue, they are there already.
    cmp qword ptr [rdi + 104], 0
    je 4f
    mov [rdi + 128], rax
    xor ebx, ebx
3:  mov eax, ebx
    dec qword ptr [rdi + 128]
    call dv_post
    inc ebx
    cmp rbx, [rdi + 104]
    jb 3b
    call dv_ring

4:  mov r9, [rdi]
5:  mov ax, [r9 + 2]
    cmp ax, [rdi + 40]
    jne 6f
    pause
    jmp 5b
6:  movzx ecx, word ptr [rdi + 40]
    inc word ptr [rdi + 40]
    and ecx, [rdi + 32]
    mov eax, [r9 + 4 + rcx * 8]
    # The status of a request.
    mov r8, [rdi + 136]
    test r8, r8
    jz 7f
    cmp byte ptr [r8 + rax], 0
    jne 10f
7:  cmp qword ptr [rdi + 128], 0
    je 8f
    dec qword ptr [rdi + 128]
    call dv_post
8:  dec qword ptr [rdi + 120]
    jz 9f
    mov r9, [rdi]
    mov ax, [r9 + 2]
    cmp ax, [rdi + 40]
    jne 6b
    call dv_ring
    jmp 4b
9:  call dv_ring
    mov al, ')'
    jmp 11f
10: mov al, '!'
11: mov edx, 0x3f8
    out dx, al
    jmp 2b

    # Makes descriptor eax available, and its request one for another sector.
dv_post:
    mov r8, [rdi + 56]
    test r8, r8
    jz 12f
    mov rdx, [rdi + 64]
    imul rdx, [rdi + 72]
    add rdx, [rdi + 80]
    mov [rdi + 64], rdx
    mov ecx, [rdi + 88]
    shr rdx, cl
    and rdx, [rdi + 96]
    mov ecx, eax
    shl ecx, 4
    mov [r8 + rcx + 8], rdx
    mov r8, [rdi + 136]
    mov byte ptr [r8 + rax], 0xee
12: movzx ecx, word ptr [rdi + 48]
    inc word ptr [rdi + 48]
    and ecx, [rdi + 32]
    mov r8, [rdi + 8]
    mov [r8 + 4 + rcx * 2], ax
    ret

    # Tells the device of what is available, if it wants to know.
dv_ring:
    mov r8, [rdi + 8]
    mov ax, [rdi + 48]
    cmp [r8 + 2], ax
    je 13f
    mov [r8 + 2], ax
    mfence
    mov r9, [rdi]
    test word ptr [r9], 1
    jnz 13f
    mov rax, [rdi + 16]
    mov ecx, [rdi + 24]
    mov [rax], ecx
13: ret

    .balign 8
dv_queue:
    .space 144
dv_registers:
    .space 1024
dv_end:
    .popsection
"#
);

unsafe extern "C" {
    static dv_start: u8;
    static dv_end: u8;
    static dv_queue: u8;
    static dv_registers: u8;
}

pub const REGISTERS: u64 = 0xd000_0000;
const QUEUE_SIZE: u16 = 256;

/// Where things are, from the beginning of the image.
const DESCRIPTORS: u64 = 0x1000;
const AVAILABLE: u64 = 0x2000;
const USED: u64 = 0x3000;
const STATUSES: u64 = 0x4000;
const HEADERS: u64 = 0x5000;
const INDIRECT: u64 = 0x6000;
const IMAGE_BYTES: usize = 0xa000;
/// The buffers are behind everything else, in RAM that no image fills.
const BUFFERS: u64 = 0x200_0000;

pub const NEXT: u16 = 1;
pub const WRITE: u16 = 2;
pub const INDIRECT_TABLE: u16 = 4;
/// The driver polls the used ring.
pub const NO_INTERRUPT: u16 = 1;

/// What a batch does.
#[derive(Clone, Copy, Debug)]
#[allow(dead_code, reason = "tests and benchmarks do different work")]
pub enum Work {
    /// Reads of a disk of `sectors` sectors, a power of two.
    BlockRead { sectors: u64, order: Order },
    /// Writes.
    BlockWrite { sectors: u64, order: Order },
    /// Buffers that the device reads, in this queue: frames or packets with this header.
    Send { queue: u32, header: &'static [u8] },
    /// Buffers that the device fills, in this queue.
    Receive { queue: u32 },
}

/// Which sectors are next.
#[derive(Clone, Copy, Debug)]
pub enum Order {
    Sequential,
    Random,
}

impl Order {
    /// The numbers a, c and s of x ← ax + c, whose bits from s on are a sector.
    fn generator(self, buffer_bytes: u32) -> [u64; 3] {
        match self {
            Self::Sequential => [1, u64::from(buffer_bytes / 512), 0],
            // Knuth's MMIX.
            Self::Random => [6_364_136_223_846_793_005, 1_442_695_040_888_963_407, 32],
        }
    }
}

/// The sectors of the requests of a driver, in its order: for those who do the same without one.
#[derive(Clone, Copy, Debug)]
pub struct Sectors {
    state: u64,
    generator: [u64; 3],
    mask: u64,
}

impl Sectors {
    pub fn new(order: Order, sectors: u64, buffer_bytes: u32) -> Self {
        assert!(sectors.is_power_of_two());
        let mask = (sectors - 1) & !u64::from(buffer_bytes / 512 - 1);
        Self { state: 0, generator: order.generator(buffer_bytes), mask }
    }
}

impl Iterator for Sectors {
    type Item = u64;

    fn next(&mut self) -> Option<u64> {
        let [multiplier, increment, shift] = self.generator;
        self.state = self.state.wrapping_mul(multiplier).wrapping_add(increment);
        Some((self.state >> shift) & self.mask)
    }
}

/// A driver of one queue of one device.
#[derive(Clone, Copy, Debug)]
pub struct Driver {
    /// The device's place.
    pub device: u64,
    pub work: Work,
    /// Bytes of each buffer: a power of two.
    pub buffer_bytes: u32,
    /// Requests in flight.
    pub depth: u16,
    /// Requests of a batch: not fewer than `depth`.
    pub batch: u64,
}

impl Driver {
    /// The image that is the program.
    pub fn image(&self) -> Vec<u8> {
        let start = &raw const dv_start;
        let offset = |symbol: *const u8| symbol as usize - start as usize;
        // SAFETY: both symbols delimit the section above, which is part of this program's image.
        let code = unsafe { slice::from_raw_parts(start, offset(&raw const dv_end)) };
        let mut image = Image::new(IMAGE_BYTES);
        assert!(code.len() <= DESCRIPTORS as usize, "the code is too long");
        image.put(0, code);
        for slot in 0..self.depth {
            self.request(&mut image, slot.into());
        }
        image.put(AVAILABLE, &NO_INTERRUPT.to_le_bytes());
        let keeps_full = matches!(self.work, Work::Receive { .. });
        if keeps_full {
            image.put(AVAILABLE + 2, &self.depth.to_le_bytes());
            for slot in 0..self.depth {
                image.put(AVAILABLE + 4 + u64::from(slot) * 2, &slot.to_le_bytes());
            }
        }
        let at = offset(&raw const dv_queue) as u64;
        for (place, word) in (0u64..).zip(self.queue(keeps_full)) {
            image.put(at + place * 8, &word.to_le_bytes());
        }
        let at = offset(&raw const dv_registers) as u64;
        for (place, (register, value)) in (0u64..).zip(self.registers()) {
            let address = (self.base() + register) as u32;
            image.put(at + place * 8, &address.to_le_bytes());
            image.put(at + place * 8 + 4, &value.to_le_bytes());
        }
        image.into_bytes()
    }

    fn base(&self) -> u64 {
        REGISTERS + self.device * 0x1000
    }

    fn queue_index(&self) -> u32 {
        match self.work {
            Work::Send { queue, .. } | Work::Receive { queue } => queue,
            Work::BlockRead { .. } | Work::BlockWrite { .. } => 0,
        }
    }

    /// The words at `dv_queue`.
    fn queue(&self, keeps_full: bool) -> [u64; 18] {
        let block = match self.work {
            Work::BlockRead { sectors, order } | Work::BlockWrite { sectors, order } => {
                Some(Sectors::new(order, sectors, self.buffer_bytes))
            }
            Work::Send { .. } | Work::Receive { .. } => None,
        };
        let at = |place| DRIVER_ADDRESS + place;
        let [multiplier, increment, shift] = block.map_or([0; 3], |sectors| sectors.generator);
        [
            at(USED),
            at(AVAILABLE),
            self.base() + 0x50,
            self.queue_index().into(),
            u64::from(QUEUE_SIZE) - 1,
            0,                                              // next used
            if keeps_full { self.depth.into() } else { 0 }, // next available
            if block.is_some() { at(HEADERS) } else { 0 },
            0, // the generator's state
            multiplier,
            increment,
            shift,
            block.map_or(0, |sectors| sectors.mask),
            if keeps_full { 0 } else { self.depth.into() },
            self.batch,
            0,                                     // still to be used
            if keeps_full { u64::MAX } else { 0 }, // still to be made available
            if block.is_some() { at(STATUSES) } else { 0 },
        ]
    }

    /// The descriptors of a request, and the bytes that never change.
    fn request(&self, image: &mut Image, slot: u64) {
        let buffer = BUFFERS + slot * u64::from(self.buffer_bytes);
        let table = INDIRECT + slot * 48;
        let header = DRIVER_ADDRESS + HEADERS + slot * 16;
        let status = DRIVER_ADDRESS + STATUSES + slot;
        let (kind, flags) = match self.work {
            Work::BlockRead { .. } => (0u32, NEXT | WRITE),
            Work::BlockWrite { .. } => (1, NEXT),
            Work::Send { header: bytes, .. } => {
                // The header, then the buffer.
                image.put(HEADERS, bytes);
                image.descriptor(table, DRIVER_ADDRESS + HEADERS, bytes.len() as u32, NEXT, 1);
                image.descriptor(table + 16, buffer, self.buffer_bytes, 0, 0);
                let at = DRIVER_ADDRESS + table;
                return image.descriptor(DESCRIPTORS + slot * 16, at, 32, INDIRECT_TABLE, 0);
            }
            Work::Receive { .. } => {
                let at = DESCRIPTORS + slot * 16;
                return image.descriptor(at, buffer, self.buffer_bytes, WRITE, 0);
            }
        };
        image.put(HEADERS + slot * 16, &kind.to_le_bytes());
        image.descriptor(table, header, 16, NEXT, 1);
        image.descriptor(table + 16, buffer, self.buffer_bytes, flags, 2);
        image.descriptor(table + 32, status, 1, WRITE, 0);
        let at = DRIVER_ADDRESS + table;
        image.descriptor(DESCRIPTORS + slot * 16, at, 48, INDIRECT_TABLE, 0);
    }

    /// The writes that bring the device up (§3.1.1, §4.2.3).
    fn registers(&self) -> Vec<(u64, u32)> {
        const ACKNOWLEDGED: u32 = 1 | 2;
        const FEATURES_OK: u32 = ACKNOWLEDGED | 8;
        let mut writes = vec![(0x70, 0), (0x70, ACKNOWLEDGED)];
        // INDIRECT_DESC and VERSION_1.
        writes.extend([(0x24, 0), (0x20, 1 << 28), (0x24, 1), (0x20, 1)]);
        writes.push((0x70, FEATURES_OK));
        writes.extend([(0x30, self.queue_index()), (0x38, QUEUE_SIZE.into())]);
        for (register, place) in [(0x80, DESCRIPTORS), (0x90, AVAILABLE), (0xa0, USED)] {
            writes.extend([(register, (DRIVER_ADDRESS + place) as u32), (register + 4, 0)]);
        }
        writes.extend([(0x44, 1), (0x70, FEATURES_OK | 4)]);
        writes.push((0x50, self.queue_index()));
        writes
    }
}

/// Memory that a guest begins with.
pub struct Image(Vec<u8>);

impl Image {
    pub fn new(bytes: usize) -> Self {
        Self(vec![0; bytes])
    }

    pub fn into_bytes(self) -> Vec<u8> {
        self.0
    }

    pub fn put(&mut self, at: u64, bytes: &[u8]) {
        self.0[at as usize..][..bytes.len()].copy_from_slice(bytes);
    }

    pub fn descriptor(&mut self, at: u64, address: u64, len: u32, flags: u16, next: u16) {
        self.put(at, &address.to_le_bytes());
        self.put(at + 8, &len.to_le_bytes());
        self.put(at + 12, &flags.to_le_bytes());
        self.put(at + 14, &next.to_le_bytes());
    }
}

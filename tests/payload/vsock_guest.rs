//! A bare-metal driver of the socket device, for [`Program::Driver`](crate::guest::Program::Driver).
//!
//! It connects to a port of the host in its first batch, and works at the connection in those
//! that follow. As [`virtio_guest`](crate::virtio_guest) it polls, is told by a byte to begin,
//! and writes `(`, `)` and `!`. It keeps to its credit and gives some as Linux does: when less than a
//! packet's is left.

use std::arch::global_asm;
use std::slice;

use crate::guest::DRIVER_ADDRESS;
use crate::virtio_guest::{INDIRECT_TABLE, Image, NEXT, NO_INTERRUPT, REGISTERS, WRITE};

/// Bytes of a message, and of a buffer.
pub const MESSAGE: u32 = 64 << 10;
/// The port of the host.
pub const PORT: u32 = 1024;

const GUEST_PORT: u32 = 5000;
const GUEST_CID: u64 = 3;
/// What the guest lets the host send before it hears of room.
const BUF_ALLOC: u32 = 256 << 10;
const QUEUE_SIZE: u16 = 256;
/// Buffers of each queue: a power of two, so that each has the same places in the ring for ever.
const SLOTS: u16 = 16;

/// Where things are, from the beginning of the image; those of the other queue `OTHER` behind.
const DESCRIPTORS: u64 = 0x1000;
const AVAILABLE: u64 = 0x2000;
const USED: u64 = 0x3000;
const HEADERS: u64 = 0x4000;
const INDIRECT: u64 = 0x5000;
const OTHER: u64 = 0x5000;
const IMAGE_BYTES: usize = 0xb000;
const BUFFERS: u64 = 0x200_0000;
/// The places of a header are so far apart.
const HEADER_STEP: u64 = 64;
const HEADER_BYTES: u32 = 44;

/// The queues: `OTHER` is between those that the device fills and those that it reads.
const RX: u64 = 0;
const TX: u64 = 1;

global_asm!(
    r#"
    .pushsection .rodata.dormouse_vsock, "a"
    .balign 4096
vs_start:
    # The writes to registers that bring the device up: pairs of address and value.
    lea rsi, [rip + vs_registers]
1:  mov ebx, [rsi]
    test ebx, ebx
    jz 2f
    mov eax, [rsi + 4]
    mov [rbx], eax
    add rsi, 8
    jmp 1b

    # A byte begins a batch, which rbx counts down.
2:  mov edx, 0x3fd
    in al, dx
    test al, 1
    jz 2b
    mov edx, 0x3f8
    in al, dx
    mov al, '('
    out dx, al
    mov rbx, [rip + vs_batch]
    cmp dword ptr [rip + vs_connected], 0
    jne 3f
    # REQUEST, and RESPONSE.
    mov dword ptr [rip + vs_connected], 1
    mov eax, 1
    xor ecx, ecx
    call vs_put
    call vs_take
    cmp eax, 2
    jne vs_failed
    jmp vs_done
3:  mov eax, [rip + vs_work]
    test eax, eax
    jz vs_exit
    dec eax
    jz vs_send
    dec eax
    jz vs_receive

    # Answers each packet with one as long.
vs_echo:
    call vs_take
    cmp eax, 5
    jne vs_failed
    add [rip + vs_sent], ecx
    call vs_put
    dec rbx
    jnz vs_echo
    jmp vs_done

    # Writes to a port that no device answers.
vs_exit:
    mov edx, 0x80
    out dx, al
    dec rbx
    jnz vs_exit
    jmp vs_done

    # Sends messages. Where there is no credit, the next packet brings some.
vs_send:
    mov ecx, {message}
    mov eax, [rip + vs_sent]
    sub eax, [rip + vs_peer_fwd_cnt]
    add eax, ecx
    cmp eax, [rip + vs_peer_buf_alloc]
    jbe 4f
    call vs_take
    cmp eax, 6
    jne vs_failed
    jmp vs_send
4:  add [rip + vs_sent], ecx
    mov eax, 5
    call vs_put
    dec rbx
    jnz vs_send
    jmp vs_done

    # Receives rbx bytes: data, or a question for credit.
vs_receive:
    call vs_take
    cmp eax, 7
    je 5f
    cmp eax, 5
    jne vs_failed
    sub rbx, rcx
    mov eax, [rip + vs_received]
    sub eax, [rip + vs_told]
    cmp eax, {enough}
    jbe 6f
5:  mov eax, 6
    xor ecx, ecx
    call vs_put
6:  test rbx, rbx
    jnz vs_receive

vs_done:
    mov al, ')'
    jmp 7f
vs_failed:
    mov al, '!'
7:  mov edx, 0x3f8
    out dx, al
    jmp 2b

    # Waits for a packet: its operation in eax, its length in ecx. What is in it is nobody's.
vs_take:
    mov ax, [{rx_used} + 2]
    cmp ax, [rip + vs_next_used]
    jne 8f
    pause
    jmp vs_take
8:  movzx edx, word ptr [rip + vs_next_used]
    inc word ptr [rip + vs_next_used]
    and edx, {slots} - 1
    imul edx, edx, {header_step}
    mov eax, [rdx + {rx_headers} + 36]
    mov [rip + vs_peer_buf_alloc], eax
    mov eax, [rdx + {rx_headers} + 40]
    mov [rip + vs_peer_fwd_cnt], eax
    mov ecx, [rdx + {rx_headers} + 24]
    movzx eax, word ptr [rdx + {rx_headers} + 30]
    add [rip + vs_received], ecx
    # Buffers are made available again when half of them are used, as Linux does.
    inc word ptr [rip + vs_empty]
    cmp word ptr [rip + vs_empty], {slots} / 2
    jb 9f
    mov word ptr [rip + vs_empty], 0
    add word ptr [{rx_available} + 2], {slots} / 2
    mfence
    test word ptr [{rx_used}], 1
    jnz 9f
    mov edx, {doorbell}
    xor r8d, r8d
    mov [rdx], r8d
9:  ret

    # Sends a packet of operation eax with ecx bytes, once there is a place for it.
vs_put:
    movzx edx, word ptr [{tx_available} + 2]
    mov r8d, edx
    sub r8w, [{tx_used} + 2]
    cmp r8w, {slots}
    jb 10f
    pause
    jmp vs_put
10: and edx, {slots} - 1
    imul edx, edx, {header_step}
    mov [rdx + {tx_headers} + 24], ecx
    mov [rdx + {tx_headers} + 30], ax
    mov eax, [rip + vs_received]
    mov [rip + vs_told], eax
    mov [rdx + {tx_headers} + 40], eax
    inc word ptr [{tx_available} + 2]
    mfence
    test word ptr [{tx_used}], 1
    jnz 11f
    mov edx, {doorbell}
    mov r8d, 1
    mov [rdx], r8d
11: ret

    .balign 8
vs_batch:          .quad 0
vs_work:           .long 0
vs_connected:      .long 0
vs_sent:           .long 0
vs_received:       .long 0
vs_told:           .long 0
vs_peer_buf_alloc: .long 0
vs_peer_fwd_cnt:   .long 0
vs_next_used:      .word 0
vs_empty:          .word 0
    .balign 8
vs_registers:      .space 1024
vs_end:
    .popsection
"#,
    message = const MESSAGE,
    enough = const BUF_ALLOC - MESSAGE,
    slots = const SLOTS,
    header_step = const HEADER_STEP,
    doorbell = const REGISTERS + 0x50,
    rx_available = const place(RX, AVAILABLE),
    rx_used = const place(RX, USED),
    rx_headers = const place(RX, HEADERS),
    tx_available = const place(TX, AVAILABLE),
    tx_used = const place(TX, USED),
    tx_headers = const place(TX, HEADERS),
);

unsafe extern "C" {
    static vs_start: u8;
    static vs_end: u8;
    static vs_batch: u8;
    static vs_work: u8;
    static vs_registers: u8;
}

/// What a batch does, but for the first one.
#[derive(Clone, Copy, Debug)]
#[repr(u32)]
pub enum Work {
    /// Writes to a port that no device answers.
    Exit = 0,
    /// Sends messages.
    Send = 1,
    /// Receives as many bytes as so many messages have, and does not look at them.
    Receive = 2,
    /// Sends as many bytes for each packet as were in it.
    Echo = 3,
}

/// Where a queue's things are in guest RAM.
const fn place(queue: u64, at: u64) -> u64 {
    DRIVER_ADDRESS + queue * OTHER + at
}

/// The image of a driver whose batches are so much work. The device is the VM's first.
pub fn image(work: Work, batch: u64) -> Vec<u8> {
    let start = &raw const vs_start;
    let offset = |symbol: *const u8| symbol as usize - start as usize;
    // SAFETY: both symbols delimit the section above, which is part of this program's image.
    let code = unsafe { slice::from_raw_parts(start, offset(&raw const vs_end)) };
    let mut image = Image::new(IMAGE_BYTES);
    assert!(code.len() <= DESCRIPTORS as usize, "the code is too long");
    image.put(0, code);
    let rbx = match work {
        Work::Receive => batch * u64::from(MESSAGE),
        Work::Exit | Work::Send | Work::Echo => batch,
    };
    image.put(offset(&raw const vs_batch) as u64, &rbx.to_le_bytes());
    image.put(offset(&raw const vs_work) as u64, &(work as u32).to_le_bytes());
    for (queue, flags) in [(RX, WRITE), (TX, 0)] {
        buffers(&mut image, queue, flags);
    }
    image.put(OTHER * RX + AVAILABLE + 2, &SLOTS.to_le_bytes());
    let at = offset(&raw const vs_registers) as u64;
    for (index, (register, value)) in (0u64..).zip(registers()) {
        let address = (REGISTERS + register) as u32;
        image.put(at + index * 8, &address.to_le_bytes());
        image.put(at + index * 8 + 4, &value.to_le_bytes());
    }
    image.into_bytes()
}

/// The descriptors of a queue's packets, their headers, and the ring that names them in turn.
fn buffers(image: &mut Image, queue: u64, flags: u16) {
    let base = queue * OTHER;
    image.put(base + AVAILABLE, &NO_INTERRUPT.to_le_bytes());
    for at in 0..QUEUE_SIZE {
        let slot = at % SLOTS;
        image.put(base + AVAILABLE + 4 + u64::from(at) * 2, &slot.to_le_bytes());
    }
    let mut header = Vec::new();
    for cid in [GUEST_CID, 2] {
        header.extend(cid.to_le_bytes());
    }
    // Ports, the length, the type of a stream, flags, and credit.
    for word in [GUEST_PORT, PORT, 0, 1, 0, BUF_ALLOC, 0] {
        header.extend(word.to_le_bytes());
    }
    for slot in 0..u64::from(SLOTS) {
        let (head, table) = (HEADERS + slot * HEADER_STEP, INDIRECT + slot * 32);
        let buffer = BUFFERS + (queue * u64::from(SLOTS) + slot) * u64::from(MESSAGE);
        image.put(base + head, &header);
        image.descriptor(base + table, place(queue, head), HEADER_BYTES, NEXT | flags, 1);
        image.descriptor(base + table + 16, buffer, MESSAGE, flags, 0);
        let at = base + DESCRIPTORS + slot * 16;
        image.descriptor(at, place(queue, table), 32, INDIRECT_TABLE, 0);
    }
}

/// The writes that bring the device up (§3.1.1, §4.2.3).
fn registers() -> Vec<(u64, u32)> {
    let mut writes = vec![(0x70, 0), (0x70, 3), (0x24, 0), (0x20, 1 << 28), (0x24, 1), (0x20, 1)];
    writes.push((0x70, 11));
    for queue in [RX, TX] {
        writes.extend([(0x30, queue as u32), (0x38, QUEUE_SIZE.into())]);
        for (register, at) in [(0x80, DESCRIPTORS), (0x90, AVAILABLE), (0xa0, USED)] {
            writes.extend([(register, place(queue, at) as u32), (register + 4, 0)]);
        }
        writes.push((0x44, 1));
    }
    writes.extend([(0x70, 15), (0x50, RX as u32)]);
    writes
}

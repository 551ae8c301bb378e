//! A guest with one device: some RAM, the device's registers, and a driver's usual steps.

use std::sync::Arc;
use std::time::{Duration, Instant};

use vm_memory::{Bytes, GuestAddress};
use vmm_sys_util::eventfd::EventFd;

use super::input::Input;
use super::ram::ram;
use crate::bus::BusDevice;
use crate::memory::GuestRam;
use crate::virtio::state::{RestoreError, TransportState};
use crate::virtio::{DeviceHandle, Interrupt, MmioTransport, Served, VirtioDevice};

/// Where the queue of a driver that keeps to the rules is.
const QUEUE: u64 = 0x2_0000;
const AVAILABLE: u64 = 0x1000;
const USED: u64 = 0x2000;
/// Where its requests are.
const BUFFERS: u64 = 0x1000;
const STATUS: u64 = 0xf00;
/// How long what is in flight may take.
const PATIENCE: Duration = Duration::from_secs(10);

pub(super) fn interrupt() -> Arc<Interrupt> {
    let line = EventFd::new(libc::EFD_NONBLOCK | libc::EFD_CLOEXEC).expect("an eventfd");
    Arc::new(Interrupt::new(line))
}

/// What a driver writes to make a queue ready, whose rings are at these distances from `base`.
pub(super) fn queue_registers(queue: u32, size: u16, base: u32) -> [(u64, u32); 9] {
    [
        (0x30, queue),
        (0x38, size.into()),
        (0x80, base),
        (0x84, 0),
        (0x90, base + AVAILABLE as u32),
        (0x94, 0),
        (0xa0, base + USED as u32),
        (0xa4, 0),
        (0x44, 1),
    ]
}

pub(super) struct Guest<D: VirtioDevice + 'static> {
    ram: Arc<GuestRam>,
    device: DeviceHandle<D>,
    registers: MmioTransport,
    sources: usize,
    /// How many requests the driver has made available.
    available: u16,
    size: u16,
    /// The queue that the driver brought up last.
    queue: u32,
}

impl<D: VirtioDevice + 'static> Guest<D> {
    pub(super) fn new(device: D) -> Self {
        let sources = device.sources().expect("the device's sources").len();
        let ram = Arc::new(ram());
        let device = DeviceHandle::new(device, &ram, interrupt()).expect("a device");
        let registers = MmioTransport::new(device.erase());
        Self { ram, device, registers, sources, available: 0, size: 0, queue: 0 }
    }

    pub(super) fn queue_count(&self) -> u32 {
        self.device.queue_count()
    }

    pub(super) fn state(&self) -> TransportState {
        self.device.state()
    }

    pub(super) fn restore(&mut self, state: &TransportState) -> Result<(), RestoreError> {
        self.device.restore(state)
    }

    pub(super) fn pause(&mut self) {
        self.settle();
        self.device.pause();
    }

    pub(super) fn resume(&mut self) {
        if self.device.resume() {
            for queue in 0..self.queue_count() {
                self.serve(queue as usize);
            }
        }
    }

    /// The host does something with the device.
    pub(super) fn host<R>(&self, act: impl FnOnce(&mut D) -> R) -> R {
        self.device.with(act)
    }

    /// Puts bytes into RAM, where there is some.
    pub(super) fn poke(&self, address: u64, bytes: &[u8]) {
        let _ = self.ram.write(bytes, GuestAddress(address));
    }

    pub(super) fn look(&self, address: u64, len: usize) -> Vec<u8> {
        let mut bytes = vec![0; len];
        let _ = self.ram.inner().read(&mut bytes, GuestAddress(address));
        bytes
    }

    pub(super) fn peek(&self, address: u64) -> u16 {
        self.ram.inner().read_obj(GuestAddress(address)).unwrap_or_default()
    }

    /// One action of the guest or the host.
    pub(super) fn act(&mut self, input: &mut Input<'_>) {
        match input.byte() % 12 {
            0 | 1 => self.begin(0, input),
            2 => self.begin(input.byte().into(), input),
            // A register that there is, as 32 bits.
            3 => self.write(u64::from(input.byte() & 0x3f) * 4, &input.u32().to_le_bytes()),
            // Anything of any size.
            4 => {
                let (offset, len) = (input.u16() & 0xfff, usize::from(input.byte() % 9));
                self.write(offset.into(), input.bytes(len));
            }
            5 => {
                let (offset, len) = (input.u16() & 0xfff, usize::from(input.byte() % 9));
                self.registers.read(offset.into(), &mut vec![0xff; len]);
            }
            6 => {
                let (address, len) = (input.address(), input.byte().into());
                let _ = self.ram.write(input.bytes(len), GuestAddress(address));
            }
            7 | 8 => self.chain(input),
            9 => {
                self.block_request(input);
            }
            10 => self.serve(input.byte().into()),
            _ => {
                self.pause();
                self.resume();
            }
        }
        self.settle();
    }

    /// Brings the device up as a driver does, with a queue where it is expected.
    pub(super) fn begin(&mut self, queue: u32, input: &mut Input<'_>) {
        let choices = input.byte();
        let features: u32 = if choices & 1 != 0 { 1 << 29 } else { 0 } | 1 << 28;
        self.size = 1 << (choices >> 1 & 7);
        self.available = 0;
        self.queue = queue;
        let base = QUEUE as u32;
        for at in [AVAILABLE, USED] {
            let _ = self.ram.write(&[0; 0x1000], GuestAddress(u64::from(base) + at));
        }
        for (register, value) in
            [(0x70, 0), (0x70, 3), (0x24, 0), (0x20, features), (0x24, 1), (0x20, 1), (0x70, 11)]
        {
            self.write(register, &u32::to_le_bytes(value));
        }
        for (register, value) in queue_registers(queue, self.size, base) {
            self.write(register, &value.to_le_bytes());
        }
        self.write(0x70, &15u32.to_le_bytes());
    }

    /// Any descriptors in any order, as a request.
    fn chain(&mut self, input: &mut Input<'_>) {
        let (count, head) = (u64::from(input.byte() % 8), input.byte());
        for at in 0..count {
            let (address, len) = (input.address(), input.len());
            // Mostly a chain in order, as few others come far.
            let (flags, next) = match input.byte() {
                0 => (input.u16(), input.u16()),
                byte => (u16::from(byte & 7), at as u16 + 1),
            };
            self.descriptor(at, address, len, flags, next);
        }
        self.offer(u16::from(head & 7));
        self.serve(self.queue as usize);
    }

    /// A request to a disk: a header, buffers and a status, and mostly as it should be. The
    /// status, where the request was answered and its buffers were not over the status.
    pub(super) fn block_request(&mut self, input: &mut Input<'_>) -> Option<u8> {
        let kinds = [0, 1, 4, 8, 11, 13];
        let kind = match kinds.get(usize::from(input.byte() % 8)) {
            Some(kind) => *kind,
            None => input.u32(),
        };
        let sector = match input.byte() {
            0 => input.u64(),
            sector => sector.into(),
        };
        let used = self.used();
        let header = [kind.to_le_bytes(), [0; 4]].concat();
        let header = [header, sector.to_le_bytes().to_vec()].concat();
        let _ = self.ram.write(&header, GuestAddress(BUFFERS - 16));
        let _ = self.ram.write(&[0xee], GuestAddress(STATUS));
        let len = usize::from(input.byte() & 0x3f);
        let data = input.bytes(len);
        let _ = self.ram.write(data, GuestAddress(BUFFERS));
        self.descriptor(0, BUFFERS - 16, 16, 1, 1);
        let direction = if matches!(kind, 0 | 8) { 2 } else { 0 };
        let mut last = 1;
        for _ in 0..input.byte() % 3 {
            let (address, len) = match input.byte() & 3 {
                0 => (input.address(), input.len()),
                1 => (BUFFERS, data.len() as u32),
                _ => (BUFFERS, u32::from(input.byte()) * 512),
            };
            self.descriptor(last, address, len, 1 | direction, last as u16 + 1);
            last += 1;
        }
        self.descriptor(last, STATUS, 1, 2, 0);
        self.offer(0);
        self.serve(self.queue as usize);
        self.settle();
        (self.used() != used && direction == 0)
            .then(|| self.ram.inner().read_obj(GuestAddress(STATUS)).expect("in RAM"))
    }

    /// The end: nothing may be left in flight.
    pub(super) fn end(mut self) {
        self.pause();
        let in_flight = self.device.call(|device, _| Ok(device.in_flight()));
        assert_eq!(in_flight.unwrap_or(0), 0);
    }

    fn used(&self) -> Option<u16> {
        self.ram.inner().read_obj(GuestAddress(QUEUE + USED + 2)).ok()
    }

    pub(super) fn write(&mut self, register: u64, data: &[u8]) {
        // A reset waits for what is in flight, which comes by a source.
        self.settle();
        self.registers.write(register, data);
    }

    fn descriptor(&mut self, at: u64, address: u64, len: u32, flags: u16, next: u16) {
        let mut bytes = address.to_le_bytes().to_vec();
        bytes.extend(len.to_le_bytes());
        bytes.extend(flags.to_le_bytes());
        bytes.extend(next.to_le_bytes());
        let _ = self.ram.write(&bytes, GuestAddress(QUEUE + at * 16));
    }

    fn offer(&mut self, head: u16) {
        let slot = u64::from(self.available % self.size.max(1));
        let available = QUEUE + AVAILABLE;
        let _ = self.ram.write(&head.to_le_bytes(), GuestAddress(available + 4 + slot * 2));
        self.available = self.available.wrapping_add(1);
        let _ = self.ram.write(&self.available.to_le_bytes(), GuestAddress(available + 2));
    }

    /// A doorbell, and those that the device rings itself.
    pub(super) fn serve(&mut self, queue: usize) {
        let mut turns = 0;
        while self.device.serve(queue) == Served::Some {
            turns += 1;
            assert!(turns < 300, "a queue of 65,536 requests at most is never served");
        }
    }

    /// What came from the host's side is served, and what is in flight is finished.
    pub(super) fn settle(&mut self) {
        // The kernel's threads take as long as a busy machine lets them.
        let begin = Instant::now();
        while begin.elapsed() < PATIENCE {
            for source in 0..self.sources {
                let _ = self.device.ready(source);
            }
            let in_flight = self.device.call(|device, _| Ok(device.in_flight()));
            if in_flight.unwrap_or(0) == 0 {
                return;
            }
            std::thread::yield_now();
        }
        panic!("a request is never finished");
    }
}

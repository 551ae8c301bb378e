//! A transport of virtio-drivers over the registers of ours, and guest RAM for its buffers.

use std::cell::{Cell, RefCell};
use std::ptr::{self, NonNull};
use std::sync::Arc;

use virtio_drivers::transport::{DeviceStatus, DeviceType, InterruptStatus, Transport};
use virtio_drivers::{BufferDirection, Hal, PAGE_SIZE, PhysAddr, Result};
use vm_memory::{Bytes, GuestAddress, GuestMemoryBackend};
use vmm_sys_util::eventfd::EventFd;
use zerocopy::{FromBytes, Immutable, IntoBytes};

use crate::bus::BusDevice;
use crate::event_loop::{Answered, Subscription, Wake, Watch};
use crate::memory::GuestRam;
use crate::virtio::{DeviceHandle, Interrupt, MmioTransport, Served, VirtioDevice};

const RAM_BYTES: usize = 256 << 20;

thread_local! {
    static RAM: Arc<GuestRam> =
        Arc::new(GuestRam::fresh(&[(GuestAddress(0), RAM_BYTES)]).unwrap());
    /// Pages are given out and never taken back: a test is short.
    static NEXT_PAGE: Cell<u64> = const { Cell::new(1) };
    /// What the drivers have got back, and the device must not touch any more.
    static GIVEN_BACK: RefCell<Vec<(PhysAddr, usize)>> = const { RefCell::new(Vec::new()) };
}

/// What buffers that were given back are filled with.
const POISON: u8 = 0xee;

/// Fails where a buffer was written to after the driver got it back.
pub(super) fn assert_nothing_was_written_too_late() {
    GIVEN_BACK.with_borrow(|buffers| {
        for &(address, len) in buffers {
            let mut bytes = vec![0; len];
            ram().inner().read_slice(&mut bytes, GuestAddress(address)).unwrap();
            assert!(bytes.iter().all(|byte| *byte == POISON), "at {address:#x}");
        }
    });
}

/// The RAM of this test's machine.
pub(super) fn ram() -> Arc<GuestRam> {
    RAM.with(Arc::clone)
}

fn host_pointer(address: PhysAddr) -> NonNull<u8> {
    NonNull::new(ram().inner().get_host_address(GuestAddress(address)).unwrap()).unwrap()
}

fn allocate(pages: usize) -> PhysAddr {
    let page = NEXT_PAGE.get();
    NEXT_PAGE.set(page + pages as u64);
    assert!((page as usize + pages) * PAGE_SIZE <= RAM_BYTES, "the test's RAM is used up");
    page * PAGE_SIZE as u64
}

/// Guest RAM for the drivers: buffers are copied in and out.
pub(super) struct TestHal;

// SAFETY: pages are given out once, zeroed by mmap, inside a mapping that lives as long as the
// test's thread.
unsafe impl Hal for TestHal {
    fn dma_alloc(pages: usize, _: BufferDirection) -> (PhysAddr, NonNull<u8>) {
        let address = allocate(pages);
        (address, host_pointer(address))
    }

    unsafe fn dma_dealloc(_: PhysAddr, _: NonNull<u8>, _: usize) -> i32 {
        0
    }

    unsafe fn mmio_phys_to_virt(_: PhysAddr, _: usize) -> NonNull<u8> {
        unreachable!("only PCI devices have such addresses")
    }

    unsafe fn share(buffer: NonNull<[u8]>, direction: BufferDirection) -> PhysAddr {
        let address = allocate(buffer.len().div_ceil(PAGE_SIZE));
        if direction != BufferDirection::DeviceToDriver {
            let target = host_pointer(address).as_ptr();
            // SAFETY: the caller's buffer is valid, and the pages are new.
            unsafe { ptr::copy_nonoverlapping(buffer.as_ptr().cast(), target, buffer.len()) };
        }
        address
    }

    unsafe fn unshare(address: PhysAddr, buffer: NonNull<[u8]>, direction: BufferDirection) {
        if direction != BufferDirection::DriverToDevice {
            let source = host_pointer(address).as_ptr();
            // SAFETY: the caller's buffer is valid, and the pages were given out for it.
            unsafe { ptr::copy_nonoverlapping(source, buffer.as_ptr().cast(), buffer.len()) };
        }
        ram().inner().write_slice(&vec![POISON; buffer.len()], GuestAddress(address)).unwrap();
        GIVEN_BACK.with_borrow_mut(|buffers| buffers.push((address, buffer.len())));
    }
}

/// A device behind its registers: the driver's doorbells are served by the driver's thread, the
/// device's sources by the device thread.
pub(super) struct TestTransport {
    registers: RefCell<MmioTransport>,
    /// Features that the test knows to use and the driver does not.
    more_features: u64,
    /// Where the device writes, of each queue and its size.
    device_areas: [(PhysAddr, u32); 3],
    _watch: Watch,
}

impl TestTransport {
    pub(super) fn new(device: impl VirtioDevice + 'static) -> Self {
        Self::with_handle(device).0
    }

    /// Also gives the host's side of the device.
    pub(super) fn with_handle<D: VirtioDevice + 'static>(device: D) -> (Self, DeviceHandle<D>) {
        let line = EventFd::new(libc::EFD_NONBLOCK).unwrap();
        let interrupt = Arc::new(Interrupt::new(line));
        let handle = DeviceHandle::new(device, &ram(), interrupt).unwrap();
        (Self::of(&handle), handle)
    }

    /// For another driver of a device that has one.
    pub(super) fn of<D: VirtioDevice + 'static>(handle: &DeviceHandle<D>) -> Self {
        let sources = handle.with(|device| device.sources().unwrap());
        let served = handle.erase();
        let answer = Box::new(move |wake| {
            let served = match wake {
                Wake::Source(source) => served.ready(source),
                Wake::Doorbell(index) => served.serve(index),
            };
            if served == Served::Some { Answered::Again } else { Answered::Done }
        });
        // Nobody rings them but the device thread.
        let doorbells =
            (0..handle.queue_count()).map(|_| EventFd::new(libc::EFD_NONBLOCK).unwrap());
        let doorbells = doorbells.collect();
        let watch = Watch::new(Subscription::new(doorbells, sources, answer)).unwrap();
        let registers = RefCell::new(MmioTransport::new(handle.erase()));
        Self { registers, more_features: 0, device_areas: [(0, 0); 3], _watch: watch }
    }

    /// Accepts these features too.
    pub(super) fn with_features(self, features: u64) -> Self {
        Self { more_features: features, ..self }
    }

    /// Where in a queue the device wants to be rung next (virtio 1.2 §2.7.10).
    pub(super) fn avail_event(&self, queue: u16) -> u16 {
        let (used, size) = self.device_areas[usize::from(queue)];
        let at = GuestAddress(used + 4 + 8 * u64::from(size));
        ram().inner().read_obj(at).unwrap()
    }

    pub(super) fn read(&self, register: u64) -> u32 {
        let mut data = [0xff; 4];
        self.registers.borrow_mut().read(register, &mut data);
        u32::from_le_bytes(data)
    }

    pub(super) fn write(&self, register: u64, value: u32) {
        self.registers.borrow_mut().write(register, &value.to_le_bytes());
    }

    fn write_address(&self, register: u64, address: PhysAddr) {
        self.write(register, address as u32);
        self.write(register + 4, (address >> 32) as u32);
    }
}

impl Transport for TestTransport {
    fn device_type(&self) -> DeviceType {
        assert_eq!(self.read(0), 0x7472_6976);
        assert_eq!(self.read(4), 2);
        self.read(8).try_into().unwrap()
    }

    fn read_device_features(&mut self) -> u64 {
        self.write(0x14, 0);
        let low = self.read(0x10);
        self.write(0x14, 1);
        u64::from(self.read(0x10)) << 32 | u64::from(low)
    }

    fn write_driver_features(&mut self, features: u64) {
        let features = features | self.more_features;
        self.write(0x24, 0);
        self.write(0x20, features as u32);
        self.write(0x24, 1);
        self.write(0x20, (features >> 32) as u32);
    }

    fn max_queue_size(&mut self, queue: u16) -> u32 {
        self.write(0x30, queue.into());
        self.read(0x34)
    }

    fn notify(&mut self, queue: u16) {
        self.write(0x50, queue.into());
    }

    fn get_status(&self) -> DeviceStatus {
        DeviceStatus::from_bits_truncate(self.read(0x70))
    }

    fn set_status(&mut self, status: DeviceStatus) {
        self.write(0x70, status.bits());
    }

    fn set_guest_page_size(&mut self, _: u32) {}

    fn requires_legacy_layout(&self) -> bool {
        false
    }

    fn queue_set(
        &mut self,
        queue: u16,
        size: u32,
        descriptors: PhysAddr,
        driver_area: PhysAddr,
        device_area: PhysAddr,
    ) {
        if let Some(area) = self.device_areas.get_mut(usize::from(queue)) {
            *area = (device_area, size);
        }
        self.write(0x30, queue.into());
        self.write(0x38, size);
        self.write_address(0x80, descriptors);
        self.write_address(0x90, driver_area);
        self.write_address(0xa0, device_area);
        self.write(0x44, 1);
        assert_eq!(self.read(0x44), 1, "the queue is refused");
    }

    fn queue_unset(&mut self, queue: u16) {
        self.write(0x30, queue.into());
        self.write(0x44, 0);
    }

    fn queue_used(&mut self, queue: u16) -> bool {
        self.write(0x30, queue.into());
        self.read(0x44) != 0
    }

    fn ack_interrupt(&mut self) -> InterruptStatus {
        let status = self.read(0x60);
        self.write(0x64, status);
        InterruptStatus::from_bits_truncate(status)
    }

    fn read_config_generation(&self) -> u32 {
        self.read(0xfc)
    }

    fn read_config_space<T: FromBytes + IntoBytes>(&self, offset: usize) -> Result<T> {
        let mut value = T::new_zeroed();
        self.registers.borrow_mut().read(0x100 + offset as u64, value.as_mut_bytes());
        Ok(value)
    }

    fn write_config_space<T: IntoBytes + Immutable>(
        &mut self,
        offset: usize,
        value: T,
    ) -> Result<()> {
        self.registers.borrow_mut().write(0x100 + offset as u64, value.as_bytes());
        Ok(())
    }
}

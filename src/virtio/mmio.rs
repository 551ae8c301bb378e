//! virtio-mmio: the registers by which a driver finds, configures and rings a device.
//!
//! Source: virtio 1.2 §4.2. One device behind one page of addresses. Its doorbells are eventfds
//! that KVM rings; a driver's doorbell that comes here all the same is served here.

use virtio_queue::QueueT;

use super::handle::DeviceCore;
use super::status::{DEVICE_NEEDS_RESET, DRIVER_OK, FEATURES_OK};
use super::{DeviceHandle, F_EVENT_IDX, Served, VirtioDevice};
use crate::bus::BusDevice;

/// Register offsets (§4.2.2).
const MAGIC_VALUE: u64 = 0x000;
const VERSION: u64 = 0x004;
const DEVICE_ID: u64 = 0x008;
const VENDOR_ID: u64 = 0x00c;
const DEVICE_FEATURES: u64 = 0x010;
const DEVICE_FEATURES_SEL: u64 = 0x014;
const DRIVER_FEATURES: u64 = 0x020;
const DRIVER_FEATURES_SEL: u64 = 0x024;
const QUEUE_SEL: u64 = 0x030;
const QUEUE_NUM_MAX: u64 = 0x034;
const QUEUE_NUM: u64 = 0x038;
const QUEUE_READY: u64 = 0x044;
/// Where the doorbell is.
pub(crate) const QUEUE_NOTIFY: u64 = 0x050;
const INTERRUPT_STATUS: u64 = 0x060;
const INTERRUPT_ACK: u64 = 0x064;
const STATUS: u64 = 0x070;
const QUEUE_DESC_LOW: u64 = 0x080;
const QUEUE_DESC_HIGH: u64 = 0x084;
const QUEUE_DRIVER_LOW: u64 = 0x090;
const QUEUE_DRIVER_HIGH: u64 = 0x094;
const QUEUE_DEVICE_LOW: u64 = 0x0a0;
const QUEUE_DEVICE_HIGH: u64 = 0x0a4;
const SHM_LEN_LOW: u64 = 0x0b0;
const SHM_LEN_HIGH: u64 = 0x0b4;
const CONFIG_GENERATION: u64 = 0x0fc;
const CONFIG: u64 = 0x100;

/// "virt", little-endian.
const MAGIC: u32 = 0x7472_6976;
const VERSION_2: u32 = 2;
/// "DORM": no vendor has it.
const VENDOR: u32 = 0x4d52_4f44;

impl<D: VirtioDevice + ?Sized> DeviceCore<D> {
    fn read(&self, register: u64) -> u32 {
        let queue = self.queues.get(self.registers.queue_sel as usize);
        match register {
            MAGIC_VALUE => MAGIC,
            VERSION => VERSION_2,
            DEVICE_ID => self.device.device_type() as u32,
            VENDOR_ID => VENDOR,
            DEVICE_FEATURES => half(self.offered(), self.registers.device_features_sel),
            QUEUE_NUM_MAX => queue.map_or(0, |queue| queue.queue.max_size().into()),
            QUEUE_READY => queue.map_or(0, |queue| queue.queue.ready().into()),
            STATUS => self.registers.status,
            CONFIG_GENERATION => self.registers.config_generation,
            // There is no region of shared memory.
            SHM_LEN_LOW | SHM_LEN_HIGH => u32::MAX,
            _ => 0,
        }
    }

    fn write(&mut self, register: u64, value: u32) {
        let registers = &mut self.registers;
        match register {
            DEVICE_FEATURES_SEL => registers.device_features_sel = value,
            DRIVER_FEATURES_SEL => registers.driver_features_sel = value,
            DRIVER_FEATURES if registers.status & (FEATURES_OK | DRIVER_OK) == 0 => {
                let (shift, mask) = match registers.driver_features_sel {
                    0 => (0, 0xffff_ffff),
                    1 => (32, 0xffff_ffff << 32),
                    _ => return,
                };
                let others = registers.driver_features & !mask;
                registers.driver_features = others | (u64::from(value) << shift);
            }
            QUEUE_SEL => registers.queue_sel = value,
            STATUS => self.write_status(value),
            _ => self.write_queue(register, value),
        }
    }

    fn write_status(&mut self, value: u32) {
        let mut status = value | (self.registers.status & DEVICE_NEEDS_RESET);
        let features = self.registers.driver_features;
        if !self.accepts(features) {
            status &= !FEATURES_OK;
        }
        // No driver is ready that has not said which features it uses (virtio 1.2 §3.1.1).
        if status & FEATURES_OK == 0 {
            status &= !DRIVER_OK;
        }
        let begins = status & DRIVER_OK != 0 && self.registers.status & DRIVER_OK == 0;
        self.registers.status = status;
        if begins {
            for queue in &mut self.queues {
                queue.queue.set_event_idx(features & F_EVENT_IDX != 0);
            }
            self.device.activate(features);
        }
    }

    /// Registers of the selected queue. One that is ready keeps its place: a driver that moves
    /// it has to take it back first.
    fn write_queue(&mut self, register: u64, value: u32) {
        let Some(queue) = self.queues.get_mut(self.registers.queue_sel as usize) else {
            return;
        };
        if register == QUEUE_READY {
            queue.queue.set_ready(value & 1 != 0);
            if queue.queue.ready() && !queue.is_valid(&self.ram) {
                queue.queue.set_ready(false);
            }
            return;
        }
        if queue.queue.ready() {
            return;
        }
        let queue = &mut queue.queue;
        match register {
            // What the queue refuses leaves it as it was. It is not told, where it would write that to the host's log.
            QUEUE_NUM => drop(queue.try_set_size(u16::try_from(value).unwrap_or(0))),
            QUEUE_DESC_LOW if !value.is_multiple_of(16) => {}
            QUEUE_DRIVER_LOW if !value.is_multiple_of(2) => {}
            QUEUE_DEVICE_LOW if !value.is_multiple_of(4) => {}
            QUEUE_DESC_LOW => queue.set_desc_table_address(Some(value), None),
            QUEUE_DESC_HIGH => queue.set_desc_table_address(None, Some(value)),
            QUEUE_DRIVER_LOW => queue.set_avail_ring_address(Some(value), None),
            QUEUE_DRIVER_HIGH => queue.set_avail_ring_address(None, Some(value)),
            QUEUE_DEVICE_LOW => queue.set_used_ring_address(Some(value), None),
            QUEUE_DEVICE_HIGH => queue.set_used_ring_address(None, Some(value)),
            _ => {}
        }
    }
}

/// One half of the feature bits.
fn half(features: u64, select: u32) -> u32 {
    match select {
        0 => features as u32,
        1 => (features >> 32) as u32,
        _ => 0,
    }
}

/// The registers on the bus.
pub(crate) struct MmioTransport(DeviceHandle);

impl MmioTransport {
    pub(crate) fn new(device: DeviceHandle) -> Self {
        Self(device)
    }
}

impl BusDevice for MmioTransport {
    fn read(&mut self, offset: u64, data: &mut [u8]) {
        if let Some(at) = offset.checked_sub(CONFIG) {
            let config = self.0.lock().device.config();
            let rest = config.get(at as usize..).unwrap_or_default();
            for (index, byte) in data.iter_mut().enumerate() {
                *byte = rest.get(index).copied().unwrap_or(0);
            }
            return;
        }
        let Ok(data) = <&mut [u8; 4]>::try_from(data) else { return };
        let value = match offset {
            // The driver's interrupt handler waits for nobody.
            INTERRUPT_STATUS => self.0.interrupt().status(),
            register => self.0.lock().read(register),
        };
        *data = value.to_le_bytes();
    }

    fn write(&mut self, offset: u64, data: &[u8]) {
        if let Some(at) = offset.checked_sub(CONFIG) {
            return self.0.lock().device.write_config(at, data);
        }
        let Ok(data) = <[u8; 4]>::try_from(data) else { return };
        let value = u32::from_le_bytes(data);
        match offset {
            INTERRUPT_ACK => self.0.interrupt().acknowledge(value),
            QUEUE_NOTIFY => while self.0.serve(value as usize) == Served::Some {},
            STATUS if value == 0 => self.0.reset(),
            register => self.0.lock().write(register, value),
        }
    }
}

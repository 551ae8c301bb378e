//! virtio-mmio: the registers by which a driver finds, configures and rings a device.
//!
//! Source: virtio 1.2 §4.2. One device behind one page of addresses. Its doorbells are eventfds
//! that KVM rings; a driver's doorbell that comes here all the same is served here.

use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use virtio_queue::QueueT;

use super::{
    F_EVENT_IDX, F_INDIRECT_DESC, F_VERSION_1, Interrupt, QueueError, Served, VirtQueue,
    VirtioDevice,
};
use crate::bus::BusDevice;
use crate::memory::GuestRam;

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
const CONFIG_GENERATION: u64 = 0x0fc;
const CONFIG: u64 = 0x100;

/// "virt", little-endian.
const MAGIC: u32 = 0x7472_6976;
const VERSION_2: u32 = 2;
/// "DORM": no vendor has it.
const VENDOR: u32 = 0x4d52_4f44;

/// Device status bits (§2.1).
const FEATURES_OK: u32 = 8;
const DRIVER_OK: u32 = 4;
const DEVICE_NEEDS_RESET: u32 = 64;

/// A device and what its driver has chosen: shared by the transport and the device thread.
pub(crate) struct DeviceCore {
    device: Box<dyn VirtioDevice>,
    queues: Vec<VirtQueue>,
    interrupt: Arc<Interrupt>,
    paused: bool,
    status: u32,
    driver_features: u64,
    device_features_sel: u32,
    driver_features_sel: u32,
    queue_sel: u32,
}

impl DeviceCore {
    /// Serves a queue. A driver that broke it is told to reset the device.
    pub(crate) fn serve(&mut self, index: usize) -> Served {
        let active = self.status & (DRIVER_OK | DEVICE_NEEDS_RESET) == DRIVER_OK;
        let Some(queue) = self.queues.get_mut(index) else {
            return Served::All;
        };
        if self.paused || !active || !queue.queue.ready() {
            return Served::All;
        }
        match self.device.serve(index, queue) {
            Ok(served) => served,
            Err(error) => {
                // No louder: a guest can make as many of these as it likes.
                tracing::debug!(device = ?self.device.device_type(), index, %error, "stopped");
                self.status |= DEVICE_NEEDS_RESET;
                self.interrupt.config_change();
                Served::All
            }
        }
    }

    /// Serves nothing until [`resume`](Self::resume).
    pub(crate) fn pause(&mut self) {
        self.paused = true;
    }

    /// Serves again. Whether it had stopped: doorbells that rang meanwhile are to be rung again.
    pub(crate) fn resume(&mut self) -> bool {
        std::mem::take(&mut self.paused)
    }

    fn offered(&self) -> u64 {
        self.device.features() | F_VERSION_1 | F_INDIRECT_DESC | F_EVENT_IDX
    }

    fn read(&self, register: u64) -> u32 {
        let queue = self.queues.get(self.queue_sel as usize);
        match register {
            MAGIC_VALUE => MAGIC,
            VERSION => VERSION_2,
            DEVICE_ID => self.device.device_type() as u32,
            VENDOR_ID => VENDOR,
            DEVICE_FEATURES => half(self.offered(), self.device_features_sel),
            QUEUE_NUM_MAX => queue.map_or(0, |queue| queue.queue.max_size().into()),
            QUEUE_READY => queue.map_or(0, |queue| queue.queue.ready().into()),
            STATUS => self.status,
            // The configuration of no device changes under its driver, so far.
            CONFIG_GENERATION => 0,
            _ => 0,
        }
    }

    fn write(&mut self, register: u64, value: u32) {
        match register {
            DEVICE_FEATURES_SEL => self.device_features_sel = value,
            DRIVER_FEATURES_SEL => self.driver_features_sel = value,
            DRIVER_FEATURES if self.status & FEATURES_OK == 0 => {
                let (shift, mask) = match self.driver_features_sel {
                    0 => (0, 0xffff_ffff),
                    1 => (32, 0xffff_ffff << 32),
                    _ => return,
                };
                self.driver_features = (self.driver_features & !mask) | (u64::from(value) << shift);
            }
            QUEUE_SEL => self.queue_sel = value,
            STATUS => self.write_status(value),
            _ => self.write_queue(register, value),
        }
    }

    fn write_status(&mut self, value: u32) {
        if value == 0 {
            return self.reset();
        }
        let mut status = value | (self.status & DEVICE_NEEDS_RESET);
        let acceptable =
            self.driver_features & !self.offered() == 0 && self.driver_features & F_VERSION_1 != 0;
        if !acceptable {
            status &= !(FEATURES_OK | DRIVER_OK);
        }
        let begins = status & DRIVER_OK != 0 && self.status & DRIVER_OK == 0;
        self.status = status;
        if begins {
            let event_idx = self.driver_features & F_EVENT_IDX != 0;
            for queue in &mut self.queues {
                queue.queue.set_event_idx(event_idx);
            }
            self.device.activate(self.driver_features);
        }
    }

    /// Registers of the selected queue. One that is ready keeps its place: a driver that moves
    /// it has to take it back first.
    fn write_queue(&mut self, register: u64, value: u32) {
        let Some(queue) = self.queues.get_mut(self.queue_sel as usize) else {
            return;
        };
        if register == QUEUE_READY {
            queue.queue.set_ready(value & 1 != 0);
            if queue.queue.ready() && !queue.is_valid() {
                queue.queue.set_ready(false);
            }
            return;
        }
        if queue.queue.ready() {
            return;
        }
        let queue = &mut queue.queue;
        match register {
            // What the queue refuses leaves it as it was, and not valid when it is to be ready.
            QUEUE_NUM => queue.set_size(u16::try_from(value).unwrap_or(0)),
            QUEUE_DESC_LOW => queue.set_desc_table_address(Some(value), None),
            QUEUE_DESC_HIGH => queue.set_desc_table_address(None, Some(value)),
            QUEUE_DRIVER_LOW => queue.set_avail_ring_address(Some(value), None),
            QUEUE_DRIVER_HIGH => queue.set_avail_ring_address(None, Some(value)),
            QUEUE_DEVICE_LOW => queue.set_used_ring_address(Some(value), None),
            QUEUE_DEVICE_HIGH => queue.set_used_ring_address(None, Some(value)),
            _ => {}
        }
    }

    fn reset(&mut self) {
        self.device.reset();
        for queue in &mut self.queues {
            queue.queue.reset();
        }
        self.status = 0;
        self.driver_features = 0;
        self.device_features_sel = 0;
        self.driver_features_sel = 0;
        self.queue_sel = 0;
        self.interrupt.acknowledge(u32::MAX);
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

impl std::fmt::Debug for DeviceCore {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("DeviceCore")
            .field("type", &self.device.device_type())
            .finish_non_exhaustive()
    }
}

/// The registers on the bus.
pub(crate) struct MmioTransport {
    core: Arc<Mutex<DeviceCore>>,
    interrupt: Arc<Interrupt>,
}

impl MmioTransport {
    pub(crate) fn new(
        device: Box<dyn VirtioDevice>,
        ram: &Arc<GuestRam>,
        interrupt: Arc<Interrupt>,
    ) -> Result<Self, QueueError> {
        let queues = device
            .queue_sizes()
            .iter()
            .map(|size| VirtQueue::new(*size, Arc::clone(ram), Arc::clone(&interrupt)))
            .collect::<Result<Vec<_>, _>>()?;
        let core = DeviceCore {
            device,
            queues,
            interrupt: Arc::clone(&interrupt),
            paused: false,
            status: 0,
            driver_features: 0,
            device_features_sel: 0,
            driver_features_sel: 0,
            queue_sel: 0,
        };
        Ok(Self { core: Arc::new(Mutex::new(core)), interrupt })
    }

    /// The number of queues, each with a doorbell.
    pub(crate) fn queue_count(&self) -> u32 {
        self.lock().queues.len() as u32
    }

    /// What the device thread serves.
    pub(crate) fn core(&self) -> &Arc<Mutex<DeviceCore>> {
        &self.core
    }

    fn lock(&self) -> MutexGuard<'_, DeviceCore> {
        self.core.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl BusDevice for MmioTransport {
    fn read(&mut self, offset: u64, data: &mut [u8]) {
        if let Some(at) = offset.checked_sub(CONFIG) {
            let config = self.lock().device.config();
            let rest = config.get(at as usize..).unwrap_or_default();
            for (index, byte) in data.iter_mut().enumerate() {
                *byte = rest.get(index).copied().unwrap_or(0);
            }
            return;
        }
        let Ok(data) = <&mut [u8; 4]>::try_from(data) else { return };
        let value = match offset {
            // The driver's interrupt handler waits for nobody.
            INTERRUPT_STATUS => self.interrupt.status(),
            register => self.lock().read(register),
        };
        *data = value.to_le_bytes();
    }

    fn write(&mut self, offset: u64, data: &[u8]) {
        let Ok(data) = <[u8; 4]>::try_from(data) else { return };
        let value = u32::from_le_bytes(data);
        match offset {
            INTERRUPT_ACK => self.interrupt.acknowledge(value),
            QUEUE_NOTIFY => {
                let mut core = self.lock();
                while core.serve(value as usize) == Served::Some {}
            }
            CONFIG.. => {}
            register => self.lock().write(register, value),
        }
    }
}

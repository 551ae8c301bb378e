//! A device and what its driver has chosen, shared by those who act on it.
//!
//! Three threads do: a vCPU's, through the transport's registers; the device thread, when a
//! doorbell rings or a source is ready; and the embedding program's. One lock a device, held for
//! no longer than one turn.

use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError, Weak};
use std::time::Instant;

use virtio_queue::QueueT;

use super::state::{Registers, RestoreError, TransportState};
use super::status::{DEVICE_NEEDS_RESET, DRIVER_OK, FEATURES_OK};
use super::{
    ConfigSpace, F_EVENT_IDX, F_INDIRECT_DESC, F_VERSION_1, Interrupt, QueueError, Queues, Served,
    VirtQueue, VirtioDevice,
};
use crate::memory::GuestRam;
use crate::metrics::DeviceMetrics;

/// A device that is shared. `D` is its type where that is known.
pub(crate) struct DeviceHandle<D: ?Sized = dyn VirtioDevice>(Arc<Shared<D>>);

/// A device that others keep: its machine. It holds no guest RAM.
pub(crate) struct WeakDeviceHandle<D>(Weak<Shared<D>>);

impl<D> WeakDeviceHandle<D> {
    /// A device that is gone.
    #[cfg(all(test, feature = "agent"))]
    pub(crate) fn gone() -> Self {
        Self(Weak::new())
    }

    /// The device, while its machine is there.
    pub(crate) fn upgrade(&self) -> Option<DeviceHandle<D>> {
        self.0.upgrade().map(DeviceHandle)
    }
}

impl<D> Clone for WeakDeviceHandle<D> {
    fn clone(&self) -> Self {
        Self(Weak::clone(&self.0))
    }
}

struct Shared<D: ?Sized> {
    interrupt: Arc<Interrupt>,
    /// Signalled when the last request in flight is finished. Its lock is taken inside of the
    /// core's, by both sides, so that no signal is lost between them.
    drained: (Mutex<()>, Condvar),
    core: Mutex<DeviceCore<D>>,
}

/// What the lock protects.
pub(super) struct DeviceCore<D: ?Sized = dyn VirtioDevice> {
    pub(super) ram: Arc<GuestRam>,
    pub(super) queues: Vec<VirtQueue>,
    pub(super) interrupt: Arc<Interrupt>,
    pub(super) registers: Registers,
    /// The host wants no request served.
    paused: bool,
    pub(super) device: D,
}

impl<D: VirtioDevice + 'static> DeviceHandle<D> {
    pub(crate) fn new(
        device: D,
        ram: &Arc<GuestRam>,
        interrupt: Arc<Interrupt>,
    ) -> Result<Self, QueueError> {
        let sizes = device.queue_sizes();
        let queues = sizes
            .into_iter()
            .map(|size| VirtQueue::new(size, Arc::clone(&interrupt)))
            .collect::<Result<Vec<_>, _>>()?;
        let core = DeviceCore {
            ram: Arc::clone(ram),
            queues,
            interrupt: Arc::clone(&interrupt),
            registers: Registers::default(),
            paused: false,
            device,
        };
        let drained = (Mutex::new(()), Condvar::new());
        Ok(Self(Arc::new(Shared { interrupt, drained, core: Mutex::new(core) })))
    }

    /// The same device, for as long as others keep it.
    pub(crate) fn downgrade(&self) -> WeakDeviceHandle<D> {
        WeakDeviceHandle(Arc::downgrade(&self.0))
    }

    /// The same device, its type forgotten.
    pub(crate) fn erase(&self) -> DeviceHandle {
        DeviceHandle(Arc::clone(&self.0) as Arc<Shared<dyn VirtioDevice>>)
    }
}

impl<D: VirtioDevice + ?Sized> DeviceHandle<D> {
    /// Serves a queue whose doorbell rang.
    pub(crate) fn serve(&self, index: usize) -> Served {
        let mut core = self.lock();
        // A driver may name any queue.
        if index >= core.queues.len() {
            return Served::All;
        }
        core.turn(|device, queues| device.serve(index, queues))
    }

    /// Serves a source that became ready.
    pub(crate) fn ready(&self, source: usize) -> Served {
        let mut core = self.lock();
        let served = if core.is_active() {
            core.turn(|device, queues| device.ready(source, queues))
        } else {
            // What was in flight when the device was paused or reset is given back.
            core.finish();
            core.device.unattended()
        };
        if core.paused && core.device.in_flight() == 0 {
            self.drained();
        }
        served
    }

    /// Does something on the host's behalf, with no queues where the device is not active.
    pub(crate) fn call<R>(
        &self,
        act: impl FnOnce(&mut D, &mut Queues<'_>) -> Result<R, QueueError>,
    ) -> Result<R, QueueError> {
        self.lock().act(act)
    }

    /// Looks at the device, or changes what its queues have no part in.
    pub(crate) fn with<R>(&self, act: impl FnOnce(&mut D) -> R) -> R {
        act(&mut self.lock().device)
    }

    /// Changes what the driver reads in the configuration space, and tells it.
    pub(crate) fn reconfigure<R>(&self, change: impl FnOnce(&mut D) -> R) -> R {
        let mut core = self.lock();
        let result = change(&mut core.device);
        core.config_changed();
        result
    }

    /// Serves nothing until the driver resets the device.
    pub(crate) fn stop(&self) {
        self.lock().needs_reset(&QueueError::Stopped);
    }

    /// Returns when the device is at no request, and will take none before
    /// [`resume`](Self::resume).
    pub(crate) fn pause(&self) {
        drop(self.pause_and_drain());
    }

    /// Serves again. Whether it had stopped: doorbells that rang meanwhile are to be rung again.
    /// What the driver was told and has not acknowledged it is told again, since the interrupt
    /// controllers may be others than those that heard it.
    pub(crate) fn resume(&self) -> bool {
        let paused = std::mem::take(&mut self.lock().paused);
        if paused {
            self.0.interrupt.wake();
        }
        paused
    }

    /// Serves nothing any more, as in a pause, and gives up what has not begun.
    pub(crate) fn give_up(&self) {
        let mut core = self.lock();
        core.paused = true;
        core.device.give_up();
    }

    /// Returns when the device, which was given up, is at no request, or it is too late.
    pub(crate) fn drain(&self, until: Instant) {
        let (lock, drained) = &self.0.drained;
        loop {
            let mut core = self.lock();
            core.finish();
            let left = until.saturating_duration_since(Instant::now());
            if core.device.in_flight() == 0 || left.is_zero() {
                return;
            }
            let lock = lock.lock().unwrap_or_else(PoisonError::into_inner);
            drop(core);
            drop(drained.wait_timeout(lock, left).unwrap_or_else(PoisonError::into_inner));
        }
    }

    /// Serves nothing any more, and lets go of what is of the host.
    pub(crate) fn close(&self) {
        let mut core = self.lock();
        core.paused = true;
        core.device.close();
        // A vCPU's thread may be waiting in a reset, and nothing will come any more.
        self.drained();
    }

    /// Whether the host wants no request served.
    #[cfg(feature = "agent")]
    pub(crate) fn is_paused(&self) -> bool {
        self.lock().paused
    }

    fn drained(&self) {
        let (lock, drained) = &self.0.drained;
        let _lock = lock.lock().unwrap_or_else(PoisonError::into_inner);
        drained.notify_all();
    }

    /// The driver starts again from nothing, once nothing is in flight.
    pub(super) fn reset(&self) {
        let mut core = self.pause_and_drain();
        core.reset();
        core.paused = false;
        // Who waits for a device that was given up finds nothing in flight either.
        self.drained();
    }

    pub(super) fn interrupt(&self) -> &Interrupt {
        &self.0.interrupt
    }

    pub(super) fn lock(&self) -> MutexGuard<'_, DeviceCore<D>> {
        self.0.core.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn pause_and_drain(&self) -> MutexGuard<'_, DeviceCore<D>> {
        loop {
            let mut core = self.lock();
            core.paused = true;
            core.finish();
            if core.device.in_flight() == 0 {
                return core;
            }
            let (lock, drained) = &self.0.drained;
            let lock = lock.lock().unwrap_or_else(PoisonError::into_inner);
            drop(core);
            drop(drained.wait(lock).unwrap_or_else(PoisonError::into_inner));
        }
    }

    /// What the device has done.
    pub(crate) fn metrics(&self) -> DeviceMetrics {
        self.lock().device.metrics()
    }

    /// How many queues there are, each with a doorbell.
    pub(crate) fn queue_count(&self) -> u32 {
        self.lock().queues.len() as u32
    }

    /// All that a snapshot keeps of a paused device.
    pub(crate) fn state(&self) -> TransportState {
        let core = self.lock();
        TransportState {
            registers: core.registers,
            interrupt_status: self.0.interrupt.status(),
            queues: core.queues.iter().map(VirtQueue::state).collect(),
            device: core.device.state(),
        }
    }

    /// Goes on from a state, with the same configuration or with what may be another one in a
    /// clone. The device is paused then: [`resume`](Self::resume) serves what waits in its queues.
    /// Where it fails the device is of no use.
    pub(crate) fn restore(&self, state: &TransportState) -> Result<(), RestoreError> {
        let mut core = self.lock();
        let core = &mut *core;
        core.paused = true;
        let (found, expected) = (state.queues.len(), core.queues.len());
        if found != expected {
            return Err(RestoreError::QueueCount { found, expected });
        }
        let (found, offered) = (state.registers.driver_features, core.offered());
        // Before it has them accepted, a driver writes what it likes.
        let accepted = state.registers.status & (FEATURES_OK | DRIVER_OK) != 0;
        if accepted && !core.accepts(found) {
            return Err(RestoreError::Features { found, offered });
        }
        for (index, (queue, state)) in core.queues.iter_mut().zip(&state.queues).enumerate() {
            if !queue.restore(state, &core.ram) {
                return Err(RestoreError::Queue { index });
            }
        }
        core.registers = state.registers;
        if core.registers.status & DRIVER_OK != 0 {
            core.device.activate(core.registers.driver_features);
        }
        self.0.interrupt.restore_status(state.interrupt_status);
        if core.device.restore(&state.device, &core.ram)? == ConfigSpace::Changed {
            core.config_changed();
        }
        Ok(())
    }
}

impl<D: VirtioDevice + ?Sized> DeviceCore<D> {
    pub(super) fn offered(&self) -> u64 {
        self.device.features() | F_VERSION_1 | F_INDIRECT_DESC | F_EVENT_IDX
    }

    /// Whether a driver may choose these features.
    pub(super) fn accepts(&self, features: u64) -> bool {
        features & !self.offered() == 0 && features & F_VERSION_1 != 0
    }

    /// Whether requests may be served.
    fn is_active(&self) -> bool {
        !self.paused && self.registers.status & (DRIVER_OK | DEVICE_NEEDS_RESET) == DRIVER_OK
    }

    fn turn(
        &mut self,
        serve: impl FnOnce(&mut D, &mut Queues<'_>) -> Result<Served, QueueError>,
    ) -> Served {
        if !self.is_active() {
            return Served::All;
        }
        self.act(serve).unwrap_or(Served::All)
    }

    /// Lets the device act on its queues. A driver that broke one is told to reset the device.
    fn act<R>(
        &mut self,
        act: impl FnOnce(&mut D, &mut Queues<'_>) -> Result<R, QueueError>,
    ) -> Result<R, QueueError> {
        let active = self.is_active();
        let list = if active { &mut self.queues[..] } else { &mut [] };
        let mut queues = Queues::new(&self.ram, list);
        let result = act(&mut self.device, &mut queues);
        if queues.has_config_changed() {
            self.config_changed();
        }
        if let Err(error) = &result {
            self.needs_reset(error);
        }
        result
    }

    fn config_changed(&mut self) {
        self.registers.config_generation = self.registers.config_generation.wrapping_add(1);
        if self.registers.status & DRIVER_OK != 0 {
            self.interrupt.config_change();
        }
    }

    fn finish(&mut self) {
        // Operations end whatever the driver has said since. One that has taken its queues away is told nothing.
        let list = match self.registers.status & DRIVER_OK {
            0 => &mut [],
            _ => &mut self.queues[..],
        };
        let mut queues = Queues::new(&self.ram, list);
        if let Err(error) = self.device.finish(&mut queues) {
            self.needs_reset(&error);
        }
    }

    fn needs_reset(&mut self, error: &QueueError) {
        // No louder: a guest can make as many of these as it likes.
        tracing::debug!(device = ?self.device.device_type(), %error, "stopped");
        self.registers.status |= DEVICE_NEEDS_RESET;
        self.interrupt.config_change();
    }

    fn reset(&mut self) {
        self.device.reset();
        for queue in &mut self.queues {
            queue.queue.reset();
        }
        let config_generation = self.registers.config_generation;
        self.registers = Registers { config_generation, ..Registers::default() };
        self.interrupt.acknowledge(u32::MAX);
    }
}

impl<D: ?Sized> Clone for DeviceHandle<D> {
    fn clone(&self) -> Self {
        Self(Arc::clone(&self.0))
    }
}

impl<D: VirtioDevice + ?Sized> std::fmt::Debug for DeviceHandle<D> {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_tuple("DeviceHandle").field(&self.lock().device.device_type()).finish()
    }
}

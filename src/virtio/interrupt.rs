//! How a device gets the driver's attention: a status word, and an eventfd that is an interrupt.
//!
//! Source: virtio 1.2 §4.2.2, InterruptStatus and InterruptACK. Neither takes a lock: the driver
//! reads and acknowledges from an interrupt handler.

use std::sync::atomic::{AtomicU32, Ordering};

use vmm_sys_util::eventfd::EventFd;

/// InterruptStatus bits.
const USED_BUFFER: u32 = 1;
const CONFIG_CHANGE: u32 = 2;

/// A device's interrupt.
#[derive(Debug)]
pub(crate) struct Interrupt {
    status: AtomicU32,
    line: EventFd,
}

impl Interrupt {
    pub(crate) fn new(line: EventFd) -> Self {
        Self { status: AtomicU32::new(0), line }
    }

    /// Some buffers have been used.
    pub(crate) fn used_buffer(&self) {
        self.raise(USED_BUFFER);
    }

    /// The configuration or the device's status changed.
    pub(crate) fn config_change(&self) {
        self.raise(CONFIG_CHANGE);
    }

    pub(super) fn status(&self) -> u32 {
        self.status.load(Ordering::SeqCst)
    }

    pub(super) fn acknowledge(&self, bits: u32) {
        self.status.fetch_and(!bits, Ordering::SeqCst);
    }

    /// The status of a snapshot; whether the line was up is the interrupt controller's state.
    pub(super) fn restore_status(&self, status: u32) {
        self.status.store(status & (USED_BUFFER | CONFIG_CHANGE), Ordering::SeqCst);
    }

    /// Raises the line again where the driver has not acknowledged what it was told. An edge that
    /// it has seen already is a spurious interrupt to it.
    pub(super) fn wake(&self) {
        if self.status() != 0 {
            self.raise(0);
        }
    }

    fn raise(&self, bit: u32) {
        self.status.fetch_or(bit, Ordering::SeqCst);
        // A counter that is full has been raised often enough.
        let _ = self.line.write(1);
    }
}

//! pvpanic: how a guest's kernel says that it panicked.
//!
//! Source: QEMU docs/specs/pvpanic.rst. One port: reading tells which events are supported,
//! writing a bit reports one.

use std::sync::Arc;

use crate::bus::BusDevice;
use crate::exit::{ExitLatch, ExitStatus};

/// Bit 0: the guest panicked. (Bit 1, "a crash kernel was loaded", is not ours to handle.)
const PANICKED: u8 = 1;

/// One port.
pub(crate) struct Pvpanic {
    exit: Arc<ExitLatch>,
}

impl Pvpanic {
    pub(crate) fn new(exit: Arc<ExitLatch>) -> Self {
        Self { exit }
    }
}

impl BusDevice for Pvpanic {
    fn read(&mut self, _offset: u64, data: &mut [u8]) {
        if let [events] = data {
            *events = PANICKED;
        }
    }

    fn write(&mut self, _offset: u64, data: &[u8]) {
        if let [events] = data
            && events & PANICKED != 0
        {
            self.exit.report(ExitStatus::Panicked { message: None });
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_panic_event_is_offered_and_taken() {
        let exit = Arc::new(ExitLatch::default());
        let mut device = Pvpanic::new(exit.clone());
        let mut events = [0xff];
        device.read(0, &mut events);
        assert_eq!(events, [PANICKED]);
        device.write(0, &[2]);
        assert_eq!(exit.get(), None);
        device.write(0, &[PANICKED]);
        assert_eq!(exit.get(), Some(&ExitStatus::Panicked { message: None }));
    }
}

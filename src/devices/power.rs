//! The registers with which an ACPI guest switches the machine off or resets it.
//!
//! Source: ACPI 6.5 §4.8.3.6 (reset register), §4.8.3.7 (sleep control and status registers of
//! hardware-reduced platforms). The tables that point here are in `arch`.

use std::sync::Arc;

use crate::arch::acpi::{RESET_VALUE, SLEEP_TYPE_S5};
use crate::bus::BusDevice;
use crate::exit::{ExitLatch, ExitStatus};

/// Offsets of the registers.
const SLEEP_CONTROL: u64 = 0;
const SLEEP_STATUS: u64 = 1;
const RESET: u64 = 2;

/// Sleep control: SLP_EN is bit 5, SLP_TYP bits 2 to 4.
const SLP_EN: u8 = 1 << 5;
const SLP_TYP_SHIFT: u8 = 2;
const SLP_TYP_MASK: u8 = 7;

/// Three byte-wide registers.
pub(crate) struct Power {
    exit: Arc<ExitLatch>,
}

impl Power {
    pub(crate) fn new(exit: Arc<ExitLatch>) -> Self {
        Self { exit }
    }
}

impl BusDevice for Power {
    fn read(&mut self, offset: u64, data: &mut [u8]) {
        // Nothing ever woke, and nothing is pending.
        if matches!(offset, SLEEP_CONTROL | SLEEP_STATUS) {
            data.fill(0);
        }
    }

    fn write(&mut self, offset: u64, data: &[u8]) {
        let [value] = *data else { return };
        // A sleep type that _S5 does not name is not one of this machine.
        let sleep_type = (value >> SLP_TYP_SHIFT) & SLP_TYP_MASK;
        match offset {
            SLEEP_CONTROL if value & SLP_EN != 0 && sleep_type == SLEEP_TYPE_S5 => {
                self.exit.report(ExitStatus::PoweredOff);
            }
            RESET if value == RESET_VALUE => self.exit.report(ExitStatus::Rebooted),
            _ => {}
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn after(offset: u64, data: &[u8]) -> Option<ExitStatus> {
        let exit = Arc::new(ExitLatch::default());
        Power::new(exit.clone()).write(offset, data);
        exit.get().cloned()
    }

    #[test]
    fn sleep_type_5_with_sleep_enable_powers_off() {
        assert_eq!(after(0, &[5 << 2 | 1 << 5]), Some(ExitStatus::PoweredOff));
        assert_eq!(after(0, &[5 << 2]), None);
        assert_eq!(after(0, &[3 << 2 | 1 << 5]), None);
        assert_eq!(after(1, &[5 << 2 | 1 << 5]), None);
    }

    #[test]
    fn reset_value_resets() {
        assert_eq!(after(2, &[1]), Some(ExitStatus::Rebooted));
        assert_eq!(after(2, &[0]), None);
        assert_eq!(after(2, &[1, 0]), None);
    }
}

//! The keyboard controller's reset line, which `reboot=k` and old guests pull.
//!
//! Source: IBM PS/2 Hardware Interface Technical Reference, keyboard and auxiliary device
//! controller; command 0xfe at port 0x64. There is no keyboard.

use std::convert::Infallible;
use std::sync::Arc;

use vm_superio::{I8042Device, Trigger};

use crate::bus::BusDevice;
use crate::exit::{ExitLatch, ExitStatus};

/// The reset line: pulling it ends the guest.
struct ResetLine(Arc<ExitLatch>);

impl Trigger for ResetLine {
    type E = Infallible;

    fn trigger(&self) -> Result<(), Infallible> {
        self.0.report(ExitStatus::Rebooted);
        Ok(())
    }
}

/// Ports 0x60 to 0x64.
pub(crate) struct I8042 {
    inner: I8042Device<ResetLine>,
}

impl I8042 {
    pub(crate) fn new(exit: Arc<ExitLatch>) -> Self {
        Self { inner: I8042Device::new(ResetLine(exit)) }
    }
}

impl BusDevice for I8042 {
    fn read(&mut self, offset: u64, data: &mut [u8]) {
        if let [byte] = data {
            *byte = self.inner.read(offset as u8);
        }
    }

    fn write(&mut self, offset: u64, data: &[u8]) {
        if let [byte] = data {
            let Ok(()) = self.inner.write(offset as u8, *byte);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_the_reset_command_resets() {
        let exit = Arc::new(ExitLatch::default());
        let mut device = I8042::new(exit.clone());
        for (offset, byte) in [(4, 0xfd), (0, 0xfe), (3, 0xfe)] {
            device.write(offset, &[byte]);
        }
        device.write(4, &[0xfe, 0xfe]);
        assert_eq!(exit.get(), None);
        device.write(4, &[0xfe]);
        assert_eq!(exit.get(), Some(&ExitStatus::Rebooted));
    }
}

//! Which device answers at which address: port I/O and MMIO.
//!
//! The bus is put together once and then only read, by every vCPU thread at the same time; each
//! device has its own lock. An address that no device claims reads as all ones and swallows
//! writes, as on a PC.

use std::collections::BTreeMap;
use std::sync::{Arc, Mutex, PoisonError};

use thiserror::Error as ThisError;

use crate::error::{Error, ErrorKind};

/// A device as the bus sees it: registers behind a range of addresses.
///
/// The guest chooses offset, size and value; whatever it chooses, a device neither panics nor
/// blocks for long. `offset` is below the length that the device was registered with.
pub(crate) trait BusDevice: Send {
    /// Fills `data`, which holds all ones, with what the guest reads at `offset`.
    fn read(&mut self, offset: u64, data: &mut [u8]);

    /// Takes what the guest writes at `offset`.
    fn write(&mut self, offset: u64, data: &[u8]);
}

/// A device that is shared between the bus and its owner.
pub(crate) type SharedDevice = Arc<Mutex<dyn BusDevice>>;

/// Why a device was not put on the bus: a mistake in the machine's address map.
#[derive(Debug, ThisError)]
pub(crate) enum BusError {
    #[error("two devices claim addresses {start:#x}..{end:#x}")]
    Overlap { start: u64, end: u64 },
}

impl From<BusError> for Error {
    fn from(error: BusError) -> Self {
        Error::new(ErrorKind::Config, error)
    }
}

/// One address space.
#[derive(Default)]
pub(crate) struct AddressSpace {
    /// First address to (length, device); ranges do not overlap.
    ranges: BTreeMap<u64, (u64, SharedDevice)>,
}

impl AddressSpace {
    /// Lets `device` answer at `len` addresses from `start`.
    pub(crate) fn insert(
        &mut self,
        start: u64,
        len: u64,
        device: SharedDevice,
    ) -> Result<(), BusError> {
        let end = start.saturating_add(len);
        let before = self.ranges.range(..end).next_back();
        if before.is_some_and(|(&other, (other_len, _))| other + other_len > start) {
            return Err(BusError::Overlap { start, end });
        }
        self.ranges.insert(start, (len, device));
        Ok(())
    }

    fn find(&self, address: u64) -> Option<(u64, &SharedDevice)> {
        let (start, (len, device)) = self.ranges.range(..=address).next_back()?;
        let offset = address - start;
        (offset < *len).then_some((offset, device))
    }

    /// A guest's read: all ones where no device answers.
    pub(crate) fn read(&self, address: u64, data: &mut [u8]) {
        data.fill(0xff);
        if let Some((offset, device)) = self.find(address) {
            device.lock().unwrap_or_else(PoisonError::into_inner).read(offset, data);
        }
    }

    /// A guest's write: dropped where no device answers.
    pub(crate) fn write(&self, address: u64, data: &[u8]) {
        if let Some((offset, device)) = self.find(address) {
            device.lock().unwrap_or_else(PoisonError::into_inner).write(offset, data);
        }
    }
}

/// The two address spaces of a PC.
#[derive(Default)]
pub(crate) struct Bus {
    pub(crate) pio: AddressSpace,
    pub(crate) mmio: AddressSpace,
}

#[cfg(test)]
mod tests {
    use super::*;

    #[derive(Default)]
    struct Probe {
        last: Option<(u64, Vec<u8>)>,
    }

    impl BusDevice for Probe {
        fn read(&mut self, offset: u64, data: &mut [u8]) {
            data.fill(offset as u8);
        }

        fn write(&mut self, offset: u64, data: &[u8]) {
            self.last = Some((offset, data.to_vec()));
        }
    }

    fn probe() -> Arc<Mutex<Probe>> {
        Arc::default()
    }

    #[test]
    fn access_reaches_the_device_with_its_offset() {
        let mut space = AddressSpace::default();
        let device = probe();
        space.insert(0x3f8, 8, device.clone()).unwrap();
        let mut data = [0; 2];
        space.read(0x3fd, &mut data);
        assert_eq!(data, [5, 5]);
        space.write(0x3ff, &[1, 2]);
        assert_eq!(device.lock().unwrap().last, Some((7, vec![1, 2])));
    }

    #[test]
    fn unclaimed_addresses_read_all_ones_and_swallow_writes() {
        let mut space = AddressSpace::default();
        space.insert(0x3f8, 8, probe()).unwrap();
        for address in [0, 0x3f7, 0x400, u64::MAX] {
            let mut data = [0; 4];
            space.read(address, &mut data);
            assert_eq!(data, [0xff; 4]);
            space.write(address, &[0; 4]);
        }
    }

    #[test]
    fn overlapping_devices_are_refused() {
        let mut space = AddressSpace::default();
        space.insert(0x100, 0x10, probe()).unwrap();
        for (start, len) in [(0x100, 1), (0x10f, 1), (0xff, 2), (0x80, 0x200)] {
            assert!(space.insert(start, len, probe()).is_err(), "{start:#x}+{len:#x}");
        }
        space.insert(0x110, 0x10, probe()).unwrap();
        space.insert(0xf0, 0x10, probe()).unwrap();
    }
}

//! Reading and writing many model-specific registers.
//!
//! KVM_GET_MSRS and KVM_SET_MSRS (api.rst §4.18, §4.19) take fewer than 256, stop at the first one that
//! they refuse, and return how many they did.

use std::collections::BTreeMap;

use kvm_bindings::{KVM_MAX_MSR_ENTRIES, Msrs, kvm_msr_entry};
use kvm_ioctls::VcpuFd;

use super::KvmError;
use crate::arch::msr::Msr;

/// Those of one call.
const BATCH: usize = KVM_MAX_MSR_ENTRIES - 1;

/// Who has the registers: a vCPU. Each call does a number of entries from the first on.
pub(super) trait Registers {
    fn get(&self, entries: &mut [kvm_msr_entry]) -> Result<usize, KvmError>;
    fn set(&self, entries: &[kvm_msr_entry]) -> Result<usize, KvmError>;
}

impl Registers for VcpuFd {
    fn get(&self, entries: &mut [kvm_msr_entry]) -> Result<usize, KvmError> {
        let mut msrs = Msrs::from_entries(entries).map_err(|_| KvmError::MsrEntries)?;
        let read = self.get_msrs(&mut msrs).map_err(KvmError::call("KVM_GET_MSRS"))?;
        entries.copy_from_slice(msrs.as_slice());
        Ok(read)
    }

    fn set(&self, entries: &[kvm_msr_entry]) -> Result<usize, KvmError> {
        let msrs = Msrs::from_entries(entries).map_err(|_| KvmError::MsrEntries)?;
        self.set_msrs(&msrs).map_err(KvmError::call("KVM_SET_MSRS"))
    }
}

/// Reads registers; those that are not there are left out.
pub(super) fn read(from: &impl Registers, indexes: &[u32]) -> Result<Vec<Msr>, KvmError> {
    let mut found = Vec::with_capacity(indexes.len());
    let mut rest = indexes;
    while !rest.is_empty() {
        let batch = &rest[..rest.len().min(BATCH)];
        let mut entries: Vec<_> = batch.iter().map(|&index| entry(index, 0)).collect();
        let read = from.get(&mut entries)?.min(batch.len());
        let values = entries[..read].iter();
        found.extend(values.map(|entry| Msr { index: entry.index, value: entry.data }));
        // The one that stopped it is left out.
        rest = &rest[(read + 1).min(batch.len())..];
    }
    Ok(found)
}

/// Writes registers, in their order. The error names the one that is refused.
pub(super) fn write(to: &impl Registers, msrs: &[Msr]) -> Result<(), KvmError> {
    for batch in msrs.chunks(BATCH) {
        let entries: Vec<_> = batch.iter().map(|msr| entry(msr.index, msr.value)).collect();
        let written = to.set(&entries)?;
        if let Some(refused) = batch.get(written) {
            return Err(KvmError::Msr { index: refused.index });
        }
    }
    Ok(())
}

/// Makes registers hold saved values.
///
/// Only those are written that differ: many may be written with nothing but what they hold, such
/// as the descriptions of features. A saved zero of a register that is not there is nothing to
/// lose either: a guest that can use it was shown a feature, and that is compared elsewhere. `present` is
/// what they hold now, where that is known.
pub(super) fn restore(
    to: &impl Registers,
    saved: &[Msr],
    present: Option<&[Msr]>,
) -> Result<(), KvmError> {
    let read_now = match present {
        Some(_) => Vec::new(),
        None => {
            let indexes: Vec<u32> = saved.iter().map(|msr| msr.index).collect();
            read(to, &indexes)?
        }
    };
    let present: BTreeMap<u32, u64> =
        present.unwrap_or(&read_now).iter().map(|msr| (msr.index, msr.value)).collect();
    let differing: Vec<Msr> = saved
        .iter()
        .filter(|msr| match present.get(&msr.index) {
            Some(present) => *present != msr.value,
            None => msr.value != 0,
        })
        .copied()
        .collect();
    write(to, &differing)
}

fn entry(index: u32, data: u64) -> kvm_msr_entry {
    kvm_msr_entry { index, data, ..Default::default() }
}

#[cfg(test)]
mod tests {
    use std::cell::RefCell;
    use std::collections::BTreeMap;

    use super::*;

    /// A CPU with some registers, of which some can only be read, and the writes to it.
    #[derive(Default)]
    struct Cpu {
        registers: RefCell<BTreeMap<u32, u64>>,
        read_only: Vec<u32>,
        written: RefCell<Vec<u32>>,
    }

    impl Cpu {
        fn new(registers: impl IntoIterator<Item = (u32, u64)>) -> Self {
            Self { registers: RefCell::new(registers.into_iter().collect()), ..Self::default() }
        }
    }

    impl Registers for Cpu {
        fn get(&self, entries: &mut [kvm_msr_entry]) -> Result<usize, KvmError> {
            assert!((1..KVM_MAX_MSR_ENTRIES).contains(&entries.len()));
            let registers = self.registers.borrow();
            for (done, entry) in entries.iter_mut().enumerate() {
                let Some(value) = registers.get(&entry.index) else {
                    return Ok(done);
                };
                entry.data = *value;
            }
            Ok(entries.len())
        }

        fn set(&self, entries: &[kvm_msr_entry]) -> Result<usize, KvmError> {
            assert!((1..KVM_MAX_MSR_ENTRIES).contains(&entries.len()));
            for (done, entry) in entries.iter().enumerate() {
                let mut registers = self.registers.borrow_mut();
                match registers.get_mut(&entry.index) {
                    Some(value) if !self.read_only.contains(&entry.index) => *value = entry.data,
                    _ => return Ok(done),
                }
                self.written.borrow_mut().push(entry.index);
            }
            Ok(entries.len())
        }
    }

    fn msr(index: u32, value: u64) -> Msr {
        Msr { index, value }
    }

    #[test]
    fn registers_that_are_not_there_are_left_out_wherever_they_stand() {
        // Every third is missing: the first, the last of a batch, the first of the next.
        let cpu = Cpu::new((0..1000).filter(|index| index % 3 != 0).map(|index| (index, 7)));
        let indexes: Vec<u32> = (0..1000).collect();
        let found: Vec<u32> = read(&cpu, &indexes).unwrap().iter().map(|msr| msr.index).collect();
        assert_eq!(found, indexes.iter().copied().filter(|i| i % 3 != 0).collect::<Vec<_>>());
        assert_eq!(read(&Cpu::default(), &indexes).unwrap(), []);
        assert_eq!(read(&cpu, &[]).unwrap(), []);
    }

    #[test]
    fn a_refused_write_names_its_register() {
        let cpu = Cpu::new((0..600).map(|index| (index, 0)));
        let cpu = Cpu { read_only: vec![300], ..cpu };
        let all: Vec<Msr> = (0..600).map(|index| msr(index, 1)).collect();
        assert!(matches!(write(&cpu, &all), Err(KvmError::Msr { index: 300 })));
        assert!(matches!(write(&cpu, &[msr(9999, 0)]), Err(KvmError::Msr { index: 9999 })));
    }

    #[test]
    fn a_restore_writes_what_differs_and_nothing_else() {
        let cpu = Cpu::new([(1, 10), (2, 20), (4, 40), (5, 50)]);
        let cpu = Cpu { read_only: vec![2], ..cpu };
        let saved = [msr(5, 51), msr(2, 20), msr(3, 0), msr(1, 10), msr(4, 41)];
        restore(&cpu, &saved, None).unwrap();
        assert_eq!(*cpu.written.borrow(), [5, 4]);
        assert!(matches!(restore(&cpu, &[msr(2, 21)], None), Err(KvmError::Msr { index: 2 })));
        assert!(matches!(restore(&cpu, &[msr(3, 1)], None), Err(KvmError::Msr { index: 3 })));
    }
}

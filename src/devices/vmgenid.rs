//! The VM's generation: a number in guest RAM that changes when the guest is not the only one any
//! more that has its memory.
//!
//! Source: "Virtual Machine Generation ID" (Microsoft, 2012). A guest that wakes from a snapshot
//! has the random numbers, keys and identities of every other guest from that snapshot. Linux
//! (drivers/virt/vmgenid.c) reseeds its random numbers when it is told, and tells programs by a
//! uevent. Where the number is, and the event that tells of it, is in the ACPI tables, in `arch`.

use std::io;
use std::sync::Arc;

use thiserror::Error as ThisError;
use vmm_sys_util::eventfd::EventFd;

use crate::arch::layout;
use crate::error::{Error, ErrorKind};
use crate::memory::{GuestRam, MemoryError};
use crate::random::random;

/// Its length.
const BYTES: usize = 16;

/// Why a VM gets no new generation.
#[derive(Debug, ThisError)]
pub(crate) enum VmGenIdError {
    #[error("cannot read random bytes from the host")]
    Random(#[source] io::Error),
    #[error("cannot write the VM's generation")]
    Write(#[from] MemoryError),
    #[error("cannot tell the guest of its new generation")]
    Interrupt(#[source] io::Error),
}

impl From<VmGenIdError> for Error {
    fn from(error: VmGenIdError) -> Self {
        Self::new(ErrorKind::Resources, error)
    }
}

/// The generation of one VM. It has no state of its own: the number is in guest RAM.
#[derive(Debug)]
pub(crate) struct VmGenId {
    ram: Arc<GuestRam>,
    interrupt: EventFd,
}

impl VmGenId {
    /// Touches no guest RAM. `interrupt` is the line of [`layout::EVENT_IRQ`].
    pub(crate) fn new(ram: &Arc<GuestRam>, interrupt: EventFd) -> Self {
        Self { ram: Arc::clone(ram), interrupt }
    }

    /// A boot's first generation: 16 random bytes where the ACPI tables say.
    pub(crate) fn write_first(ram: &GuestRam) -> Result<(), VmGenIdError> {
        let generation = random::<BYTES>().map_err(VmGenIdError::Random)?;
        Ok(ram.write(&generation, layout::VM_GENERATION)?)
    }

    /// The guest is another one from now on. To be called while it stands still, when the
    /// interrupt controllers have their state: what they are told before is overwritten. A guest
    /// that has no driver for it yet does nothing then, and reads the new number when it has.
    pub(crate) fn renew(&self) -> Result<(), VmGenIdError> {
        Self::write_first(&self.ram)?;
        self.interrupt.write(1).map_err(VmGenIdError::Interrupt)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use vm_memory::{Bytes, GuestAddress};

    fn generation(ram: &GuestRam) -> u128 {
        ram.inner().read_obj(layout::VM_GENERATION).unwrap()
    }

    #[test]
    fn each_renewal_is_another_number_and_one_interrupt() {
        let ram = Arc::new(GuestRam::fresh(&[(GuestAddress(0), 1 << 20)]).unwrap());
        let line = EventFd::new(libc::EFD_NONBLOCK).unwrap();
        let device = VmGenId::new(&ram, line.try_clone().unwrap());
        assert_eq!(generation(&ram), 0, "a new device writes no RAM");

        VmGenId::write_first(&ram).unwrap();
        let first = generation(&ram);
        assert_ne!(first, 0);
        line.read().expect_err("a boot is no change");

        device.renew().unwrap();
        let second = generation(&ram);
        assert!(second != first && second != 0);
        assert_eq!(line.read().unwrap(), 1);
    }

    #[test]
    fn a_guest_without_ram_there_is_an_error() {
        let ram = Arc::new(GuestRam::fresh(&[(GuestAddress(0), 4096)]).unwrap());
        let line = EventFd::new(libc::EFD_NONBLOCK).unwrap();
        let device = VmGenId::new(&ram, line.try_clone().unwrap());
        assert!(matches!(device.renew(), Err(VmGenIdError::Write(_))));
        line.read().expect_err("nothing changed");
    }
}

//! Puts what a guest boots into its memory: kernel, initramfs, command line, ACPI tables, and
//! the structure that tells the kernel where they are.
//!
//! It writes guest RAM and says where the boot vCPU begins; it touches no vCPU.

mod agent;

#[cfg(feature = "image")]
pub(crate) use self::agent::agent_file;
pub(crate) use self::agent::archive;

use linux_loader::configurator;
use linux_loader::loader::{self, Elf, KernelLoader, PvhBootCapability};
use std::io::Cursor;
use thiserror::Error as ThisError;
use vm_memory::GuestAddress;

use crate::arch::boot_params::{Handover, Placed};
use crate::arch::regs::Entry;
use crate::arch::{acpi, firmware, layout};
use crate::cmdline::Cmdline;
use crate::devices::{VmGenId, VmGenIdError};
use crate::error::{Error, ErrorKind};
use crate::kernel::{BootProtocol, Vmlinux};
use crate::memory::{GuestRam, MemoryError};

const PAGE_BYTES: u64 = 4096;
const MIB: u64 = 1 << 20;

/// Why a guest's memory cannot be filled.
#[derive(Debug, ThisError)]
pub(crate) enum BootError {
    #[error(
        "the kernel needs memory up to {} MiB, the guest's ends at {} MiB",
        end.div_ceil(MIB),
        ram_end / MIB
    )]
    KernelTooLarge { end: u64, ram_end: u64 },
    #[error(
        "the initramfs of {} MiB does not fit: the kernel ends at {} MiB, usable memory at {} MiB",
        len.div_ceil(MIB),
        kernel_end.div_ceil(MIB),
        ram_end / MIB
    )]
    InitramfsTooLarge { len: u64, kernel_end: u64, ram_end: u64 },
    #[error("the kernel has no PVH entry point")]
    NoPvhEntry,
    #[error("cannot load the kernel")]
    Load(#[source] loader::Error),
    #[error("cannot write the boot parameters")]
    Handover(#[source] configurator::Error),
    #[error(transparent)]
    Memory(#[from] MemoryError),
    #[error(transparent)]
    Generation(#[from] VmGenIdError),
}

impl From<BootError> for Error {
    fn from(error: BootError) -> Self {
        match error {
            BootError::KernelTooLarge { .. } => Error::new(ErrorKind::Kernel, error)
                .fix("give the guest more memory, by `VmConfig::memory_mib`"),
            BootError::InitramfsTooLarge { .. } => Error::new(ErrorKind::Initramfs, error).fix(
                "give the guest more memory, by `VmConfig::memory_mib`, or a smaller initramfs",
            ),
            BootError::NoPvhEntry => Error::new(ErrorKind::Kernel, error)
                .fix("use BootProtocol::Auto or BootProtocol::Linux64"),
            BootError::Memory(error) => error.into(),
            BootError::Generation(error) => error.into(),
            BootError::Load(_) | BootError::Handover(_) => Error::new(ErrorKind::Kernel, error),
        }
    }
}

/// What is booted.
pub(crate) struct Boot<'a> {
    pub(crate) kernel: &'a Vmlinux,
    pub(crate) protocol: BootProtocol,
    pub(crate) initramfs: Option<&'a [u8]>,
    pub(crate) cmdline: &'a Cmdline,
    pub(crate) memory_bytes: u64,
    pub(crate) vcpus: u8,
    pub(crate) virtio_devices: u32,
}

impl Boot<'_> {
    /// Fills the memory and returns the boot vCPU's entry. One copy of kernel and initramfs.
    pub(crate) fn load(&self, ram: &GuestRam) -> Result<Entry, BootError> {
        let entry = self.load_kernel(ram)?;
        entry.write_tables(ram)?;
        ram.write(&acpi::tables(self.vcpus, self.virtio_devices), layout::ACPI)?;
        ram.write(&firmware::reset_code(), layout::RESET_VECTOR)?;
        VmGenId::write_first(ram)?;

        let mut cmdline = self.cmdline.as_str().as_bytes().to_vec();
        cmdline.push(0);
        ram.write(&cmdline, layout::CMDLINE)?;

        let handover = Handover {
            memory_bytes: self.memory_bytes,
            cmdline_len: cmdline.len() as u32 - 1,
            initramfs: self.load_initramfs(ram)?,
        };
        handover.write(entry, ram).map_err(BootError::Handover)?;
        Ok(entry)
    }

    /// The end of the RAM that begins at address 0.
    fn low_ram_end(&self) -> u64 {
        self.memory_bytes.min(layout::DEVICES_START)
    }

    fn load_kernel(&self, ram: &GuestRam) -> Result<Entry, BootError> {
        let (end, ram_end) = (self.kernel.end_address(), self.low_ram_end());
        if end > ram_end {
            return Err(BootError::KernelTooLarge { end, ram_end });
        }
        let mut image = Cursor::new(self.kernel.image());
        let loaded = Elf::load(ram.inner(), None, &mut image, None).map_err(BootError::Load)?;
        let linux = Entry::Linux64 { address: loaded.kernel_load.0 };
        match (self.protocol, loaded.pvh_boot_cap) {
            (BootProtocol::Linux64, _) => Ok(linux),
            (_, PvhBootCapability::PvhEntryPresent(GuestAddress(address))) => {
                Ok(Entry::Pvh { address })
            }
            (BootProtocol::Auto, _) => Ok(linux),
            (BootProtocol::Pvh, _) => Err(BootError::NoPvhEntry),
        }
    }

    /// As high as the kernel will find it, so that it is out of the way of the kernel's growth.
    fn load_initramfs(&self, ram: &GuestRam) -> Result<Option<Placed>, BootError> {
        let Some(archive) = self.initramfs else {
            return Ok(None);
        };
        let len = archive.len() as u64;
        let (kernel_end, ram_end) =
            (self.kernel.end_address(), self.low_ram_end().min(layout::INITRAMFS_END));
        let address = ram_end.checked_sub(len).map(|address| address & !(PAGE_BYTES - 1));
        match address {
            Some(address) if address >= kernel_end => {
                ram.write(archive, GuestAddress(address))?;
                Ok(Some(Placed { address, len }))
            }
            _ => Err(BootError::InitramfsTooLarge { len, kernel_end, ram_end }),
        }
    }
}

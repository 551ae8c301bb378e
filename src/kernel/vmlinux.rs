//! The ELF form of a kernel, checked once and then trusted.
//!
//! Source: ELF-64 object file format, version 1.5. The copy to guest RAM and the PVH note are
//! linux-loader's; what is checked here is what its errors cannot name.

use std::mem::size_of;

use linux_loader::elf::{
    EI_CLASS, ELFCLASS64, ELFMAG0, ELFMAG1, ELFMAG2, ELFMAG3, EM_X86_64, Elf64_Ehdr, Elf64_Phdr,
    PT_LOAD, PT_NOTE,
};
use vm_memory::ByteValued;

use super::{KernelError, start_of};

/// The ELF magic number, 0x7f 'E' 'L' 'F'.
const MAGIC: [u8; 4] = [ELFMAG0, ELFMAG1, ELFMAG2, ELFMAG3];

/// Kernels live above the first MiB, which holds what the boot protocols hand over.
const LOWEST_ADDRESS: u64 = 0x10_0000;

/// Kernels have five program headers and notes of some hundred bytes.
const MAX_HEADERS: u16 = 64;
const MAX_NOTE_BYTES: u64 = 64 << 10;

pub(super) fn is_elf(image: &[u8]) -> bool {
    image.starts_with(&MAGIC)
}

/// An x86-64 ELF image with its headers and loadable segments inside its bytes.
#[derive(Debug)]
pub(crate) struct Vmlinux {
    image: Vec<u8>,
    end_address: u64,
}

impl Vmlinux {
    /// Checks the headers: architecture, and that each segment is within the image and above the
    /// first MiB of guest memory.
    pub(super) fn parse(image: Vec<u8>) -> Result<Self, KernelError> {
        if !is_elf(&image) {
            return Err(KernelError::UnknownFormat { start: start_of(&image) });
        }
        let header: Elf64_Ehdr = read(&image, 0, "the ELF header")?;
        let (class, machine) = (header.e_ident[EI_CLASS], header.e_machine);
        if class != ELFCLASS64 || machine != EM_X86_64 {
            return Err(KernelError::Architecture { class, machine });
        }
        if usize::from(header.e_phentsize) != size_of::<Elf64_Phdr>() {
            return Err(KernelError::Elf("its program headers have an unknown size"));
        }
        if header.e_phnum > MAX_HEADERS {
            return Err(KernelError::Elf("it has more than 64 program headers"));
        }
        let (mut end_address, mut loaded, mut entered) = (0, 0u64, false);
        for index in 0..u64::from(header.e_phnum) {
            let offset = header.e_phoff.saturating_add(index * size_of::<Elf64_Phdr>() as u64);
            let segment: Elf64_Phdr = read(&image, offset, "a program header")?;
            if segment.p_type == PT_NOTE && segment.p_filesz > MAX_NOTE_BYTES {
                return Err(KernelError::Elf("a note is larger than 64 KiB"));
            }
            if segment.p_type != PT_LOAD {
                continue;
            }
            check_within(&image, segment.p_offset, segment.p_filesz, "a segment")?;
            if segment.p_paddr < LOWEST_ADDRESS {
                return Err(KernelError::Elf("a segment lies in the first MiB"));
            }
            if segment.p_filesz > segment.p_memsz {
                return Err(KernelError::Elf("a segment is larger in the file than in memory"));
            }
            let end = segment.p_paddr.checked_add(segment.p_memsz);
            let end = end.ok_or(KernelError::Elf("a segment ends past the last address"))?;
            end_address = end_address.max(end);
            entered |= (segment.p_paddr..end).contains(&header.e_entry);
            loaded = loaded.saturating_add(segment.p_filesz);
        }
        // Segments that overlap in the file could be copied for ever.
        if loaded > image.len() as u64 {
            return Err(KernelError::Elf("its segments overlap in the file"));
        }
        if end_address == 0 {
            return Err(KernelError::Elf("it has no loadable segment"));
        }
        if !entered {
            return Err(KernelError::Elf("its entry point lies in no segment"));
        }
        Ok(Self { image, end_address })
    }

    /// The image's bytes.
    pub(crate) fn image(&self) -> &[u8] {
        &self.image
    }

    /// The first guest physical address after the last segment.
    pub(crate) fn end_address(&self) -> u64 {
        self.end_address
    }
}

/// Checks that `len` bytes at `offset` are within the image.
fn check_within(
    image: &[u8],
    offset: u64,
    len: u64,
    what: &'static str,
) -> Result<(), KernelError> {
    let end = offset.saturating_add(len);
    let available = image.len() as u64;
    if end > available {
        return Err(KernelError::Truncated { what, end, len: available });
    }
    Ok(())
}

/// Reads a structure at a byte offset, whatever its alignment.
fn read<T: ByteValued + Default>(
    image: &[u8],
    offset: u64,
    what: &'static str,
) -> Result<T, KernelError> {
    let len = size_of::<T>();
    check_within(image, offset, len as u64, what)?;
    let offset = offset as usize;
    let mut value = T::default();
    value.as_mut_slice().copy_from_slice(&image[offset..offset + len]);
    Ok(value)
}

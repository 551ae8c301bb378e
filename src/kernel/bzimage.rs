//! bzImage: a setup header, a decompressor that we do not run, and the compressed vmlinux.
//!
//! Source: Linux Documentation/arch/x86/boot.rst, "The Real-Mode Kernel Header".

use super::{KernelError, MAX_IMAGE_BYTES, start_of};
use crate::compression::{self, Fault};

/// Offsets of the fields of the setup header that matter here.
const SETUP_SECTS: usize = 0x1f1;
const HEADER: usize = 0x202;
const VERSION: usize = 0x206;
const XLOADFLAGS: usize = 0x236;
const PAYLOAD_OFFSET: usize = 0x248;
const PAYLOAD_LENGTH: usize = 0x24c;
/// One past the last byte that is read of the header.
const HEADER_END: usize = 0x250;

const MAGIC: &[u8; 4] = b"HdrS";
/// The protocol that introduced `payload_offset`.
const VERSION_PAYLOAD: u16 = 0x0208;
/// The protocol that introduced `xloadflags`.
const VERSION_XLOADFLAGS: u16 = 0x020c;
/// `xloadflags` bit 0, XLF_KERNEL_64: the kernel has a 64-bit entry point.
const XLF_KERNEL_64: u16 = 1;

pub(super) fn is_bzimage(image: &[u8]) -> bool {
    image.get(HEADER..HEADER + MAGIC.len()) == Some(MAGIC)
}

/// Unpacks the vmlinux out of a bzImage.
pub(super) fn unpack(image: &[u8]) -> Result<Vec<u8>, KernelError> {
    let len = image.len() as u64;
    let truncated = |what, end| KernelError::Truncated { what, end, len };
    let header = image.get(..HEADER_END).ok_or(truncated("the setup header", HEADER_END as u64))?;
    let u16_at = |at: usize| u16::from_le_bytes([header[at], header[at + 1]]);
    let u32_at = |at: usize| {
        u32::from_le_bytes([header[at], header[at + 1], header[at + 2], header[at + 3]])
    };

    let version = u16_at(VERSION);
    if version < VERSION_PAYLOAD {
        let [minor, major] = version.to_le_bytes();
        return Err(KernelError::OldProtocol { major, minor });
    }
    if version >= VERSION_XLOADFLAGS && u16_at(XLOADFLAGS) & XLF_KERNEL_64 == 0 {
        return Err(KernelError::Not64Bit);
    }
    // "For backwards compatibility, if the setup_sects field contains 0, the real value is 4."
    let setup_sectors = match header[SETUP_SECTS] {
        0 => 4,
        sectors => u64::from(sectors),
    };
    let start = (setup_sectors + 1) * 512 + u64::from(u32_at(PAYLOAD_OFFSET));
    let end = start + u64::from(u32_at(PAYLOAD_LENGTH));
    if end > len {
        return Err(truncated("the payload", end));
    }
    let payload = &image[start as usize..end as usize];
    compression::unpack(payload, MAX_IMAGE_BYTES).map_err(|fault| match fault {
        Fault::Unknown => KernelError::UnknownCompression { start: start_of(payload) },
        Fault::Damaged { format, source } => KernelError::Unpack { format, source },
        Fault::TooLarge => KernelError::TooLarge,
    })
}

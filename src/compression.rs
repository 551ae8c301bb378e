//! The compressions that Linux packs its kernel and its modules with, told apart by their first
//! bytes.
//!
//! Source: Linux scripts/Makefile.lib and the formats' own specifications. A kernel's build
//! appends the unpacked size as four bytes, which is why a decoder must not mind what follows its
//! stream.

use std::io::{self, Read};

use liblzma::read::XzDecoder;
use liblzma::stream::Stream;

use crate::input_file::read_bounded;

/// The memory that unpacking xz may take beside what it unpacks: 256 MiB.
const MAX_XZ_BYTES: u64 = 256 << 20;

/// Why bytes could not be unpacked.
#[derive(Debug)]
pub(crate) enum Fault {
    /// They begin as no format that is known.
    Unknown,
    /// They are damaged, or want too much memory.
    Damaged { format: &'static str, source: io::Error },
    /// There is more in them than was asked for.
    TooLarge,
}

/// Unpacks `packed`, at most `max_bytes` of it. An ELF image is not packed.
pub(crate) fn unpack(packed: &[u8], max_bytes: u64) -> Result<Vec<u8>, Fault> {
    let gzip = || read_bounded(flate2::read::GzDecoder::new(packed), max_bytes);
    let lz4 = || read_bounded(lz4_flex::frame::FrameDecoder::new(packed), max_bytes);
    let (format, unpacked) = match packed {
        [0x1f, 0x8b, ..] => ("gzip", gzip()),
        [0xfd, b'7', b'z', b'X', b'Z', 0, ..] => {
            ("xz", xz(packed).and_then(|xz| read_bounded(xz, max_bytes)))
        }
        [0x28, 0xb5, 0x2f, 0xfd, ..] => ("zstd", unpack_zstd(packed, max_bytes)),
        [0x02, 0x21, 0x4c, 0x18, ..] => {
            ("lz4 (legacy frame)", unpack_lz4_legacy(packed, max_bytes))
        }
        [0x04, 0x22, 0x4d, 0x18, ..] => ("lz4", lz4()),
        [0x7f, b'E', b'L', b'F', ..] => return Ok(packed.to_vec()),
        _ => return Err(Fault::Unknown),
    };
    unpacked.map_err(|source| Fault::Damaged { format, source })?.ok_or(Fault::TooLarge)
}

/// A decoder of xz. An archive names the memory that it wants for its dictionary, up to 4 GiB;
/// kernels and packages are made with 128 MiB at most.
pub(crate) fn xz<R: Read>(reader: R) -> io::Result<XzDecoder<R>> {
    let stream = Stream::new_stream_decoder(MAX_XZ_BYTES, 0)?;
    Ok(XzDecoder::new_stream(reader, stream))
}

fn unpack_zstd(packed: &[u8], max_bytes: u64) -> io::Result<Option<Vec<u8>>> {
    let decoder = zstd::stream::read::Decoder::with_buffer(packed)?;
    read_bounded(decoder.single_frame(), max_bytes)
}

/// The frame of the kernel's `lz4 -l` has no end mark: the build's four bytes follow the last
/// block at once and would be taken for the length of one more.
fn unpack_lz4_legacy(packed: &[u8], max_bytes: u64) -> io::Result<Option<Vec<u8>>> {
    let frame = packed.len().saturating_sub(size_of::<u32>());
    read_bounded(lz4_flex::frame::FrameDecoder::new(packed.take(frame as u64)), max_bytes)
}

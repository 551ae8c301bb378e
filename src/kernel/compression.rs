//! The compressions that Linux packs its vmlinux with, told apart by their first bytes.
//!
//! Source: Linux scripts/Makefile.lib and the formats' own specifications. The build appends the
//! unpacked size as four bytes, which is why a decoder must not mind what follows its stream.

use std::io::{self, Read};

use liblzma::read::XzDecoder;
use liblzma::stream::Stream;

use super::{KernelError, read_bounded, start_of};

/// The memory that unpacking xz may take beside what it unpacks: 256 MiB.
const MAX_XZ_BYTES: u64 = 256 << 20;

/// Unpacks a bzImage's payload, at most 1 GiB of it.
pub(super) fn unpack(payload: &[u8]) -> Result<Vec<u8>, KernelError> {
    let (format, unpacked) = match payload {
        [0x1f, 0x8b, ..] => ("gzip", read_bounded(flate2::read::GzDecoder::new(payload))),
        [0xfd, b'7', b'z', b'X', b'Z', 0, ..] => ("xz", xz(payload).and_then(read_bounded)),
        [0x28, 0xb5, 0x2f, 0xfd, ..] => ("zstd", unpack_zstd(payload)),
        [0x02, 0x21, 0x4c, 0x18, ..] => ("lz4 (legacy frame)", unpack_lz4_legacy(payload)),
        [0x04, 0x22, 0x4d, 0x18, ..] => {
            ("lz4", read_bounded(lz4_flex::frame::FrameDecoder::new(payload)))
        }
        // A kernel built without compression holds the image as it is.
        [0x7f, b'E', b'L', b'F', ..] => return Ok(payload.to_vec()),
        _ => return Err(KernelError::UnknownCompression { start: start_of(payload) }),
    };
    unpacked.map_err(|source| KernelError::Unpack { format, source })?.ok_or(KernelError::TooLarge)
}

/// A decoder of xz. An archive names the memory that it wants for its dictionary, up to 4 GiB;
/// kernels and packages are made with 128 MiB at most.
pub(super) fn xz<R: Read>(reader: R) -> io::Result<XzDecoder<R>> {
    let stream = Stream::new_stream_decoder(MAX_XZ_BYTES, 0)?;
    Ok(XzDecoder::new_stream(reader, stream))
}

fn unpack_zstd(payload: &[u8]) -> io::Result<Option<Vec<u8>>> {
    let decoder = zstd::stream::read::Decoder::with_buffer(payload)?;
    read_bounded(decoder.single_frame())
}

/// The frame of the kernel's `lz4 -l` has no end mark: the build's four bytes follow the last
/// block at once and would be taken for the length of one more.
fn unpack_lz4_legacy(payload: &[u8]) -> io::Result<Option<Vec<u8>>> {
    let frame = payload.len().saturating_sub(size_of::<u32>());
    read_bounded(lz4_flex::frame::FrameDecoder::new(payload.take(frame as u64)))
}

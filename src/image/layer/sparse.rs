//! Where the data of a sparse file lies.

use std::io::Read;

use tar::{GnuExtSparseHeader, GnuSparseHeader};

use super::{LayerFault, pax};

/// Extents of a file, at most. A map takes 16 bytes of memory for each.
const MAX_EXTENTS: usize = 1 << 17;
const MALFORMED: LayerFault = LayerFault::Tar("the map of a sparse file in it is malformed");
const TOO_MANY: LayerFault =
    LayerFault::Limit { what: "extents in a sparse file", limit: MAX_EXTENTS as u64 };
const BLOCK: usize = 512;

/// Data of a file.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(in crate::image) struct Extent {
    pub(in crate::image) offset: u64,
    pub(in crate::image) len: u64,
}

/// Are they in order, inside of the file, and as much as the archive has of it?
pub(super) fn check(extents: &[Extent], size: u64, data: u64) -> Result<(), LayerFault> {
    let (mut end, mut sum) = (0u64, 0u64);
    for extent in extents {
        if extent.offset < end {
            return Err(MALFORMED);
        }
        end = extent.offset.checked_add(extent.len).ok_or(MALFORMED)?;
        sum = sum.checked_add(extent.len).ok_or(MALFORMED)?;
    }
    if end > size || sum != data { Err(MALFORMED) } else { Ok(()) }
}

/// The map of GNU tar's own format: in the header, and in as many blocks after it as it takes. They are no
/// part of the entry's size.
pub(super) fn gnu(
    header: &tar::Header,
    source: &mut impl Read,
) -> Result<(u64, Vec<Extent>), LayerFault> {
    let header = header.as_gnu().ok_or(MALFORMED)?;
    let real_size = header.real_size().map_err(|_| MALFORMED)?;
    let mut extents = Vec::new();
    push(&mut extents, &header.sparse)?;
    let mut is_extended = header.is_extended();
    while is_extended {
        let mut block = GnuExtSparseHeader::new();
        source.read_exact(block.as_mut_bytes())?;
        push(&mut extents, block.sparse())?;
        is_extended = block.is_extended();
    }
    Ok((real_size, extents))
}

fn push(extents: &mut Vec<Extent>, headers: &[GnuSparseHeader]) -> Result<(), LayerFault> {
    for header in headers.iter().filter(|header| !header.is_empty()) {
        let offset = header.offset().map_err(|_| MALFORMED)?;
        let len = header.length().map_err(|_| MALFORMED)?;
        extents.push(Extent { offset, len });
    }
    if extents.len() > MAX_EXTENTS { Err(TOO_MANY) } else { Ok(()) }
}

/// The map of format 1.0, which the entry's data begins with: decimal numbers, each on a line, padded to a
/// block. Returns how many bytes it takes, too.
pub(super) fn leading(
    source: &mut impl Read,
    available: u64,
) -> Result<(u64, Vec<Extent>), LayerFault> {
    let (mut taken, mut block, mut at) = (0u64, [0; BLOCK], BLOCK);
    let mut next = || -> Result<u64, LayerFault> {
        let mut digits = Vec::new();
        loop {
            if at == BLOCK {
                if taken + BLOCK as u64 > available {
                    return Err(MALFORMED);
                }
                source.read_exact(&mut block)?;
                taken += BLOCK as u64;
                at = 0;
            }
            let byte = block[at];
            at += 1;
            match byte {
                b'\n' => return pax::number(&digits),
                _ if digits.len() < 20 => digits.push(byte),
                _ => return Err(MALFORMED),
            }
        }
    };
    let count = next()?;
    if count > MAX_EXTENTS as u64 {
        return Err(TOO_MANY);
    }
    let mut extents = Vec::new();
    for _ in 0..count {
        extents.push(Extent { offset: next()?, len: next()? });
    }
    Ok((taken, extents))
}

//! A request of a disk's driver, parsed once (virtio 1.2 §5.2.6).

use crate::disk::SECTOR_BYTES;
use crate::memory::{Clear, GuestBytes};
use crate::virtio::Chain;

/// Request types.
const T_IN: u32 = 0;
const T_OUT: u32 = 1;
const T_FLUSH: u32 = 4;
const T_GET_ID: u32 = 8;
const T_DISCARD: u32 = 11;
const T_WRITE_ZEROES: u32 = 13;

const HEADER_BYTES: usize = 16;
const SEGMENT_BYTES: usize = 16;
/// What a request has beside its data: the header and the status.
pub(super) const FRAMING_BYTES: u64 = HEADER_BYTES as u64 + 1;
/// One DISCARD or WRITE_ZEROES covers so many sectors (1 GiB) in so many ranges.
pub(super) const MAX_RANGE_SECTORS: u32 = 1 << 21;
pub(super) const MAX_RANGES: u32 = 32;
/// One request moves at most so much (64 MiB): the descriptors of a hostile one may overlap, and
/// other VMs' devices wait for it.
const MAX_REQUEST_BYTES: u64 = 64 << 20;

/// Why a request fails; its status says so.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Fault {
    /// The device does not do this.
    Unsupported,
    /// The request or the host's file is at fault.
    Io,
}

/// What a request wants. Offsets and lengths are bytes in whole sectors, and inside the disk.
#[derive(Debug)]
pub(super) enum Request<'ram> {
    Read { offset: u64, bytes: GuestBytes<'ram> },
    Write { offset: u64, bytes: GuestBytes<'ram> },
    Flush,
    GetId { bytes: GuestBytes<'ram> },
    Clear { ranges: Vec<Range> },
}

/// A range to clear.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Range {
    pub(super) offset: u64,
    pub(super) len: u64,
    pub(super) clear: Clear,
}

/// A chain as a request: what it wants, and where its status goes.
#[derive(Debug)]
pub(super) struct Parsed<'ram> {
    /// The last byte; empty where the driver left no room for it.
    pub(super) status: GuestBytes<'ram>,
    /// What counts as written: the status comes last, so all before it, also after a fault.
    pub(super) written: u32,
    pub(super) request: Result<Request<'ram>, Fault>,
}

impl<'ram> Parsed<'ram> {
    /// Parses a request for a disk of so many sectors.
    pub(super) fn new(chain: Chain<'ram>, sectors: u64, read_only: bool) -> Self {
        let Chain { readable: mut header, writable: mut to_driver, .. } = chain;
        let written = to_driver.len();
        let status_at = written.checked_sub(1);
        let Some(status) = status_at.and_then(|at| to_driver.split_off(at)) else {
            // There is nothing to say, and nobody to say it to.
            let status = GuestBytes::default();
            return Self { status, written: 0, request: Err(Fault::Io) };
        };
        let bounds = Bounds { sectors, read_only };
        let request = match header.split_off(HEADER_BYTES as u64) {
            Some(from_driver) => bounds.parse(&header, from_driver, to_driver),
            None => Err(Fault::Io),
        };
        Self { status, written: u32::try_from(written).unwrap_or(u32::MAX), request }
    }
}

struct Bounds {
    sectors: u64,
    read_only: bool,
}

impl Bounds {
    fn parse<'ram>(
        &self,
        header: &GuestBytes<'_>,
        from_driver: GuestBytes<'ram>,
        to_driver: GuestBytes<'ram>,
    ) -> Result<Request<'ram>, Fault> {
        let mut bytes = [0; HEADER_BYTES];
        header.copy_to(&mut bytes);
        let kind = u32::from_le_bytes(array(&bytes[..4]));
        let sector = u64::from_le_bytes(array(&bytes[8..]));
        if from_driver.len().max(to_driver.len()) > MAX_REQUEST_BYTES {
            return Err(Fault::Io);
        }
        match kind {
            T_IN => {
                let offset = self.offset(sector, to_driver.len())?;
                Ok(Request::Read { offset, bytes: to_driver })
            }
            T_OUT => {
                let offset = self.writable_offset(sector, from_driver.len())?;
                Ok(Request::Write { offset, bytes: from_driver })
            }
            T_FLUSH => Ok(Request::Flush),
            T_GET_ID => Ok(Request::GetId { bytes: to_driver }),
            T_DISCARD | T_WRITE_ZEROES => self.ranges(kind, &from_driver),
            _ => Err(Fault::Unsupported),
        }
    }

    /// The ranges of a list, all of which are checked before the first is touched.
    fn ranges<'ram>(&self, kind: u32, list: &GuestBytes<'_>) -> Result<Request<'ram>, Fault> {
        let segment = SEGMENT_BYTES as u64;
        if !list.len().is_multiple_of(segment) || list.len() / segment > MAX_RANGES.into() {
            return Err(Fault::Io);
        }
        let mut bytes = vec![0; list.len() as usize];
        list.copy_to(&mut bytes);
        let mut ranges = Vec::new();
        for range in bytes.chunks_exact(SEGMENT_BYTES) {
            let sector = u64::from_le_bytes(array(&range[..8]));
            let sectors = u32::from_le_bytes(array(&range[8..12]));
            let flags = u32::from_le_bytes(array(&range[12..]));
            // Bit 0, "unmap", is for WRITE_ZEROES alone; the others are reserved (§5.2.6.2).
            let clear = match (kind, flags) {
                (T_DISCARD, 0) => Clear::Discard,
                (T_WRITE_ZEROES, 0) => Clear::Keep,
                (T_WRITE_ZEROES, 1) => Clear::Unmap,
                _ => return Err(Fault::Unsupported),
            };
            if sectors > MAX_RANGE_SECTORS {
                return Err(Fault::Io);
            }
            let len = u64::from(sectors) * SECTOR_BYTES;
            ranges.push(Range { offset: self.writable_offset(sector, len)?, len, clear });
        }
        ranges.retain(|range| range.len > 0);
        Ok(Request::Clear { ranges })
    }

    /// Where `len` bytes at a sector are in the file; an error where they are not all there.
    fn offset(&self, sector: u64, len: u64) -> Result<u64, Fault> {
        let end = sector.checked_add(len / SECTOR_BYTES).ok_or(Fault::Io)?;
        if !len.is_multiple_of(SECTOR_BYTES) || end > self.sectors {
            return Err(Fault::Io);
        }
        Ok(sector * SECTOR_BYTES)
    }

    fn writable_offset(&self, sector: u64, len: u64) -> Result<u64, Fault> {
        if self.read_only {
            return Err(Fault::Io);
        }
        self.offset(sector, len)
    }
}

/// The bytes of a slice whose length the caller knows.
fn array<const N: usize>(slice: &[u8]) -> [u8; N] {
    let mut array = [0; N];
    array.copy_from_slice(slice);
    array
}

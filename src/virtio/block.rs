//! The block device: a file or a block device of the host as the guest's disk.
//!
//! Source: virtio 1.2 §5.2. Sectors are 512 bytes. Data moves between the file and guest RAM
//! without a copy; FLUSH is fdatasync; DISCARD and WRITE_ZEROES reach the file as holes.

use std::fs::File;
use std::io::{self, Seek, SeekFrom};
use std::os::fd::OwnedFd;
use std::os::unix::fs::FileTypeExt;

use vmm_sys_util::write_zeroes::{PunchHole, WriteZeroesAt};

use super::{Answer, Chain, DeviceType, QueueError, Queues, RateLimiter, Served, VirtioDevice};
use crate::config::RateLimit;
use crate::memory::GuestBytes;
use crate::metrics::{BlockMetrics, DeviceMetrics};

/// Feature bits.
const F_SEG_MAX: u64 = 1 << 2;
const F_RO: u64 = 1 << 5;
const F_BLK_SIZE: u64 = 1 << 6;
const F_FLUSH: u64 = 1 << 9;
const F_DISCARD: u64 = 1 << 13;
const F_WRITE_ZEROES: u64 = 1 << 14;

/// Request types.
const T_IN: u32 = 0;
const T_OUT: u32 = 1;
const T_FLUSH: u32 = 4;
const T_GET_ID: u32 = 8;
const T_DISCARD: u32 = 11;
const T_WRITE_ZEROES: u32 = 13;

/// Statuses, the last byte of each request.
const S_OK: u8 = 0;
const S_IOERR: u8 = 1;
const S_UNSUPP: u8 = 2;

const SECTOR_BYTES: u64 = 512;
const HEADER_BYTES: u64 = 16;
const SEGMENT_BYTES: u64 = 16;
/// Length of the id string, which ends with a NUL where it is shorter.
const ID_BYTES: usize = 20;
const QUEUE_SIZE: u16 = 256;
/// A queue full of buffers, without the header and the status.
const MAX_BUFFERS: u32 = QUEUE_SIZE as u32 - 2;
/// One DISCARD or WRITE_ZEROES covers so many sectors (1 GiB) in so many ranges.
const MAX_RANGE_SECTORS: u32 = 1 << 21;
const MAX_RANGES: u32 = 32;
/// One request moves at most so much (64 MiB): the descriptors of a hostile one may overlap, and
/// other VMs' devices wait for it.
const MAX_REQUEST_BYTES: u64 = 64 << 20;

/// The device.
#[derive(Debug)]
pub(crate) struct Block {
    file: File,
    sectors: u64,
    read_only: bool,
    id: [u8; ID_BYTES],
    limiter: RateLimiter,
    metrics: BlockMetrics,
}

/// Why a request failed; its status says so.
#[derive(Debug)]
enum Fault {
    /// The device does not do this.
    Unsupported,
    /// The request or the host's file is at fault.
    Io,
}

impl From<io::Error> for Fault {
    fn from(error: io::Error) -> Self {
        tracing::debug!(%error, "a disk request failed");
        Self::Io
    }
}

impl Block {
    /// A disk as large as `file`, whose last incomplete sector is left out.
    pub(crate) fn new(mut file: File, read_only: bool, id: &str) -> io::Result<Self> {
        let kind = file.metadata()?.file_type();
        if !kind.is_file() && !kind.is_block_device() {
            let reason = "neither a regular file nor a block device";
            return Err(io::Error::new(io::ErrorKind::InvalidInput, reason));
        }
        let sectors = file.seek(SeekFrom::End(0))? / SECTOR_BYTES;
        let mut bytes = [0; ID_BYTES];
        for (byte, from) in bytes.iter_mut().zip(id.bytes()) {
            *byte = from;
        }
        let limiter = RateLimiter::new(RateLimit::default())?;
        let metrics = BlockMetrics::default();
        Ok(Self { file, sectors, read_only, id: bytes, limiter, metrics })
    }

    pub(crate) fn set_rate_limit(&mut self, limit: RateLimit) {
        self.limiter.set(limit);
    }

    /// Does what a request says.
    fn execute(
        &mut self,
        header: Header,
        from_driver: &GuestBytes<'_>,
        to_driver: &GuestBytes<'_>,
    ) -> Result<(), Fault> {
        if from_driver.len().max(to_driver.len()) > MAX_REQUEST_BYTES {
            return Err(Fault::Io);
        }
        match header.kind {
            T_IN => {
                let offset = self.offset(header.sector, to_driver.len())?;
                Ok(to_driver.read_from(&self.file, offset)?)
            }
            T_OUT => {
                let offset = self.writable_offset(header.sector, from_driver.len())?;
                Ok(from_driver.write_to(&self.file, offset)?)
            }
            T_FLUSH => Ok(self.file.sync_data()?),
            T_GET_ID => {
                to_driver.copy_from(&self.id);
                Ok(())
            }
            T_DISCARD | T_WRITE_ZEROES => self.clear(header.kind, from_driver),
            _ => Err(Fault::Unsupported),
        }
    }

    /// Punches or zeroes each range of a list, all of which are checked first.
    fn clear(&mut self, kind: u32, list: &GuestBytes<'_>) -> Result<(), Fault> {
        let count = list.len() / SEGMENT_BYTES;
        if !list.len().is_multiple_of(SEGMENT_BYTES) || count > MAX_RANGES.into() {
            return Err(Fault::Io);
        }
        let mut bytes = vec![0; list.len() as usize];
        list.copy_to(&mut bytes);
        let mut ranges = Vec::new();
        for range in bytes.chunks_exact(SEGMENT_BYTES as usize) {
            let sector = u64::from_le_bytes(array(&range[..8]));
            let sectors = u32::from_le_bytes(array(&range[8..12]));
            let flags = u32::from_le_bytes(array(&range[12..]));
            // Bit 0, "unmap", is for WRITE_ZEROES alone; the others are reserved (§5.2.6.2).
            if flags & !1 != 0 || (flags != 0 && kind == T_DISCARD) {
                return Err(Fault::Unsupported);
            }
            if sectors > MAX_RANGE_SECTORS {
                return Err(Fault::Io);
            }
            let len = u64::from(sectors) * SECTOR_BYTES;
            ranges.push((self.writable_offset(sector, len)?, len));
        }
        for (offset, len) in ranges {
            match kind {
                T_DISCARD => self.file.punch_hole(offset, len)?,
                _ => self.file.write_all_zeroes_at(offset, len as usize)?,
            }
        }
        Ok(())
    }

    /// Where `len` bytes at a sector are in the file; an error where they are not all there.
    fn offset(&self, sector: u64, len: u64) -> Result<u64, Fault> {
        let sectors = len / SECTOR_BYTES;
        let end = sector.checked_add(sectors).ok_or(Fault::Io)?;
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

    /// Answers a request: reads its header, does it, writes its status.
    fn answer(&mut self, chain: Chain<'_>) -> u32 {
        let Some((to_driver, status)) =
            chain.writable.len().checked_sub(1).and_then(|at| chain.writable.clone().split_at(at))
        else {
            // No room for a status: there is nothing to say, and nobody to say it to.
            return 0;
        };
        let result = match chain.readable.split_at(HEADER_BYTES) {
            Some((header, from_driver)) => {
                self.execute(Header::read(&header), &from_driver, &to_driver)
            }
            None => Err(Fault::Io),
        };
        let code = match result {
            Ok(()) => S_OK,
            Err(Fault::Io) => S_IOERR,
            Err(Fault::Unsupported) => S_UNSUPP,
        };
        status.copy_from(&[code]);
        // The status comes last, so all before it counts as written, also after a fault.
        u32::try_from(chain.writable.len()).unwrap_or(u32::MAX)
    }
}

/// `struct virtio_blk_req` without its data.
#[derive(Clone, Copy, Debug)]
struct Header {
    kind: u32,
    sector: u64,
}

impl Header {
    fn read(bytes: &GuestBytes<'_>) -> Self {
        let mut header = [0; HEADER_BYTES as usize];
        bytes.copy_to(&mut header);
        Self {
            kind: u32::from_le_bytes(array(&header[..4])),
            sector: u64::from_le_bytes(array(&header[8..])),
        }
    }
}

/// The bytes of a slice whose length the caller knows.
fn array<const N: usize>(slice: &[u8]) -> [u8; N] {
    let mut array = [0; N];
    array.copy_from_slice(slice);
    array
}

impl VirtioDevice for Block {
    fn device_type(&self) -> DeviceType {
        DeviceType::Block
    }

    fn features(&self) -> u64 {
        let common = F_SEG_MAX | F_BLK_SIZE | F_FLUSH;
        common | if self.read_only { F_RO } else { F_DISCARD | F_WRITE_ZEROES }
    }

    fn queue_sizes(&self) -> Vec<u16> {
        vec![QUEUE_SIZE]
    }

    /// `struct virtio_blk_config` (§5.2.4).
    fn config(&self) -> Vec<u8> {
        let mut config = Vec::with_capacity(60);
        config.extend(self.sectors.to_le_bytes());
        config.extend(0u32.to_le_bytes()); // size_max
        config.extend(MAX_BUFFERS.to_le_bytes()); // seg_max
        config.extend([0; 4]); // geometry
        config.extend((SECTOR_BYTES as u32).to_le_bytes()); // blk_size
        config.extend([0; 8]); // topology
        config.extend([0; 2]); // writeback, unused
        config.extend(1u16.to_le_bytes()); // num_queues
        config.extend(MAX_RANGE_SECTORS.to_le_bytes()); // max_discard_sectors
        config.extend(MAX_RANGES.to_le_bytes()); // max_discard_seg
        config.extend(1u32.to_le_bytes()); // discard_sector_alignment
        config.extend(MAX_RANGE_SECTORS.to_le_bytes()); // max_write_zeroes_sectors
        config.extend(MAX_RANGES.to_le_bytes()); // max_write_zeroes_seg
        config.push(1); // write_zeroes_may_unmap
        config.extend([0; 3]);
        config
    }

    fn sources(&self) -> io::Result<Vec<OwnedFd>> {
        Ok(vec![self.limiter.source()?])
    }

    fn serve(&mut self, index: usize, queues: &mut Queues<'_>) -> Result<Served, QueueError> {
        queues.serve(index, |chain| {
            let framing = HEADER_BYTES + 1;
            let data = (chain.readable.len() + chain.writable.len()).saturating_sub(framing);
            if !self.limiter.take(data) {
                return Answer::PutBack;
            }
            Answer::Used(self.answer(chain))
        })
    }

    /// There are tokens again.
    fn ready(&mut self, _: usize, queues: &mut Queues<'_>) -> Result<Served, QueueError> {
        self.serve(0, queues)
    }

    fn metrics(&self) -> DeviceMetrics {
        DeviceMetrics::Block(self.metrics)
    }
}

//! The block device: a file or a block device of the host as the guest's disk.
//!
//! Source: virtio 1.2 §5.2. Sectors are 512 bytes. Data moves between the file and guest RAM
//! without a copy: at once where the page cache has it, else through the process's I/O queue,
//! so that a slow disk holds up nobody but its own guest. FLUSH is fdatasync; DISCARD and
//! WRITE_ZEROES reach the file as holes.

mod pending;
mod request;
mod saving;

use std::io;
use std::sync::Arc;

use self::pending::{Ended, Job, PendingRequests, Reply};
use self::request::{FRAMING_BYTES, Fault, MAX_RANGE_SECTORS, MAX_RANGES, Parsed, Range, Request};
use super::{
    Answer, Chain, DeviceType, QueueError, Queues, RateLimiter, Served, Source, VirtioDevice,
};
use crate::config::{BlockConfig, RateLimit};
use crate::disk::{Disk, SECTOR_BYTES};
use crate::memory::{FileIo, GuestRam, Transfer};
use crate::metrics::{BlockMetrics, DeviceMetrics};

/// Feature bits.
const F_SEG_MAX: u64 = 1 << 2;
const F_RO: u64 = 1 << 5;
const F_BLK_SIZE: u64 = 1 << 6;
const F_FLUSH: u64 = 1 << 9;
const F_MQ: u64 = 1 << 12;
const F_DISCARD: u64 = 1 << 13;
const F_WRITE_ZEROES: u64 = 1 << 14;

/// Statuses, the last byte of each request.
const S_OK: u8 = 0;
const S_IOERR: u8 = 1;
const S_UNSUPP: u8 = 2;

/// Length of the id string, which ends with a NUL where it is shorter.
const ID_BYTES: usize = 20;
const QUEUE_SIZE: u16 = 256;
/// A queue full of buffers, without the header and the status.
const MAX_BUFFERS: u32 = QUEUE_SIZE as u32 - 2;

/// Pieces that one read of a disk with deltas may lie in: each sector one, in 8 MiB, which is twice of what Linux asks for
/// at once.
const MAX_PIECES: usize = 16384;
/// Operations that wait at a time, beside those of one request: what they take of the host's memory is the host's to say.
const MAX_OPERATIONS: usize = 4096;

/// The place of the rate limiter among the sources; the I/O queue is the other one.
const LIMITER: usize = 1;

/// The device.
#[derive(Debug)]
pub(crate) struct Block {
    /// `None` once the VM is over, and while the disk of a paused one is saved.
    disk: Option<Disk>,
    io: Arc<FileIo>,
    sectors: u64,
    read_only: bool,
    id: [u8; ID_BYTES],
    queues: u16,
    /// The queue that was served first the last time that all were.
    first_queue: u16,
    limiter: RateLimiter,
    /// Whether the file's page cache can be written without waiting. Many file systems cannot.
    writes_cached: bool,
    pending: PendingRequests,
    /// Requests are left in their queues until operations have ended.
    is_full: bool,
    /// Operations that were found during a turn, and begin together at its end.
    unsubmitted: Vec<(u64, Transfer)>,
    metrics: BlockMetrics,
}

/// What became of a request at once.
enum Started {
    Done,
    Waits(Job, Vec<Transfer>),
    /// For its turn among the flushes.
    WaitsToFlush,
}

impl Block {
    /// A disk of a configuration, whose requests wait in `io` where they have to.
    pub(crate) fn new(disk: Disk, io: Arc<FileIo>, config: &BlockConfig) -> io::Result<Self> {
        let mut bytes = [0; ID_BYTES];
        for (byte, from) in bytes.iter_mut().zip(config.id.bytes()) {
            *byte = from;
        }
        Ok(Self {
            sectors: disk.sectors(),
            read_only: disk.is_read_only(),
            disk: Some(disk),
            io,
            id: bytes,
            queues: config.queues,
            first_queue: 0,
            limiter: RateLimiter::new(config.rate_limit)?,
            writes_cached: true,
            pending: PendingRequests::default(),
            is_full: false,
            unsubmitted: Vec::new(),
            metrics: BlockMetrics::default(),
        })
    }

    pub(crate) fn rate_limit(&self) -> RateLimit {
        self.limiter.limit()
    }

    pub(crate) fn set_rate_limit(&mut self, limit: RateLimit) {
        self.limiter.set(limit);
    }

    /// Answers a request at once, or takes it on.
    fn answer(&mut self, index: usize, chain: Chain<'_>, ram: &Arc<GuestRam>) -> Answer {
        let head = chain.head;
        let Parsed { status, written, request } = Parsed::new(chain, self.sectors, self.read_only);
        let started = request.and_then(|request| self.start(request, ram));
        let reply = || Reply { queue: index, head, written, status: status.keep(ram) };
        let code = match started {
            Ok(Started::Done) => S_OK,
            Ok(Started::Waits(job, transfers)) => {
                self.unsubmitted.extend(self.pending.add(reply(), job, transfers));
                return Answer::InFlight;
            }
            Ok(Started::WaitsToFlush) => {
                self.pending.add_flush(reply());
                return Answer::InFlight;
            }
            Err(fault) => {
                self.metrics.errors += 1;
                match fault {
                    Fault::Io => S_IOERR,
                    Fault::Unsupported => S_UNSUPP,
                }
            }
        };
        status.copy_from(&[code]);
        Answer::Used(written)
    }

    /// Does what can be done without waiting.
    fn start(&mut self, request: Request<'_>, ram: &Arc<GuestRam>) -> Result<Started, Fault> {
        let Some(disk) = &mut self.disk else { return Err(Fault::Io) };
        match request {
            Request::Read { offset, bytes } => {
                let len = bytes.len();
                let mut transfers = Vec::new();
                let parts = disk.read(offset, bytes, MAX_PIECES).ok_or(Fault::Io)?;
                for part in parts {
                    let cached = match part.cached {
                        true => part.bytes.read_cached(part.file, part.offset),
                        false => Ok(0),
                    };
                    // What cannot be read without waiting is read again with waiting.
                    let done = cached.unwrap_or(0);
                    if done < part.bytes.len() {
                        let buffers = part.bytes.skip(done).keep(ram);
                        let read = Transfer::read(part.file, part.offset + done, buffers);
                        transfers.push(read.keeping(part.locked));
                    }
                }
                Ok(self.then(Job::Read { len }, transfers))
            }
            Request::Write { offset, bytes } => {
                let len = bytes.len();
                let part = disk.write(offset, bytes);
                let mut done = 0;
                if part.cached && self.writes_cached {
                    match part.bytes.write_cached(part.file, part.offset) {
                        Ok(count) => done = count,
                        Err(error) => {
                            self.writes_cached = error.raw_os_error() != Some(libc::EOPNOTSUPP)
                        }
                    }
                }
                let mut transfers = Vec::new();
                if done < len {
                    let buffers = part.bytes.skip(done).keep(ram);
                    let write = Transfer::write(part.file, part.offset + done, buffers);
                    transfers.push(write.keeping(part.locked));
                }
                Ok(self.then(Job::Write { offset, len }, transfers))
            }
            Request::Flush => Ok(Started::WaitsToFlush),
            Request::GetId { bytes } => {
                bytes.copy_from(&self.id);
                Ok(Started::Done)
            }
            Request::Clear { ranges } => {
                let clear = |range: &Range| disk.clear(range.offset, range.len, range.clear);
                let transfers = ranges.iter().map(clear).collect();
                Ok(self.then(Job::Clear { ranges }, transfers))
            }
        }
    }

    fn then(&mut self, job: Job, transfers: Vec<Transfer>) -> Started {
        if transfers.is_empty() {
            self.succeeded(&job);
            return Started::Done;
        }
        Started::Waits(job, transfers)
    }

    /// A request has done what it wanted.
    fn succeeded(&mut self, job: &Job) {
        let (metrics, Some(disk)) = (&mut self.metrics, &mut self.disk) else { return };
        match job {
            Job::Read { len } => {
                metrics.reads += 1;
                metrics.read_bytes += len;
            }
            Job::Write { offset, len } => {
                metrics.writes += 1;
                metrics.written_bytes += len;
                disk.written(*offset, *len);
            }
            Job::Clear { ranges } => {
                metrics.clears += 1;
                for range in ranges {
                    disk.written(range.offset, range.len);
                }
            }
            Job::Flush(_) => metrics.flushes += 1,
        }
    }

    /// Begins what was found during a turn, and the next flush.
    fn submit(&mut self) {
        if let Some(disk) = &mut self.disk {
            self.unsubmitted.extend(self.pending.next_flush(disk));
        }
        if !self.unsubmitted.is_empty() {
            self.io.submit(std::mem::take(&mut self.unsubmitted));
        }
    }

    /// Gives a request back whose operations have ended.
    fn give_back(&mut self, ended: Ended, queues: &mut Queues<'_>) -> Result<(), QueueError> {
        let Ended { reply, job, failed } = ended;
        if failed {
            self.metrics.errors += 1;
            if let (Job::Flush(flush), Some(disk)) = (&job, &mut self.disk) {
                disk.flush_failed(flush);
            }
        } else {
            self.succeeded(&job);
        }
        reply.status.copy_from(&[if failed { S_IOERR } else { S_OK }]);
        let ram = queues.ram();
        match queues.get(reply.queue) {
            Some(queue) => queue.add_used(ram, reply.head, reply.written),
            // The driver took the queue away.
            None => Ok(()),
        }
    }
}

impl VirtioDevice for Block {
    fn device_type(&self) -> DeviceType {
        DeviceType::Block
    }

    fn features(&self) -> u64 {
        let common = F_SEG_MAX | F_BLK_SIZE | F_FLUSH | F_MQ;
        common | if self.read_only { F_RO } else { F_DISCARD | F_WRITE_ZEROES }
    }

    fn queue_sizes(&self) -> Vec<u16> {
        vec![QUEUE_SIZE; self.queues.into()]
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
        config.extend(self.queues.to_le_bytes()); // num_queues
        config.extend(MAX_RANGE_SECTORS.to_le_bytes()); // max_discard_sectors
        config.extend(MAX_RANGES.to_le_bytes()); // max_discard_seg
        config.extend(1u32.to_le_bytes()); // discard_sector_alignment
        config.extend(MAX_RANGE_SECTORS.to_le_bytes()); // max_write_zeroes_sectors
        config.extend(MAX_RANGES.to_le_bytes()); // max_write_zeroes_seg
        config.push(1); // write_zeroes_may_unmap
        config.extend([0; 3]);
        config
    }

    fn sources(&self) -> io::Result<Vec<Source>> {
        Ok(vec![Box::new(self.io.event()?), Box::new(self.limiter.source()?)])
    }

    fn serve(&mut self, index: usize, queues: &mut Queues<'_>) -> Result<Served, QueueError> {
        let ram = queues.ram();
        let served = queues.serve(index, |chain| {
            if self.pending.operations() > MAX_OPERATIONS {
                self.is_full = true;
                return Answer::PutBack;
            }
            let data = (chain.readable.len() + chain.writable.len()).saturating_sub(FRAMING_BYTES);
            match self.limiter.take(data) {
                true => self.answer(index, chain, ram),
                false => Answer::PutBack,
            }
        });
        self.submit();
        if self.pending.len() > usize::from(QUEUE_SIZE) * usize::from(self.queues) {
            return Err(QueueError::InFlight);
        }
        served
    }

    fn ready(&mut self, source: usize, queues: &mut Queues<'_>) -> Result<Served, QueueError> {
        self.finish(queues)?;
        let mut served = Served::All;
        let has_room = self.is_full && self.pending.operations() <= MAX_OPERATIONS;
        if source == LIMITER || has_room {
            self.is_full = false;
            // Each is the first in turn: what it takes is not there for the others.
            self.first_queue = (self.first_queue + 1) % self.queues;
            for index in (self.first_queue..self.queues).chain(0..self.first_queue) {
                if self.serve(index.into(), queues)? == Served::Some {
                    served = Served::Some;
                }
            }
        }
        Ok(served)
    }

    fn in_flight(&self) -> usize {
        self.pending.len()
    }

    fn finish(&mut self, queues: &mut Queues<'_>) -> Result<(), QueueError> {
        let mut outcome = Ok(());
        for (token, result) in self.io.take_done() {
            if let Err(error) = &result {
                tracing::debug!(%error, "a disk request failed");
            }
            let (ended, next) = self.pending.ended(token, result.is_err());
            self.unsubmitted.extend(next);
            if let Some(ended) = ended {
                // A queue that is broken is told of once; all requests end.
                outcome = outcome.and(self.give_back(ended, queues));
            }
        }
        self.submit();
        let ram = queues.ram();
        for index in 0..self.queues.into() {
            if let Some(queue) = queues.get(index) {
                queue.signal(ram)?;
            }
        }
        outcome
    }

    fn give_up(&mut self) {
        self.io.cancel();
    }

    fn close(&mut self) {
        self.io.cancel();
        self.disk = None;
        // What is in flight ends in its own time, and nobody waits for it.
        self.pending = PendingRequests::default();
    }

    fn metrics(&self) -> DeviceMetrics {
        DeviceMetrics::Block(self.metrics)
    }
}

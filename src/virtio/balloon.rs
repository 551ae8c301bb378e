//! The memory balloon: pages that the guest does without, given back to the host.
//!
//! Source: virtio 1.2 §5.5. Pages are of 4 KiB, and named by numbers in lists of 32 bits. A page
//! that the guest puts into the balloon, or reports as free, costs the host nothing until the guest uses it
//! again; it is zero then, or in a guest that came from a snapshot what it was there. Taking one out needs
//! nothing of the host. A number that is
//! none of the guest's pages is ignored. What a request can ask for in one turn is bounded.
//!
//! Linux numbers queues without gaps: it puts the reporting queue where the queue of a feature
//! that it was not offered would be. So both of those places are reporting queues here.

use std::time::SystemTime;

use vm_memory::GuestAddress;

use super::{
    Answer, Chain, ConfigSpace, DeviceState, DeviceType, QueueError, Queues, RestoreError, Served,
    VirtioDevice,
};
use crate::config::BalloonConfig;
use crate::memory::{GuestBytes, GuestRam};
use crate::metrics::{BalloonMetrics, BalloonStats, BalloonStatus, DeviceMetrics};

/// Feature bits.
const F_STATS_VQ: u64 = 1 << 1;
const F_DEFLATE_ON_OOM: u64 = 1 << 2;
const F_REPORTING: u64 = 1 << 5;

const INFLATEQ: usize = 0;
const DEFLATEQ: usize = 1;
const STATSQ: usize = 2;

const QUEUE_SIZE: u16 = 128;
/// The queues with and without reporting.
const QUEUES: usize = 3;
const QUEUES_WITH_REPORTING: usize = 5;

const PAGE_SHIFT: u32 = 12;
/// Page numbers of one request that are looked at; Linux sends 256. The others stay with the guest.
const MAX_PFNS: usize = 1024;
/// Lists that are looked at in one turn, and pages in a row in them: each is a system call.
const LISTS_PER_TURN: usize = 4;
const RUNS_PER_TURN: usize = 512;
/// Bytes of one report that are given back, and one report a turn; Linux sends 32 times 4 MiB.
const MAX_REPORT_BYTES: u64 = 128 << 20;
const REPORTS_PER_TURN: usize = 1;
/// Statistics of one answer that are looked at; the specification has ten.
const MAX_STATS: usize = 64;
/// `struct virtio_balloon_stat`: a tag of 16 bits, a value of 64.
const STAT_BYTES: usize = 10;

/// Where `actual` is in the configuration.
const ACTUAL: u64 = 4;

/// The device.
#[derive(Debug)]
pub(crate) struct Balloon {
    config: BalloonConfig,
    /// What the driver chose.
    features: u64,
    /// How many pages the host wants in the balloon.
    num_pages: u32,
    /// How many the driver says are in it.
    actual: u32,
    /// The driver's buffer for statistics, by its number. It is kept, and given back when the
    /// host wants to know more.
    stats_buffer: Option<u16>,
    stats: Option<BalloonStats>,
    metrics: BalloonMetrics,
}

impl Balloon {
    pub(crate) fn new(config: BalloonConfig) -> Self {
        Self {
            config,
            features: 0,
            num_pages: 0,
            actual: 0,
            stats_buffer: None,
            stats: None,
            metrics: BalloonMetrics::default(),
        }
    }

    /// Changes how many pages the host wants in the balloon.
    pub(crate) fn set_target(&mut self, pages: u32) {
        self.num_pages = pages;
    }

    /// What is known now.
    pub(crate) fn status(&self) -> BalloonStatus {
        BalloonStatus {
            target_bytes: u64::from(self.num_pages) << PAGE_SHIFT,
            actual_bytes: u64::from(self.actual) << PAGE_SHIFT,
            stats: self.stats,
        }
    }

    /// Asks the guest for new statistics, and does not wait for them.
    pub(crate) fn ask_for_stats(&mut self, queues: &mut Queues<'_>) -> Result<(), QueueError> {
        if self.features & F_STATS_VQ == 0 {
            return Ok(());
        }
        // Linux rings for its first answer before it says DRIVER_OK, which nobody hears.
        self.serve_stats(queues)?;
        let ram = queues.ram();
        if let Some(queue) = queues.get(STATSQ)
            && let Some(head) = self.stats_buffer.take()
        {
            queue.add_used(ram, head, 0)?;
            queue.signal(ram)?;
        }
        Ok(())
    }

    /// Gives pages back, and says in how many runs.
    fn inflate(&mut self, ram: &GuestRam, list: &GuestBytes<'_>) -> usize {
        let mut pfns = pfns(list);
        let listed = pfns.len() as u64;
        pfns.sort_unstable();
        pfns.dedup();
        let (mut pages, mut runs) = (0, 0);
        // One system call for neighbours.
        for run in pfns.chunk_by(|pfn, next| pfn.checked_add(1) == Some(*next)) {
            let Some(first) = run.first() else { continue };
            let address = GuestAddress(u64::from(*first) << PAGE_SHIFT);
            pages += ram.discard(address, run.len() << PAGE_SHIFT) >> PAGE_SHIFT;
            runs += 1;
        }
        self.metrics.inflated_bytes += pages << PAGE_SHIFT;
        self.metrics.refused_pages += listed - pages;
        runs
    }

    fn deflate(&mut self, list: &GuestBytes<'_>) {
        self.metrics.deflated_bytes += (pfns(list).len() as u64) << PAGE_SHIFT;
    }

    /// Reads the driver's answer, and keeps its buffer. A driver has one; of two the older goes
    /// back.
    fn take_stats(&mut self, chain: &Chain<'_>) -> Option<u16> {
        let mut bytes = [0; MAX_STATS * STAT_BYTES];
        let len = chain.readable.copy_to(&mut bytes);
        self.stats = Some(read_stats(bytes.get(..len).unwrap_or_default(), SystemTime::now()));
        self.stats_buffer.replace(chain.head)
    }

    fn serve_stats(&mut self, queues: &mut Queues<'_>) -> Result<Served, QueueError> {
        let ram = queues.ram();
        let mut older = Vec::new();
        let served = queues.serve(STATSQ, |chain| {
            older.extend(self.take_stats(&chain));
            Answer::InFlight
        })?;
        if let Some(queue) = queues.get(STATSQ) {
            for head in older {
                queue.add_used(ram, head, 0)?;
            }
            queue.signal(ram)?;
        }
        Ok(served)
    }
}

/// The page numbers of a list, as many as are looked at.
fn pfns(list: &GuestBytes<'_>) -> Vec<u32> {
    let mut bytes = vec![0; MAX_PFNS * 4];
    let len = list.copy_to(&mut bytes);
    let (pfns, _) = bytes.get(..len).unwrap_or_default().as_chunks();
    pfns.iter().copied().map(u32::from_le_bytes).collect()
}

/// The statistics in an answer; of two with one tag the later counts (§5.5.6.3).
fn read_stats(bytes: &[u8], taken: SystemTime) -> BalloonStats {
    let mut values = [None; 10];
    let (stats, _) = bytes.as_chunks::<STAT_BYTES>();
    for [tag_low, tag_high, value @ ..] in stats {
        let tag = u16::from_le_bytes([*tag_low, *tag_high]);
        if let Some(known) = values.get_mut(usize::from(tag)) {
            *known = Some(u64::from_le_bytes(*value));
        }
    }
    let value = |tag: usize| values.get(tag).copied().flatten();
    BalloonStats {
        taken,
        swap_in: value(0),
        swap_out: value(1),
        majflt: value(2),
        minflt: value(3),
        memfree: value(4),
        memtot: value(5),
        avail: value(6),
        caches: value(7),
        htlb_pgalloc: value(8),
        htlb_pgfail: value(9),
    }
}

/// Lets a device look at a few requests, and at the others in its next turn. Each costs some of what is left for
/// this one.
fn serve_some(
    queues: &mut Queues<'_>,
    index: usize,
    mut left: usize,
    mut look: impl FnMut(&Chain<'_>) -> usize,
) -> Result<Served, QueueError> {
    let served = queues.serve(index, |chain| {
        if left == 0 {
            return Answer::PutBack;
        }
        left = left.saturating_sub(look(&chain));
        Answer::Used(0)
    })?;
    Ok(if left == 0 { Served::Some } else { served })
}

impl VirtioDevice for Balloon {
    fn device_type(&self) -> DeviceType {
        DeviceType::Balloon
    }

    fn features(&self) -> u64 {
        let mut features = F_STATS_VQ;
        if self.config.deflate_on_oom {
            features |= F_DEFLATE_ON_OOM;
        }
        if self.config.free_page_reporting {
            features |= F_REPORTING;
        }
        features
    }

    fn queue_sizes(&self) -> Vec<u16> {
        let reporting = self.config.free_page_reporting;
        vec![QUEUE_SIZE; if reporting { QUEUES_WITH_REPORTING } else { QUEUES }]
    }

    /// `struct virtio_balloon_config` (§5.5.4), as far as the features need it.
    fn config(&self) -> Vec<u8> {
        [self.num_pages.to_le_bytes(), self.actual.to_le_bytes()].concat()
    }

    /// The driver writes `actual` alone.
    fn write_config(&mut self, offset: u64, data: &[u8]) {
        if let (ACTUAL, Ok(actual)) = (offset, data.try_into()) {
            self.actual = u32::from_le_bytes(actual);
        }
    }

    fn activate(&mut self, features: u64) {
        self.features = features;
    }

    /// A driver that starts again has all its pages.
    fn reset(&mut self) {
        self.features = 0;
        self.actual = 0;
        self.stats_buffer = None;
        self.stats = None;
    }

    fn serve(&mut self, index: usize, queues: &mut Queues<'_>) -> Result<Served, QueueError> {
        let ram = queues.ram();
        match index {
            INFLATEQ => serve_some(queues, index, RUNS_PER_TURN, |chain| {
                self.inflate(ram, &chain.readable).max(RUNS_PER_TURN / LISTS_PER_TURN)
            }),
            DEFLATEQ => serve_some(queues, index, LISTS_PER_TURN, |chain| {
                self.deflate(&chain.readable);
                1
            }),
            STATSQ if self.features & F_STATS_VQ != 0 => self.serve_stats(queues),
            _ if self.features & F_REPORTING != 0 => {
                serve_some(queues, index, REPORTS_PER_TURN, |chain| {
                    self.metrics.reported_bytes +=
                        ram.discard_bytes(&chain.writable, MAX_REPORT_BYTES);
                    1
                })
            }
            // The driver did not choose what the queue is for.
            _ => Ok(Served::All),
        }
    }

    fn metrics(&self) -> DeviceMetrics {
        DeviceMetrics::Balloon(self.metrics)
    }

    fn state(&self) -> DeviceState {
        DeviceState::Balloon {
            num_pages: self.num_pages,
            actual: self.actual,
            stats_buffer: self.stats_buffer,
            stats: self.stats,
        }
    }

    fn restore(
        &mut self,
        state: &DeviceState,
        ram: &GuestRam,
    ) -> Result<ConfigSpace, RestoreError> {
        let DeviceState::Balloon { num_pages, actual, stats_buffer, stats } = *state else {
            return Err(RestoreError::Device);
        };
        let (pages, most) = (u64::from(num_pages), ram.bytes() >> PAGE_SHIFT);
        if pages > most {
            return Err(RestoreError::Balloon { pages, most });
        }
        if let Some(buffer) = stats_buffer
            && buffer >= QUEUE_SIZE
        {
            return Err(RestoreError::Queue { index: STATSQ });
        }
        // The driver may claim any number of pages, and nothing is counted on it.
        (self.num_pages, self.actual) = (num_pages, actual);
        (self.stats_buffer, self.stats) = (stats_buffer, stats);
        Ok(ConfigSpace::Same)
    }
}

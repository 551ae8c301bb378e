//! Memory, a MiB at a time, on several threads: copied, checked for zeros and summed while it is
//! in the processor's cache.

use std::fs::File;
use std::num::NonZero;
use std::ops::ControlFlow;
use std::os::unix::fs::FileExt;
use std::panic;
use std::sync::atomic::{AtomicU64, AtomicUsize, Ordering};
use std::thread;

use super::MemoryError;
use super::pages::{CHUNK_BYTES, CHUNK_PAGES, ChunkPages, PAGE_BYTES, PageRun, PageSet, runs};
use super::saved::ChunkChecksum;

/// More threads than this gain nothing: the memory is the limit.
const MAX_THREADS: usize = 4;

/// A thread costs what some MiB do.
const CHUNKS_PER_THREAD: usize = 4;

/// How far saving or checking has come.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct MemoryProgress {
    /// Bytes that were looked at.
    pub(crate) done_bytes: u64,
    /// Of so many.
    pub(crate) total_bytes: u64,
}

/// Is told after each MiB, on any of the threads, and may break it off.
pub(crate) type OnProgress<'a> = &'a (dyn Fn(MemoryProgress) -> ControlFlow<()> + Sync);

/// Where pages come from.
pub(super) trait Source: Sync {
    /// Copies a run of pages, which are those of one chunk at most.
    fn read(&self, run: PageRun, target: &mut [u8]) -> Result<(), MemoryError>;
}

/// What was copied.
#[derive(Debug)]
pub(super) struct Copied {
    /// The pages that are not zero.
    pub(super) present: PageSet,
    pub(super) checksums: Vec<ChunkChecksum>,
}

/// Copies the pages to where they belong in `target`, and leaves out those that are zero.
pub(super) fn copy(
    source: &dyn Source,
    pages: &PageSet,
    page_count: u64,
    target: &File,
    on_progress: OnProgress<'_>,
) -> Result<Copied, MemoryError> {
    let chunks: Vec<_> = pages.chunks().collect();
    let counter = Counter::new(chunks.len(), on_progress);
    let copied = in_parallel(chunks.len(), |at, buffer| {
        let Some((index, mut pages)) = chunks.get(at).copied() else { return Ok(None) };
        for (run, bytes) in pieces(pages) {
            if let Some(target) = buffer.get_mut(bytes) {
                let first = u64::from(index) * CHUNK_PAGES + run.first;
                source.read(PageRun { first, ..run }, target)?;
            }
        }
        leave_out_zeros(&mut pages, buffer);
        let crc32 = checksum(pages, buffer);
        let base = u64::from(index) * CHUNK_BYTES as u64;
        for (run, bytes) in pieces(pages) {
            let piece = buffer.get(bytes).unwrap_or_default();
            target
                .write_all_at(piece, base + run.offset())
                .map_err(MemoryError::file("write to the memory's file"))?;
        }
        counter.advance()?;
        let is_present = pages.iter().any(|word| *word != 0);
        Ok(is_present.then_some((ChunkChecksum { chunk: index, crc32 }, pages)))
    })?;
    let mut present = PageSet::new(page_count);
    let mut checksums = Vec::with_capacity(copied.len());
    for (checksum, pages) in copied.into_iter().flatten() {
        present.insert_chunk(checksum.chunk, pages);
        checksums.push(checksum);
    }
    checksums.sort_unstable_by_key(|checksum| checksum.chunk);
    Ok(Copied { present, checksums })
}

/// Reads chunks of a file, and returns the checksums that they have. All is read of a chunk: what
/// is nowhere else may have become damaged too.
pub(super) fn checksums(
    file: &File,
    file_bytes: u64,
    chunks: &[u32],
    counter: &Counter<'_>,
) -> Result<Vec<ChunkChecksum>, MemoryError> {
    in_parallel(chunks.len(), |at, buffer| {
        let chunk = chunks.get(at).copied().unwrap_or_default();
        let base = u64::from(chunk) * CHUNK_BYTES as u64;
        let len = file_bytes.saturating_sub(base).min(CHUNK_BYTES as u64) as usize;
        let (bytes, rest) = buffer.split_at_mut(len.min(CHUNK_BYTES));
        file.read_exact_at(bytes, base).map_err(MemoryError::file("read the memory's file"))?;
        rest.fill(0);
        let mut pages = [u64::MAX; _];
        leave_out_zeros(&mut pages, buffer);
        counter.advance()?;
        Ok(ChunkChecksum { chunk, crc32: checksum(pages, buffer) })
    })
}

/// The checksum of a chunk that is all zeros.
pub(super) fn checksum_of_zeros() -> u32 {
    checksum(ChunkPages::default(), &[])
}

/// Counts chunks, and says so.
pub(super) struct Counter<'a> {
    done: AtomicU64,
    total: u64,
    on_progress: OnProgress<'a>,
}

impl<'a> Counter<'a> {
    pub(super) fn new(total: usize, on_progress: OnProgress<'a>) -> Self {
        Self { done: AtomicU64::new(0), total: total as u64, on_progress }
    }

    fn advance(&self) -> Result<(), MemoryError> {
        let done = self.done.fetch_add(1, Ordering::Relaxed) + 1;
        let bytes = |chunks: u64| chunks * CHUNK_BYTES as u64;
        let progress = MemoryProgress { done_bytes: bytes(done), total_bytes: bytes(self.total) };
        match (self.on_progress)(progress) {
            ControlFlow::Continue(()) => Ok(()),
            ControlFlow::Break(()) => Err(MemoryError::Interrupted),
        }
    }
}

/// Does `count` pieces of work, each with room for a chunk, until one fails. This thread does its
/// share, and where no other can be started, all of it. The results are in no order.
fn in_parallel<T: Send>(
    count: usize,
    work: impl Fn(usize, &mut [u8]) -> Result<T, MemoryError> + Sync,
) -> Result<Vec<T>, MemoryError> {
    let next = AtomicUsize::new(0);
    let worker = || {
        let mut results = Vec::new();
        let mut buffer = Vec::new();
        loop {
            let at = next.fetch_add(1, Ordering::Relaxed);
            if at >= count {
                return Ok(results);
            }
            buffer.resize(CHUNK_BYTES, 0);
            match work(at, &mut buffer) {
                Ok(result) => results.push(result),
                Err(error) => {
                    next.store(count, Ordering::Relaxed);
                    return Err(error);
                }
            }
        }
    };
    let processors = thread::available_parallelism().map_or(1, NonZero::get);
    let threads = processors.min(MAX_THREADS).min(count.div_ceil(CHUNKS_PER_THREAD));
    thread::scope(|scope| {
        let others: Vec<_> = (1..threads)
            .map_while(|_| {
                let builder = thread::Builder::new().name("dormouse-save".into());
                builder.spawn_scoped(scope, worker).ok()
            })
            .collect();
        let mut results = worker();
        for other in others {
            let other = other.join().unwrap_or_else(|panic| panic::resume_unwind(panic));
            results = match (results, other) {
                (Ok(mut all), Ok(more)) => {
                    all.extend(more);
                    Ok(all)
                }
                (Err(error), _) | (_, Err(error)) => Err(error),
            };
        }
        results
    })
}

/// The runs of pages in a chunk, with where they are in its bytes.
fn pieces(pages: ChunkPages) -> impl Iterator<Item = (PageRun, std::ops::Range<usize>)> {
    let all: Vec<_> = runs(&pages).collect();
    all.into_iter().map(|run| {
        let begin = run.first as usize * PAGE_BYTES;
        (run, begin..begin + run.bytes())
    })
}

/// Leaves the pages that are not zero.
fn leave_out_zeros(pages: &mut ChunkPages, bytes: &[u8]) {
    for (word, bytes) in pages.iter_mut().zip(bytes.chunks(64 * PAGE_BYTES)) {
        for (bit, page) in bytes.chunks(PAGE_BYTES).enumerate() {
            if *word & 1 << bit != 0 && is_zero(page) {
                *word &= !(1 << bit);
            }
        }
    }
}

/// Most pages that are not zero show it in their first bytes.
fn is_zero(page: &[u8]) -> bool {
    page.chunks(256).all(|part| part.iter().fold(0, |all, byte| all | byte) == 0)
}

/// See [`ChunkChecksum`]. What is a hole in one file and zeros in another has the same.
fn checksum(pages: ChunkPages, bytes: &[u8]) -> u32 {
    let mut hasher = crc32fast::Hasher::new();
    for word in pages {
        hasher.update(&word.to_le_bytes());
    }
    for (_, range) in pieces(pages) {
        hasher.update(bytes.get(range).unwrap_or_default());
    }
    hasher.finalize()
}

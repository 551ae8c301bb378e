//! What is known of a file that guest RAM was saved to: it goes into the snapshot's state beside
//! it, and comes back from there as anybody's bytes.

use serde::{Deserialize, Serialize};

use super::pages::{CHUNK_PAGES, PAGE_BYTES, PageRun};

/// The most runs of pages a file may have: each becomes a mapping, of which a process has 65,530.
pub(crate) const MAX_RUNS: usize = 1024;

/// What is on disk stays what it is.
const _: () = assert!(PAGE_BYTES == 4096 && CHUNK_PAGES == 256);

/// A file of memory: its pages, and checksums of them.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub(crate) struct SavedMemory {
    /// How many pages the RAM has, and the file with its holes.
    pub(super) pages: u64,
    /// How many of them are not zero, and so take space.
    pub(super) present_pages: u64,
    /// Whether pages outside of the runs are zeros; else they are those of the memory below.
    pub(super) complete: bool,
    /// Where its pages count. A hole in there is zeros.
    pub(super) runs: Vec<PageRun>,
    /// Of each MiB that is not all zeros.
    pub(super) checksums: Vec<ChunkChecksum>,
}

/// The checksum of one MiB of a file.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub(crate) struct ChunkChecksum {
    /// Which MiB.
    pub(super) chunk: u32,
    /// The CRC-32 of a bitmap of its pages that are not zero, and of these pages.
    pub(super) crc32: u32,
}

impl SavedMemory {
    /// How long the file is, with its holes.
    pub(crate) fn file_bytes(&self) -> u64 {
        self.pages.saturating_mul(PAGE_BYTES as u64)
    }

    /// How many checksums there are: one for each MiB that is not all zeros.
    pub(crate) fn checksum_count(&self) -> usize {
        self.checksums.len()
    }

    /// What is wrong with it as the memory of a VM with `pages` pages, over another or not.
    pub(super) fn fault(&self, pages: u64, is_bottom: bool) -> Option<&'static str> {
        if self.pages != pages {
            return Some("it is of a VM with more or less memory");
        }
        match (self.complete, is_bottom) {
            (false, true) => {
                return Some("it is a diff, and the memory that it is one of is missing");
            }
            (true, false) => return Some("it is complete, and stands over other memory"),
            _ => {}
        }
        if self.runs.len() > MAX_RUNS {
            return Some("it has more than 1,024 runs of pages");
        }
        let mut end = 0;
        for run in &self.runs {
            match run.first.checked_add(run.count) {
                Some(next) if run.count > 0 && run.first >= end && next <= pages => end = next,
                _ => return Some("its runs of pages overlap, or are not inside of it"),
            }
        }
        let mut next = 0;
        for checksum in &self.checksums {
            let chunk = u64::from(checksum.chunk);
            if chunk < next || chunk >= pages.div_ceil(CHUNK_PAGES) {
                return Some("its checksums are out of order, or not of it");
            }
            next = chunk + 1;
        }
        (self.present_pages > pages).then_some("it says that it has more pages than it has")
    }
}

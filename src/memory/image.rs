//! The content of guest RAM at one moment, which nothing changes any more: files in layers, each
//! over those before. Any number of VMs map it, each privately, and read none of it before their
//! guests do.

use std::fs::File;
use std::os::unix::fs::FileExt;
use std::sync::Arc;

use vm_memory::GuestAddress;

use super::MemoryError;
use super::chunks::{self, Counter, OnProgress, Source};
use super::mapping::{Content, Reservation};
use super::memory_file;
use super::pages::{CHUNK_PAGES, Gaps, PAGE_BYTES, PageRun, PageSet};
use super::saved::{ChunkChecksum, MAX_RUNS, SavedMemory};

/// The most layers: a restore maps each one's runs.
pub(crate) const MAX_LAYERS: usize = 16;

/// Which gaps the lowest layer keeps: they are memory that the guest never used, and cost nothing
/// as fresh memory, while a hole of a file costs a page of the file and one of the guest.
pub(super) const BOTTOM_GAPS: Gaps = Gaps { min: 1024, most: 31 };

/// Which gaps another layer keeps: the pages in one that is closed are stored twice.
pub(super) const UPPER_GAPS: Gaps = Gaps { min: 8, most: MAX_RUNS - 1 };

/// A file, and what of it counts.
#[derive(Clone, Debug)]
pub(super) struct Layer {
    pub(super) file: Arc<File>,
    pub(super) runs: Arc<[PageRun]>,
    /// `None` where the file is in memory, and sealed.
    pub(super) checksums: Option<Arc<[ChunkChecksum]>>,
}

/// Memory to map. A clone is the same memory.
#[derive(Clone, Debug)]
pub(crate) struct MemoryImage {
    ranges: Arc<[(GuestAddress, usize)]>,
    /// From the lowest. Pages that none has are zeros.
    layers: Arc<[Layer]>,
}

impl MemoryImage {
    /// `layers` are from the lowest. All come from here or were checked.
    pub(super) fn new(ranges: Arc<[(GuestAddress, usize)]>, layers: Vec<Layer>) -> Self {
        Self { ranges, layers: layers.into() }
    }

    /// The image that files hold, the lowest first, for RAM in these ranges. Reads no memory.
    ///
    /// The files are as they were saved while anybody maps the image: a file that is made shorter
    /// ends the process that looks at what is gone (SIGBUS), and one that is written to changes
    /// under the guest.
    ///
    /// # Errors
    ///
    /// `Saved` for what does not fit the ranges, the other layers or its file, and for a file that
    /// is not a whole regular one; `Layers` for none or more than 16.
    pub(crate) fn open(
        ranges: &[(GuestAddress, usize)],
        layers: Vec<(File, SavedMemory)>,
    ) -> Result<Self, MemoryError> {
        if !(1..=MAX_LAYERS).contains(&layers.len()) {
            return Err(MemoryError::Layers { count: layers.len() });
        }
        let ranges: Arc<[_]> = ranges.into();
        let pages = page_count(&ranges);
        let open = |(number, (file, saved)): (usize, (File, SavedMemory))| {
            let fault = |fault| MemoryError::Saved { layer: number, fault };
            if let Some(found) = saved.fault(pages, number == 0) {
                return Err(fault(found));
            }
            let metadata =
                file.metadata().map_err(MemoryError::file("look at the memory's file"))?;
            if !metadata.is_file() {
                return Err(fault("it is no regular file"));
            }
            if metadata.len() != saved.file_bytes() {
                return Err(fault("its file was made shorter or longer"));
            }
            Ok(Layer {
                file: Arc::new(file),
                runs: saved.runs.into(),
                checksums: Some(saved.checksums.into()),
            })
        };
        let layers = layers.into_iter().enumerate().map(open).collect::<Result<Vec<_>, _>>()?;
        Ok(Self::new(ranges, layers))
    }

    /// The ranges of guest RAM that it is of.
    pub(crate) fn ranges(&self) -> &[(GuestAddress, usize)] {
        &self.ranges
    }

    /// The layers' files, the lowest first.
    pub(crate) fn files(&self) -> impl Iterator<Item = &Arc<File>> {
        self.layers.iter().map(|layer| &layer.file)
    }

    pub(super) fn shared_ranges(&self) -> &Arc<[(GuestAddress, usize)]> {
        &self.ranges
    }

    pub(super) fn layers(&self) -> &[Layer] {
        &self.layers
    }

    pub(super) fn page_count(&self) -> u64 {
        page_count(&self.ranges)
    }

    /// Whether this image is some of another's layers, from the lowest.
    pub(super) fn is_below(&self, other: &Self) -> bool {
        let same = |(one, other): (&Layer, &Layer)| Arc::ptr_eq(&one.file, &other.file);
        self.layers.len() <= other.layers.len()
            && self.layers.iter().zip(other.layers.iter()).all(same)
    }

    /// The pages that are not holes: all others are zeros.
    pub(super) fn data(&self) -> Result<PageSet, MemoryError> {
        let mut pages = PageSet::new(self.page_count());
        for layer in self.layers.iter() {
            for run in layer.runs.iter() {
                pages.remove(*run);
                memory_file::add_data(&layer.file, *run, &mut pages)
                    .map_err(MemoryError::file("look for the memory's holes"))?;
            }
        }
        Ok(pages)
    }

    /// Reads all of the files that the image was opened from, and compares their checksums, those
    /// of holes too. Takes as long as reading the files does; bytes that are in memory only, as
    /// those of a fork, are not read.
    ///
    /// # Errors
    ///
    /// `Damaged` for the first difference, `Interrupted` where `on_progress` breaks, `File` for
    /// what cannot be read.
    pub(crate) fn verify(&self, on_progress: OnProgress<'_>) -> Result<(), MemoryError> {
        let pages = self.page_count();
        let mut all = Vec::new();
        for (number, layer) in self.layers.iter().enumerate() {
            let Some(expected) = &layer.checksums else { continue };
            let mut data = PageSet::new(pages);
            memory_file::add_data(&layer.file, PageRun { first: 0, count: pages }, &mut data)
                .map_err(MemoryError::file("look for the memory's holes"))?;
            for checksum in expected.iter() {
                let first = u64::from(checksum.chunk) * CHUNK_PAGES;
                data.insert(PageRun { first, count: 1 });
            }
            all.push((number, layer, expected, data.chunks().map(|chunk| chunk.0).collect()));
        }
        let count = all.iter().map(|(.., chunks): &(_, _, _, Vec<u32>)| chunks.len()).sum();
        let counter = Counter::new(count, on_progress);
        let zeros = chunks::checksum_of_zeros();
        for (layer, Layer { file, .. }, expected, chunks) in all {
            let file_bytes = pages * PAGE_BYTES as u64;
            let mut found = chunks::checksums(file, file_bytes, &chunks, &counter)?;
            found.sort_unstable_by_key(|checksum| checksum.chunk);
            let mut expected = expected.iter().peekable();
            for checksum in found {
                let own = expected.next_if(|expected| expected.chunk == checksum.chunk);
                if checksum.crc32 != own.map_or(zeros, |own| own.crc32) {
                    return Err(MemoryError::Damaged { layer, mib: checksum.chunk });
                }
            }
        }
        Ok(())
    }

    /// Writes all layers to one file, which becomes that and nothing else.
    ///
    /// # Errors
    ///
    /// `File` for what cannot be read or written, `Interrupted` where `on_progress` breaks. The
    /// file is of no use then.
    pub(crate) fn merge(
        &self,
        file: &File,
        on_progress: OnProgress<'_>,
    ) -> Result<SavedMemory, MemoryError> {
        save_complete(self, &self.data()?, self.page_count(), file, on_progress)
    }

    /// Maps the image over regions of its ranges: `region` is the one that `first` is the first
    /// page of. Above the `below` lowest layers only, which are mapped already.
    pub(super) fn map(
        &self,
        region: &Reservation,
        first: u64,
        below: usize,
    ) -> std::io::Result<()> {
        let pages = PageRun { first, count: (region.len() / PAGE_BYTES) as u64 };
        for layer in self.layers.iter().skip(below) {
            for run in layer.runs.iter().map(|run| run.common(pages)).filter(|run| run.count > 0) {
                let offset = (run.first - first) as usize * PAGE_BYTES;
                region.map(offset, run.bytes(), Content::Private(&layer.file, run.offset()))?;
            }
        }
        region.keep_to_this_process();
        Ok(())
    }
}

impl Source for MemoryImage {
    fn read(&self, pages: PageRun, target: &mut [u8]) -> Result<(), MemoryError> {
        target.fill(0);
        for layer in self.layers.iter() {
            let begin = layer.runs.partition_point(|run| run.end() <= pages.first);
            let runs = layer.runs.get(begin..).unwrap_or_default();
            for run in runs.iter().map(|run| run.common(pages)).take_while(|run| run.count > 0) {
                let at = (run.first - pages.first) as usize * PAGE_BYTES;
                let Some(part) = target.get_mut(at..at + run.bytes()) else { break };
                layer
                    .file
                    .read_exact_at(part, run.offset())
                    .map_err(MemoryError::file("read the memory's file"))?;
            }
        }
        Ok(())
    }
}

/// Writes the pages of `pages` that are not zero to a file, which then is all of the memory.
pub(super) fn save_complete(
    source: &dyn Source,
    pages: &PageSet,
    page_count: u64,
    file: &File,
    on_progress: OnProgress<'_>,
) -> Result<SavedMemory, MemoryError> {
    make_empty(file, page_count)?;
    let copied = chunks::copy(source, pages, page_count, file, on_progress)?;
    Ok(SavedMemory {
        pages: page_count,
        present_pages: copied.present.len(),
        complete: true,
        runs: copied.present.joined(BOTTOM_GAPS),
        checksums: copied.checksums,
    })
}

/// Makes a file one hole for so many pages.
pub(super) fn make_empty(file: &File, page_count: u64) -> Result<(), MemoryError> {
    let len = page_count * PAGE_BYTES as u64;
    file.set_len(0)
        .and_then(|()| memory_file::set_len(file, len))
        .map_err(MemoryError::file("set the length of the memory's file"))
}

/// How many pages the ranges have together.
pub(super) fn page_count(ranges: &[(GuestAddress, usize)]) -> u64 {
    ranges.iter().map(|(_, len)| (len / PAGE_BYTES) as u64).sum()
}

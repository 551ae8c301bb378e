//! What guest RAM stands on: nothing yet, a file in memory of its own, or an image that it shares.
//!
//! Fresh RAM is a file in the host's memory, mapped shared. So freezing it copies nothing: the
//! file becomes an image as it is, and the RAM goes on over a private mapping of it, as each
//! clone does. The price beside anonymous memory is a page cache entry for each page: its first
//! touch takes 1.5 times as long, and the guest gets no huge pages unless the host's
//! /sys/kernel/mm/transparent_hugepage/shmem_enabled gives them.

use std::fs::File;
use std::os::unix::fs::FileExt;
use std::sync::{Arc, MutexGuard, PoisonError};

use vm_memory::{GuestAddress, GuestMemoryBackend, GuestMemoryRegion, MemoryRegionAddress};

use super::chunks::{self, OnProgress, Source};
use super::image::{self, BOTTOM_GAPS, Layer, MAX_LAYERS, MemoryImage, UPPER_GAPS};
use super::mapping::Content;
use super::memory_file;
use super::pages::{PAGE_BYTES, PageRun, PageSet};
use super::saved::SavedMemory;
use super::written;
use super::{GuestRam, MemoryError};

/// Where the RAM's pages come from.
#[derive(Clone, Debug)]
pub(super) enum Backing {
    /// Addresses alone.
    Nothing,
    /// A file in memory that nobody else has.
    Fresh(Arc<File>),
    /// An image, and on top of it the pages that were written since.
    Image(MemoryImage),
}

/// What of the memory to save.
#[derive(Clone, Copy, Debug)]
pub(crate) enum Save<'image> {
    /// All that is not zero.
    Full,
    /// What was written since the RAM was this image.
    Diff(&'image MemoryImage),
}

impl GuestRam {
    /// Gives the RAM content of its own, zeros. Touches no page.
    ///
    /// # Errors
    ///
    /// `Mapped` where it has content; `File` and `Map` where the kernel has no more descriptors or
    /// mappings.
    pub(crate) fn map_fresh(&self) -> Result<(), MemoryError> {
        let mut backing = self.backing();
        let Backing::Nothing = *backing else { return Err(MemoryError::Mapped) };
        let file = memory_file::in_memory(self.page_count())
            .map_err(MemoryError::file("make a file in memory"))?;
        self.map_shared(&file)?;
        *backing = Backing::Fresh(Arc::new(file));
        Ok(())
    }

    /// Gives the RAM the content of an image. Reads and touches no page: one system call for
    /// each run of pages.
    ///
    /// # Errors
    ///
    /// `Mapped` where it has content; `OtherRanges` for an image of another VM's RAM; `Map` where
    /// the process has too many mappings (65,530).
    pub(crate) fn map_image(&self, image: &MemoryImage) -> Result<(), MemoryError> {
        let mut backing = self.backing();
        let Backing::Nothing = *backing else { return Err(MemoryError::Mapped) };
        if image.ranges() != &*self.ranges {
            return Err(MemoryError::OtherRanges);
        }
        self.map_layers(image, 0)?;
        *backing = Backing::Image(image.clone());
        Ok(())
    }

    /// The pages that differ from the image that the RAM stands on, where it does; those that
    /// were touched, where it is fresh. Its time follows these pages, on Linux 6.7 and later.
    ///
    /// # Errors
    ///
    /// `NotMapped` without content; `File` where /proc is not there.
    pub(crate) fn written_pages(&self) -> Result<PageSet, MemoryError> {
        let backing = self.backing().clone();
        self.written(&backing)
    }

    /// As [`freeze`](Self::freeze), of RAM that nobody uses any more: nothing of fresh RAM is even
    /// mapped anew, so it takes less than a millisecond at any size.
    ///
    /// # Errors
    ///
    /// As `freeze`.
    pub(crate) fn freeze_for_good(&self) -> Result<MemoryImage, MemoryError> {
        let backing = self.backing().clone();
        let Backing::Fresh(file) = &backing else { return self.freeze() };
        let image = self.image_of(file)?;
        memory_file::seal(file).map_err(MemoryError::file("seal the memory"))?;
        Ok(image)
    }

    /// Fresh RAM as the image that it becomes. Of the gaps in it only large ones are of use.
    fn image_of(&self, file: &Arc<File>) -> Result<MemoryImage, MemoryError> {
        let mut pages = PageSet::new(self.page_count());
        memory_file::add_chunks(file, self.page_count(), &mut pages)
            .map_err(MemoryError::file("look for the memory's holes"))?;
        let runs = pages.joined(BOTTOM_GAPS).into();
        let layer = Layer { file: Arc::clone(file), runs, checksums: None };
        Ok(MemoryImage::new(Arc::clone(&self.ranges), vec![layer]))
    }

    /// Makes the content an image, on which this RAM goes on, and any number of others may. The
    /// caller sees to it that nothing writes to the RAM meanwhile: no vCPU, no device.
    ///
    /// Fresh RAM copies nothing; giving back its page tables takes some 60 µs for each MiB that
    /// was touched. RAM on an image copies the pages that were written since.
    ///
    /// # Errors
    ///
    /// As [`map_fresh`](Self::map_fresh) and [`written_pages`](Self::written_pages). The RAM is
    /// as it was.
    pub(crate) fn freeze(&self) -> Result<MemoryImage, MemoryError> {
        let mut backing = self.backing();
        match backing.clone() {
            Backing::Nothing => Err(MemoryError::NotMapped),
            Backing::Fresh(file) => {
                let image = self.image_of(&file)?;
                let mapped = self.map_zeros().and_then(|()| self.map_layers(&image, 0));
                let frozen = mapped.and_then(|()| {
                    memory_file::seal(&file).map_err(MemoryError::file("seal the memory"))
                });
                if let Err(error) = frozen {
                    // What is mapped privately by now has not been written to.
                    let mapped = self.map_shared(&file);
                    *backing = mapped.map_or(Backing::Nothing, |()| Backing::Fresh(file));
                    return Err(error);
                }
                *backing = Backing::Image(image.clone());
                Ok(image)
            }
            Backing::Image(image) => {
                let written = written_pages(self)?;
                if written.is_empty() {
                    return Ok(image);
                }
                let kept = kept_layers(&image);
                let frozen = self.freeze_above(&image, kept, written)?;
                // From here on the old image would do as little as the new one: a page that is not
                // mapped anew is one that was written, and has the same content.
                *backing = Backing::Image(frozen.clone());
                self.map_layers(&frozen, kept)?;
                Ok(frozen)
            }
        }
    }

    /// Writes the content to a file, which becomes that and nothing else: sparse, and as long as
    /// the RAM. Nothing may write to the RAM meanwhile. Zeros are not written. What is written is
    /// in the page cache afterwards, not on the disk.
    ///
    /// # Errors
    ///
    /// `NotMapped` without content; `OtherImage` for a diff to an image that the RAM does not
    /// stand on; `File` for what cannot be written; `Interrupted` where `on_progress` breaks. The
    /// file is of no use then.
    pub(crate) fn save(
        &self,
        file: &File,
        save: Save<'_>,
        on_progress: OnProgress<'_>,
    ) -> Result<SavedMemory, MemoryError> {
        let backing = self.backing().clone();
        let mut pages = self.written(&backing)?;
        let total = self.page_count();
        match save {
            Save::Full => {
                if let Backing::Image(image) = &backing {
                    pages.unite(&image.data()?);
                }
                image::save_complete(self, &pages, total, file, on_progress)
            }
            Save::Diff(below) => {
                let image = match &backing {
                    Backing::Image(image) if below.is_below(image) => image,
                    _ => return Err(MemoryError::OtherImage),
                };
                image::make_empty(file, total)?;
                let (runs, pages) = above(image, below.layers().len(), pages)?;
                let copied = chunks::copy(self, &pages, total, file, on_progress)?;
                Ok(SavedMemory {
                    pages: total,
                    present_pages: copied.present.len(),
                    complete: false,
                    runs,
                    checksums: copied.checksums,
                })
            }
        }
    }

    /// Has pages present before the guest wants them, ready to be written. Runs that are not
    /// inside of the RAM are left out.
    pub(crate) fn populate(&self, runs: &[PageRun]) {
        for run in runs {
            let mut first = 0;
            for region in &self.regions {
                let pages = PageRun { first, count: (region.len() / PAGE_BYTES) as u64 };
                let inside = run.common(pages);
                if inside.count > 0 {
                    let offset = (inside.first - first) as usize * PAGE_BYTES;
                    region.populate(offset, inside.bytes());
                }
                first = pages.end();
            }
        }
    }

    /// Writes to the file of fresh RAM. Returns whether it has it all: else it is to be written
    /// to the RAM itself, also where a part was.
    pub(super) fn write_to_file(&self, bytes: &[u8], address: GuestAddress) -> bool {
        let Backing::Fresh(file) = &*self.backing() else { return false };
        let mut first = 0;
        for (base, len) in self.ranges.iter() {
            let offset = address.0.checked_sub(base.0).filter(|offset| *offset < *len as u64);
            if let Some(offset) = offset {
                let fits = bytes.len() as u64 <= *len as u64 - offset;
                return fits && file.write_all_at(bytes, first + offset).is_ok();
            }
            first += *len as u64;
        }
        false
    }

    pub(super) fn backing(&self) -> MutexGuard<'_, Backing> {
        self.backing.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn page_count(&self) -> u64 {
        image::page_count(&self.ranges)
    }

    fn written(&self, backing: &Backing) -> Result<PageSet, MemoryError> {
        match backing {
            Backing::Nothing => Err(MemoryError::NotMapped),
            Backing::Fresh(file) => {
                let count = self.page_count();
                let mut pages = PageSet::new(count);
                memory_file::add_data(file, PageRun { first: 0, count }, &mut pages)
                    .map_err(MemoryError::file("look for the memory's holes"))?;
                Ok(pages)
            }
            Backing::Image(_) => written_pages(self),
        }
    }

    fn map_shared(&self, file: &File) -> Result<(), MemoryError> {
        let mut offset = 0;
        for region in &self.regions {
            region.map(0, region.len(), Content::Shared(file, offset)).map_err(MemoryError::Map)?;
            region.keep_to_this_process();
            offset += region.len() as u64;
        }
        Ok(())
    }

    /// What the RAM is between the pages of an image.
    fn map_zeros(&self) -> Result<(), MemoryError> {
        let mut regions = self.regions.iter();
        regions.try_for_each(|region| {
            region.map(0, region.len(), Content::Zeros).map_err(MemoryError::Map)
        })
    }

    fn map_layers(&self, image: &MemoryImage, below: usize) -> Result<(), MemoryError> {
        let mut first = 0;
        for region in &self.regions {
            image.map(region, first, below).map_err(MemoryError::Map)?;
            first += (region.len() / PAGE_BYTES) as u64;
        }
        Ok(())
    }

    /// The image with one layer more: what is above its `kept` lowest layers.
    fn freeze_above(
        &self,
        image: &MemoryImage,
        kept: usize,
        written: PageSet,
    ) -> Result<MemoryImage, MemoryError> {
        let total = self.page_count();
        let (runs, pages) = above(image, kept, written)?;
        let file =
            memory_file::in_memory(total).map_err(MemoryError::file("make a file in memory"))?;
        chunks::copy(self, &pages, total, &file, &|_| std::ops::ControlFlow::Continue(()))?;
        memory_file::seal(&file).map_err(MemoryError::file("seal the memory"))?;
        let layer = Layer { file: Arc::new(file), runs: runs.into(), checksums: None };
        let mut layers: Vec<_> = image.layers().iter().take(kept).cloned().collect();
        layers.push(layer);
        Ok(MemoryImage::new(Arc::clone(image.shared_ranges()), layers))
    }
}

/// How many of an image's layers stay below the next one: all, until there are too many. Then
/// those of files, which a diff is made to, and what is above them becomes one.
fn kept_layers(image: &MemoryImage) -> usize {
    let layers = image.layers();
    match layers.len() < MAX_LAYERS {
        true => layers.len(),
        false => {
            let files = layers.iter().take_while(|layer| layer.checksums.is_some()).count();
            files.clamp(1, MAX_LAYERS - 1)
        }
    }
}

/// What is above the `below` lowest layers of an image, with pages that were written since: its
/// runs, and the pages in there that have to be looked at. The others are zeros.
fn above(
    image: &MemoryImage,
    below: usize,
    written: PageSet,
) -> Result<(Vec<PageRun>, PageSet), MemoryError> {
    let upper = image.layers().get(below..).unwrap_or_default();
    let mut covered = written.clone();
    for run in upper.iter().flat_map(|layer| layer.runs.iter()) {
        covered.insert(*run);
    }
    let runs = covered.joined(UPPER_GAPS);
    let joined = PageSet::of(image.page_count(), &runs);
    if joined == written {
        return Ok((runs, written));
    }
    let mut pages = image.data()?;
    pages.unite(&written);
    pages.intersect(&joined);
    Ok((runs, pages))
}

fn written_pages(ram: &GuestRam) -> Result<PageSet, MemoryError> {
    let mut pages = PageSet::new(ram.page_count());
    written::pages(&ram.regions, &mut pages)
        .map_err(MemoryError::file("read /proc/self/pagemap"))?;
    Ok(pages)
}

impl Source for GuestRam {
    fn read(&self, pages: PageRun, target: &mut [u8]) -> Result<(), MemoryError> {
        let mut first = 0;
        for region in self.inner.iter() {
            let all = PageRun { first, count: region.len() / PAGE_BYTES as u64 };
            let run = pages.common(all);
            if run.count > 0 {
                let at = (run.first - pages.first) as usize * PAGE_BYTES;
                let offset = MemoryRegionAddress((run.first - first) * PAGE_BYTES as u64);
                let slice = region.get_slice(offset, run.bytes());
                let slice = slice.map_err(|source| MemoryError::Read { source })?;
                slice.copy_to(target.get_mut(at..).unwrap_or_default());
            }
            first = all.end();
        }
        Ok(())
    }
}

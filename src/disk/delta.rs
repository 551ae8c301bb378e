//! A private delta over a disk that many VMs share: what one VM wrote.
//!
//! The file: a header of 4,096 bytes; a bitmap with a bit for each sector of the disk, set where
//! the sector was written; and the sectors, at the same distances as on the disk. All of it is
//! sparse: an empty delta of a disk of 1 TiB takes 8 KiB. A bit a sector, and not a cluster,
//! means that no write ever reads: there is no copy-up, and no request waits for another.
//!
//! A flush brings sectors to the disk before the bits that speak of them, so that a power cut
//! leaves each sector that was flushed as it was or as it became. What was not flushed is in the
//! page cache, as with any disk, the bitmap of a VM that ends too: a power cut may take the sector
//! and leave its bit.

use std::collections::VecDeque;
use std::fs::{self, File};
use std::io;
use std::os::unix::fs::{FileExt, MetadataExt, OpenOptionsExt};
use std::path::Path;
use std::sync::Arc;

use super::{DiskError, Flush, MAX_BYTES_WITH_DELTA, Part, SECTOR_BYTES, extents, lock, open};
use crate::config::FileFacts;
use crate::file_lock::LockedFile;
use crate::memory::{self, Clear, GuestBytes, Transfer};

const MAGIC: [u8; 8] = *b"DORMDLTA";
const VERSION: u32 = 1;
const HEADER_BYTES: u64 = 4096;
/// The unit in which the bitmap is written: the bits of 16 MiB of disk.
const PAGE_BYTES: usize = 4096;
const PAGE_SECTORS: u64 = PAGE_BYTES as u64 * 8;

type Page = [u8; PAGE_BYTES];

/// An open delta.
#[derive(Debug)]
pub(super) struct Delta {
    file: Arc<LockedFile>,
    /// As many pages as the disk needs; those that are zeros are not there.
    bitmap: Vec<Option<Box<Page>>>,
    /// Which pages of the bitmap the file does not have yet.
    dirty: Vec<bool>,
    /// Those that the last flush took on, which may not have come to its end.
    flushed: Vec<usize>,
    sectors_offset: u64,
}

/// Bytes in a row that are all in the delta, or all in the disk below.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Run {
    pub(super) len: u64,
    pub(super) written: bool,
}

impl Delta {
    /// Opens a delta of a disk with so many sectors, or creates it.
    pub(super) fn open(path: &Path, base: &Path, sectors: u64) -> Result<Self, DiskError> {
        let failed = |source| DiskError::CreateDelta { path: path.to_owned(), source };
        let mut options = File::options();
        // What a guest writes is its owner's alone, as what is in its memory.
        options.read(true).write(true).create_new(true).mode(0o600);
        let created = options.open(path);
        let (file, is_new) = match created {
            Ok(file) => (file, true),
            Err(error) if error.kind() == io::ErrorKind::AlreadyExists => {
                (open(path, true, 0)?, false)
            }
            Err(source) => return Err(failed(source)),
        };
        let file = lock(file, path, true)?;
        if !Self::is_unmade(&file, sectors) {
            return Self::read(file, path, base, sectors);
        }
        Self::create(file, sectors).map_err(|source| {
            if is_new {
                let _ = fs::remove_file(path);
            }
            failed(source)
        })
    }

    /// Whether a file is as whoever made it leaves it until the header is written, and might have been ended.
    fn is_unmade(file: &File, sectors: u64) -> bool {
        let Ok(metadata) = file.metadata() else { return false };
        let len = metadata.len();
        let is_plain = metadata.is_file() && (len == 0 || len == Self::bytes(sectors));
        is_plain && matches!(extents::next(file, 0, len), Ok(None))
    }

    /// Opens a delta that nobody writes to any more, for reading. Others may have it too.
    pub(super) fn open_frozen(path: &Path, base: &Path, sectors: u64) -> Result<Self, DiskError> {
        let file = open(path, false, 0)?;
        let file = lock(file, path, false)?;
        Self::read(file, path, base, sectors)
    }

    /// Whether there is a delta at this path that somebody has written to.
    pub(super) fn is_used(path: &Path) -> bool {
        let mut header = [0; 20];
        let file = open(path, false, 0).ok();
        let file = file.filter(|file| file.read_exact_at(&mut header, 0).is_ok());
        let sectors = header.last_chunk().copied().map_or(0, u64::from_le_bytes);
        // What is no delta, or of a disk that is too large for one, is refused when it is opened.
        let file = file.filter(|_| sectors <= MAX_BYTES_WITH_DELTA / SECTOR_BYTES);
        let delta = file.and_then(|file| Self::read(file.into(), path, path, sectors).ok());
        delta.is_some_and(|delta| delta.bitmap.iter().any(Option::is_some))
    }

    /// Whether it outlives whoever has it open.
    pub(super) fn has_name(&self) -> bool {
        self.file.metadata().is_ok_and(|metadata| metadata.nlink() > 0)
    }

    /// A delta without a name, in the folder for temporary files: it goes when it is closed.
    pub(super) fn temporary(sectors: u64) -> Result<Self, DiskError> {
        let path = std::env::temp_dir();
        let mut options = File::options();
        options.read(true).write(true).mode(0o600).custom_flags(libc::O_TMPFILE);
        let file = options.open(&path).and_then(|file| Self::create(file.into(), sectors));
        file.map_err(|source| DiskError::CreateDelta { path, source })
    }

    /// Makes an empty file an empty delta.
    pub(super) fn create(file: LockedFile, sectors: u64) -> io::Result<Self> {
        let delta = Self::empty(file, sectors);
        let mut header = [0; 20];
        header[..8].copy_from_slice(&MAGIC);
        header[8..12].copy_from_slice(&VERSION.to_le_bytes());
        header[12..].copy_from_slice(&sectors.to_le_bytes());
        memory::set_len(&delta.file, Self::bytes(sectors))?;
        delta.file.write_all_at(&header, 0)?;
        Ok(delta)
    }

    /// Reads the header and the bitmap of a file that anybody may have written.
    fn read(file: LockedFile, path: &Path, base: &Path, expected: u64) -> Result<Self, DiskError> {
        let reason = |reason| DiskError::NotADelta { path: path.to_owned(), reason };
        let mut header = [0; 20];
        file.read_exact_at(&mut header, 0).map_err(|_| reason("it is too short"))?;
        let (magic, rest) = header.split_at(8);
        if magic != MAGIC {
            return Err(reason("it does not begin with the mark of a delta"));
        }
        let (version, sectors) = rest.split_at(4);
        if version != VERSION.to_le_bytes() {
            return Err(reason("it is of another version"));
        }
        if sectors != expected.to_le_bytes() {
            let found = sectors.iter().rev().fold(0, |word, byte| word << 8 | u64::from(*byte));
            let (path, base) = (path.to_owned(), base.to_owned());
            return Err(DiskError::OtherBase { path, base, found, expected });
        }
        let mut delta = Self::empty(file, expected);
        let len = delta.file.metadata().map(|metadata| metadata.len());
        if len.unwrap_or(0) < Self::bytes(expected) {
            return Err(reason("it ends too early"));
        }
        delta.read_bitmap().map_err(|_| reason("its bitmap cannot be read"))?;
        Ok(delta)
    }

    /// How long the file is.
    fn bytes(sectors: u64) -> u64 {
        Self::sectors_offset(sectors) + sectors * SECTOR_BYTES
    }

    fn sectors_offset(sectors: u64) -> u64 {
        HEADER_BYTES + sectors.div_ceil(PAGE_SECTORS) * PAGE_BYTES as u64
    }

    fn empty(file: LockedFile, sectors: u64) -> Self {
        let pages = sectors.div_ceil(PAGE_SECTORS) as usize;
        Self {
            file: Arc::new(file),
            bitmap: vec![None; pages],
            dirty: vec![false; pages],
            flushed: Vec::new(),
            sectors_offset: Self::sectors_offset(sectors),
        }
    }

    /// Reads the parts of the bitmap that are not holes.
    fn read_bitmap(&mut self) -> io::Result<()> {
        let file = Arc::clone(&self.file);
        let mut at = HEADER_BYTES;
        while let Some(data) = extents::next(&file, at, self.sectors_offset)? {
            let first = (data.start - HEADER_BYTES) as usize / PAGE_BYTES;
            let end = ((data.end - HEADER_BYTES) as usize).div_ceil(PAGE_BYTES);
            for page in first..end {
                self.read_page(&file, page)?;
            }
            at = data.end;
        }
        Ok(())
    }

    fn read_page(&mut self, file: &File, page: usize) -> io::Result<()> {
        let mut buffer = [0; PAGE_BYTES];
        file.read_exact_at(&mut buffer, page_offset(page))?;
        if buffer != [0; PAGE_BYTES]
            && let Some(page) = self.bitmap.get_mut(page)
        {
            *page = Some(Box::new(buffer));
        }
        Ok(())
    }

    /// The ranges of the disk outside of which the delta has nothing, in units of 16 MiB: offset
    /// and length.
    pub(super) fn used(&self) -> impl Iterator<Item = (u64, u64)> + '_ {
        let used = self.bitmap.iter().zip(0u64..).filter(|(page, _)| page.is_some());
        let bytes = PAGE_SECTORS * SECTOR_BYTES;
        used.map(move |(_, page)| (page * bytes, bytes))
    }

    /// The file, and where in it the disk's bytes at `offset` are.
    pub(super) fn place(&self, offset: u64) -> (&File, u64) {
        (&self.file, self.sectors_offset + offset)
    }

    /// Writes all of the bitmap that the file does not have yet to the page cache.
    pub(super) fn write_bitmap(&mut self) -> io::Result<()> {
        for page in self.dirty_pages() {
            self.file.write_all_at(self.page(page), page_offset(page))?;
        }
        self.dirty.fill(false);
        Ok(())
    }

    /// The same, and what flushes took on that may not have come to their end. Nothing is left for later.
    fn write_flushed(&mut self) -> io::Result<()> {
        let flushed = std::mem::take(&mut self.flushed);
        self.mark_dirty(&flushed);
        self.write_bitmap()
    }

    /// Where it is.
    pub(super) fn file(&self) -> &File {
        &self.file
    }

    /// Writes what the file does not have yet, so that closing it changes nothing, and says what
    /// the file is then.
    pub(super) fn settle(&mut self) -> io::Result<FileFacts> {
        self.write_flushed()?;
        let metadata = self.file.metadata()?;
        Ok(super::facts(&metadata, metadata.len()))
    }

    /// Where bytes of the disk are in the delta.
    pub(super) fn part<'ram>(&self, offset: u64, bytes: GuestBytes<'ram>) -> Part<'_, 'ram> {
        let offset = self.sectors_offset + offset;
        Part { file: &self.file, offset, bytes, cached: true, locked: None }
    }

    pub(super) fn clear(&self, offset: u64, len: u64, clear: Clear) -> Transfer {
        Transfer::clear(&self.file, self.sectors_offset + offset, len, clear)
    }

    /// Cuts a range of whole sectors where the delta begins or ends to have it.
    pub(super) fn runs(&self, offset: u64, len: u64) -> Vec<Run> {
        let mut runs: Vec<Run> = Vec::new();
        let mut sector = offset / SECTOR_BYTES;
        let end = (offset + len) / SECTOR_BYTES;
        while sector < end {
            let written = self.is_written(sector);
            // Eight sectors at once where they are alike.
            let alike = matches!((written, self.byte(sector)), (true, 0xff) | (false, 0));
            let sectors = if alike && sector.is_multiple_of(8) { (end - sector).min(8) } else { 1 };
            let len = sectors * SECTOR_BYTES;
            match runs.last_mut() {
                Some(run) if run.written == written => run.len += len,
                _ => runs.push(Run { len, written }),
            }
            sector += sectors;
        }
        runs
    }

    fn is_written(&self, sector: u64) -> bool {
        self.byte(sector) & (1 << (sector % 8)) != 0
    }

    /// The bits of eight sectors, of which this is one.
    fn byte(&self, sector: u64) -> u8 {
        let (page, byte) = place_of(sector);
        let page = self.bitmap.get(page).and_then(Option::as_ref);
        page.and_then(|page| page.get(byte)).copied().unwrap_or(0)
    }

    /// The delta has these sectors from now on.
    pub(super) fn mark(&mut self, offset: u64, len: u64) {
        let (mut sector, end) = (offset / SECTOR_BYTES, (offset + len) / SECTOR_BYTES);
        while sector < end {
            let (page, _) = place_of(sector);
            let begin = page as u64 * PAGE_SECTORS;
            let until = end.min(begin + PAGE_SECTORS);
            let Some(bits) = self.bitmap.get_mut(page) else { return };
            let bits = bits.get_or_insert_with(|| Box::new([0; PAGE_BYTES]));
            if set_bits(bits, sector - begin, until - begin)
                && let Some(dirty) = self.dirty.get_mut(page)
            {
                *dirty = true;
            }
            sector = until;
        }
    }

    /// First the sectors, then the bits as they are now, so that no bit speaks of a sector that a
    /// power cut may take.
    pub(super) fn flush(&mut self, sync: fn(&Arc<LockedFile>) -> Transfer) -> Flush {
        let dirty = self.dirty_pages();
        let mut stages = VecDeque::from([vec![sync(&self.file)]]);
        if !dirty.is_empty() {
            stages.push_back(dirty.iter().map(|page| self.write_page(*page)).collect());
            stages.push_back(vec![Transfer::data_sync(&self.file)]);
        }
        self.dirty.fill(false);
        self.flushed.clone_from(&dirty);
        Flush { stages, dirty }
    }

    pub(super) fn mark_dirty(&mut self, pages: &[usize]) {
        for page in pages {
            if let Some(dirty) = self.dirty.get_mut(*page) {
                *dirty = true;
            }
        }
    }

    fn dirty_pages(&self) -> Vec<usize> {
        let pages = self.dirty.iter().enumerate();
        pages.filter(|(_, dirty)| **dirty).map(|(page, _)| page).collect()
    }

    fn page(&self, page: usize) -> &[u8] {
        let page = self.bitmap.get(page).and_then(Option::as_ref);
        page.map_or(&[0; PAGE_BYTES], |page| &page[..])
    }

    fn write_page(&self, page: usize) -> Transfer {
        Transfer::write_bytes(&self.file, page_offset(page), self.page(page).to_vec())
    }
}

/// Sets the bits from one to before another, which come in this order, and says whether any was not. By bytes, since a guest
/// has many of them set at once.
fn set_bits(bits: &mut Page, first: u64, end: u64) -> bool {
    let (from, to) = ((first / 8) as usize, (end - 1) as usize / 8);
    let mut is_new = false;
    for (index, byte) in bits.iter_mut().enumerate().take(to + 1).skip(from) {
        let above = if index == from { 0xff << (first % 8) } else { 0xff };
        let below = if index == to { 0xff >> (7 - (end - 1) % 8) } else { 0xff };
        let mask: u8 = above & below;
        is_new |= *byte & mask != mask;
        *byte |= mask;
    }
    is_new
}

/// Where a page of the bitmap is in the file.
fn page_offset(page: usize) -> u64 {
    HEADER_BYTES + (page * PAGE_BYTES) as u64
}

/// The page of the bitmap that has a sector's bit, and the byte in it.
fn place_of(sector: u64) -> (usize, usize) {
    ((sector / PAGE_SECTORS) as usize, (sector % PAGE_SECTORS / 8) as usize)
}

impl Drop for Delta {
    /// The bits go where the sectors went: to the page cache.
    fn drop(&mut self) {
        if let Err(error) = self.write_flushed() {
            tracing::error!(%error, "the delta of a disk is not complete");
        }
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    proptest! {
        #[test]
        fn bits_of_a_range_are_set_as_one_by_one(
            before in proptest::collection::vec(0u64..PAGE_SECTORS, 0..4),
            first in 0u64..PAGE_SECTORS,
            len in 1u64..PAGE_SECTORS,
        ) {
            let end = (first + len).min(PAGE_SECTORS);
            let set = |bits: &mut Page, bit: u64| bits[bit as usize / 8] |= 1 << (bit % 8);
            let mut before_it = [0; PAGE_BYTES];
            before.iter().for_each(|bit| set(&mut before_it, *bit));
            let (mut bits, mut expected) = (before_it, before_it);
            (first..end).for_each(|bit| set(&mut expected, bit));
            prop_assert_eq!(set_bits(&mut bits, first, end), expected != before_it);
            prop_assert!(bits == expected);
        }
    }
}

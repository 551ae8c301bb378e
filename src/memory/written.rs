//! Which pages of a private mapping were written: the kernel knows, because it made a page of
//! this process out of each. Nothing is tracked, and nothing slows a writer down: guest, device,
//! or kernel on behalf of one.

use std::fs::File;
use std::io;
use std::os::fd::AsRawFd;
use std::os::unix::fs::FileExt;

use super::mapping::Reservation;
use super::pages::{PAGE_BYTES, PageRun, PageSet};

/// `struct pm_scan_arg` (Linux 6.7, Documentation/admin-guide/mm/pagemap.rst).
#[repr(C)]
#[derive(Default)]
struct ScanArguments {
    size: u64,
    flags: u64,
    start: u64,
    end: u64,
    walk_end: u64,
    vec: u64,
    vec_len: u64,
    max_pages: u64,
    category_inverted: u64,
    category_mask: u64,
    category_anyof_mask: u64,
    return_mask: u64,
}

/// `struct page_region`.
#[repr(C)]
#[derive(Clone, Copy, Default)]
struct Found {
    start: u64,
    end: u64,
    categories: u64,
}

/// `_IOWR('f', 16, struct pm_scan_arg)`.
const PAGEMAP_SCAN: libc::c_ulong = 0xc060_6610;

const PAGE_IS_FILE: u64 = 1 << 2;
const PAGE_IS_PRESENT: u64 = 1 << 3;
const PAGE_IS_SWAPPED: u64 = 1 << 4;
/// The kernel's one page of zeros, which a read of fresh memory gives.
const PAGE_IS_PFNZERO: u64 = 1 << 5;

/// In an entry of pagemap.
const ENTRY_IS_FILE: u64 = 1 << 61;
const ENTRY_IS_SWAPPED_OR_PRESENT: u64 = 0b11 << 62;

/// How many runs, or entries, the kernel gives at once.
const AT_ONCE: usize = 512;

const _: () = assert!(size_of::<ScanArguments>() == 0x60 && size_of::<Found>() == 24);

/// The written pages of some regions, which follow one another.
pub(super) fn pages(regions: &[Reservation], pages: &mut PageSet) -> io::Result<()> {
    let pagemap = File::open("/proc/self/pagemap")?;
    let mut first = 0;
    let can_scan = !is_merged();
    for region in regions {
        if !(can_scan && scan(&pagemap, region, first, pages)?) {
            read_entries(&pagemap, region, first, pages)?;
        }
        first += (region.len() / PAGE_BYTES) as u64;
    }
    Ok(())
}

/// Whether the kernel merges this process's pages that are alike (KSM, PR_GET_MEMORY_MERGE). It may then put its page of
/// zeros in place of one that was written, which a scan takes for one that was only read; entries tell it as written.
fn is_merged() -> bool {
    const PR_GET_MEMORY_MERGE: libc::c_int = 68;
    // SAFETY: the call takes integers.
    unsafe { libc::prctl(PR_GET_MEMORY_MERGE, 0, 0, 0, 0) == 1 }
}

/// By PAGEMAP_SCAN: its time follows the pages that were touched, not those that there are. False before Linux 6.7,
/// which has no such call.
fn scan(pagemap: &File, region: &Reservation, first: u64, pages: &mut PageSet) -> io::Result<bool> {
    let base = region.address().addr() as u64;
    let mut found = [Found::default(); AT_ONCE];
    let mut arguments = ScanArguments {
        size: size_of::<ScanArguments>() as u64,
        start: base,
        end: base + region.len() as u64,
        vec: (&raw mut found).expose_provenance() as u64,
        vec_len: AT_ONCE as u64,
        category_inverted: PAGE_IS_FILE | PAGE_IS_PFNZERO,
        category_mask: PAGE_IS_FILE | PAGE_IS_PFNZERO,
        category_anyof_mask: PAGE_IS_PRESENT | PAGE_IS_SWAPPED,
        // The same for all that is found, so that neighbours are one run.
        return_mask: PAGE_IS_FILE,
        ..Default::default()
    };
    while arguments.start < arguments.end {
        // SAFETY: `arguments` is the call's structure, and `found`, which it points to and which
        // outlives the call, has room for as many runs as it says.
        let count = unsafe { libc::ioctl(pagemap.as_raw_fd(), PAGEMAP_SCAN, &raw mut arguments) };
        let Ok(count) = usize::try_from(count) else {
            match io::Error::last_os_error() {
                error if error.kind() == io::ErrorKind::Interrupted => continue,
                error if matches!(error.raw_os_error(), Some(libc::ENOTTY | libc::EINVAL)) => {
                    return Ok(false);
                }
                error => return Err(error),
            }
        };
        for run in found.iter().take(count) {
            let page = |address: u64| first + (address - base) / PAGE_BYTES as u64;
            pages.insert(PageRun::between(page(run.start), page(run.end)));
        }
        // It ends where its list was full, and is asked again from there.
        if arguments.walk_end <= arguments.start {
            break;
        }
        arguments.start = arguments.walk_end;
    }
    Ok(true)
}

/// By the entries of all pages, 8 bytes for each.
fn read_entries(
    pagemap: &File,
    region: &Reservation,
    first: u64,
    pages: &mut PageSet,
) -> io::Result<()> {
    let base = region.address().addr() / PAGE_BYTES;
    let count = region.len() / PAGE_BYTES;
    let mut bytes = [0; AT_ONCE * 8];
    for begin in (0..count).step_by(AT_ONCE) {
        let bytes = &mut bytes[..AT_ONCE.min(count - begin) * 8];
        pagemap.read_exact_at(bytes, (base + begin) as u64 * 8)?;
        let (entries, _) = bytes.as_chunks();
        for (page, entry) in (first + begin as u64..).zip(entries) {
            let entry = u64::from_le_bytes(*entry);
            if entry & ENTRY_IS_SWAPPED_OR_PRESENT != 0 && entry & ENTRY_IS_FILE == 0 {
                pages.insert(PageRun { first: page, count: 1 });
            }
        }
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::super::mapping::Content;
    use super::super::memory_file;
    use super::*;

    #[test]
    fn both_ways_find_what_was_written_and_nothing_that_was_read() {
        const PAGES: u64 = 3000;
        let file = memory_file::in_memory(PAGES).unwrap();
        for page in (0..PAGES).step_by(2) {
            file.write_all_at(&[7], page * 4096).unwrap();
        }
        let region = Reservation::new(PAGES as usize * PAGE_BYTES).unwrap();
        // The last thousand pages are fresh memory.
        region.map(0, 2000 * PAGE_BYTES, Content::Private(&file, 0)).unwrap();
        let at = |page: u64| region.address().wrapping_add(page as usize * PAGE_BYTES);
        let mut expected = PageSet::new(PAGES);
        for page in 0..PAGES {
            // SAFETY: the pages are mapped, and the test's alone.
            unsafe {
                at(page).read_volatile();
                // More runs than are given at once.
                if page < 1800 && page % 3 == 0 || page == 2500 {
                    at(page).write_volatile(9);
                    expected.insert(PageRun { first: page, count: 1 });
                }
            }
        }
        let pagemap = File::open("/proc/self/pagemap").unwrap();
        // Entries do not tell the page of zeros, nor does a scan where it is a huge one; and before Linux 6.7 both are
        // the same.
        let but_for_fresh = |mut pages: PageSet| {
            pages.remove(PageRun { first: 2501, count: 499 });
            pages.remove(PageRun { first: 2000, count: 500 });
            pages
        };
        let mut entries = PageSet::new(PAGES);
        read_entries(&pagemap, &region, 0, &mut entries).unwrap();
        assert_eq!(but_for_fresh(entries), expected);
        let mut scanned = PageSet::new(PAGES);
        pages(std::slice::from_ref(&region), &mut scanned).unwrap();
        assert_eq!(but_for_fresh(scanned), expected);
        drop(region);
    }
}

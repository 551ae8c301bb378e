//! Files that hold guest RAM: page `p` is at `p * 4096`, and a hole is zeros.

use std::ffi::CStr;
use std::fs::File;
use std::io;
use std::os::fd::{AsRawFd, FromRawFd};

use super::pages::{PAGE_BYTES, PageRun, PageSet};

/// Not executable, and sealed against becoming so (Linux 6.3; some systems insist on it).
const MFD_NOEXEC_SEAL: libc::c_uint = 8;

/// The smallest unit in which the data of a large file is looked for.
const MIN_CHUNK_PAGES: u64 = 512;

/// A file of `pages` pages without a name, in the host's memory; all holes.
pub(super) fn in_memory(pages: u64) -> io::Result<File> {
    const NAME: &CStr = c"dormouse-memory";
    let len = pages.checked_mul(PAGE_BYTES as u64).ok_or(io::ErrorKind::InvalidInput)?;
    let flags = libc::MFD_CLOEXEC | libc::MFD_ALLOW_SEALING;
    let create = |flags| {
        // SAFETY: the name is a C string.
        match unsafe { libc::memfd_create(NAME.as_ptr(), flags) } {
            -1 => Err(io::Error::last_os_error()),
            // SAFETY: the descriptor is new, and nobody else's.
            fd => Ok(unsafe { File::from_raw_fd(fd) }),
        }
    };
    let file = match create(flags | MFD_NOEXEC_SEAL) {
        Err(error) if error.raw_os_error() == Some(libc::EINVAL) => create(flags)?,
        created => created?,
    };
    set_len(&file, len)?;
    Ok(file)
}

/// Sets the length of a file. Beyond the limit of a file's size (ulimit -f) the kernel would end the process by a signal.
pub(crate) fn set_len(file: &File, len: u64) -> io::Result<()> {
    let mut limit = libc::rlimit { rlim_cur: 0, rlim_max: 0 };
    // SAFETY: the kernel writes one structure.
    let is_known = unsafe { libc::getrlimit(libc::RLIMIT_FSIZE, &raw mut limit) } == 0;
    check_limit(len, is_known.then_some(limit.rlim_cur))?;
    file.set_len(len)
}

fn check_limit(len: u64, limit: Option<libc::rlim_t>) -> io::Result<()> {
    match limit {
        Some(limit) if limit != libc::RLIM_INFINITY && len > limit => {
            Err(io::Error::from_raw_os_error(libc::EFBIG))
        }
        _ => Ok(()),
    }
}

/// Has a file in memory stay as it is for good: no write, no new mapping that could write, no
/// other length. The caller has no mapping left that could.
///
/// F_SEAL_FUTURE_WRITE says just that. F_SEAL_WRITE would have the kernel look at every page for
/// a mapping that is left (15 µs a MiB), and wait where somebody holds one for a moment.
pub(super) fn seal(file: &File) -> io::Result<()> {
    let others = libc::F_SEAL_GROW | libc::F_SEAL_SHRINK | libc::F_SEAL_SEAL;
    for writes in [libc::F_SEAL_FUTURE_WRITE, libc::F_SEAL_WRITE] {
        // SAFETY: the call has no memory arguments.
        if unsafe { libc::fcntl(file.as_raw_fd(), libc::F_ADD_SEALS, writes | others) } == 0 {
            return Ok(());
        }
        let error = io::Error::last_os_error();
        // Linux before 5.1 does not know the first.
        if error.raw_os_error() != Some(libc::EINVAL) {
            return Err(error);
        }
    }
    Err(io::ErrorKind::Unsupported.into())
}

/// Adds the pages of `within` that the file has data for. A file system that does not know its
/// holes says that all is data.
pub(super) fn add_data(file: &File, within: PageRun, pages: &mut PageSet) -> io::Result<()> {
    let page_bytes = PAGE_BYTES as u64;
    let mut page = within.first;
    while page < within.end() {
        let Some(begin) = seek(file, page * page_bytes, libc::SEEK_DATA)? else { break };
        let first = (begin / page_bytes).max(page);
        if first >= within.end() {
            break;
        }
        let hole = seek(file, begin, libc::SEEK_HOLE)?.unwrap_or(u64::MAX);
        let end = hole.div_ceil(page_bytes).max(first + 1).min(within.end());
        pages.insert(PageRun::between(first, end));
        page = end;
    }
    Ok(())
}

/// Adds the chunks in which the file has data, of 2 MiB or, of more than 2 GiB, a thousandth part. At
/// most 1,024 calls of some 0.5 µs: the end of data is not looked for, which the kernel does page by
/// page, some 30 µs a MiB.
pub(super) fn add_chunks(file: &File, page_count: u64, pages: &mut PageSet) -> io::Result<()> {
    let chunk = page_count.div_ceil(1024).max(MIN_CHUNK_PAGES);
    let mut page = 0;
    while page < page_count {
        let Some(begin) = seek(file, page * PAGE_BYTES as u64, libc::SEEK_DATA)? else { break };
        let first = begin / PAGE_BYTES as u64 / chunk * chunk;
        page = (first + chunk).min(page_count);
        pages.insert(PageRun::between(first, page));
    }
    Ok(())
}

/// lseek, which says `None` behind the last data. The file's position is nobody's: all else that
/// is done with it names its place.
fn seek(file: &File, offset: u64, whence: libc::c_int) -> io::Result<Option<u64>> {
    let offset = libc::off_t::try_from(offset).map_err(|_| io::ErrorKind::InvalidInput)?;
    // SAFETY: the call has no memory arguments.
    let found = unsafe { libc::lseek(file.as_raw_fd(), offset, whence) };
    match u64::try_from(found) {
        Ok(found) => Ok(Some(found)),
        Err(_) => match io::Error::last_os_error() {
            error if error.raw_os_error() == Some(libc::ENXIO) => Ok(None),
            error => Err(error),
        },
    }
}

#[cfg(test)]
mod tests {
    use std::os::unix::fs::FileExt;

    use super::*;

    #[test]
    fn a_file_beyond_the_limit_of_its_size_is_an_error_and_no_signal() {
        for limit in [None, Some(libc::RLIM_INFINITY), Some(4096)] {
            check_limit(4096, limit).unwrap();
        }
        assert_eq!(check_limit(4097, Some(4096)).unwrap_err().raw_os_error(), Some(libc::EFBIG));
    }

    #[test]
    fn a_sealed_file_refuses_what_would_change_it() {
        let file = in_memory(4).unwrap();
        file.write_all_at(&[1], 0).unwrap();
        seal(&file).unwrap();
        assert!(file.write_all_at(&[2], 0).is_err());
        assert!(file.set_len(4096).is_err());
        assert!(file.set_len(1 << 20).is_err());
        // SAFETY: the call has no memory arguments.
        let punched = unsafe {
            let mode = libc::FALLOC_FL_PUNCH_HOLE | libc::FALLOC_FL_KEEP_SIZE;
            libc::fallocate(file.as_raw_fd(), mode, 0, 4096)
        };
        assert_eq!(punched, -1);
        let mut byte = [0];
        file.read_exact_at(&mut byte, 0).unwrap();
        assert_eq!(byte, [1]);
    }

    #[test]
    fn data_is_found_in_whole_pages_and_within_bounds() {
        let file = in_memory(100).unwrap();
        for page in [0, 1, 5, 50, 99] {
            file.write_all_at(&[1], page * 4096 + 4095).unwrap();
        }
        let data = |first, count| {
            let mut pages = PageSet::new(100);
            add_data(&file, PageRun { first, count }, &mut pages).unwrap();
            pages.runs().map(|run| (run.first, run.count)).collect::<Vec<_>>()
        };
        assert_eq!(data(0, 100), [(0, 2), (5, 1), (50, 1), (99, 1)]);
        assert_eq!(data(1, 49), [(1, 1), (5, 1)]);
        assert_eq!(data(6, 44), []);
        assert_eq!(data(51, 10), []);
        assert_eq!(data(99, 1), [(99, 1)]);
        assert_eq!(data(0, 0), []);
    }

    #[test]
    fn chunks_with_data_are_found_in_few_steps() {
        let chunks = |pages: u64, data: &[u64]| {
            let file = in_memory(pages).unwrap();
            for page in data {
                file.write_all_at(&[1], page * PAGE_BYTES as u64).unwrap();
            }
            let mut found = PageSet::new(pages);
            add_chunks(&file, pages, &mut found).unwrap();
            found.runs().map(|run| (run.first, run.end())).collect::<Vec<_>>()
        };
        assert_eq!(chunks(3000, &[]), []);
        assert_eq!(chunks(3000, &[511, 1024, 1025, 2999]), [(0, 512), (1024, 1536), (2560, 3000)]);
        assert_eq!(chunks(100, &[99]), [(0, 100)]);
        // Of 8 GiB, chunks of 8 MiB.
        assert_eq!(
            chunks(2 << 20, &[2047, (2 << 20) - 1]),
            [(0, 2048), ((2 << 20) - 2048, 2 << 20)]
        );
    }
}

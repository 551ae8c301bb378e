//! The parts of a sparse file that have data.

use std::fs::File;
use std::io;
use std::ops::Range;

use rustix::fs::{SeekFrom, seek};
use rustix::io::Errno;

/// The first range with data in `from..end`, or `None` where there are only holes. A file that
/// knows no holes, such as a block device, has data everywhere.
pub(super) fn next(file: &File, from: u64, end: u64) -> io::Result<Option<Range<u64>>> {
    if from >= end {
        return Ok(None);
    }
    let start = match seek(file, SeekFrom::Data(from)) {
        Ok(start) if start >= end => return Ok(None),
        Ok(start) => start.max(from),
        Err(Errno::NXIO) => return Ok(None),
        Err(Errno::INVAL) => return Ok(Some(from..end)),
        Err(error) => return Err(error.into()),
    };
    let hole = seek(file, SeekFrom::Hole(start))?;
    // A hole that begins where the data does would be no progress.
    Ok(Some(start..hole.clamp(start + 1, end)))
}

/// The parts of a whole file that have data, counted.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Extents {
    pub(crate) count: usize,
    pub(crate) bytes: u64,
}

impl Extents {
    /// Moves the position of the file.
    pub(crate) fn of(file: &File) -> io::Result<Self> {
        let (mut found, mut at) = (Self { count: 0, bytes: 0 }, 0);
        let end = file.metadata()?.len();
        while let Some(range) = next(file, at, end)? {
            found.count += 1;
            found.bytes += range.end - range.start;
            at = range.end;
        }
        Ok(found)
    }
}

#[cfg(test)]
mod tests {
    use std::os::unix::fs::FileExt;

    use vmm_sys_util::tempfile::TempFile;

    use super::*;

    #[test]
    fn holes_are_left_out_and_ranges_end_where_they_are_told_to() {
        let file = TempFile::new_in("/dev/shm".as_ref()).unwrap().into_file();
        file.set_len(1 << 20).unwrap();
        file.write_all_at(&[1; 8192], 65_536).unwrap();
        assert_eq!(next(&file, 0, 1 << 20).unwrap(), Some(65_536..73_728));
        assert_eq!(next(&file, 70_000, 1 << 20).unwrap(), Some(70_000..73_728));
        assert_eq!(next(&file, 0, 66_000).unwrap(), Some(65_536..66_000));
        assert_eq!(next(&file, 0, 65_536).unwrap(), None);
        assert_eq!(next(&file, 73_728, 1 << 20).unwrap(), None);
        assert_eq!(next(&file, 5, 5).unwrap(), None);
        file.write_all_at(&[1; 4096], 262_144).unwrap();
        assert_eq!(Extents::of(&file).unwrap(), Extents { count: 2, bytes: 12_288 });
    }
}

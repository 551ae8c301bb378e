//! Files that are read whole: regular ones, opened without waiting, up to a bound.
//!
//! A path may come from a configuration that somebody else wrote. A FIFO would block its opener,
//! and a device might never end.

use std::fs::{File, OpenOptions};
use std::io::{self, Read};
use std::os::unix::fs::OpenOptionsExt;
use std::path::Path;

/// Where something is that a guest is booted from.
#[cfg(feature = "image")]
#[derive(Clone, Copy, Debug)]
pub(crate) enum InputFile<'a> {
    File(&'a Path),
    Bytes(&'a [u8]),
}

/// Opens a regular file for reading.
pub(crate) fn open(path: &Path) -> io::Result<File> {
    let file = OpenOptions::new().read(true).custom_flags(libc::O_NONBLOCK).open(path)?;
    let kind = file.metadata()?.file_type();
    if kind.is_dir() {
        return Err(io::Error::from_raw_os_error(libc::EISDIR));
    }
    if !kind.is_file() {
        return Err(io::Error::new(io::ErrorKind::InvalidInput, "not a regular file"));
    }
    Ok(file)
}

/// Reads to the end; `None` where that is further than `max_bytes`.
pub(crate) fn read_bounded(reader: impl Read, max_bytes: u64) -> io::Result<Option<Vec<u8>>> {
    let mut bytes = Vec::new();
    reader.take(max_bytes.saturating_add(1)).read_to_end(&mut bytes)?;
    Ok((bytes.len() as u64 <= max_bytes).then_some(bytes))
}

#[cfg(test)]
mod tests {
    use vmm_sys_util::tempdir::TempDir;

    use super::*;

    #[test]
    fn what_is_no_regular_file_is_refused_without_waiting() {
        let refusal = |path: &str| open(Path::new(path)).unwrap_err().to_string();
        assert_eq!(refusal("/dev/zero"), "not a regular file");
        assert!(refusal("/tmp").contains("Is a directory"));
        let dir = TempDir::new().unwrap();
        let fifo = dir.as_path().join("fifo");
        let made = std::process::Command::new("mkfifo").arg(&fifo).status().unwrap();
        assert!(made.success());
        assert_eq!(refusal(fifo.to_str().unwrap()), "not a regular file");
    }

    #[test]
    fn a_bound_is_kept() {
        assert_eq!(read_bounded(&b"abc"[..], 3).unwrap(), Some(b"abc".to_vec()));
        assert_eq!(read_bounded(&b"abcd"[..], 3).unwrap(), None);
        assert_eq!(read_bounded(io::repeat(1), 1000).unwrap(), None);
    }
}

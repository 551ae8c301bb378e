//! What the host is told of what could not be done.

use std::ffi::OsStr;
use std::io;
use std::os::unix::ffi::OsStrExt;
use std::path::{Path, PathBuf};

use crate::protocol::{Bytes, Failure, FailureKind, MAX_FAILURE_BYTES};

impl Failure {
    pub(crate) fn new(kind: FailureKind, what: impl Into<String>) -> Self {
        Self { kind, errno: 0, what: bounded(what.into()) }
    }

    /// The kind is that of the system's error.
    pub(crate) fn of(what: impl Into<String>, error: &io::Error) -> Self {
        let errno = error.raw_os_error().unwrap_or(0);
        Self { kind: kind_of(error, errno), errno, what: bounded(what.into()) }
    }

    pub(crate) fn of_path(verb: &str, path: &Path, error: &io::Error) -> Self {
        Self::of(format!("{verb} {}", path.display()), error)
    }
}

/// Names of programs and paths may be of any length, and an answer not.
fn bounded(mut what: String) -> String {
    what.truncate(what.floor_char_boundary(MAX_FAILURE_BYTES));
    what
}

fn kind_of(error: &io::Error, errno: i32) -> FailureKind {
    match errno {
        // ENOENT, ESRCH, ENXIO, ENODEV.
        2 | 3 | 6 | 19 => FailureKind::NotFound,
        // EEXIST, ENOTEMPTY.
        17 | 39 => FailureKind::Exists,
        // EPERM, EACCES, EROFS.
        1 | 13 | 30 => FailureKind::Permission,
        // ECONNREFUSED.
        111 => FailureKind::Refused,
        // ENOMEM, EFBIG, ENOSPC, EDQUOT.
        12 | 27 | 28 | 122 => FailureKind::Full,
        // ENOTDIR, EISDIR, EINVAL, ENAMETOOLONG, ELOOP.
        20 | 21 | 22 | 36 | 40 => FailureKind::Invalid,
        0 if error.kind() == io::ErrorKind::InvalidInput => FailureKind::Invalid,
        0 if error.kind() == io::ErrorKind::PermissionDenied => FailureKind::NotAllowed,
        _ => FailureKind::Other,
    }
}

/// The path that a message names: an absolute one.
pub(crate) fn absolute(path: &Bytes) -> Result<PathBuf, Failure> {
    let path = Path::new(OsStr::from_bytes(&path.0));
    if !path.is_absolute() {
        let what = format!("{} is no absolute path", path.display());
        return Err(Failure::new(FailureKind::Invalid, what));
    }
    if path.as_os_str().as_bytes().contains(&0) {
        return Err(Failure::new(FailureKind::Invalid, "a path with a NUL"));
    }
    Ok(path.into())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_could_not_be_done_is_cut_between_two_characters() {
        let failure = Failure::new(FailureKind::Other, format!("x{}", "\u{e4}".repeat(1 << 20)));
        assert_eq!(failure.what.len(), MAX_FAILURE_BYTES - 1);
        let error = io::ErrorKind::Other.into();
        assert_eq!(Failure::of("y".repeat(1 << 20), &error).what.len(), MAX_FAILURE_BYTES);
    }
}

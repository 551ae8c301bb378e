//! The directory of sessions: a directory for each, and a lock that one process has.
//!
//! For a session named ID there are `ID/session.json`, its record; and `ID/asleep`, the files that it sleeps in.

use std::fs::{self, File};
use std::os::unix::fs::{DirBuilderExt, OpenOptionsExt};
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::{fmt, io};

use super::error::SessionError;
use super::state::Listeners;
use crate::config::RestoreOptions;
use crate::error::Error;
use crate::file_lock::{Locked, LockedFile};
use crate::microvm::{MicroVm, Suspended};

/// A directory of sessions that is this process's, until the last session of it is dropped.
#[derive(Debug)]
pub(super) struct Home {
    path: PathBuf,
    /// Locked (flock), so that it goes with the process, however that ends.
    _lock: LockedFile,
    /// Who is told of the events of all sessions.
    pub(super) listeners: Arc<Listeners>,
    given: Given,
}

/// What of this host a session of this name gets that wakes from its files.
pub(super) struct Given(pub(super) Box<dyn Fn(&str) -> RestoreOptions + Send + Sync>);

impl fmt::Debug for Given {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("Given")
    }
}

impl Home {
    pub(super) fn open(path: &Path, given: Given) -> Result<Self, SessionError> {
        // Absolute, so that it means the same when the process goes elsewhere.
        let path = std::path::absolute(path).map_err(SessionError::io("find", path))?;
        let made = fs::DirBuilder::new().recursive(true).mode(0o700).create(&path);
        made.map_err(SessionError::io("make the directory", &path))?;
        // No session has this name.
        let lock = path.join(".lock");
        let file = File::options().create(true).append(true).mode(0o600).open(&lock);
        let file = file.map_err(SessionError::io("open", &lock))?;
        let locked = match LockedFile::exclusive(file).map_err(SessionError::io("lock", &lock))? {
            Locked::Ours(locked) => locked,
            Locked::Taken => return Err(SessionError::InUse { path }),
            Locked::NoLocks(_) => {
                let error = io::Error::from(io::ErrorKind::Unsupported);
                return Err(SessionError::io("lock", &lock)(error));
            }
        };
        Ok(Self { path, _lock: locked, listeners: Arc::default(), given })
    }

    /// The directory of a session.
    pub(super) fn session(&self, id: &str) -> PathBuf {
        self.path.join(id)
    }

    /// The directory in which it sleeps.
    pub(super) fn asleep(&self, id: &str) -> PathBuf {
        self.session(id).join("asleep")
    }

    /// The VM that sleeps in the files of a session.
    pub(super) fn sleeper(&self, id: &str) -> Result<MicroVm<Suspended>, Error> {
        MicroVm::<Suspended>::open_with(self.asleep(id), &self.given(id))
    }

    /// What it gets when it wakes.
    pub(super) fn given(&self, id: &str) -> RestoreOptions {
        (self.given.0)(id)
    }

    /// Makes the directory of a session that is new.
    pub(super) fn make(&self, id: &str) -> Result<(), SessionError> {
        let path = self.session(id);
        match fs::DirBuilder::new().mode(0o700).create(&path) {
            Err(error) if error.kind() == io::ErrorKind::AlreadyExists => {
                Err(SessionError::Exists { id: id.to_owned() })
            }
            made => made.map_err(SessionError::io("make the directory", &path)),
        }
    }

    /// Removes all that there is of a session.
    pub(super) fn remove(&self, id: &str) -> Result<(), SessionError> {
        let path = self.session(id);
        match fs::remove_dir_all(&path) {
            Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(()),
            removed => removed.map_err(SessionError::io("remove", &path)),
        }
    }

    /// Whether the directory of this name, in which there is no record, is what is left of a session: one that could not
    /// be made, or removed. What has other things in it is somebody else's.
    pub(super) fn is_rest(&self, id: &str) -> bool {
        let Ok(entries) = fs::read_dir(self.session(id)) else { return false };
        entries.filter_map(Result::ok).all(|entry| {
            let name = entry.file_name();
            let name = name.to_string_lossy();
            name == "asleep" || name.starts_with(".asleep.") || name.starts_with("session.json")
        })
    }

    /// The names of all directories that may be those of sessions.
    pub(super) fn ids(&self) -> Result<Vec<String>, SessionError> {
        let entries = fs::read_dir(&self.path).map_err(SessionError::io("read", &self.path))?;
        let mut ids = Vec::new();
        for entry in entries {
            let entry = entry.map_err(SessionError::io("read", &self.path))?;
            let is_directory = entry.file_type().is_ok_and(|kind| kind.is_dir());
            if let Ok(name) = entry.file_name().into_string()
                && is_directory
                && check_id(&name).is_ok()
            {
                ids.push(name);
            }
        }
        ids.sort();
        Ok(ids)
    }
}

/// Whether this is a label of a host's name (RFC 1123), in lower case: what a session's name has to be.
pub(crate) fn is_label(id: &str) -> bool {
    let is_good = |byte: u8| matches!(byte, b'a'..=b'z' | b'0'..=b'9' | b'-');
    let ends = id.starts_with('-') || id.ends_with('-');
    (1..=63).contains(&id.len()) && id.bytes().all(is_good) && !ends
}

pub(super) fn check_id(id: &str) -> Result<(), SessionError> {
    match is_label(id) {
        true => Ok(()),
        false => Err(SessionError::Id { id: id.chars().take(80).collect() }),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_name_is_a_label_of_a_hosts_name() {
        for good in ["a", "0", "a-b", "7f3a", &"x".repeat(63)] {
            check_id(good).unwrap();
        }
        for bad in ["", "-a", "a-", "A", "a.b", "..", "a/b", "ä", "a b", &"x".repeat(64)] {
            check_id(bad).unwrap_err();
        }
    }
}

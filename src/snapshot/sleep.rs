//! A VM that sleeps in files: what they say of it beyond a snapshot, and that it wakes once at a time.
//!
//! A snapshot is nobody: any number of VMs come from it, each told that it is another. The files of a VM
//! that was suspended are a snapshot as well, and say besides that one VM may go on from them as itself.

#[cfg(feature = "session")]
use std::path::Path;

use serde::{Deserialize, Serialize};

use super::directory::OpenDirectory;
use super::error::SnapshotError;
use super::{Place, Purpose, Snapshot};
use crate::bounded;
use crate::config::{InterfaceConfig, RestoreOptions};
use crate::error::Error;
use crate::file_lock::{Locked, LockedFile};

/// In the state of a VM that was suspended, and in no other's.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct Sleep {
    /// Who the VM is, where it is a clone whose guest does not know yet.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub(crate) clone: Option<CloneNames>,
}

/// What a clone has of its own: see [`RestoreOptions::hostname`] and [`RestoreOptions::interfaces`].
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default)]
pub(crate) struct CloneNames {
    pub(crate) hostname: Option<String>,
    #[serde(deserialize_with = "bounded::list")]
    pub(crate) interfaces: Vec<InterfaceConfig>,
}

/// A VM woke from the directory that this locks (flock), and is not over. It goes with the process too,
/// however that ends.
#[derive(Debug)]
pub(crate) struct WakeLock {
    _directory: LockedFile,
}

impl Snapshot {
    /// What is said of the VM that sleeps here, and what it gets of the host when it wakes as `options` say.
    ///
    /// # Errors
    ///
    /// No VM sleeps here, it is awake, its disks are not what they were, or the options are for a clone.
    pub(crate) fn sleep(&self, options: &RestoreOptions) -> Result<(Sleep, RestoreOptions), Error> {
        let Some(sleep) = &self.0.state.sleep else {
            let directory = self.directory().unwrap_or_else(|| "memory".as_ref()).to_owned();
            return Err(SnapshotError::NotAsleep { directory }.into());
        };
        let of_clone = [
            ("hostname", options.hostname.is_some()),
            ("addresses", !options.interfaces.is_empty()),
            ("deltas", options.disks.values().any(|disk| disk.delta.is_some())),
        ];
        if let Some((what, _)) = of_clone.into_iter().find(|(_, is_set)| *is_set) {
            return Err(SnapshotError::AsItWas { what }.into());
        }
        // Before its disks: those of one that is awake change.
        drop(self.wake_lock()?);
        let mut options = options.clone();
        if let Some(CloneNames { hostname, interfaces }) = sleep.clone.clone() {
            options.hostname = hostname;
            options.interfaces = interfaces;
        }
        self.config(&options, Purpose::Sleep)?.check()?;
        Ok((sleep.clone(), options))
    }

    /// A disk that may not be what the memory here knows of it any more, after the VM was awake; with what it wakes with.
    #[cfg(feature = "session")]
    pub(crate) fn changed_disk(&self, options: &RestoreOptions) -> Option<&Path> {
        let state = &self.0.state;
        let mut disks = state.config.blocks.iter().zip(&state.disks).enumerate();
        let changed = disks.find(|(index, (block, disk))| {
            let given = options.disks.get(index).and_then(|disk| disk.base.as_deref());
            disk.may_have_changed(block, given)
        });
        changed.map(|(_, (block, _))| block.path.as_path())
    }

    /// Keeps others from waking the VM that sleeps here, in this process or another; none is needed
    /// for one in memory, which has one owner.
    ///
    /// # Errors
    ///
    /// It is awake; or another snapshot has the place by now.
    pub(crate) fn wake_lock(&self) -> Result<Option<WakeLock>, SnapshotError> {
        match &self.0.place {
            Place::Directory(directory) => directory.wake_lock().map(Some),
            Place::Memory(_) => Ok(None),
        }
    }
}

impl OpenDirectory {
    /// As [`Snapshot::wake_lock`].
    pub(super) fn wake_lock(&self) -> Result<WakeLock, SnapshotError> {
        let file = self.reopen().map_err(SnapshotError::open(&self.path))?;
        let directory =
            match LockedFile::exclusive(file).map_err(SnapshotError::open(&self.path))? {
                Locked::Ours(directory) | Locked::NoLocks(directory) => directory,
                Locked::Taken => return Err(SnapshotError::Awake { directory: self.path.clone() }),
            };
        let lock = WakeLock { _directory: directory };
        // Whoever had the lock before may have suspended the VM again, to the same place.
        if !self.is_in_place() {
            return Err(SnapshotError::Replaced { directory: self.path.clone() });
        }
        Ok(lock)
    }
}

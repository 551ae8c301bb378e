//! A stopped machine, written to a directory or kept in memory.

use std::fs;
use std::io::Write;
use std::os::fd::AsRawFd;
use std::path::{Path, PathBuf};
use std::sync::{Arc, OnceLock};
use std::time::SystemTime;

use rustix::fs::{AtFlags, CWD, linkat};

use super::directory::{STATE, Staging, disk_name, memory_name};
use super::error::SnapshotError;
use super::options::{SaveStage, SnapshotOptions};
use super::{Inner, Place, Snapshot, State, Temporary, format, random_bytes};
use crate::disk::DiskError;
use crate::error::Error;
use crate::kvm::Vcpu;
use crate::machine::Machine;
use crate::memory::{MAX_LAYERS, MemoryError, MemoryProgress, Save, SavedMemory};

/// What becomes of the disks that a guest writes to.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Disks {
    /// They are copied: the VM goes on, or others come from it.
    Copy,
    /// They stay where they are: the VM sleeps.
    InPlace,
}

/// A machine that is stopped, and what it came from.
#[derive(Clone, Copy)]
pub(crate) struct Sleeper<'a> {
    pub(crate) machine: &'a Machine,
    pub(crate) vcpus: &'a [Vcpu],
    pub(crate) origin: Option<&'a Snapshot>,
}

impl Sleeper<'_> {
    /// Writes a snapshot to a directory, which appears there whole or not at all. The machine
    /// stays as it is.
    pub(crate) fn save(
        self,
        directory: &Path,
        disks: Disks,
        options: &SnapshotOptions,
    ) -> Result<Snapshot, Error> {
        let staging = Staging::begin(directory).map_err(SnapshotError::from)?;
        let mut state = self.state(&|index| staging.path(&disk_name(index)), disks, options)?;
        state.memory = self.save_memory(&staging, options)?;
        let bytes = format::encode(&state)
            .map_err(|source| SnapshotError::State { path: staging.path(STATE), source })?;
        let mut file = staging.create(STATE).map_err(SnapshotError::from)?;
        file.write_all(&bytes)
            .map_err(|source| SnapshotError::Write { path: staging.path(STATE), source })?;
        drop(file);
        staging.commit(options.sync).map_err(SnapshotError::from)?;
        Snapshot::open(directory)
    }

    /// Keeps a snapshot in memory, of which none is copied. From now on the machine has its
    /// memory over what is shared.
    pub(crate) fn keep(self, disks: Disks) -> Result<Snapshot, Error> {
        let temporary = Temporary::new().map_err(SnapshotError::Temporary)?;
        let options = SnapshotOptions::default();
        let state = self.state(&|index| temporary.0.join(disk_name(index)), disks, &options)?;
        let image = self.machine.ram().freeze().map_err(SnapshotError::Freeze)?;
        let place = Place::Memory(temporary);
        let written = OnceLock::new();
        Ok(Snapshot(Arc::new(Inner { place, state, image, written })))
    }

    /// Everything but the memory; what disks there are to copy goes to `path`.
    fn state(
        self,
        path: &dyn Fn(usize) -> PathBuf,
        disks: Disks,
        options: &SnapshotOptions,
    ) -> Result<State, Error> {
        let machine = self.machine.state(self.vcpus)?;
        let controls = self.machine.controls();
        let mut saved = Vec::new();
        for (index, disk) in controls.disks.iter().enumerate() {
            let mut done = 0;
            let mut report = |bytes| {
                done += bytes;
                options.report(SaveStage::Disk(index), done, None)
            };
            let disk = match disks {
                Disks::Copy => disk.save(&path(index), &mut report),
                Disks::InPlace => disk.leave(&path(index), &mut report),
            };
            saved.push(disk.map_err(|error| match error {
                DiskError::Interrupted => SnapshotError::Interrupted,
                error => error.into(),
            })?);
        }
        let since_1970 = SystemTime::UNIX_EPOCH.elapsed().unwrap_or_default();
        Ok(State {
            dormouse: env!("CARGO_PKG_VERSION").to_owned(),
            id: random_bytes().map_err(SnapshotError::Random)?,
            created: since_1970.as_secs(),
            host: self.machine.profile(self.vcpus)?,
            config: self.machine.config().clone(),
            machine,
            memory: Vec::new(),
            disks: saved,
        })
    }

    /// Shares the layers of the snapshot that the machine came from, and adds what it wrote; or
    /// writes everything.
    fn save_memory(
        self,
        staging: &Staging,
        options: &SnapshotOptions,
    ) -> Result<Vec<SavedMemory>, SnapshotError> {
        let origin = self.origin.filter(|_| !options.full);
        let shared = origin.and_then(|origin| Some((origin, share_layers(origin, staging)?)));
        let (mut layers, save) = match shared {
            Some((origin, layers)) => (layers, Save::Diff(&origin.0.image)),
            None => (Vec::new(), Save::Full),
        };
        let name = memory_name(layers.len());
        let file = staging.create(&name)?;
        let report = |progress: MemoryProgress| {
            options.report(SaveStage::Memory, progress.done_bytes, Some(progress.total_bytes))
        };
        let saved = self.machine.ram().save(&file, save, &report);
        layers.push(saved.map_err(|source| match source {
            MemoryError::Interrupted => SnapshotError::Interrupted,
            source => SnapshotError::SaveMemory { path: staging.path(&name), source },
        })?);
        Ok(layers)
    }
}

/// Gives the files of an origin's layers a second name; `None` where that is not possible: they
/// have no name any more, they never had one, or it is in another file system.
fn share_layers(origin: &Snapshot, staging: &Staging) -> Option<Vec<SavedMemory>> {
    let layers = &origin.0.state.memory;
    if layers.is_empty() || layers.len() >= MAX_LAYERS {
        return None;
    }
    for (index, file) in origin.0.image.files().enumerate() {
        // By what is open, whatever has become of the directory.
        let open = format!("/proc/self/fd/{}", file.as_raw_fd());
        let path = staging.path(&memory_name(index));
        if linkat(CWD, open, CWD, path, AtFlags::SYMLINK_FOLLOW).is_err() {
            for linked in 0..index {
                let _ = fs::remove_file(staging.path(&memory_name(linked)));
            }
            return None;
        }
    }
    Some(layers.clone())
}

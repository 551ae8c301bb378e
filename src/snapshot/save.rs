//! A stopped machine, written to a directory or kept in memory.

use std::fs::{self, File};
use std::io::Write;
use std::ops::ControlFlow;
use std::os::fd::AsRawFd;
use std::path::{Path, PathBuf};
use std::sync::{Arc, OnceLock};
use std::time::SystemTime;

use rustix::fs::{AtFlags, CWD, linkat};

use super::directory::{STATE, Staging, WRITTEN, disk_name, memory_name};
use super::error::SnapshotError;
use super::format;
use super::options::{SaveStage, SnapshotOptions};
use super::{CloneNames, Inner, MAX_NOTED, Place, Purpose, Sleep, Snapshot, State, Temporary};
use crate::disk::{self, DiskError, SavedDisk};
use crate::error::Error;
use crate::kvm::{FreshState, Vcpu};
use crate::machine::Machine;
use crate::memory::{GuestRam, MAX_LAYERS, MemoryProgress, Save, SavedMemory};
use crate::random::random;

/// A machine that is stopped, and what it came from.
#[derive(Clone)]
pub(crate) struct Sleeper<'a> {
    pub(crate) machine: &'a Machine,
    pub(crate) vcpus: &'a [Vcpu],
    pub(crate) origin: Option<&'a Snapshot>,
    /// Who it is, where it is a clone whose guest does not know yet.
    pub(crate) clone: Option<CloneNames>,
}

impl Sleeper<'_> {
    /// Writes a snapshot to a directory, which appears there whole or not at all. The machine
    /// stays as it is.
    pub(crate) fn save(
        &self,
        directory: &Path,
        purpose: Purpose,
        options: &SnapshotOptions,
    ) -> Result<Snapshot, Error> {
        let _saving = self.machine.saving();
        let staging = Staging::begin(directory).map_err(SnapshotError::from)?;
        let mut state = self.state(&|index| staging.path(&disk_name(index)), purpose, options)?;
        state.memory = self.save_memory(&staging, options)?;
        finish(staging, &state, options).map_err(Error::from)
    }

    /// Keeps a snapshot in memory, of which none is copied. From now on the machine has its
    /// memory over what is shared.
    pub(crate) fn keep(&self, purpose: Purpose) -> Result<Snapshot, Error> {
        let _saving = self.machine.saving();
        let temporary = match self.machine.controls().disks.is_empty() {
            true => Temporary::default(),
            false => Temporary::new().map_err(SnapshotError::Temporary)?,
        };
        let options = SnapshotOptions::default();
        let state =
            self.state(&|index| temporary.path.join(disk_name(index)), purpose, &options)?;
        let ram = self.machine.ram();
        let image = match purpose {
            Purpose::Clones => ram.freeze(),
            Purpose::Sleep => ram.freeze_for_good(),
        };
        let image = image.map_err(SnapshotError::Freeze)?;
        let place = Place::Memory(temporary);
        let written = OnceLock::new();
        Ok(Snapshot(Arc::new(Inner { place, state, image, written, fresh: FreshState::new() })))
    }

    /// Everything but the memory; what disks there are to copy goes to `path`.
    fn state(
        &self,
        path: &dyn Fn(usize) -> PathBuf,
        purpose: Purpose,
        options: &SnapshotOptions,
    ) -> Result<State, Error> {
        let machine = self.machine.state(self.vcpus)?;
        let controls = self.machine.controls();
        let mut saved = Vec::new();
        for (index, disk) in controls.disks.iter().enumerate() {
            let mut report = report_disk(options, index);
            let origin = self.origin.and_then(|origin| origin.0.state.disks.get(index));
            let whole = origin.and_then(SavedDisk::whole);
            let disk = match purpose {
                Purpose::Clones => disk.save(&path(index), whole, &mut report),
                Purpose::Sleep => disk.leave(&path(index), whole, options.sync, &mut report),
            };
            saved.push(disk.map_err(|error| match error {
                DiskError::Interrupted => SnapshotError::Interrupted,
                error => error.into(),
            })?);
        }
        let since_1970 = SystemTime::UNIX_EPOCH.elapsed().unwrap_or_default();
        Ok(State {
            dormouse: env!("CARGO_PKG_VERSION").to_owned(),
            id: random().map_err(SnapshotError::Random)?,
            created: since_1970.as_secs(),
            host: self.machine.profile(self.vcpus)?,
            config: self.machine.config_to_save(),
            machine,
            memory: Vec::new(),
            disks: saved,
            sleep: (purpose == Purpose::Sleep).then(|| Sleep { clone: self.clone.clone() }),
        })
    }

    /// Shares the layers of the snapshot that the machine came from, and adds what it wrote; or
    /// writes everything.
    fn save_memory(
        &self,
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
        let saved = self.machine.ram().save(&file, save, &report_memory(options));
        layers.push(saved.map_err(SnapshotError::save_memory(staging.path(&name)))?);
        Ok(layers)
    }
}

impl Snapshot {
    /// A file of the snapshot, though another may have its name by now.
    fn file(&self, name: &str) -> std::io::Result<File> {
        match &self.0.place {
            Place::Directory(directory) => directory.file(name),
            Place::Memory(temporary) => File::open(temporary.path.join(name)),
        }
    }

    pub(super) fn write_merged(
        &self,
        directory: &Path,
        options: &SnapshotOptions,
    ) -> Result<Self, SnapshotError> {
        let staging = Staging::begin(directory)?;
        let name = memory_name(0);
        let file = staging.create(&name)?;
        let merged = self.0.image.merge(&file, &report_memory(options));
        let merged = merged.map_err(SnapshotError::save_memory(staging.path(&name)))?;
        for (index, name, _) in self.0.state.disk_files() {
            let from = self.file(&name).map_err(SnapshotError::open(&self.path(&name)))?;
            let to = staging.create(&name)?;
            let mut report = report_disk(options, index);
            disk::copy_file(&from, &to, &mut report).map_err(|source| {
                if source.kind() == std::io::ErrorKind::Interrupted {
                    return SnapshotError::Interrupted;
                }
                SnapshotError::Write { path: staging.path(&name), source }
            })?;
        }
        let id = random().map_err(SnapshotError::Random)?;
        // A copy of the files of a VM that sleeps is not that VM.
        let state = State { id, memory: vec![merged], sleep: None, ..self.0.state.clone() };
        finish(staging, &state, options)
    }

    /// Notes which pages a guest that came from here has written until it first stood still, for
    /// those that come after it. It is of use, and no more: where it fails nothing is noted.
    pub(crate) fn note_written(&self, ram: &GuestRam) {
        let Place::Directory(directory) = &self.0.place else { return };
        if self.0.written.get().is_some() {
            return;
        }
        let Ok(pages) = ram.written_pages() else { return };
        let runs: Vec<_> = pages.runs().take(MAX_NOTED).collect();
        let pages = runs.iter().map(|run| run.count).sum::<u64>();
        if pages > MAX_NOTED as u64 || self.0.written.set(runs.clone()).is_err() {
            return;
        }
        if let Ok(bytes) = format::encode(&runs) {
            let _ = directory.replace_file(WRITTEN, &bytes);
        }
    }
}

fn report_memory(options: &SnapshotOptions) -> impl Fn(MemoryProgress) -> ControlFlow<()> + Sync {
    |progress| options.report(SaveStage::Memory, progress.done_bytes, Some(progress.total_bytes))
}

/// How much of a disk has been copied, as one part after the other has.
fn report_disk(options: &SnapshotOptions, index: usize) -> impl FnMut(u64) -> ControlFlow<()> {
    let mut done = 0;
    move |bytes| {
        done += bytes;
        options.report(SaveStage::Disk(index), done, None)
    }
}

/// Writes the state, which is the last of a snapshot's files, and puts the directory into place.
fn finish(
    staging: Staging,
    state: &State,
    options: &SnapshotOptions,
) -> Result<Snapshot, SnapshotError> {
    let path = staging.path(STATE);
    let bytes = format::encode(state)
        .map_err(|source| SnapshotError::State { path: path.clone(), source })?;
    let mut file = staging.create(STATE)?;
    file.write_all(&bytes).map_err(|source| SnapshotError::Write { path, source })?;
    drop(file);
    put_into_place(staging, options.sync)
}

/// Puts a directory that is whole into its place. It is opened before, so that no failure leaves it there.
pub(super) fn put_into_place(staging: Staging, sync: bool) -> Result<Snapshot, SnapshotError> {
    let snapshot = Snapshot::read(staging.open()?).map_err(|(_, error)| error)?;
    staging.commit(sync)?;
    Ok(snapshot)
}

/// Those of 1 TiB. As many may come with the next layer, and all have to fit into a state.
const MAX_SHARED_CHECKSUMS: usize = 1 << 20;

/// Whether there are layers, and not so many that no other may lie over them.
pub(super) fn take_another(layers: &[SavedMemory]) -> bool {
    let checksums: usize = layers.iter().map(SavedMemory::checksum_count).sum();
    (1..MAX_LAYERS).contains(&layers.len()) && checksums <= MAX_SHARED_CHECKSUMS
}

/// Gives the files of an origin's layers a second name; `None` where that is not possible: they
/// have no name any more, they never had one, it is in another file system, or they are too many.
fn share_layers(origin: &Snapshot, staging: &Staging) -> Option<Vec<SavedMemory>> {
    let layers = &origin.0.state.memory;
    if !take_another(layers) {
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

//! A snapshot: a VM's memory, disks and registers, in a directory or in memory.
//!
//! `state` is read and checked when it is opened; memory and disks are mapped, and read by whoever
//! touches them. docs/snapshot-format.md describes the files.

mod archive;
mod directory;
mod error;
mod format;
#[cfg(any(test, fuzzing))]
pub(crate) mod fuzzing;
mod options;
mod restore;
mod save;
mod sleep;
mod temporary;

use std::io;
use std::ops::ControlFlow;
use std::path::Path;
use std::sync::{Arc, OnceLock};
use std::time::{Duration, SystemTime};

use serde::{Deserialize, Serialize};

use self::directory::{OpenDirectory, STATE, WRITTEN, disk_name, memory_name};
use self::error::SnapshotError;
pub use self::options::{SaveProgress, SaveStage, SnapshotOptions};
pub(crate) use self::save::Sleeper;
pub(crate) use self::sleep::{CloneNames, Sleep, WakeLock};
use self::temporary::Temporary;
use crate::arch::layout;
use crate::bounded;
use crate::config::MachineConfig;
use crate::disk::SavedDisk;
use crate::error::Error;
use crate::input_file;
use crate::kvm::{CpuProfile, FreshState};
use crate::machine::MachineState;
use crate::memory::{MemoryImage, PageRun, SavedMemory};

/// A VM that was saved: in a directory, by [`MicroVm::snapshot`] and [`MicroVm::suspend`], or in
/// memory. It never changes, and any number of VMs come from it, here and in other processes.
///
/// A clone of the handle is the same snapshot. It keeps open one descriptor for each layer of the
/// memory, and one for the directory. Where another snapshot takes the directory's place, the
/// handle still is the one that was opened: it serves as long as it needs no disk out of there.
///
/// Its files are mapped, and have to stay what they are while VMs stand on them: where one is cut short, the process that
/// looks at what is gone ends (SIGBUS).
///
/// ```no_run
/// use dormouse::Snapshot;
///
/// let base = Snapshot::open("base")?;
/// for vm in base.fork(100)? {
///     let running = vm.resume()?;
///     // …
/// }
/// # Ok::<(), dormouse::Error>(())
/// ```
///
/// [`MicroVm::snapshot`]: crate::MicroVm::snapshot
/// [`MicroVm::suspend`]: crate::MicroVm::suspend
#[derive(Clone)]
pub struct Snapshot(Arc<Inner>);

struct Inner {
    place: Place,
    state: State,
    image: MemoryImage,
    /// The pages that a restored guest wrote first.
    written: OnceLock<Vec<PageRun>>,
    /// What the first VM that was restored from it was before.
    fresh: FreshState,
}

/// Who goes on from a snapshot, which says what becomes of the disks.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Purpose {
    /// Others than the VM that was saved, which may go on itself: they have copies of its disks.
    Clones,
    /// The VM itself, which ends until it wakes: its disks stay where they are.
    Sleep,
}

/// Where the files of a snapshot are.
enum Place {
    Directory(OpenDirectory),
    /// Its memory is in this process; its disks are in a directory that goes with it.
    Memory(Temporary),
}

/// What the file `state` holds.
#[derive(Clone, Debug, Serialize, Deserialize)]
struct State {
    dormouse: String,
    id: [u8; 16],
    created: u64,
    host: CpuProfile,
    config: MachineConfig,
    machine: MachineState,
    #[serde(deserialize_with = "bounded::list")]
    memory: Vec<SavedMemory>,
    #[serde(deserialize_with = "bounded::list")]
    disks: Vec<SavedDisk>,
    /// There where a VM was suspended.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    sleep: Option<Sleep>,
}

/// What is known of a snapshot, to be looked at and compared.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[non_exhaustive]
pub struct SnapshotFacts {
    /// 16 random bytes: no two snapshots have the same.
    pub id: [u8; 16],
    /// The version of this crate that wrote it.
    pub dormouse: String,
    /// When it was written.
    pub created: SystemTime,
    /// The host's kernel.
    pub kernel: String,
    /// Guest memory in bytes.
    pub memory_bytes: u64,
    /// Layers of memory, each over those before it.
    pub memory_layers: usize,
    /// Virtual CPUs.
    pub vcpus: u8,
    /// The model-specific registers that are saved of each vCPU, by their index.
    pub msrs: Vec<u32>,
    /// The CPUID table that the guest was given: leaf, subleaf, EAX, EBX, ECX, EDX.
    pub cpuid: Vec<[u32; 6]>,
}

impl Snapshot {
    /// Opens the snapshot in a directory: reads and checks its state, some 100 µs, and opens its
    /// memory.
    ///
    /// # Errors
    ///
    /// [`ErrorKind::Snapshot`](crate::ErrorKind::Snapshot) for what is no snapshot, is damaged, or is
    /// of another version. Whether it fits this host is seen when it is restored.
    pub fn open(directory: impl AsRef<Path>) -> Result<Self, Error> {
        Ok(Self::open_directory(directory.as_ref())?)
    }

    /// As [`open`](Self::open), and none where there is no snapshot, or one that is of no use to any version.
    #[cfg(feature = "session")]
    pub(crate) fn find(directory: &Path) -> Result<Option<Self>, Error> {
        match Self::open_directory(directory) {
            Err(error) if error.is_damage() => Ok(None),
            opened => Ok(opened.map(Some)?),
        }
    }

    fn open_directory(directory: &Path) -> Result<Self, SnapshotError> {
        for _ in 0..MAX_REPLACED {
            let open = OpenDirectory::open(directory).map_err(SnapshotError::open(directory))?;
            match Self::read(open) {
                Ok(snapshot) => return Ok(snapshot),
                // Its files went while they were opened, because another is in its place now.
                Err((open, error)) if open.is_in_place() => return Err(error),
                Err(_) => {}
            }
        }
        Err(SnapshotError::Replaced { directory: directory.to_owned() })
    }

    fn read(open: OpenDirectory) -> Result<Self, (OpenDirectory, SnapshotError)> {
        match Self::parts(&open) {
            Ok((state, image)) => {
                let written = OnceLock::new();
                if let Some(runs) = read_written(&open) {
                    let _ = written.set(runs);
                }
                let place = Place::Directory(open);
                Ok(Self(Arc::new(Inner { place, state, image, written, fresh: FreshState::new() })))
            }
            Err(error) => Err((open, error)),
        }
    }

    /// What the files of a snapshot say, checked.
    fn parts(open: &OpenDirectory) -> Result<(State, MemoryImage), SnapshotError> {
        let directory = &open.path;
        let state = State::of(open)?;
        let mut layers = Vec::new();
        let file = |name: &str| {
            open.file(name).map_err(|source| SnapshotError::open(&directory.join(name))(source))
        };
        for (index, saved) in state.memory.iter().enumerate() {
            layers.push((file(&memory_name(index))?, saved.clone()));
        }
        for (_, name, _) in state.disk_files() {
            file(&name)?;
        }
        let ranges = layout::ram_ranges(state.config.memory_bytes);
        let image = MemoryImage::open(&ranges, layers)
            .map_err(|source| SnapshotError::Memory { directory: directory.to_owned(), source })?;
        Ok((state, image))
    }

    /// Opens the snapshot in a directory where it is the one with this id.
    pub(crate) fn open_same(directory: &Path, id: [u8; 16]) -> Result<Self, Error> {
        let snapshot = Self::open_directory(directory)?;
        match snapshot.id() == id {
            true => Ok(snapshot),
            false => Err(SnapshotError::Replaced { directory: directory.to_owned() }.into()),
        }
    }

    /// 16 random bytes: no two snapshots have the same.
    pub(crate) fn id(&self) -> [u8; 16] {
        self.0.state.id
    }

    /// How much of what the guest writes to its console is kept.
    pub(crate) fn console_tail_bytes(&self) -> usize {
        self.0.state.config.console_tail_bytes
    }

    /// Reads all of the memory and disks and compares them with their checksums: some 1 GiB a
    /// second.
    ///
    /// # Errors
    ///
    /// [`ErrorKind::Snapshot`](crate::ErrorKind::Snapshot), of a disk [`ErrorKind::Disk`](crate::ErrorKind::Disk), which
    /// name what differs; or `Snapshot` where another one has its place.
    pub fn verify(&self) -> Result<(), Error> {
        let Some(directory) = self.directory() else { return Ok(()) };
        let verified = self.0.image.verify(&|_| ControlFlow::Continue(()));
        let damaged = |source| SnapshotError::Memory { directory: directory.to_owned(), source };
        verified.map_err(damaged)?;
        let mut disks = self.0.state.disks.iter().enumerate();
        let verified = disks.try_for_each(|(index, disk)| {
            let path = directory.join(disk_name(index));
            disk.verify(&path, &mut |_| ControlFlow::Continue(()))
        });
        // What is wrong with another's disks says nothing of these.
        self.check_disks_in_place()?;
        Ok(verified.map_err(SnapshotError::from)?)
    }

    /// Disks are opened by their paths: whether those were of this snapshot.
    fn check_disks_in_place(&self) -> Result<(), SnapshotError> {
        match &self.0.place {
            Place::Directory(directory)
                if self.0.state.disk_files().next().is_some() && !directory.is_in_place() =>
            {
                Err(SnapshotError::Replaced { directory: directory.path.clone() })
            }
            _ => Ok(()),
        }
    }

    /// Writes a snapshot of the same VM whose memory is one layer and whose files are no other
    /// snapshot's, also of one in memory. It takes reading and writing all of the memory.
    ///
    /// # Errors
    ///
    /// [`ErrorKind::Snapshot`](crate::ErrorKind::Snapshot) where it cannot be written, and
    /// [`ErrorKind::Disk`](crate::ErrorKind::Disk) where a disk cannot.
    pub fn merge(&self, directory: impl AsRef<Path>) -> Result<Self, Error> {
        self.merge_with(directory, &SnapshotOptions::default())
    }

    /// As [`merge`](Self::merge), in a way of one's own.
    ///
    /// # Errors
    ///
    /// As `merge`; [`ErrorKind::Interrupted`](crate::ErrorKind::Interrupted) where the progress
    /// says so.
    pub fn merge_with(
        &self,
        directory: impl AsRef<Path>,
        options: &SnapshotOptions,
    ) -> Result<Self, Error> {
        Ok(self.write_merged(directory.as_ref(), options)?)
    }

    /// The directory that it is in; none for one in memory.
    pub fn directory(&self) -> Option<&Path> {
        match &self.0.place {
            Place::Directory(directory) => Some(&directory.path),
            Place::Memory(_) => None,
        }
    }

    /// Removes the files of the snapshot in a directory, and the directory where nothing else is
    /// in it; not those of another one, nor those of a VM that is awake. What is damaged goes too.
    pub(crate) fn remove(directory: &Path, id: [u8; 16]) {
        let Ok(open) = OpenDirectory::open(directory) else { return };
        let Ok(_lock) = open.wake_lock() else { return };
        let is_it = match State::of(&open) {
            Ok(state) => state.id == id,
            // What cannot be read just now, or not by this version, may be another.
            Err(error) => error.is_damage(),
        };
        if is_it {
            open.remove();
        }
    }

    /// What is known of it.
    pub fn facts(&self) -> SnapshotFacts {
        let State { dormouse, id, created, host, config, machine, .. } = &self.0.state;
        SnapshotFacts {
            id: *id,
            dormouse: dormouse.clone(),
            created: SystemTime::UNIX_EPOCH + Duration::from_secs(*created),
            kernel: host.host().kernel.clone(),
            memory_bytes: config.memory_bytes,
            memory_layers: self.0.image.files().count(),
            vcpus: config.vcpus,
            msrs: machine.msrs(),
            cpuid: host.first_cpuid(),
        }
    }
}

impl State {
    /// That of the snapshot in a directory, checked.
    fn of(open: &OpenDirectory) -> Result<Self, SnapshotError> {
        let path = open.path.join(STATE);
        let bytes = read(open, STATE).map_err(SnapshotError::open(&path))?;
        Ok(Self::read(bytes, &path)?.0)
    }

    /// What the bytes of the file at `path` say, checked; none, where it is too long to be read. With the bytes.
    fn read(bytes: Option<Vec<u8>>, path: &Path) -> Result<(Self, Vec<u8>), SnapshotError> {
        let damaged = |source| SnapshotError::State { path: path.to_owned(), source };
        let bytes = bytes.ok_or_else(|| damaged(format::FormatError::TooLong))?;
        let state: Self = format::decode(&bytes).map_err(damaged)?;
        state.check().map_err(|what| SnapshotError::Impossible { path: path.to_owned(), what })?;
        Ok((state, bytes))
    }

    /// The files of disks: of which disk, their names, how long they are.
    fn disk_files(&self) -> impl Iterator<Item = (usize, String, u64)> {
        let disks = self.disks.iter().enumerate();
        disks.flat_map(|(index, disk)| {
            disk.files().map(move |(behind, bytes)| (index, disk_name(index) + behind, bytes))
        })
    }

    /// Counts that a hostile file may have wrong.
    fn check(&self) -> Result<(), String> {
        self.config.check().map_err(|error| error.to_string())?;
        self.machine.check(&self.config)?;
        let tables = self.host.cpuid().map_err(|error| error.to_string())?.len();
        if tables != usize::from(self.config.vcpus) {
            return Err(format!("{tables} CPUID tables are saved of {} vCPUs", self.config.vcpus));
        }
        let (found, expected) = (self.disks.len(), self.config.blocks.len());
        if found != expected {
            return Err(format!("{found} disks are saved of {expected}"));
        }
        if SystemTime::UNIX_EPOCH.checked_add(Duration::from_secs(self.created)).is_none() {
            return Err("it was written after the end of time".to_owned());
        }
        Ok(())
    }
}

/// How often a directory may be replaced while it is opened.
const MAX_REPLACED: usize = 8;

/// The most pages that are worth having before a guest runs: 16 MiB, some 8 ms.
const MAX_NOTED: usize = 4096;

fn read(directory: &OpenDirectory, name: &str) -> io::Result<Option<Vec<u8>>> {
    input_file::read_bounded(directory.file(name)?, format::MAX_STATE_BYTES)
}

/// The pages that are worth having before a guest runs, where that can be read, and where they
/// are not so many that somebody else than we wrote that.
fn read_written(directory: &OpenDirectory) -> Option<Vec<PageRun>> {
    let runs: Vec<PageRun> = format::decode(&read(directory, WRITTEN).ok()??).ok()?;
    let pages = runs.iter().fold(0, |pages: u64, run| pages.saturating_add(run.count));
    (runs.len() <= MAX_NOTED && pages <= MAX_NOTED as u64).then_some(runs)
}

impl std::fmt::Debug for Snapshot {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match self.directory() {
            Some(directory) => write!(f, "Snapshot({})", directory.display()),
            None => f.write_str("Snapshot(in memory)"),
        }
    }
}

#[cfg(test)]
mod tests;

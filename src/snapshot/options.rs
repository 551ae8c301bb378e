//! How a snapshot is written.

use std::fmt;
use std::ops::ControlFlow;
use std::sync::Arc;

/// How a VM is saved: unless set, only what changed since the snapshot that it came from is
/// written, the rest is shared with that one's files, and the kernel writes to the disk in its
/// own time.
///
/// ```
/// use std::ops::ControlFlow;
/// use dormouse::SnapshotOptions;
///
/// let options = SnapshotOptions::new().sync(true).progress(|progress| {
///     println!("{:?}: {} bytes", progress.stage, progress.bytes);
///     ControlFlow::Continue(())
/// });
/// ```
#[derive(Clone, Default)]
pub struct SnapshotOptions {
    pub(crate) full: bool,
    pub(crate) sync: bool,
    pub(crate) progress: Option<Arc<OnProgress>>,
}

type OnProgress = dyn Fn(SaveProgress) -> ControlFlow<()> + Send + Sync;

/// How far a save is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub struct SaveProgress {
    /// What is being saved.
    pub stage: SaveStage,
    /// Bytes that were looked at in this stage.
    pub bytes: u64,
    /// Bytes that there are to look at in this stage, where that is known before.
    pub total_bytes: Option<u64>,
}

/// A part of a snapshot, or of the work.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub enum SaveStage {
    /// The guest's memory.
    Memory,
    /// The disk at this place, counted from 0.
    Disk(usize),
    /// All of it, to or from one packed file.
    Archive,
}

impl SnapshotOptions {
    /// As it is fastest.
    pub fn new() -> Self {
        Self::default()
    }

    /// Writes all of the memory, not only what changed since the snapshot that the VM came from.
    /// Such a snapshot shares no memory with another, only the whole disks that others stand on too; and a restore of
    /// one layer is faster than of many, which are 16 at most.
    #[must_use]
    pub fn full(mut self, on: bool) -> Self {
        self.full = on;
        self
    }

    /// Whether everything is on the disk (fsync) before the snapshot takes its place, so that it
    /// also outlives a power cut. Without it, it outlives the process.
    #[must_use]
    pub fn sync(mut self, on: bool) -> Self {
        self.sync = on;
        self
    }

    /// Calls `progress` every few MiB, from threads of the save. When it answers `Break`, the
    /// save ends with [`ErrorKind::Interrupted`](crate::ErrorKind::Interrupted), and the VM, and
    /// whatever was at the place before, are as they were. Saves of one VM come one after the other: a
    /// `progress` that waits for another one waits for ever.
    #[must_use]
    pub fn progress(
        mut self,
        progress: impl Fn(SaveProgress) -> ControlFlow<()> + Send + Sync + 'static,
    ) -> Self {
        self.progress = Some(Arc::new(progress));
        self
    }

    /// Tells the caller how far a stage is.
    pub(crate) fn report(
        &self,
        stage: SaveStage,
        bytes: u64,
        total_bytes: Option<u64>,
    ) -> ControlFlow<()> {
        match &self.progress {
            Some(progress) => progress(SaveProgress { stage, bytes, total_bytes }),
            None => ControlFlow::Continue(()),
        }
    }
}

impl fmt::Debug for SnapshotOptions {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Self { full, sync, progress } = self;
        f.debug_struct("SnapshotOptions")
            .field("full", full)
            .field("sync", sync)
            .field("progress", &progress.is_some())
            .finish()
    }
}

//! A machine made from a snapshot.

use std::path::PathBuf;

use super::directory::disk_name;
use super::error::SnapshotError;
use super::save::Disks;
use super::{Inner, Place, SavedDisk, Snapshot};
use crate::config::{Clock, MachineConfig, RestoreOptions};
use crate::console::Console;
use crate::error::Error;
use crate::kvm::{ClockPolicy, Vcpu};
use crate::machine::{Machine, Shell};
use crate::phase::Phase;
use crate::timings::Recorder;

impl Snapshot {
    /// A machine that goes on from here, with its vCPUs, on a shell that was prepared for it.
    pub(crate) fn machine(
        &self,
        shell: Option<Shell>,
        options: &RestoreOptions,
        disks: Disks,
        console: Option<&Console>,
        recorder: &mut Recorder,
    ) -> Result<(Machine, Vec<Vcpu>), Error> {
        let Inner { state, image, written, .. } = &*self.0;
        let config = recorder.run(Phase::Config, || {
            let config = self.config(options, disks)?;
            config.check()?;
            Ok::<_, SnapshotError>(config)
        })?;
        todo!()
    }

    /// The configuration of a machine that goes on from here.
    fn config(&self, options: &RestoreOptions, disks: Disks) -> Result<MachineConfig, SnapshotError> {
        let state = &self.0.state;
        let mut config = state.config.clone();
        options.apply(&mut config)?;
        let count = state.disks.len();
        if let Some(&index) = options.disks.keys().find(|index| **index >= count) {
            return Err(SnapshotError::NoDisk { index, count });
        }
        for (index, disk) in state.disks.iter().enumerate() {
            // TODO
        }
        Ok(config)
    }

    /// Where the files of the snapshot are.
    fn path(&self, name: &str) -> PathBuf {
        match &self.0.place {
            Place::Directory(directory) => directory.join(name),
            Place::Memory(temporary) => temporary.0.join(name),
        }
    }
}

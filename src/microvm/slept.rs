//! Where a VM lies that sleeps, and what it gets of the host when it wakes.

use std::path::PathBuf;
use std::sync::Arc;

use super::agent::CloneIdentity;
use crate::config::{MachineConfig, RestoreOptions};
use crate::snapshot::Snapshot;

/// Where a VM sleeps, and what it wakes with; of one that is awake, where it did and woke with.
#[derive(Clone, Debug)]
pub(super) struct Slept {
    pub(super) place: Place,
    pub(super) options: RestoreOptions,
    /// Who it is, where it is a clone that has not been told so.
    pub(super) identity: Option<Arc<CloneIdentity>>,
}

#[derive(Clone, Debug)]
pub(super) enum Place {
    Directory { path: PathBuf, id: [u8; 16] },
    Memory(Snapshot),
}

impl Place {
    pub(super) fn of(snapshot: Snapshot) -> Self {
        match snapshot.directory() {
            Some(path) => Self::Directory { path: path.to_owned(), id: snapshot.id() },
            None => Self::Memory(snapshot),
        }
    }
}

/// All that a machine had of the host, also what no file keeps.
pub(super) fn as_before(config: &MachineConfig) -> RestoreOptions {
    let mut options = RestoreOptions::default()
        .console_output(config.console_writer.clone())
        .kvm_device(&config.kvm_device)
        .outside_paths(true);
    for (index, network) in config.networks.iter().enumerate() {
        if network.has_descriptor() {
            options = options.network(index, network.clone());
        }
    }
    options
}

//! A machine made from a snapshot.

use std::path::{Path, PathBuf};

use super::directory::disk_name;
use super::error::SnapshotError;
use super::save::Disks;
use super::{Inner, Place, Snapshot, State};
use crate::arch::layout;
use crate::config::{Clock, MachineConfig, RestoreOptions};
use crate::console::Console;
use crate::error::Error;
use crate::kvm::{ClockPolicy, Kvm, Vcpu};
use crate::machine::{Cpus, Machine, Shell, ShellConfig};
use crate::memory::GuestRam;
use crate::phase::Phase;
use crate::timings::Recorder;

impl Snapshot {
    /// What a machine that goes on from here needs of KVM, made ahead.
    pub(crate) fn shell(
        &self,
        options: &RestoreOptions,
        recorder: &mut Recorder,
    ) -> Result<Shell, Error> {
        let State { host, config, .. } = &self.0.state;
        let mut config = config.clone();
        options.apply(&mut config).map_err(SnapshotError::from)?;
        let ranges = layout::ram_ranges(config.memory_bytes);
        let ram = recorder.run(Phase::Memory, || GuestRam::reserve(&ranges))?;
        let (kvm_device, seccomp) = (&config.kvm_device, config.seccomp);
        let cpus = Cpus::Exactly(host.cpuid()?);
        let shell = Shell::new(&ShellConfig { kvm_device, cpus, seccomp }, ram, recorder)?;
        recorder.run(Phase::Kvm, || host.fits(&Kvm::open(kvm_device)?, shell.first_vcpu()))?;
        Ok(shell)
    }

    /// A machine that goes on from here, with its vCPUs, around a shell that was made for it.
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
        let shell = match shell {
            Some(shell) if shell.shows(state.host.cpuid()?) => shell,
            Some(_) => return Err(SnapshotError::OtherShell.into()),
            None => self.shell(options, recorder)?,
        };
        recorder.run(Phase::Memory, || shell.ram().map_image(image))?;
        let (machine, vcpus) = Machine::from_shell(shell, &config, console, recorder)?;
        recorder.run(Phase::Restore, || {
            let clock = match options.clock {
                Clock::Advance => ClockPolicy::Advance,
                Clock::Freeze => ClockPolicy::Freeze,
            };
            machine.restore(&vcpus, &state.machine, clock)
        })?;
        if let Some(written) = written.get().filter(|_| options.populate) {
            recorder.timed(Phase::Populate, || machine.ram().populate(written));
        }
        Ok((machine, vcpus))
    }

    /// The configuration of a machine that goes on from here.
    fn config(
        &self,
        options: &RestoreOptions,
        disks: Disks,
    ) -> Result<MachineConfig, SnapshotError> {
        let state = &self.0.state;
        let mut config = state.config.clone();
        options.apply(&mut config)?;
        let count = state.disks.len();
        if let Some(&index) = options.disks.keys().find(|index| **index >= count) {
            return Err(SnapshotError::NoDisk { index, count });
        }
        for (index, (block, disk)) in config.blocks.iter_mut().zip(&state.disks).enumerate() {
            let given = options.disks.get(&index);
            let moved = given.and_then(|given| given.base.as_deref()).map(|base| disk.moved(base));
            let saved = self.path(&disk_name(index));
            let delta = given.and_then(|given| given.delta.as_deref());
            let is_given = moved.is_some();
            let disk = moved.as_ref().unwrap_or(disk);
            let base = disk.base().filter(|base| !is_given && !self.may_name(base, options));
            if let Some(path) = base {
                return Err(SnapshotError::OutsideDisk { index, path: path.to_owned() });
            }
            *block = match disks {
                Disks::InPlace => disk.own_config(block, &saved),
                Disks::Copy => disk.config(block, &saved, delta),
            };
        }
        let socket = config.vsock.as_mut().and_then(|vsock| vsock.unix_socket.take());
        if let (Some(path), Some(vsock)) = (socket, &mut config.vsock) {
            if options.vsock_socket.as_ref() != Some(&path) && !self.may_name(&path, options) {
                return Err(SnapshotError::OutsideSocket { path });
            }
            vsock.unix_socket = Some(path);
        }
        Ok(config)
    }

    /// Whether a snapshot may name a file of this host: one of this process names its own.
    fn may_name(&self, path: &Path, options: &RestoreOptions) -> bool {
        match &self.0.place {
            Place::Directory(directory) => options.outside_paths || path.starts_with(directory),
            Place::Memory(_) => true,
        }
    }

    /// Where a file of the snapshot is.
    pub(super) fn path(&self, name: &str) -> PathBuf {
        match &self.0.place {
            Place::Directory(directory) => directory.join(name),
            Place::Memory(temporary) => temporary.0.join(name),
        }
    }
}

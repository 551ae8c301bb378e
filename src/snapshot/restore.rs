//! A machine made from a snapshot.

use std::fs;
use std::path::{Path, PathBuf};

use super::directory::disk_name;
use super::error::SnapshotError;
use super::{Inner, Place, Purpose, Snapshot};
use crate::arch::layout;
use crate::config::{MachineConfig, NetBackend, RestoreOptions, Writes};
use crate::console::Console;
use crate::disk::is_used_delta;
use crate::error::Error;
use crate::kvm::Vcpu;
use crate::machine::{Machine, Shell, ShellConfig};
use crate::memory::{GuestRam, MemoryError};
use crate::phase::Phase;
use crate::timings::Recorder;

impl Snapshot {
    /// What a machine that goes on from here needs of KVM, made ahead: over addresses alone.
    pub(crate) fn shell(
        &self,
        options: &RestoreOptions,
        recorder: &mut Recorder,
    ) -> Result<Shell, Error> {
        let mut config = self.0.state.config.clone();
        self.apply(options, &mut config)?;
        self.shell_over(&config, |_| Ok(()), recorder)
    }

    /// The same, over memory that `fill` gives its content first: KVM need not follow then what is
    /// mapped there.
    fn shell_over(
        &self,
        config: &MachineConfig,
        fill: impl FnOnce(&GuestRam) -> Result<(), MemoryError>,
        recorder: &mut Recorder,
    ) -> Result<Shell, Error> {
        let host = &self.0.state.host;
        let ranges = layout::ram_ranges(config.memory_bytes);
        let ram = recorder.run(Phase::Memory, || {
            let ram = GuestRam::reserve(&ranges)?;
            fill(&ram)?;
            Ok::<_, MemoryError>(ram)
        })?;
        let shell = Shell::new(&ShellConfig::as_shown(host, config)?, ram, recorder)?;
        // The host stays what it is: where one VM went on, the next will.
        if self.0.fresh.get().is_none() {
            recorder.run(Phase::Kvm, || shell.fits(host))?;
        }
        recorder.run(Phase::Vcpus, || shell.look_ahead(&self.0.fresh))?;
        Ok(shell)
    }

    /// A machine that goes on from here, with its vCPUs, around a shell that was made for it.
    pub(crate) fn machine(
        &self,
        shell: Option<Shell>,
        options: &RestoreOptions,
        purpose: Purpose,
        console: Option<&Console>,
        recorder: &mut Recorder,
    ) -> Result<(Machine, Vec<Vcpu>), Error> {
        let Inner { state, image, written, .. } = &*self.0;
        let config = recorder.run(Phase::Config, || {
            let config = self.config(options, purpose)?;
            config.check()?;
            Ok::<_, SnapshotError>(config)
        })?;
        let shell = match shell {
            Some(shell) if shell.shows(state.host.cpuid()?) => {
                recorder.run(Phase::Memory, || shell.ram().map_image(image))?;
                shell
            }
            Some(_) => return Err(SnapshotError::OtherShell.into()),
            None => self.shell_over(&config, |ram| ram.map_image(image), recorder)?,
        };
        let (machine, vcpus) = Machine::from_shell(shell, &config, console, recorder)?;
        self.check_disks_in_place()?;
        let clock = options.clock_of(&config);
        recorder.run(Phase::Restore, || machine.restore(&vcpus, &state.machine, clock))?;
        if let Some(written) = written.get().filter(|_| options.populate) {
            recorder.timed(Phase::Populate, || machine.ram().populate(written));
        }
        Ok((machine, vcpus))
    }

    /// The configuration of a machine that goes on from here.
    pub(super) fn config(
        &self,
        options: &RestoreOptions,
        purpose: Purpose,
    ) -> Result<MachineConfig, SnapshotError> {
        let state = &self.0.state;
        let mut config = state.config.clone();
        self.apply(options, &mut config)?;
        self.check_networks(options, &config)?;
        self.check_services(options, &config)?;
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
            if is_given && disk.base().is_none() {
                return Err(SnapshotError::NoBase { index });
            }
            if delta.is_some() && block.writes == Writes::Refused {
                return Err(SnapshotError::ReadOnly { index });
            }
            let disk = moved.as_ref().unwrap_or(disk);
            let base = disk.base().filter(|base| !is_given && !self.may_name(base, options));
            let left = disk.left_delta(block).filter(|left| !self.may_name(left, options));
            if let Some(path) = base.or(left) {
                return Err(SnapshotError::OutsideDisk { index, path: path.to_owned() });
            }
            disk.check_left(block)?;
            *block = match purpose {
                Purpose::Sleep => {
                    disk.check_base()?;
                    disk.own_config(block, &saved)
                }
                Purpose::Clones => {
                    if let Some(path) = delta.filter(|path| is_used_delta(path)) {
                        return Err(SnapshotError::UsedDelta { index, path: path.to_owned() });
                    }
                    disk.config(block, &saved, delta)
                }
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

    /// Changes the saved configuration as the caller says. The KVM device, and whether vCPU threads are confined, are
    /// this host's to say as well, not whoever's wrote the snapshot.
    fn apply(
        &self,
        options: &RestoreOptions,
        config: &mut MachineConfig,
    ) -> Result<(), SnapshotError> {
        options.apply(config)?;
        if options.kvm_device.is_none() && matches!(self.0.place, Place::Directory(_)) {
            config.kvm_device = MachineConfig::default().kvm_device;
        }
        config.seccomp |= options.seccomp.is_none() && !self.is_trusted(options);
        Ok(())
    }

    /// A tap, or a program and the ports that it forwards, are of this host too.
    fn check_networks(
        &self,
        options: &RestoreOptions,
        config: &MachineConfig,
    ) -> Result<(), SnapshotError> {
        let all = config.networks.iter().enumerate();
        for (index, network) in all.filter(|(index, _)| !options.networks.contains_key(index)) {
            let what = match &network.backend {
                NetBackend::Missing => return Err(SnapshotError::NoNetwork { index }),
                NetBackend::Tap(name) => format!("the tap {name:?}"),
                NetBackend::User(user) => format!("the program {}", user.program.display()),
                NetBackend::TapFd(_) | NetBackend::Socket(_) => continue,
            };
            if !self.is_trusted(options) {
                return Err(SnapshotError::OutsideNetwork { index, what });
            }
        }
        Ok(())
    }

    /// So is what the agent's services are connected to.
    fn check_services(
        &self,
        options: &RestoreOptions,
        config: &MachineConfig,
    ) -> Result<(), SnapshotError> {
        let services = config.agent.iter().flat_map(|agent| agent.services.keys());
        let mut saved = services.filter(|name| !options.services.contains_key(*name));
        match saved.next() {
            Some(name) if !self.is_trusted(options) => {
                Err(SnapshotError::OutsideService { name: name.clone() })
            }
            _ => Ok(()),
        }
    }

    /// Whether a snapshot may name what is this host's: one of this process names its own.
    fn is_trusted(&self, options: &RestoreOptions) -> bool {
        match &self.0.place {
            Place::Directory(_) => options.outside_paths,
            Place::Memory(_) => true,
        }
    }

    /// Whether a snapshot may name a file: one that lies in its directory, and is no link to
    /// elsewhere, or any where it is trusted.
    fn may_name(&self, path: &Path, options: &RestoreOptions) -> bool {
        let Place::Directory(directory) = &self.0.place else { return true };
        options.outside_paths || lies_in(path, &directory.path)
    }

    /// Where a file of the snapshot is.
    pub(super) fn path(&self, name: &str) -> PathBuf {
        match &self.0.place {
            Place::Directory(directory) => directory.path.join(name),
            Place::Memory(temporary) => temporary.path.join(name),
        }
    }
}

/// Whether a path is of a file that lies in this directory itself, and is no link.
pub(super) fn lies_in(path: &Path, directory: &Path) -> bool {
    let (Some(name), Some(parent)) = (path.file_name(), path.parent()) else { return false };
    let (Ok(parent), Ok(directory)) = (fs::canonicalize(parent), fs::canonicalize(directory))
    else {
        return false;
    };
    parent == directory && !directory.join(name).is_symlink()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_lies_in_a_directory_is_not_what_only_looks_so() {
        let temporary = super::super::Temporary::new().unwrap();
        let inside = temporary.path.join("disk-0");
        assert!(lies_in(&inside, &temporary.path), "what is not there yet");
        std::os::unix::fs::symlink("/etc/passwd", &inside).unwrap();
        assert!(!lies_in(&inside, &temporary.path), "a link");
        for path in ["../x", "a/../../x", "..", "memory-0/..", "/etc/passwd", ""] {
            assert!(!lies_in(&temporary.path.join(path), &temporary.path), "{path}");
        }
        assert!(!lies_in(Path::new("etc"), Path::new("/")), "a relative path");
    }
}

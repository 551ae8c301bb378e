//! What a restored VM gets of this host, in place of what the snapshot's VM had.

use std::collections::BTreeMap;
use std::io::Write;
use std::path::PathBuf;
use std::sync::{Arc, Mutex};

use super::agent::{HostService, InterfaceConfig};
use super::{ConfigError, ConsoleOutput, MachineConfig, NetConfig, make_absolute};

/// How a snapshot becomes a VM. What is not set is as it was: the clone has the devices of the
/// VM that was saved, the same network interfaces and vsock path, no console writer, and disks
/// whose writes are its own.
///
/// ```
/// use dormouse::{NetConfig, RestoreOptions};
///
/// let options = RestoreOptions::new()
///     .console(std::io::stderr())
///     .disk_delta(0, "vm-7.delta")
///     .network(0, NetConfig::tap("tap7"));
/// ```
#[derive(Clone, Debug)]
pub struct RestoreOptions {
    console: Option<ConsoleOutput>,
    pub(crate) disks: BTreeMap<usize, DiskOverride>,
    pub(crate) networks: BTreeMap<usize, NetConfig>,
    pub(crate) vsock_socket: Option<PathBuf>,
    pub(crate) hostname: Option<String>,
    pub(crate) interfaces: Vec<InterfaceConfig>,
    pub(crate) services: BTreeMap<String, HostService>,
    pub(crate) seccomp: Option<bool>,
    pub(crate) kvm_device: Option<PathBuf>,
    pub(crate) clock: Option<Clock>,
    pub(crate) populate: bool,
    pub(crate) outside_paths: bool,
}

/// Where a clone's disk is.
#[derive(Clone, Debug, Default)]
pub(crate) struct DiskOverride {
    pub(crate) base: Option<PathBuf>,
    pub(crate) delta: Option<PathBuf>,
}

/// What the clocks say that a restored guest counts by: CLOCK_MONOTONIC, timers and the scheduler go by them, and CLOCK_REALTIME
/// until somebody sets it. Source: KVM_SET_CLOCK, §4.30 of the KVM API's documentation.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub enum Clock {
    /// The guest slept: its clocks went on. `date` is right at the first instruction, CLOCK_MONOTONIC
    /// is later by the time that the VM was suspended, and timers that are due have run out. What a guest without an
    /// agent gets, in which nobody else would set its wall clock.
    ///
    /// The scheduler's clock goes on by as much, which not every kernel bears after weeks: Debian's 6.12.117 has died of it
    /// (a NULL pointer in `pick_task_fair`), two times in twenty after 30 days.
    Advance,
    /// The guest was frozen: its clocks go on where they stopped, as those of a machine that was suspended to RAM. No timer
    /// is early; the wall clock is late by the time that the VM was suspended, until somebody in the guest sets it.
    /// The agent does when `MicroVm::agent` finds it, before what `Agent::freeze` stopped goes on: this is what a
    /// guest with an agent gets. CLOCK_BOOTTIME stands still too, other than after a suspend to RAM. The clocks go on with the
    /// restore, and so while the VM is paused before it is resumed.
    Freeze,
}

impl Default for RestoreOptions {
    fn default() -> Self {
        Self {
            console: None,
            disks: BTreeMap::new(),
            networks: BTreeMap::new(),
            vsock_socket: None,
            hostname: None,
            interfaces: Vec::new(),
            services: BTreeMap::new(),
            seccomp: None,
            kvm_device: None,
            clock: None,
            populate: true,
            outside_paths: false,
        }
    }
}

impl RestoreOptions {
    /// Everything as it was, where the snapshot has it: what its files name outside of their directory is
    /// refused, see [`outside_paths`](Self::outside_paths).
    pub fn new() -> Self {
        Self::default()
    }

    /// Copies the console's output to a writer, as
    /// [`VmConfig::console`](crate::VmConfig::console) does; VMs that are made with clones of these options share it, as
    /// do those of a [`Pool`](crate::Pool).
    #[must_use]
    pub fn console(mut self, writer: impl Write + Send + 'static) -> Self {
        self.console = Some(ConsoleOutput(Arc::new(Mutex::new(writer))));
        self
    }

    pub(crate) fn console_output(mut self, output: Option<ConsoleOutput>) -> Self {
        self.console = output;
        self
    }

    /// The file that a disk stands on is at another place now. Disks are counted from 0. It has
    /// to be the same file, byte for byte: its size is checked. A disk that is saved whole stands on no other file,
    /// and is refused one.
    #[must_use]
    pub fn disk_base(mut self, index: usize, path: impl Into<PathBuf>) -> Self {
        self.disks.entry(index).or_default().base = Some(absolute(path));
        self
    }

    /// What this VM writes to a disk goes to this file, which is created: one that another VM has written to is refused,
    /// since it holds a later disk than the one that this VM's memory is about. Without it it goes to a file
    /// without a name in the folder for temporary files, and is gone with the VM. Where the disk stands on
    /// a copy in a snapshot, a VM that is suspended is saved with what is in the file, and goes on without it.
    /// A read-only disk is refused one.
    #[must_use]
    pub fn disk_delta(mut self, index: usize, path: impl Into<PathBuf>) -> Self {
        self.disks.entry(index).or_default().delta = Some(absolute(path));
        self
    }

    /// Connects a network interface otherwise: another tap, another hardware address. All of the interface's
    /// configuration is this one's, also its MTU and rate limits. Interfaces are counted from 0. A guest that runs has read its address before: it learns of a new one
    /// by an interrupt, and Linux takes it when the driver binds again.
    #[must_use]
    pub fn network(mut self, index: usize, network: NetConfig) -> Self {
        self.networks.insert(index, network);
        self
    }

    /// Another path for the vsock device's UNIX socket: two VMs cannot have one.
    #[must_use]
    pub fn vsock_unix_socket(mut self, path: impl Into<PathBuf>) -> Self {
        self.vsock_socket = Some(path.into());
        self
    }

    /// Another hostname for a clone, which the agent in it sets before it is ready. As it was,
    /// unless set.
    #[cfg(feature = "agent")]
    #[must_use]
    pub fn hostname(mut self, name: impl Into<String>) -> Self {
        self.hostname = Some(name.into());
        self
    }

    /// Other addresses for the network interfaces of a clone, eth0's first, in place of all that
    /// [`AgentConfig::interface`](crate::AgentConfig::interface) gave, and of no fewer interfaces: one that shall
    /// have none is an [`InterfaceConfig::new`]. The agent in it sets them before it is ready. An empty list leaves
    /// them as they are.
    #[cfg(feature = "agent")]
    #[must_use]
    pub fn interfaces(mut self, interfaces: impl IntoIterator<Item = InterfaceConfig>) -> Self {
        self.interfaces = interfaces.into_iter().collect();
        self
    }

    /// What the agent's service of this name is connected to, in place of what
    /// [`AgentConfig::service`](crate::AgentConfig::service) said.
    #[cfg(feature = "agent")]
    #[must_use]
    pub fn service(mut self, name: impl Into<String>, service: HostService) -> Self {
        self.services.insert(name.into(), service);
        self
    }

    /// What the guest's clocks say, also when it wakes again in this process. Unless set [`Clock::Freeze`] where the guest
    /// has an agent, which sets its wall clock when `MicroVm::agent` finds it, and [`Clock::Advance`] elsewhere; the
    /// latter is also for a host that never asks for the agent.
    #[must_use]
    pub fn clock(mut self, clock: Clock) -> Self {
        self.clock = Some(clock);
        self
    }

    /// What they say in a VM of this configuration.
    pub(crate) fn clock_of(&self, config: &MachineConfig) -> Clock {
        // Who has no use for agents sets no clock by them.
        let is_set = cfg!(feature = "agent") && config.agent.is_some();
        self.clock.unwrap_or(if is_set { Clock::Freeze } else { Clock::Advance })
    }

    /// Whether the pages that such a VM wrote first the last time are made its own before it
    /// runs: 2 µs each instead of some 6 at a fault. On unless set.
    #[must_use]
    pub fn populate(mut self, on: bool) -> Self {
        self.populate = on;
        self
    }

    /// Whether the snapshot may name what is outside of its directory: the disks that it stands
    /// on, the path of a UNIX socket, taps, passt with its forwarded ports, and what an agent's
    /// services are connected to; and whether its vCPU threads go unconfined as those of the saved VM did. Off unless set, because whoever
    /// wrote the snapshot would choose what the guest gets of this host; what is given here needs
    /// no leave. A snapshot in memory is this process's own, and has it.
    #[must_use]
    pub fn outside_paths(mut self, on: bool) -> Self {
        self.outside_paths = on;
        self
    }

    /// As [`VmConfig::seccomp`](crate::VmConfig::seccomp).
    #[must_use]
    pub fn seccomp(mut self, on: bool) -> Self {
        self.seccomp = Some(on);
        self
    }

    /// The KVM device node. Unless set it is `/dev/kvm`, also where the saved VM had another; a snapshot in memory is
    /// this process's own, and its VMs have the one that it had.
    #[must_use]
    pub fn kvm_device(mut self, path: impl Into<PathBuf>) -> Self {
        self.kvm_device = Some(absolute(path));
        self
    }

    /// Changes a saved configuration, but for its disks.
    pub(crate) fn apply(&self, config: &mut MachineConfig) -> Result<(), ConfigError> {
        config.console_writer = self.console.clone();
        for (&index, network) in &self.networks {
            let count = config.networks.len();
            let slot = config.networks.get_mut(index);
            *slot.ok_or(ConfigError::NoNetwork { index, count })? = network.clone();
        }
        if let Some(path) = &self.vsock_socket {
            let mut vsock = config.vsock().ok_or(ConfigError::NoVsock)?;
            vsock.unix_socket = Some(path.clone());
            config.vsock = Some(vsock);
        }
        self.apply_to_agent(config)?;
        if let Some(on) = self.seccomp {
            config.seccomp = on;
        }
        if let Some(path) = &self.kvm_device {
            config.kvm_device.clone_from(path);
        }
        Ok(())
    }

    fn apply_to_agent(&self, config: &mut MachineConfig) -> Result<(), ConfigError> {
        if let Some(hostname) = &self.hostname {
            let agent = config.agent.as_mut();
            let agent = agent.ok_or(ConfigError::NoAgent { what: "hostname" })?;
            agent.hostname = Some(hostname.clone());
        }
        if !self.interfaces.is_empty() {
            let agent = config.agent.as_mut();
            let agent = agent.ok_or(ConfigError::NoAgent { what: "address" })?;
            // One that is not named would keep the address of the guest that was saved.
            let (given, saved) = (self.interfaces.len(), agent.interfaces.len());
            if given < saved {
                return Err(ConfigError::FewerInterfaces { given, saved });
            }
            agent.interfaces.clone_from(&self.interfaces);
        }
        for (name, service) in &self.services {
            let agent = config.agent.as_mut();
            let agent = agent.ok_or(ConfigError::NoAgent { what: "service" })?;
            let port = agent.services.get_mut(name);
            port.ok_or_else(|| ConfigError::NoService { name: name.clone() })?.service =
                service.clone();
        }
        Ok(())
    }
}

/// A path that is the same one when the process is elsewhere.
fn absolute(path: impl Into<PathBuf>) -> PathBuf {
    let mut path = path.into();
    make_absolute(&mut path);
    path
}

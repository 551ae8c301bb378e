//! The agent in the guest: what it sets up before it is ready, and what the guest reaches of the host.

mod check;
mod disks;
mod error;
mod hooks;
mod setup;
mod signal;

use std::collections::{BTreeMap, BTreeSet};
use std::net::SocketAddr;
use std::path::PathBuf;

use serde::{Deserialize, Serialize};

pub(crate) use self::disks::Overlay;
pub use self::disks::{MountConfig, RootDisk};
pub(crate) use self::error::AgentConfigError;
pub(crate) use self::hooks::HookAction;
pub use self::hooks::{Hook, HookName};
#[cfg(feature = "image")]
pub(crate) use self::signal::signal;
use super::{MachineConfig, VsockConfig};
use crate::bounded;
use crate::protocol;

/// An agent in the guest, as its first process: it sets the guest up, and does there what this process asks for.
///
/// The guest boots with an initramfs of the agent and of those kernel modules that it needs. The agent
/// mounts, configures the network, and starts what the guest is there for; then it is ready. It needs a
/// vsock device, which a VM with an agent has, with or without [`VmConfig::vsock`](crate::VmConfig::vsock).
///
/// It is plain data, checked when a VM is created from it; a snapshot has it too. Without more than
/// `new`, the agent and the initramfs are all that the guest has.
///
/// ```
/// use dormouse::{AgentConfig, BlockConfig, Entrypoint, InterfaceConfig, Kernel, RootDisk, VmConfig};
///
/// let agent = AgentConfig::new()
///     .root(RootDisk::new(0).fs_type("ext4").overlay_memory(0))
///     .hostname("worker-7")
///     .interface(InterfaceConfig::new().address("10.0.0.2/24").gateway("10.0.0.1"))
///     .nameserver("10.0.0.1")
///     .entrypoint(Entrypoint::new(["/usr/bin/app", "--port=8080"]).env("MODE", "production"));
/// # use dormouse::NetConfig;
/// let config = VmConfig::new(Kernel::file("vmlinux"))
///     .block(BlockConfig::new("rootfs.ext4").read_only())
///     .network(NetConfig::tap("tap0"))
///     .agent(agent);
/// ```
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct AgentConfig {
    pub(crate) root: Option<RootDisk>,
    #[serde(deserialize_with = "bounded::list")]
    pub(crate) mounts: Vec<MountConfig>,
    pub(crate) hostname: Option<String>,
    #[serde(deserialize_with = "bounded::list")]
    pub(crate) interfaces: Vec<InterfaceConfig>,
    #[serde(deserialize_with = "bounded::list")]
    pub(crate) nameservers: Vec<String>,
    pub(crate) services: BTreeMap<String, ServicePort>,
    pub(crate) hooks: BTreeMap<HookName, Hook>,
    pub(crate) entrypoint: Option<Entrypoint>,
    pub(crate) end_with_entrypoint: bool,
    pub(crate) modules: BTreeSet<String>,
    /// Of the boot alone: a snapshot has none.
    pub(crate) modules_dir: Option<PathBuf>,
    /// Likewise.
    pub(crate) binary: Option<PathBuf>,
}

/// A service, and the port of the guest's loopback that stands for it.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub(crate) struct ServicePort {
    pub(crate) port: u16,
    pub(crate) service: HostService,
}

impl AgentConfig {
    /// An agent that has nothing to set up.
    pub fn new() -> Self {
        Self::default()
    }

    /// The disk with the guest's root file system. The initramfs is the root, unless set.
    #[must_use]
    pub fn root(mut self, root: RootDisk) -> Self {
        self.root = Some(root);
        self
    }

    /// Mounts another disk. They are mounted in the order in which they were added.
    #[must_use]
    pub fn mount(mut self, mount: MountConfig) -> Self {
        self.mounts.push(mount);
        self
    }

    /// The guest's hostname (RFC 1123): up to 64 letters, digits, hyphens, and dots between them. The guest's
    /// own, from /etc/hostname, unless set.
    #[must_use]
    pub fn hostname(mut self, name: impl Into<String>) -> Self {
        self.hostname = Some(name.into());
        self
    }

    /// Addresses of the next network interface: the first is eth0's, and so on. An interface without is
    /// left to the guest.
    #[must_use]
    pub fn interface(mut self, interface: InterfaceConfig) -> Self {
        self.interfaces.push(interface);
        self
    }

    /// The address of a name server, IPv4 or IPv6, for /etc/resolv.conf, which is left as it is
    /// where none is given.
    #[must_use]
    pub fn nameserver(mut self, address: impl Into<String>) -> Self {
        self.nameservers.push(address.into());
        self
    }

    /// A service of the host that the guest's programs reach at a TCP port of their loopback
    /// (127.0.0.1), without a network: what connects there is connected to `service`, by this process.
    /// A snapshot that is not trusted names none: see [`RestoreOptions::service`](crate::RestoreOptions::service).
    #[must_use]
    pub fn service(mut self, name: impl Into<String>, port: u16, service: HostService) -> Self {
        self.services.insert(name.into(), ServicePort { port, service });
        self
    }

    /// What is done in the guest at a moment of its life.
    #[must_use]
    pub fn hook(mut self, name: HookName, hook: Hook) -> Self {
        self.hooks.insert(name, hook);
        self
    }

    /// What the guest is there for: a program that is started when everything else is set up. None unless set.
    #[must_use]
    pub fn entrypoint(mut self, entrypoint: Entrypoint) -> Self {
        self.entrypoint = Some(entrypoint);
        self
    }

    /// Whether the guest switches itself off when the entrypoint ends. Off unless set.
    #[must_use]
    pub fn end_with_entrypoint(mut self, on: bool) -> Self {
        self.end_with_entrypoint = on;
        self
    }

    /// Another module of the guest's kernel, as modprobe knows it, with what it depends on. Those of the
    /// configured devices, and of the file systems that are named, are loaded without being named here.
    #[must_use]
    pub fn module(mut self, name: impl Into<String>) -> Self {
        self.modules.insert(name.into());
        self
    }

    /// A directory like /lib/modules/6.12.9 with the modules of the guest's kernel. Unless set: that of an installed
    /// kernel ([`Kernel::installed`](crate::Kernel::installed), [`Kernel::installed_in`](crate::Kernel::installed_in),
    /// an [`InstalledKernel`](crate::InstalledKernel)), or what the package of [`Kernel::deb`](crate::Kernel::deb)
    /// has. Any other kernel is taken to have built in what it needs.
    #[must_use]
    pub fn modules_dir(mut self, path: impl Into<PathBuf>) -> Self {
        self.modules_dir = Some(path.into());
        self
    }

    /// An agent in place of the one in this library: a statically linked ELF executable for the guest's
    /// processor, made from the same version.
    #[must_use]
    pub fn binary(mut self, path: impl Into<PathBuf>) -> Self {
        self.binary = Some(path.into());
        self
    }
}

/// The addresses of a network interface of the guest.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct InterfaceConfig {
    #[serde(deserialize_with = "bounded::list")]
    pub(crate) addresses: Vec<String>,
    #[serde(deserialize_with = "bounded::list")]
    pub(crate) gateways: Vec<String>,
}

impl InterfaceConfig {
    /// No address.
    pub fn new() -> Self {
        Self::default()
    }

    /// An address with the prefix of its network, IPv4 or IPv6: `10.0.0.2/24`, `fd00::2/64`.
    #[must_use]
    pub fn address(mut self, address: impl Into<String>) -> Self {
        self.addresses.push(address.into());
        self
    }

    /// The router for all that is not on the interface's own networks, IPv4 or IPv6.
    #[must_use]
    pub fn gateway(mut self, address: impl Into<String>) -> Self {
        self.gateways.push(address.into());
        self
    }
}

/// What the host connects a guest's program to.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
#[non_exhaustive]
pub enum HostService {
    /// A TCP port, of the host or of whatever the host reaches.
    Tcp(SocketAddr),
    /// A UNIX stream socket, by its absolute path of up to 107 bytes.
    Unix(PathBuf),
}

/// A program of the guest.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Entrypoint {
    #[serde(deserialize_with = "bounded::words")]
    pub(crate) argv: Vec<String>,
    #[serde(default)]
    pub(crate) env: BTreeMap<String, String>,
    #[serde(default)]
    pub(crate) cwd: Option<String>,
    #[serde(default)]
    pub(crate) user: Option<String>,
    #[serde(default)]
    pub(crate) stop_signal: Option<String>,
}

impl Entrypoint {
    /// A program and its arguments. Without a `/`, it is looked for in PATH.
    pub fn new<S: Into<String>>(argv: impl IntoIterator<Item = S>) -> Self {
        let argv = argv.into_iter().map(Into::into).collect();
        Self { argv, env: BTreeMap::new(), cwd: None, user: None, stop_signal: None }
    }

    /// A variable of its environment. All that it has are these, and unless they are among them
    /// `PATH=/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin`, and `HOME`: `/root`, or
    /// where a [user](Self::user) is set that one's home directory in the guest's /etc/passwd (`/root` for root and `/` for
    /// others, where it is not there).
    #[must_use]
    pub fn env(mut self, name: impl Into<String>, value: impl Into<String>) -> Self {
        self.env.insert(name.into(), value.into());
        self
    }

    /// Its working directory, an absolute path; `/` unless set.
    #[must_use]
    pub fn current_dir(mut self, path: impl Into<String>) -> Self {
        self.cwd = Some(path.into());
        self
    }

    /// `user`, `uid`, `user:group` or `uid:gid`, of the guest's /etc/passwd and /etc/group; root unless set.
    #[must_use]
    pub fn user(mut self, user: impl Into<String>) -> Self {
        self.user = Some(user.into());
        self
    }

    /// The signal that asks it to end when the guest is [shut down](crate::MicroVm::shutdown): `SIGQUIT`, `QUIT`,
    /// `3`, `SIGRTMIN+3`. It alone gets it, and what it has started gets none: that is for it to end. Unless set, SIGTERM, as all
    /// other processes get.
    #[must_use]
    pub fn stop_signal(mut self, signal: impl Into<String>) -> Self {
        self.stop_signal = Some(signal.into());
        self
    }
}

impl MachineConfig {
    /// The vsock device: that of the configuration, or the one that an agent needs.
    pub(crate) fn vsock(&self) -> Option<VsockConfig> {
        let needed = || self.agent.as_ref().map(|_| VsockConfig::default());
        self.vsock.clone().or_else(needed)
    }

    /// The port of the host at which the agent calls.
    pub(crate) fn agent_port(&self) -> Option<u32> {
        self.agent.as_ref().map(|_| protocol::HOST_PORT)
    }
}

#[cfg(test)]
mod tests;

//! What a VM is made of: plain data, set by a builder or read by serde, checked once.
//!
//! [`VmConfig`] is the whole; [`MachineConfig`] is the part that the machine itself needs, which
//! is everything but what it boots.

#[cfg_attr(
    not(feature = "agent"),
    allow(dead_code, unreachable_pub, reason = "a VM without an agent has none of it")
)]
mod agent;
mod balloon;
mod block;
mod cpu;
mod network;
mod nothing_else;
mod rate_limit;
mod restore;
mod vsock;

#[cfg(feature = "agent")]
pub(crate) use self::agent::HookAction;
#[cfg(feature = "image")]
pub(crate) use self::agent::signal;
#[cfg_attr(
    not(feature = "agent"),
    allow(unused_imports, unreachable_pub, reason = "as above")
)]
pub use self::agent::{
    AgentConfig, Entrypoint, Hook, HookName, HostService, InterfaceConfig, MountConfig, RootDisk,
};
pub(crate) use self::agent::{AgentConfigError, Overlay};
pub use self::balloon::BalloonConfig;
pub use self::block::BlockConfig;
pub(crate) use self::block::{FileFacts, Writes};
pub use self::cpu::{CpuTemplate, CpuidRegister};
pub(crate) use self::network::{Cable, CableRest, MacAddress, NetBackend};
pub use self::network::{NetConfig, UserNetwork};
pub use self::rate_limit::RateLimit;
pub use self::restore::{Clock, RestoreOptions};
pub use self::vsock::VsockConfig;

use std::io::Write;
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex};

use serde::{Deserialize, Serialize};
use thiserror::Error as ThisError;

use self::nothing_else::NothingElse;
use crate::bounded;
use crate::cmdline::Cmdline;
use crate::console::ConsoleWriter;
use crate::error::{Error, ErrorKind};
use crate::initramfs::Initramfs;
use crate::kernel::Kernel;

const PAGE_BYTES: u64 = 4096;
const MIN_MEMORY_BYTES: u64 = 2 << 20;
const MAX_MEMORY_BYTES: u64 = 1 << 40;
const MAX_VCPUS: u8 = 32;
/// The IOAPIC's inputs that legacy devices leave.
const MAX_VIRTIO_DEVICES: usize = 19;
const MAX_QUEUES: u16 = 32;
const MAX_VSOCK_CONNECTIONS: usize = 65_536;
const MAX_CONSOLE_TAIL_BYTES: usize = 64 << 20;

/// Which value is refused, and what would be taken.
#[derive(Debug, ThisError)]
pub(crate) enum ConfigError {
    #[error(
        "{bytes} bytes of memory: it takes a multiple of 4096 from {MIN_MEMORY_BYTES} (2 MiB) to \
         {MAX_MEMORY_BYTES} (1 TiB)"
    )]
    Memory { bytes: u64 },
    #[error("{count} vCPUs: it takes 1 to {MAX_VCPUS}")]
    Vcpus { count: u8 },
    #[error("{count} virtio devices: it takes up to {MAX_VIRTIO_DEVICES}")]
    VirtioDevices { count: usize },
    #[error("the id {id:?} of a disk: it takes up to 20 bytes of printable ASCII without spaces")]
    BlockId { id: String },
    #[error("{count} queues of a disk: it takes 1 to {MAX_QUEUES}")]
    BlockQueues { count: u16 },
    #[error("{count} frozen deltas of a disk: it takes up to {max}")]
    FrozenDeltas { count: usize, max: usize },
    #[error("writes to the disk {} would go below its deltas", path.display())]
    WritesBelowDelta { path: PathBuf },
    #[error("vsock CID {cid}: a guest takes 3 to 4294967294")]
    GuestCid { cid: u32 },
    #[error("{count} vsock connections: it takes 1 to {MAX_VSOCK_CONNECTIONS}")]
    VsockConnections { count: usize },
    #[error("an MTU of {mtu} bytes: it takes 68 to 65535")]
    Mtu { mtu: u16 },
    #[error("the hardware address {mac}: it takes one of a single station, not of a group")]
    Mac { mac: MacAddress },
    #[error("a rate limit of nothing, which no request would pass: it takes 1 or more")]
    RateOfNothing,
    #[error("a burst of {burst} without a rate, which it would be a burst of")]
    BurstWithoutRate { burst: u64 },
    #[error("a rate limit of an entropy device that the VM does not have")]
    LimitWithoutEntropy,
    #[error("port {port} of the host is forwarded twice")]
    ForwardedTwice { port: u16 },
    #[error("a forwarded port 0: it takes 1 to 65535 of the host and of the guest")]
    ForwardedNothing,
    #[error("two {what} of one IP version in a user network: it takes one of each")]
    TwoOfOneVersion { what: &'static str },
    #[error("a network interface with nothing at its other end")]
    NoBackend,
    #[error("there is no network interface {index}: the snapshot has {count}, counted from 0")]
    NoNetwork { index: usize, count: usize },
    #[error("the snapshot has no vsock device")]
    NoVsock,
    #[error("the snapshot has no agent, whose {what} could be another")]
    NoAgent { what: &'static str },
    #[error("addresses of {given} network interfaces, and the snapshot has some of {saved}")]
    FewerInterfaces { given: usize, saved: usize },
    #[error("the snapshot's agent has no service {name:?}")]
    NoService { name: String },
    #[error(transparent)]
    Agent(#[from] AgentConfigError),
    #[error("a console tail of {bytes} bytes: it takes 0 to {MAX_CONSOLE_TAIL_BYTES}")]
    ConsoleTail { bytes: usize },
}

impl From<ConfigError> for Error {
    fn from(error: ConfigError) -> Self {
        let fix = match &error {
            ConfigError::Agent(AgentConfigError::NoDisk { .. }) => {
                Some("add the disk with `VmConfig::block`")
            }
            ConfigError::LimitWithoutEntropy => Some("add the device with `VmConfig::entropy`"),
            _ => None,
        };
        let error = Error::new(ErrorKind::Config, error);
        match fix {
            Some(fix) => error.fix(fix),
            None => error,
        }
    }
}

/// Everything that a VM is made of.
///
/// It is plain data: it clones, and serializes but for what cannot be written down (a kernel or
/// initramfs in memory, the console's writer). Values are checked when a VM is created from it.
///
/// ```
/// use dormouse::{Kernel, VmConfig};
///
/// let config = VmConfig::new(Kernel::file("vmlinux")).memory_mib(512).vcpus(2);
/// let json = serde_json::to_string(&config).unwrap();
/// let same: VmConfig = serde_json::from_str(&json).unwrap();
/// assert_eq!(same.memory_bytes(), 512 << 20);
/// ```
///
/// Serialized it has the names `kernel`, `initramfs`, `cmdline`, `memory_bytes`, `vcpus`, `cpu`, `console_tail_bytes`,
/// `blocks`, `networks`, `entropy`, `entropy_rate_limit`, `vsock`, `agent`, `balloon`, `seccomp` and `kvm_device`. All but
/// the kernel may be left out, and are then as in [`new`](Self::new); any other name is an error.
///
/// ```
/// # use dormouse::VmConfig;
/// let text = r#"{ "kernel": { "source": { "file": "vmlinux" } }, "memory_bytes": 536870912, "vcpus": 2 }"#;
/// let config: VmConfig = serde_json::from_str(text).unwrap();
/// assert_eq!(config.memory_bytes(), 512 << 20);
/// ```
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct VmConfig {
    kernel: Kernel,
    #[serde(default)]
    initramfs: Option<Initramfs>,
    #[serde(default)]
    cmdline: Cmdline,
    #[serde(flatten)]
    machine: MachineConfig,
    #[serde(flatten)]
    rest: NothingElse,
}

impl VmConfig {
    /// A VM with this kernel, 128 MiB of memory, one vCPU, no initramfs, the default command
    /// line, and the last 16 KiB of its console kept.
    pub fn new(kernel: Kernel) -> Self {
        Self {
            kernel,
            initramfs: None,
            cmdline: Cmdline::default(),
            machine: MachineConfig::default(),
            rest: NothingElse,
        }
    }

    /// The guest's first file system. None unless set.
    #[must_use]
    pub fn initramfs(mut self, initramfs: Initramfs) -> Self {
        self.initramfs = Some(initramfs);
        self
    }

    /// The whole command line, in place of the default one.
    #[must_use]
    pub fn cmdline(mut self, cmdline: Cmdline) -> Self {
        self.cmdline = cmdline;
        self
    }

    /// Guest memory in MiB: 2 to 1,048,576 (1 TiB).
    #[must_use]
    pub fn memory_mib(self, mib: u32) -> Self {
        self.memory(u64::from(mib) << 20)
    }

    /// Guest memory in bytes: a multiple of 4,096, from 2 MiB to 1 TiB. The host gives a page
    /// when the guest first uses it.
    #[must_use]
    pub fn memory(mut self, bytes: u64) -> Self {
        self.machine.memory_bytes = bytes;
        self
    }

    /// Virtual CPUs: 1 to 32, a thread each.
    #[must_use]
    pub fn vcpus(mut self, count: u8) -> Self {
        self.machine.vcpus = count;
        self
    }

    /// Hides CPU features from the guest, or sets bits, in what the host's CPU offers.
    #[must_use]
    pub fn cpu(mut self, template: CpuTemplate) -> Self {
        self.machine.cpu = template;
        self
    }

    /// Copies the console's output to a writer as it comes, a byte or a few at a time. It runs
    /// on the vCPU's thread: one that blocks stops that vCPU, one that fails is not called again. The VMs of a
    /// configuration that is cloned share the writer, one call at a time: give each one of its own.
    #[must_use]
    pub fn console(mut self, writer: impl Write + Send + 'static) -> Self {
        self.machine.console_writer = Some(ConsoleOutput(Arc::new(Mutex::new(writer))));
        self
    }

    /// How many of the console's last bytes are kept, for errors and [`Console::tail`]: 0 to
    /// 64 MiB; 16 KiB unless set.
    ///
    /// [`Console::tail`]: crate::Console::tail
    #[must_use]
    pub fn console_tail_bytes(mut self, bytes: usize) -> Self {
        self.machine.console_tail_bytes = bytes;
        self
    }

    /// Adds a disk. The guest finds disks in the order in which they were added: vda, vdb, …
    #[must_use]
    pub fn block(mut self, block: BlockConfig) -> Self {
        self.machine.blocks.push(block);
        self
    }

    /// Adds a network interface. The guest finds them in the order in which they were added, as
    /// eth0, eth1, … None unless set.
    #[must_use]
    pub fn network(mut self, network: NetConfig) -> Self {
        self.machine.networks.push(network);
        self
    }

    /// Gives the guest a virtio entropy device that is fed by the host's random source. Off
    /// unless set: a guest's CPU has a random instruction of its own. Source: virtio 1.2 §5.4.
    #[must_use]
    pub fn entropy(mut self, on: bool) -> Self {
        self.machine.entropy = on;
        self
    }

    /// Gives the guest a vsock device: streams between its programs and this process. Off unless
    /// set.
    #[must_use]
    pub fn vsock(mut self, vsock: VsockConfig) -> Self {
        self.machine.vsock = Some(vsock);
        self
    }

    /// Boots the guest with an agent as its first process, and the vsock device that it needs. The
    /// [`initramfs`](Self::initramfs), if there is one, is unpacked first, and its `/init` is not run. None
    /// unless set.
    #[cfg(feature = "agent")]
    #[must_use]
    pub fn agent(mut self, agent: AgentConfig) -> Self {
        self.machine.agent = Some(agent);
        self
    }

    /// Limits the entropy device, to 64 KiB a request besides; not limited unless set. It can be
    /// changed while the guest runs, see [`MicroVm::set_entropy_rate_limit`].
    ///
    /// [`MicroVm::set_entropy_rate_limit`]: crate::MicroVm::set_entropy_rate_limit
    #[must_use]
    pub fn entropy_rate_limit(mut self, limit: RateLimit) -> Self {
        self.machine.entropy_rate_limit = limit;
        self
    }

    /// Gives the guest a memory balloon. None unless set.
    #[must_use]
    pub fn balloon(mut self, balloon: BalloonConfig) -> Self {
        self.machine.balloon = Some(balloon);
        self
    }

    /// Whether the threads that run vCPUs are confined by seccomp. On unless set: such a thread
    /// may then use what is open, write, lock, allocate memory, sleep and read clocks; what it
    /// may not, such as opening a file or starting a thread or a program, fails with EPERM. That
    /// holds for what the embedding program does there too: in a console writer, a subscriber of
    /// `tracing`, or a handler of a fault. Files that they need are opened before; the backtrace
    /// of a panic there has addresses without names.
    ///
    /// `false` lifts it for this VM's vCPU threads. The device thread, which serves all VMs, is
    /// confined always.
    #[must_use]
    pub fn seccomp(mut self, on: bool) -> Self {
        self.machine.seccomp = on;
        self
    }

    /// The KVM device node; `/dev/kvm` unless set. For a jail that has it elsewhere.
    #[must_use]
    pub fn kvm_device(mut self, path: impl Into<PathBuf>) -> Self {
        self.machine.kvm_device = path.into();
        self
    }

    /// Guest memory in bytes.
    pub fn memory_bytes(&self) -> u64 {
        self.machine.memory_bytes
    }

    /// The same, with its kernel to be read anew.
    #[cfg(feature = "image")]
    pub(crate) fn with_kernel_unread(mut self) -> Self {
        self.kernel = self.kernel.unread();
        self
    }

    pub(crate) fn parts(&self) -> (&Kernel, Option<&Initramfs>, &Cmdline, &MachineConfig) {
        (&self.kernel, self.initramfs.as_ref(), &self.cmdline, &self.machine)
    }
}

/// The machine without what it boots.
#[derive(Clone, Debug, Serialize, Deserialize)]
#[serde(default)]
pub(crate) struct MachineConfig {
    pub(crate) memory_bytes: u64,
    pub(crate) vcpus: u8,
    pub(crate) cpu: CpuTemplate,
    pub(crate) console_tail_bytes: usize,
    #[serde(skip)]
    pub(crate) console_writer: Option<ConsoleOutput>,
    #[serde(deserialize_with = "bounded::list")]
    pub(crate) blocks: Vec<BlockConfig>,
    #[serde(deserialize_with = "bounded::list")]
    pub(crate) networks: Vec<NetConfig>,
    pub(crate) entropy: bool,
    /// As it is configured; see [`vsock`](Self::vsock()).
    pub(crate) vsock: Option<VsockConfig>,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub(crate) agent: Option<AgentConfig>,
    pub(crate) entropy_rate_limit: RateLimit,
    pub(crate) balloon: Option<BalloonConfig>,
    pub(crate) seccomp: bool,
    pub(crate) kvm_device: PathBuf,
}

impl Default for MachineConfig {
    fn default() -> Self {
        Self {
            memory_bytes: 128 << 20,
            vcpus: 1,
            cpu: CpuTemplate::default(),
            console_tail_bytes: 16 << 10,
            console_writer: None,
            blocks: Vec::new(),
            networks: Vec::new(),
            entropy: false,
            vsock: None,
            agent: None,
            entropy_rate_limit: RateLimit::default(),
            balloon: None,
            seccomp: true,
            kvm_device: Path::new("/dev/kvm").to_owned(),
        }
    }
}

impl MachineConfig {
    /// The same for somebody else: without descriptors, which are this process's alone. What an agent is booted
    /// from is of no use to it.
    pub(crate) fn to_be_saved(&self) -> Self {
        let networks = self.networks.iter().map(NetConfig::without_descriptor).collect();
        let agent = self.agent.clone();
        let agent = agent.map(|agent| AgentConfig { modules_dir: None, binary: None, ..agent });
        Self { networks, agent, vsock: self.vsock(), ..self.clone() }
    }

    /// The same with paths that do not begin where the process is now, which may be elsewhere later; but for
    /// [that of the socket](Self::make_socket_absolute).
    pub(crate) fn with_absolute_paths(&self) -> Self {
        let mut config = self.clone();
        config.blocks.iter_mut().for_each(BlockConfig::make_absolute);
        config.networks.iter_mut().for_each(NetConfig::make_absolute);
        make_absolute(&mut config.kvm_device);
        config
    }

    pub(crate) fn make_socket_absolute(&mut self) {
        self.vsock.iter_mut().flat_map(|vsock| &mut vsock.unix_socket).for_each(make_absolute);
    }

    /// Checks every value. Costs nothing.
    pub(crate) fn check(&self) -> Result<(), ConfigError> {
        let bytes = self.memory_bytes;
        if !bytes.is_multiple_of(PAGE_BYTES)
            || !(MIN_MEMORY_BYTES..=MAX_MEMORY_BYTES).contains(&bytes)
        {
            return Err(ConfigError::Memory { bytes });
        }
        if !(1..=MAX_VCPUS).contains(&self.vcpus) {
            return Err(ConfigError::Vcpus { count: self.vcpus });
        }
        let count = self.blocks.len()
            + self.networks.len()
            + usize::from(self.entropy)
            + usize::from(self.balloon.is_some())
            + usize::from(self.vsock().is_some());
        if count > MAX_VIRTIO_DEVICES {
            return Err(ConfigError::VirtioDevices { count });
        }
        let queues = self.blocks.iter().map(|block| block.queues);
        if let Some(count) = queues.into_iter().find(|count| !(1..=MAX_QUEUES).contains(count)) {
            return Err(ConfigError::BlockQueues { count });
        }
        let good_id = |id: &str| id.len() <= 20 && id.bytes().all(|byte| byte.is_ascii_graphic());
        if let Some(block) = self.blocks.iter().find(|block| !good_id(&block.id)) {
            return Err(ConfigError::BlockId { id: block.id.clone() });
        }
        if let Some(vsock) = &self.vsock {
            let (cid, count) = (vsock.guest_cid, vsock.max_connections);
            if !(3..u32::MAX).contains(&cid) {
                return Err(ConfigError::GuestCid { cid });
            }
            if !(1..=MAX_VSOCK_CONNECTIONS).contains(&count) {
                return Err(ConfigError::VsockConnections { count });
            }
        }
        self.networks.iter().try_for_each(NetConfig::check)?;
        for block in &self.blocks {
            block.check()?;
        }
        self.entropy_rate_limit.check()?;
        if !self.entropy && !self.entropy_rate_limit.is_unlimited() {
            return Err(ConfigError::LimitWithoutEntropy);
        }
        if let Some(agent) = &self.agent {
            agent.check(self)?;
        }
        if self.console_tail_bytes > MAX_CONSOLE_TAIL_BYTES {
            return Err(ConfigError::ConsoleTail { bytes: self.console_tail_bytes });
        }
        Ok(())
    }
}

/// A path that is empty, or begins in a directory that is gone, stays what it is: whoever opens it says so.
fn make_absolute(path: &mut PathBuf) {
    if let Ok(absolute) = std::path::absolute(&*path) {
        *path = absolute;
    }
}

/// A console writer in a configuration that can be cloned and printed.
#[derive(Clone)]
pub(crate) struct ConsoleOutput(pub(crate) ConsoleWriter);

impl std::fmt::Debug for ConsoleOutput {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str("ConsoleOutput")
    }
}

#[cfg(test)]
mod tests;

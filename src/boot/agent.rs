//! What the guest's kernel unpacks as its first file system: the user's archive, and behind it the agent
//! with what it needs.
//!
//! The kernel unpacks one archive after the other, each at a multiple of four bytes, and a later file takes
//! the place of an earlier one. Source: Linux Documentation/driver-api/early-userspace/buffer-format.rst.

use std::io;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use thiserror::Error as ThisError;

use crate::config::{AgentConfig, MachineConfig, Overlay};
use crate::error::{Error, ErrorKind};
use crate::initramfs::Initramfs;
use crate::input_file;
use crate::kernel::Kernel;
use crate::modules::{Module, ModuleError};
use crate::protocol::{MODULES_PATH, SETUP_PATH, Wire};

/// The agent: a static executable that the build made. Empty where it could not.
#[cfg(feature = "agent")]
static EMBEDDED: &[u8] = include_bytes!(concat!(env!("OUT_DIR"), "/guest-agent"));
#[cfg(not(feature = "agent"))]
static EMBEDDED: &[u8] = &[];

/// The largest agent that is read.
const MAX_BINARY_BYTES: u64 = 256 << 20;

/// What disks are tried for whose file system nobody named.
const USUAL_FILE_SYSTEMS: [&str; 3] = ["squashfs", "erofs", "ext4"];

/// Why there is no agent to boot.
#[derive(Debug, ThisError)]
enum AgentError {
    #[error("this build of dormouse has no agent for guests")]
    NotBuilt,
    #[error("cannot read the agent {}", path.display())]
    Read { path: PathBuf, source: io::Error },
    #[error("{} is no ELF executable for x86-64, as an agent has to be", path.display())]
    NoExecutable { path: PathBuf },
}

impl From<AgentError> for Error {
    fn from(error: AgentError) -> Self {
        let fix = match &error {
            AgentError::NotBuilt => {
                "build dormouse with the feature `agent` where the agent can be built, or name one \
                 with `AgentConfig::binary`"
            }
            AgentError::Read { .. } | AgentError::NoExecutable { .. } => {
                "name a statically linked agent of this version with `AgentConfig::binary`, or none"
            }
        };
        Error::new(ErrorKind::Initramfs, error).fix(fix)
    }
}

/// Where the agent comes from that a guest would get.
#[cfg(feature = "image")]
pub(crate) fn agent_file(config: &AgentConfig) -> input_file::InputFile<'_> {
    match &config.binary {
        Some(path) => input_file::InputFile::File(path),
        None => input_file::InputFile::Bytes(EMBEDDED),
    }
}

/// The guest's initramfs, with the agent where it has one.
pub(crate) fn archive(
    kernel: &Kernel,
    initramfs: Option<&Initramfs>,
    config: &MachineConfig,
) -> Result<Option<Arc<[u8]>>, Error> {
    let own = initramfs.map(Initramfs::load).transpose()?;
    let Some(agent) = &config.agent else { return Ok(own) };
    let binary = match &agent.binary {
        Some(path) => read_binary(path)?,
        None if EMBEDDED.is_empty() => return Err(AgentError::NotBuilt.into()),
        None => EMBEDDED.to_vec(),
    };
    let modules = modules(kernel, agent, config)?;
    let ours = build(binary, agent, &modules)?;
    let Some(own) = own else { return Ok(Some(ours)) };
    let start = own.len().next_multiple_of(4);
    let mut both = Vec::with_capacity(start + ours.len());
    both.extend_from_slice(&own);
    both.resize(start, 0);
    both.extend_from_slice(&ours);
    Ok(Some(both.into()))
}

/// The agent as /init, what it has to do, and the modules, named in their order.
fn build(
    binary: Vec<u8>,
    agent: &AgentConfig,
    modules: &[Arc<Module>],
) -> Result<Arc<[u8]>, Error> {
    let mut archive = Initramfs::builder()
        // The kernel opens it for /init, before that could make it.
        .char_device("dev/console", 0o600, 5, 1)
        .directory("proc", 0o755)
        .directory("sys", 0o755)
        .directory("run", 0o755)
        .directory(MODULES_PATH, 0o700)
        .file("init", 0o755, binary)
        .file(SETUP_PATH, 0o600, agent.setup().to_bytes());
    for (at, module) in modules.iter().enumerate() {
        let path = format!("{MODULES_PATH}/{at:02}-{}.ko", module.name);
        archive = archive.file(&path, 0o600, module.content.as_slice());
    }
    archive.build()?.read()
}

/// The modules that the agent loads, in their order.
fn modules(
    kernel: &Kernel,
    agent: &AgentConfig,
    config: &MachineConfig,
) -> Result<Vec<Arc<Module>>, Error> {
    let Needs { required, optional } = Needs::of(agent, config);
    kernel.modules(agent.modules_dir.as_deref(), &required, &optional).map_err(|error| {
        let missing = matches!(error, ModuleError::Missing { .. });
        let error = Error::from(error);
        if missing {
            return error.fix(
                "boot a kernel that has it, as Debian's linux-image-cloud-amd64 does, or name a \
                 directory with all of the kernel's modules with `AgentConfig::modules_dir`",
            );
        }
        error
    })
}

/// The names of modules.
#[derive(Debug, Default)]
struct Needs {
    required: Vec<String>,
    optional: Vec<String>,
}

impl Needs {
    fn of(agent: &AgentConfig, config: &MachineConfig) -> Self {
        let mut needs = Self::default();
        let root = agent.root.as_ref();
        let overlay = root.map(|root| root.overlay).unwrap_or_default();
        needs.require(&["virtio_mmio", "vmw_vsock_virtio_transport"], true);
        needs.require(&["virtio_blk"], !config.blocks.is_empty());
        needs.require(&["virtio_net"], !config.networks.is_empty());
        needs.require(&["virtio_rng"], config.entropy);
        needs.require(&["virtio_balloon"], config.balloon.is_some());
        needs.require(&["overlay"], matches!(overlay, Overlay::Memory(_) | Overlay::Disk(_)));
        needs.require(&["ext4"], matches!(overlay, Overlay::Disk(_)));
        let root_type = root.map(|root| &root.fs_type);
        for fs_type in root_type.into_iter().chain(agent.mounts.iter().map(|mount| &mount.fs_type))
        {
            match fs_type {
                Some(name) => needs.require(&[module_of(name)], true),
                None => needs.optional.extend(USUAL_FILE_SYSTEMS.map(str::to_owned)),
            }
        }
        needs.required.extend(agent.modules.iter().cloned());
        needs
    }

    fn require(&mut self, names: &[&str], needed: bool) {
        if needed {
            self.required.extend(names.iter().map(|name| (*name).to_owned()));
        }
    }
}

/// The module of a file system that has not its name.
fn module_of(fs_type: &str) -> &str {
    match fs_type {
        "ext2" | "ext3" => "ext4",
        "iso9660" => "isofs",
        name => name,
    }
}

fn read_binary(path: &Path) -> Result<Vec<u8>, AgentError> {
    let failed = |source| AgentError::Read { path: path.into(), source };
    let file = input_file::open(path).map_err(failed)?;
    let binary = input_file::read_bounded(file, MAX_BINARY_BYTES).map_err(failed)?;
    // ELF-64, version 1.5: class 2, little-endian, type EXEC or DYN, machine 62.
    let is_executable = |binary: &Vec<u8>| {
        binary.starts_with(b"\x7fELF\x02\x01")
            && matches!(binary.get(16..20), Some([2 | 3, 0, 62, 0]))
    };
    binary.filter(is_executable).ok_or_else(|| AgentError::NoExecutable { path: path.into() })
}

#[cfg(test)]
mod tests;

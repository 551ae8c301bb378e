//! What a template is made of, as a hash.

use std::fs;
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};

use serde::Serialize;
use sha2::{Digest, Sha256};

use super::error::TemplateError;
use super::ready::Ready;
use super::store::Key;
use crate::boot;
use crate::config::{MachineConfig, NetConfig, VmConfig, Writes};
use crate::error::Error;
use crate::input_file::InputFile;
use crate::kvm::{HostFacts, Kvm};

/// Raised when templates of before would be misunderstood, or are built otherwise.
const VERSION: u32 = 2;

/// Everything that goes in. What has no content here is known by the file's facts.
#[derive(Serialize)]
struct Ingredients<'a> {
    version: u32,
    dormouse: &'static str,
    host: HostFacts,
    /// The CPU's features: leaf, subleaf, and what of the registers does not change from one
    /// core to the next.
    features: Vec<[u32; 6]>,
    kernel: Content,
    protocol: String,
    initramfs: Option<Content>,
    cmdline: &'a str,
    machine: &'a MachineConfig,
    agent: Content,
    files: Vec<Content>,
    ready: &'a Ready,
}

#[derive(Serialize)]
enum Content {
    Hash([u8; 32]),
    File { path: PathBuf, bytes: u64, modified: (i64, i64), inode: u64 },
}

impl Content {
    fn of(origin: InputFile<'_>) -> Result<Self, TemplateError> {
        match origin {
            InputFile::Bytes(bytes) => Ok(Self::Hash(Sha256::digest(bytes).into())),
            InputFile::File(path) => Self::file(path),
        }
    }

    fn file(path: &Path) -> Result<Self, TemplateError> {
        let path = fs::canonicalize(path).map_err(TemplateError::io("find", path))?;
        let metadata = fs::metadata(&path).map_err(TemplateError::io("look at", &path))?;
        let modified = (metadata.mtime(), metadata.mtime_nsec());
        Ok(Self::File { bytes: metadata.len(), modified, inode: metadata.ino(), path })
    }
}

/// The name of the template of this configuration.
pub(super) fn of(config: &VmConfig, ready: &Ready) -> Result<Key, Error> {
    let (kernel, initramfs, cmdline, machine) = config.parts();
    let Some(agent) = &machine.agent else { return Err(TemplateError::NoAgent.into()) };
    let is_kept = |writes: &Writes| matches!(writes, Writes::ToDisk | Writes::ToDelta(_));
    let written = machine.blocks.iter().position(|block| is_kept(&block.writes));
    if let Some(index) = written {
        return Err(TemplateError::WrittenDisk { index }.into());
    }
    if let Some(index) = machine.networks.iter().position(NetConfig::has_descriptor) {
        return Err(TemplateError::Descriptor { index }.into());
    }
    let mut machine = machine.with_absolute_paths();
    machine.make_socket_absolute();
    let machine = &machine;
    let kvm = Kvm::open(&machine.kvm_device)?;
    let disks = machine.blocks.iter().flat_map(|block| {
        std::iter::once(block.path.as_path()).chain(block.frozen.iter().map(PathBuf::as_path))
    });
    let files = disks.chain(agent.modules_dir.as_deref()).chain(kernel.modules_dir());
    let ingredients = Ingredients {
        version: VERSION,
        dormouse: env!("CARGO_PKG_VERSION"),
        host: HostFacts::of(kvm.capabilities(), None)?,
        features: features(&kvm),
        kernel: Content::of(kernel.input_file())?,
        protocol: format!("{:?}", kernel.boot_protocol()),
        initramfs: initramfs.map(|initramfs| Content::of(initramfs.input_file())).transpose()?,
        cmdline: cmdline.as_str(),
        machine,
        agent: Content::of(boot::agent_file(agent))?,
        files: files.map(Content::file).collect::<Result<_, _>>()?,
        ready,
    };
    // With names: a field that is left out is not the one behind it.
    let bytes = rmp_serde::to_vec_named(&ingredients).map_err(TemplateError::Config)?;
    Ok(Key(Sha256::digest(bytes).into()))
}

/// Leaves of CPUID that name features, without what differs from core to core (leaf 1, EBX).
fn features(kvm: &Kvm) -> Vec<[u32; 6]> {
    let entries = kvm.capabilities().supported_cpuid.as_slice().iter();
    let rows = entries.filter_map(|entry| match entry.function {
        1 | 0x8000_0001 => Some([entry.function, 0, 0, 0, entry.ecx, entry.edx]),
        7 => Some([7, entry.index, entry.eax, entry.ebx, entry.ecx, entry.edx]),
        _ => None,
    });
    rows.collect()
}

//! `/dev/kvm`: opened for each VM, its capabilities read once per process.
//!
//! Source: Linux Documentation/virt/kvm/api.rst; section numbers are given at each call.

mod clock;
mod cpu_profile;
mod kick;
mod msrs;
mod thread_clock;
mod vcpu;
mod vcpu_state;
mod vm;
mod vm_state;

#[cfg(feature = "image")]
pub(crate) use self::cpu_profile::HostFacts;
pub(crate) use self::cpu_profile::{CpuProfile, HostError};
pub(crate) use self::kick::{KickTarget, block_signals};
pub(crate) use self::thread_clock::ThreadClock;
pub(crate) use self::vcpu::{Vcpu, VmExit};
pub(crate) use self::vcpu_state::VcpuState;
pub(crate) use self::vm::Vm;
pub(crate) use self::vm_state::{FreshState, VmState};

use std::ffi::CString;
use std::io;
use std::os::unix::ffi::OsStrExt;
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};
use std::sync::OnceLock;

use kvm_bindings::{CpuId, KVM_API_VERSION, KVM_MAX_CPUID_ENTRIES};
use kvm_ioctls::Cap;
use thiserror::Error as ThisError;

use crate::error::{Error, ErrorKind};

/// Whether the KVM of a kernel with these modules (/sys/module) emulates all of ring 0: no stock kernel boots there.
pub(crate) fn emulates_ring_0(modules: &Path) -> bool {
    modules.join("kvm_pvm").exists()
}

/// Why KVM cannot be used, or what it refused.
#[derive(Debug, ThisError)]
pub(crate) enum KvmError {
    #[error("cannot open {}", path.display())]
    Open { path: PathBuf, owner: Option<u32>, source: io::Error },
    #[error("{} is not a KVM device", path.display())]
    NotKvm { path: PathBuf },
    #[error("{} speaks version {version} of the KVM API, not {KVM_API_VERSION}", path.display())]
    Version { path: PathBuf, version: i32 },
    #[error("this host's KVM lacks {missing}")]
    Capability { missing: String },
    #[error("{count} vCPUs, but this host's KVM takes {max}")]
    TooManyVcpus { count: usize, max: usize },
    #[error("{call} failed")]
    Call { call: &'static str, source: io::Error },
    #[error("KVM refuses the model-specific register {index:#x}")]
    Msr { index: u32 },
    #[error("a vCPU's CPUID has more entries than KVM takes")]
    CpuidEntries,
    #[error("a vCPU's state has too many model-specific registers")]
    MsrEntries,
    #[error("an XSAVE area of {saved} bytes, where this host's KVM has {room}")]
    XsaveArea { saved: usize, room: usize },
    #[error("the state is that of {saved} vCPUs, and there are {vcpus}")]
    VcpuCount { saved: usize, vcpus: usize },
    #[error("the guest's TSC runs at {saved_khz} kHz, this host's at {host_khz} kHz")]
    TscFrequency { saved_khz: u32, host_khz: u32 },
}

impl KvmError {
    /// Wraps the result of an ioctl.
    fn call(call: &'static str) -> impl Fn(kvm_ioctls::Error) -> Self {
        move |errno| Self::Call { call, source: io::Error::from_raw_os_error(errno.errno()) }
    }
}

impl From<KvmError> for Error {
    fn from(error: KvmError) -> Self {
        let (kind, fix) = match &error {
            KvmError::Open { path, source, owner } => match source.kind() {
                io::ErrorKind::NotFound => (ErrorKind::KvmMissing, Some(missing_device_fix(path))),
                io::ErrorKind::PermissionDenied => {
                    (ErrorKind::KvmPermission, Some(permission_fix(path, *owner)))
                }
                _ => match source.raw_os_error() {
                    Some(libc::EMFILE | libc::ENFILE | libc::ENOMEM) => {
                        (ErrorKind::Resources, Some(DESCRIPTORS_FIX.to_owned()))
                    }
                    Some(libc::EISDIR) => (ErrorKind::KvmUnsupported, None),
                    _ => (ErrorKind::KvmMissing, Some(missing_device_fix(path))),
                },
            },
            KvmError::NotKvm { .. } | KvmError::Version { .. } => {
                (ErrorKind::KvmUnsupported, Some("name the host's /dev/kvm".to_owned()))
            }
            KvmError::Capability { .. } => (
                ErrorKind::KvmUnsupported,
                Some("run a host kernel of version 5.10 or later".to_owned()),
            ),
            KvmError::TooManyVcpus { .. } => (ErrorKind::Config, None),
            KvmError::Call { source, .. } => match source.raw_os_error() {
                Some(libc::EMFILE | libc::ENFILE | libc::ENOMEM) => {
                    (ErrorKind::Resources, Some(DESCRIPTORS_FIX.to_owned()))
                }
                _ => (ErrorKind::Kvm, None),
            },
            KvmError::TscFrequency { .. } => (
                ErrorKind::KvmUnsupported,
                Some("use a host of the same frequency, or one that scales the TSC".to_owned()),
            ),
            KvmError::Msr { .. }
            | KvmError::CpuidEntries
            | KvmError::MsrEntries
            | KvmError::XsaveArea { .. }
            | KvmError::VcpuCount { .. } => (ErrorKind::Kvm, None),
        };
        let error = Error::new(kind, error);
        match fix {
            Some(fix) => error.fix(fix),
            None => error,
        }
    }
}

const DESCRIPTORS_FIX: &str = "raise the limits of open files and memory (ulimit -n, ulimit -v)";

fn missing_device_fix(path: &Path) -> String {
    format!(
        "load the module (modprobe kvm_intel or kvm_amd), switch virtualization on in the \
         firmware, or pass the device into the container (--device {})",
        path.display()
    )
}

fn permission_fix(path: &Path, owner: Option<u32>) -> String {
    let group = owner.map_or_else(|| "the device's group".to_owned(), |gid| format!("group {gid}"));
    format!(
        "{} belongs to {group}: add your user to it (on most systems: sudo usermod -aG kvm $USER) \
         and log in again",
        path.display()
    )
}

/// What every VM here stands on.
const REQUIRED: &[(Cap, &str)] = &[
    (Cap::UserMemory, "KVM_CAP_USER_MEMORY"),
    (Cap::ExtCpuid, "KVM_CAP_EXT_CPUID"),
    (Cap::Irqchip, "KVM_CAP_IRQCHIP"),
    (Cap::Irqfd, "KVM_CAP_IRQFD"),
    (Cap::Ioeventfd, "KVM_CAP_IOEVENTFD"),
    (Cap::SetTssAddr, "KVM_CAP_SET_TSS_ADDR"),
    (Cap::TscDeadlineTimer, "KVM_CAP_TSC_DEADLINE_TIMER"),
    (Cap::ImmediateExit, "KVM_CAP_IMMEDIATE_EXIT"),
];

/// What does not change while the process lives.
#[derive(Debug)]
pub(crate) struct Capabilities {
    pub(crate) supported_cpuid: CpuId,
    pub(crate) max_vcpus: usize,
    /// Whether a guest may have a TSC of another frequency than the host's.
    pub(crate) scales_tsc: bool,
    /// The size of a vCPU's XSAVE area: that of its registers, and at least the page that it was
    /// before Linux 5.17.
    pub(crate) xsave_bytes: u32,
    /// Model-specific registers that KVM lists as state (api.rst §4.3).
    pub(crate) msrs: Vec<u32>,
}

/// An open KVM device.
pub(crate) struct Kvm {
    fd: kvm_ioctls::Kvm,
    capabilities: &'static Capabilities,
}

impl Kvm {
    /// Opens the device and checks that it is a KVM that can run a VM: three system calls, and
    /// some 400 µs more at the process's first time.
    pub(crate) fn open(path: &Path) -> Result<Self, KvmError> {
        let fd = open_device(path)?;
        static CAPABILITIES: OnceLock<Capabilities> = OnceLock::new();
        let capabilities = match CAPABILITIES.get() {
            Some(capabilities) => capabilities,
            None => {
                let found = read_capabilities(&fd)?;
                CAPABILITIES.get_or_init(|| found)
            }
        };
        Ok(Self { fd, capabilities })
    }

    pub(crate) fn capabilities(&self) -> &'static Capabilities {
        self.capabilities
    }

    /// The version of the API, which is 12 for ever (api.rst §4.1).
    pub(crate) fn api_version(&self) -> i32 {
        self.fd.get_api_version()
    }

    /// Whether an optional capability is there, by its number.
    pub(crate) fn check_extension(&self, capability: Cap) -> bool {
        self.fd.check_extension(capability)
    }

    pub(super) fn fd(&self) -> &kvm_ioctls::Kvm {
        &self.fd
    }
}

fn open_device(path: &Path) -> Result<kvm_ioctls::Kvm, KvmError> {
    let failed = |source: io::Error| KvmError::Open {
        path: path.into(),
        owner: path.metadata().ok().map(|metadata| metadata.gid()),
        source,
    };
    let c_path = CString::new(path.as_os_str().as_bytes())
        .map_err(|_| failed(io::Error::from_raw_os_error(libc::ENOENT)))?;
    let fd = kvm_ioctls::Kvm::new_with_path(c_path)
        .map_err(|errno| failed(io::Error::from_raw_os_error(errno.errno())))?;
    match fd.get_api_version() {
        version if version == KVM_API_VERSION as i32 => Ok(fd),
        version if version < 0 => Err(KvmError::NotKvm { path: path.into() }),
        version => Err(KvmError::Version { path: path.into(), version }),
    }
}

fn read_capabilities(fd: &kvm_ioctls::Kvm) -> Result<Capabilities, KvmError> {
    let missing: Vec<&str> = REQUIRED
        .iter()
        .filter(|(capability, _)| !fd.check_extension(*capability))
        .map(|(_, name)| *name)
        .collect();
    if !missing.is_empty() {
        return Err(KvmError::Capability { missing: missing.join(", ") });
    }
    let supported_cpuid = fd
        .get_supported_cpuid(KVM_MAX_CPUID_ENTRIES)
        .map_err(KvmError::call("KVM_GET_SUPPORTED_CPUID"))?;
    let msrs = fd
        .get_msr_index_list()
        .map_err(KvmError::call("KVM_GET_MSR_INDEX_LIST"))?
        .as_slice()
        .to_vec();
    Ok(Capabilities {
        supported_cpuid,
        max_vcpus: fd.get_max_vcpus(),
        scales_tsc: fd.check_extension(Cap::TscControl),
        xsave_bytes: u32::try_from(fd.check_extension_int(Cap::Xsave2)).unwrap_or(0).max(4096),
        msrs,
    })
}

#[cfg(test)]
mod tests;

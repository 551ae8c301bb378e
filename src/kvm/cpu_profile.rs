//! What a snapshot needs of a host, and whether a host has it.
//!
//! Source: api.rst §4.20 (KVM_SET_CPUID2): KVM takes any table, and a guest that uses a feature
//! that its table shows and the CPU lacks dies of it, later and elsewhere. So it is compared
//! before.

use std::fmt;

use kvm_bindings::{KVM_MAX_CPUID_ENTRIES, kvm_cpuid_entry2};
use serde::{Deserialize, Serialize};

use super::{Capabilities, KvmError, Vcpu};
use crate::arch::features::{self, MissingFeatures};
use crate::bounded;
use crate::error::{Error, ErrorKind};

/// What a host is, as far as a guest depends on it.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct HostFacts {
    /// `GenuineIntel` or `AuthenticAMD`.
    pub(crate) vendor: String,
    /// The CPU's family, model and stepping.
    pub(crate) signature: [u32; 3],
    /// The running kernel, as `uname -r` prints it.
    pub(crate) kernel: String,
    /// The frequency of the TSC; None where no vCPU has told.
    pub(crate) tsc_khz: Option<u32>,
    /// Whether guests may have a TSC of another frequency.
    pub(crate) scales_tsc: bool,
    /// The size of a vCPU's XSAVE area.
    pub(crate) xsave_bytes: u32,
}

impl HostFacts {
    /// Reads the facts of this host: a few µs.
    pub(crate) fn of(capabilities: &Capabilities, vcpu: Option<&Vcpu>) -> Result<Self, KvmError> {
        let cpuid = capabilities.supported_cpuid.as_slice();
        let uname = rustix::system::uname();
        Ok(Self {
            vendor: features::vendor(cpuid),
            signature: features::signature(cpuid),
            kernel: uname.release().to_string_lossy().into_owned(),
            tsc_khz: vcpu.map(Vcpu::tsc_khz).transpose()?,
            scales_tsc: capabilities.scales_tsc,
            xsave_bytes: capabilities.xsave_bytes,
        })
    }
}

/// What a saved guest was shown, and where.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub(crate) struct CpuProfile {
    host: HostFacts,
    /// The CPUID of each vCPU.
    #[serde(deserialize_with = "bounded::list")]
    cpuid: Vec<Vec<kvm_cpuid_entry2>>,
    /// That of the first one, with those features only that the CPU itself had.
    features: Vec<kvm_cpuid_entry2>,
}

/// A table's bytes are in snapshots.
const _: () = assert!(size_of::<kvm_cpuid_entry2>() == 40);

/// More vCPUs than any VM has: the bound for a list that comes from a file.
const MAX_VCPUS: usize = 256;

impl CpuProfile {
    /// The profile of a guest on this host, given the CPUID of each of its vCPUs as it was set
    /// (KVM_GET_CPUID2 gives what the guest has changed since), and its first vCPU.
    pub(crate) fn new(
        capabilities: &Capabilities,
        cpuid: Vec<Vec<kvm_cpuid_entry2>>,
        vcpu: Option<&Vcpu>,
    ) -> Result<Self, KvmError> {
        let supported = capabilities.supported_cpuid.as_slice();
        let first = cpuid.first().map_or(&[][..], Vec::as_slice);
        let features = features::of_the_cpu(first, supported);
        Ok(Self { host: HostFacts::of(capabilities, vcpu)?, cpuid, features })
    }

    /// The CPUID of each vCPU: what a restore sets, exactly.
    ///
    /// # Errors
    ///
    /// Where a table is longer than KVM takes: the profile is not one of ours.
    pub(crate) fn cpuid(&self) -> Result<&[Vec<kvm_cpuid_entry2>], KvmError> {
        let fits = self.cpuid.len() <= MAX_VCPUS
            && self.cpuid.iter().all(|table| table.len() <= KVM_MAX_CPUID_ENTRIES);
        if fits { Ok(&self.cpuid) } else { Err(KvmError::CpuidEntries) }
    }

    /// The table of the first vCPU: leaf, subleaf, EAX, EBX, ECX, EDX.
    pub(crate) fn first_cpuid(&self) -> Vec<[u32; 6]> {
        let first = self.cpuid.first().map_or(&[][..], Vec::as_slice);
        let row = |entry: &kvm_cpuid_entry2| {
            [entry.function, entry.index, entry.eax, entry.ebx, entry.ecx, entry.edx]
        };
        first.iter().map(row).collect()
    }

    /// What the host was that the guest was saved on.
    pub(crate) fn host(&self) -> &HostFacts {
        &self.host
    }

    /// Whether the guest can run on this host.
    ///
    /// # Errors
    ///
    /// Everything that it would miss, then, for whoever looks for the cause, what else differs.
    pub(crate) fn fits(
        &self,
        capabilities: &Capabilities,
        vcpu: Option<&Vcpu>,
    ) -> Result<(), HostError> {
        let supported = capabilities.supported_cpuid.as_slice();
        self.compare(&HostFacts::of(capabilities, vcpu)?, supported).map_err(HostError::Unfit)
    }

    fn compare(&self, here: &HostFacts, supported: &[kvm_cpuid_entry2]) -> Result<(), Differences> {
        let there = &self.host;
        let mut found = Vec::new();
        let texts = |there: &str, here: &str| (there.to_owned(), here.to_owned());
        if there.vendor != here.vendor {
            let (there, here) = texts(&there.vendor, &here.vendor);
            found.push(Difference::Vendor { there, here });
        }
        let missing = features::missing(&self.features, supported);
        found.extend(missing.into_iter().map(Difference::Features));
        let moved = features::moved_xsave_components(&self.features, supported);
        found.extend(moved.into_iter().map(|component| Difference::XsaveLayout { component }));
        if there.xsave_bytes > here.xsave_bytes {
            let (there, here) = (there.xsave_bytes, here.xsave_bytes);
            found.push(Difference::XsaveBytes { there, here });
        }
        let bits = [&self.features, supported].map(features::physical_address_bits);
        if bits[0] > bits[1] {
            found.push(Difference::AddressBits { there: bits[0], here: bits[1] });
        }
        if let (Some(saved), Some(host)) = (there.tsc_khz, here.tsc_khz)
            && !here.scales_tsc
            && !super::clock::same_frequency(saved, host)
        {
            found.push(Difference::TscFrequency { there: saved, here: host });
        }
        if found.is_empty() {
            return Ok(());
        }
        if there.signature != here.signature {
            found.push(Difference::Cpu { there: there.signature, here: here.signature });
        }
        if there.kernel != here.kernel {
            let (there, here) = texts(&there.kernel, &here.kernel);
            found.push(Difference::Kernel { there, here });
        }
        Err(Differences(found))
    }
}

/// Why a guest does not go on here.
#[derive(Debug, thiserror::Error)]
pub(crate) enum HostError {
    #[error(transparent)]
    Kvm(#[from] KvmError),
    #[error("the guest does not fit this host: {0}")]
    Unfit(Differences),
}

impl From<HostError> for Error {
    fn from(error: HostError) -> Self {
        match error {
            HostError::Kvm(error) => error.into(),
            HostError::Unfit(_) => Self::new(ErrorKind::Snapshot, error).fix(
                "restore it on a host like the one that it was saved on, or hide what not all \
                 hosts have from its CPUID before it boots (VmConfig::cpu)",
            ),
        }
    }
}

/// All that stands against it, the gravest first; never empty.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Differences(pub(crate) Vec<Difference>);

/// One way in which this host (`here`) is not the one that the guest was saved on (`there`).
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) enum Difference {
    Vendor { there: String, here: String },
    Features(MissingFeatures),
    XsaveLayout { component: u32 },
    XsaveBytes { there: u32, here: u32 },
    AddressBits { there: u32, here: u32 },
    TscFrequency { there: u32, here: u32 },
    Cpu { there: [u32; 3], here: [u32; 3] },
    Kernel { there: String, here: String },
}

impl fmt::Display for Differences {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        for (at, difference) in self.0.iter().enumerate() {
            let separator = if at == 0 { "" } else { "; " };
            write!(f, "{separator}{difference}")?;
        }
        Ok(())
    }
}

impl fmt::Display for Difference {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            // From a file: shown as what it is.
            Self::Vendor { there, here } => {
                write!(f, "the CPU's vendor is {here:?} here, {there:?} there")
            }
            Self::Features(MissingFeatures { leaf, subleaf, register, bits }) => {
                let register = format!("{register:?}").to_lowercase();
                write!(f, "CPUID {leaf:#x}.{subleaf} {register} lacks the bits {bits:#x} here")
            }
            Self::XsaveLayout { component } => {
                write!(f, "component {component} of the XSAVE area lies elsewhere here")
            }
            Self::XsaveBytes { there, here } => {
                write!(f, "the XSAVE area has {here} bytes here, {there} there")
            }
            Self::AddressBits { there, here } => {
                write!(f, "a physical address has {here} bits here, {there} there")
            }
            Self::TscFrequency { there, here } => write!(
                f,
                "the TSC runs at {here} kHz here, at {there} kHz there, and this host scales none"
            ),
            Self::Cpu { there, here } => {
                let name = |[family, model, stepping]: &[u32; 3]| {
                    format!("family {family:#x} model {model:#x} stepping {stepping}")
                };
                write!(f, "the CPU is {} here, {} there", name(here), name(there))
            }
            Self::Kernel { there, here } => {
                write!(f, "the kernel is {here:?} here, {there:?} there")
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn entry(function: u32, [eax, ebx, ecx, edx]: [u32; 4]) -> kvm_cpuid_entry2 {
        kvm_cpuid_entry2 { function, eax, ebx, ecx, edx, ..Default::default() }
    }

    fn cpuid() -> Vec<kvm_cpuid_entry2> {
        vec![entry(1, [0, 0, 0xf0, 0xff]), entry(0x8000_0008, [40, 0, 0, 0])]
    }

    fn host() -> HostFacts {
        HostFacts {
            vendor: "AuthenticAMD".into(),
            signature: [0x19, 1, 1],
            kernel: "6.1.0".into(),
            tsc_khz: Some(2_000_000),
            scales_tsc: false,
            xsave_bytes: 4096,
        }
    }

    fn profile() -> CpuProfile {
        CpuProfile { host: host(), cpuid: vec![cpuid()], features: cpuid() }
    }

    fn refusal(here: &HostFacts, supported: &[kvm_cpuid_entry2]) -> String {
        profile().compare(here, supported).unwrap_err().to_string()
    }

    #[test]
    fn a_newer_kernel_and_a_better_cpu_of_the_same_vendor_will_do() {
        let here = HostFacts {
            signature: [0x1a, 2, 0],
            kernel: "6.18".into(),
            tsc_khz: Some(2_000_100),
            xsave_bytes: 8192,
            ..host()
        };
        let supported = [entry(1, [9, 9, 0xff, 0xff]), entry(0x8000_0008, [52, 0, 0, 0])];
        assert_eq!(profile().compare(&here, &supported), Ok(()));
        let unknown = HostFacts { tsc_khz: None, ..here };
        assert_eq!(profile().compare(&unknown, &supported), Ok(()));
    }

    #[test]
    fn all_that_is_missing_is_told_with_what_else_differs() {
        let here = HostFacts {
            vendor: "GenuineIntel".into(),
            signature: [6, 0x55, 7],
            kernel: "5.10".into(),
            ..host()
        };
        let supported = [entry(1, [0, 0, 0x70, 0xff]), entry(0x8000_0008, [39, 0, 0, 0])];
        assert_eq!(
            refusal(&here, &supported),
            "the CPU's vendor is \"GenuineIntel\" here, \"AuthenticAMD\" there; \
             CPUID 0x1.0 ecx lacks the bits 0x80 here; \
             a physical address has 39 bits here, 40 there; \
             the CPU is family 0x6 model 0x55 stepping 7 here, family 0x19 model 0x1 stepping 1 \
             there; the kernel is \"5.10\" here, \"6.1.0\" there"
        );
    }

    #[test]
    fn a_tsc_of_another_frequency_will_do_where_it_is_scaled() {
        let here = HostFacts { tsc_khz: Some(3_000_000), ..host() };
        assert_eq!(
            refusal(&here, &cpuid()),
            "the TSC runs at 3000000 kHz here, at 2000000 kHz there, and this host scales none"
        );
        let scaling = HostFacts { scales_tsc: true, ..here };
        assert_eq!(profile().compare(&scaling, &cpuid()), Ok(()));
    }

    #[test]
    fn a_smaller_xsave_area_will_not_do() {
        let here = HostFacts { xsave_bytes: 2048, ..host() };
        let words = "the XSAVE area has 2048 bytes here, 4096 there";
        assert_eq!(refusal(&here, &cpuid()), words);
    }

    #[test]
    fn tables_that_no_kvm_takes_are_refused() {
        let long = CpuProfile { cpuid: vec![vec![entry(1, [0; 4]); 257]], ..profile() };
        assert!(matches!(long.cpuid(), Err(KvmError::CpuidEntries)));
        let many = CpuProfile { cpuid: vec![cpuid(); 257], ..profile() };
        assert!(matches!(many.cpuid(), Err(KvmError::CpuidEntries)));
        let json = serde_json::to_string(&profile()).unwrap();
        let read: CpuProfile = serde_json::from_str(&json).unwrap();
        assert_eq!(read.cpuid().unwrap(), [cpuid()]);
    }
}

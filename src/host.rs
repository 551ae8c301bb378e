//! What this machine can do, and what to do about what it cannot.

use std::fs;
use std::path::{Path, PathBuf};

use kvm_ioctls::Cap;
use serde::{Deserialize, Serialize};

use crate::error::Error;
use crate::kernel::InstalledKernel;
use crate::kvm::{Kvm, emulates_ring_0};

/// What this machine offers to VMs. Plain data: print it, log it, send it along with a report.
///
/// ```
/// use dormouse::Host;
///
/// let host = Host::check();
/// for problem in host.problems() {
///     println!("{}: {}", problem.what, problem.fix);
/// }
/// ```
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[non_exhaustive]
pub struct Host {
    /// The running kernel, as `uname -r` prints it.
    pub release: String,
    /// The processor, by its own name.
    pub cpu: String,
    /// Processors that this process may use.
    pub cpus: usize,
    /// What runs the guests' ring 0.
    pub virtualization: Virtualization,
    /// `/dev/kvm`, or why it cannot be used.
    pub kvm: KvmStatus,
    /// Kernels that a VM can boot, the newest first, with whether this user can read them.
    pub kernels: Vec<HostKernel>,
}

/// What runs the guests' ring 0.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
#[non_exhaustive]
pub enum Virtualization {
    /// Intel VMX: any guest runs at full speed.
    Vmx,
    /// AMD SVM: any guest runs at full speed.
    Svm,
    /// A KVM without either (the module `kvm_pvm`): ring 3 runs at full speed, ring 0 is
    /// emulated and incomplete. Bare-metal guests run, stock Linux kernels do not.
    Emulated,
    /// None that can be seen.
    None,
}

/// Whether `/dev/kvm` can be used.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
#[non_exhaustive]
pub enum KvmStatus {
    /// It opens, and has what a VM needs.
    Usable {
        /// The version of its API: 12.
        api_version: i32,
        /// The largest number of vCPUs of a VM.
        max_vcpus: usize,
        /// Optional capabilities that are there, by their names in the KVM API.
        capabilities: Vec<String>,
    },
    /// It does not.
    Unusable {
        /// What was tried and why it failed.
        what: String,
        /// What to do about it.
        fix: Option<String>,
    },
}

/// An installed kernel, and whether it can be read.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[non_exhaustive]
pub struct HostKernel {
    /// The kernel.
    pub kernel: InstalledKernel,
    /// Whether this user can read its image.
    pub readable: bool,
}

/// Something that a VM would miss.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[non_exhaustive]
pub struct Problem {
    /// What is wrong.
    pub what: String,
    /// What to do about it.
    pub fix: String,
}

/// Capabilities that are used where they are there.
const OPTIONAL: &[(Cap, &str)] = &[
    (Cap::KvmclockCtrl, "KVM_CAP_KVMCLOCK_CTRL"),
    (Cap::SplitIrqchip, "KVM_CAP_SPLIT_IRQCHIP"),
    (Cap::ImmediateExit, "KVM_CAP_IMMEDIATE_EXIT"),
    (Cap::AdjustClock, "KVM_CAP_ADJUST_CLOCK"),
    (Cap::TscControl, "KVM_CAP_TSC_CONTROL"),
    (Cap::Xcrs, "KVM_CAP_XCRS"),
    (Cap::Xsave2, "KVM_CAP_XSAVE2"),
    (Cap::X2ApicApi, "KVM_CAP_X2APIC_API"),
];

impl Host {
    /// Looks at this machine: opens `/dev/kvm`, reads a few files of /proc, /sys and /boot.
    /// Takes about 1 ms and changes nothing.
    pub fn check() -> Self {
        Self::check_with(Path::new("/dev/kvm"), Path::new("/"))
    }

    fn check_with(kvm_device: &Path, root: &Path) -> Self {
        let cpuinfo = read(&root.join("proc/cpuinfo"));
        let field = |name: &str| {
            let line = cpuinfo.lines().find(|line| line.starts_with(name));
            line.and_then(|line| line.split_once(':')).map_or("", |(_, value)| value.trim())
        };
        let kernels = InstalledKernel::find(root).into_iter().map(|kernel| {
            let readable = fs::File::open(kernel.path()).is_ok();
            HostKernel { kernel, readable }
        });
        Self {
            release: read(&root.join("proc/sys/kernel/osrelease")).trim().to_owned(),
            cpu: field("model name").to_owned(),
            cpus: std::thread::available_parallelism().map_or(1, usize::from),
            virtualization: virtualization(field("flags"), &root.join("sys/module")),
            kvm: KvmStatus::of(kvm_device),
            kernels: kernels.collect(),
        }
    }

    /// Whether a stock Linux kernel can boot here.
    pub fn can_run_linux(&self) -> bool {
        matches!(self.kvm, KvmStatus::Usable { .. })
            && matches!(self.virtualization, Virtualization::Vmx | Virtualization::Svm)
    }

    /// What a VM would miss here, the gravest first. Empty where everything is there.
    pub fn problems(&self) -> Vec<Problem> {
        let problem = |what: &str, fix: &str| Problem { what: what.into(), fix: fix.into() };
        let mut problems = Vec::new();
        if let KvmStatus::Unusable { what, fix } = &self.kvm {
            problems.push(problem(what, fix.as_deref().unwrap_or("ask the host's administrator")));
        }
        match self.virtualization {
            Virtualization::Vmx | Virtualization::Svm => {}
            Virtualization::Emulated => problems.push(problem(
                "this KVM emulates ring 0, so stock Linux kernels do not boot",
                "use a machine whose CPU shows vmx or svm in /proc/cpuinfo; bare-metal guests run \
                 here",
            )),
            Virtualization::None => problems.push(problem(
                "the CPU shows neither vmx nor svm",
                "switch virtualization on in the firmware, or nested virtualization in the \
                 hypervisor that this machine runs under",
            )),
        }
        if self.kernels.is_empty() {
            problems.push(problem(
                "no kernel is installed under /boot or /lib/modules",
                "install one (Debian: apt-get install linux-image-cloud-amd64), or use \
                 Kernel::installed_in, Kernel::file or Kernel::deb",
            ));
        }
        for HostKernel { kernel, readable } in &self.kernels {
            if !readable {
                let path = kernel.path().display();
                problems.push(Problem {
                    what: format!("{path} cannot be read"),
                    fix: format!("sudo chmod a+r {path}"),
                });
            }
        }
        problems
    }
}

impl KvmStatus {
    fn of(device: &Path) -> Self {
        match Kvm::open(device) {
            Ok(kvm) => Self::Usable {
                api_version: kvm.api_version(),
                max_vcpus: kvm.capabilities().max_vcpus,
                capabilities: OPTIONAL
                    .iter()
                    .filter(|(capability, _)| kvm.check_extension(*capability))
                    .map(|(_, name)| (*name).to_owned())
                    .collect(),
            },
            Err(error) => {
                let error = Error::from(error);
                let fix = error.how_to_fix().map(str::to_owned);
                // The fix is said apart.
                let text = error.to_string();
                let what = match &fix {
                    Some(fix) => text.trim_end_matches(&format!("; {fix}")).to_owned(),
                    None => text,
                };
                Self::Unusable { what, fix }
            }
        }
    }
}

/// What the CPU's flags and the loaded modules say.
fn virtualization(flags: &str, modules: &Path) -> Virtualization {
    let flag = |name: &str| flags.split_whitespace().any(|flag| flag == name);
    if emulates_ring_0(modules) {
        Virtualization::Emulated
    } else if flag("vmx") {
        Virtualization::Vmx
    } else if flag("svm") {
        Virtualization::Svm
    } else {
        Virtualization::None
    }
}

fn read(path: &PathBuf) -> String {
    fs::read_to_string(path).unwrap_or_default()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_machine_with_nothing_is_told_what_to_do_about_each_thing() {
        let host = Host::check_with(Path::new("/nonexistent/kvm"), Path::new("/nonexistent"));
        assert!(!host.can_run_linux());
        let problems = host.problems();
        assert_eq!(problems.len(), 3, "{problems:?}");
        assert!(problems[0].what.starts_with("cannot open /nonexistent/kvm: No such file"));
        assert!(problems[0].fix.contains("modprobe"), "{problems:?}");
    }

    #[test]
    fn flags_and_modules_tell_the_kinds_apart() {
        let none = Path::new("/nonexistent");
        assert_eq!(virtualization("fpu svm sse", none), Virtualization::Svm);
        assert_eq!(virtualization("fpu vmx", none), Virtualization::Vmx);
        assert_eq!(virtualization("fpu svm_lock", none), Virtualization::None);
    }

    #[test]
    fn a_check_serializes() {
        let host = Host::check();
        let json = serde_json::to_string(&host).unwrap();
        assert_eq!(serde_json::from_str::<Host>(&json).unwrap(), host);
    }
}

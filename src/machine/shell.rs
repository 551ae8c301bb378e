//! What can be made before it is known which guest runs: KVM's VM, its vCPUs, their threads.
//!
//! A shell has memory, of which only the addresses matter so far, and no device. All that takes
//! time in making a VM is done with it: KVM_CREATE_VM, the vCPUs' CPUID, the threads' filters.
//! Devices come after: an ioeventfd or irqfd is registered in about 1 µs, and none of them makes a
//! VM wait for an SRCU grace period, for no memory slot changes any more.

use std::path::{Path, PathBuf};
use std::sync::Arc;

use kvm_bindings::kvm_cpuid_entry2;

use super::vcpu_threads::IdleThreads;
use crate::arch::{cpuid, msr};
use crate::config::{CpuTemplate, MachineConfig};
use crate::error::Error;
use crate::kvm::{CpuProfile, FreshState, HostError, Kvm, KvmError, Vcpu, Vm};
use crate::memory::GuestRam;
use crate::phase::Phase;
use crate::seccomp::Confinement;
use crate::timings::Recorder;

/// A VM without devices, and without a guest.
#[derive(Debug)]
pub(crate) struct Shell {
    // In this order: the threads are the last to hold the VM.
    pub(super) vcpus: Vec<Vcpu>,
    /// What each of them was given.
    pub(super) cpuid: Vec<Vec<kvm_cpuid_entry2>>,
    pub(super) vm: Arc<Vm>,
    pub(super) threads: IdleThreads,
    /// What it was made with.
    pub(super) kvm_device: PathBuf,
    pub(super) seccomp: bool,
}

/// What a shell is made of, beside its memory.
#[derive(Clone, Copy, Debug)]
pub(crate) struct ShellConfig<'a> {
    pub(crate) kvm_device: &'a Path,
    pub(crate) cpus: Cpus<'a>,
    /// Whether the threads are confined.
    pub(crate) seccomp: bool,
}

/// What the vCPUs show to the guest.
#[derive(Clone, Copy, Debug)]
pub(crate) enum Cpus<'a> {
    /// This host's CPU, changed as a template says.
    OfHost { count: u8, template: &'a CpuTemplate },
    /// These tables, one a vCPU: those that a saved guest was shown.
    Exactly(&'a [Vec<kvm_cpuid_entry2>]),
}

impl<'a> From<&'a MachineConfig> for ShellConfig<'a> {
    fn from(config: &'a MachineConfig) -> Self {
        Self {
            kvm_device: &config.kvm_device,
            cpus: Cpus::OfHost { count: config.vcpus, template: &config.cpu },
            seccomp: config.seccomp,
        }
    }
}

impl<'a> ShellConfig<'a> {
    /// For a guest that runs or was saved already, which goes on with the CPUs that it was shown.
    ///
    /// # Errors
    ///
    /// As [`CpuProfile::cpuid`].
    pub(crate) fn as_shown(
        profile: &'a CpuProfile,
        config: &'a MachineConfig,
    ) -> Result<Self, KvmError> {
        Ok(Self {
            kvm_device: &config.kvm_device,
            cpus: Cpus::Exactly(profile.cpuid()?),
            seccomp: config.seccomp,
        })
    }
}

impl Shell {
    /// Makes a shell over `ram`, in about 1 ms, of which KVM_CREATE_VM is the largest part.
    pub(crate) fn new(
        config: &ShellConfig,
        ram: GuestRam,
        recorder: &mut Recorder,
    ) -> Result<Self, Error> {
        let confinement = config.seccomp.then_some(Confinement::Vcpu);
        let (kvm, vm, count) = recorder.run(Phase::Kvm, || {
            let kvm = Kvm::open(config.kvm_device)?;
            let (count, max) = (config.cpus.count(), kvm.capabilities().max_vcpus);
            let fits = u8::try_from(count).ok().filter(|_| count <= max);
            let count = fits.ok_or(KvmError::TooManyVcpus { count, max: max.min(255) })?;
            let vm = Arc::new(Vm::new(&kvm, Arc::new(ram))?);
            Ok::<_, Error>((kvm, vm, count))
        })?;
        recorder.run(Phase::Vcpus, || {
            let supported = &kvm.capabilities().supported_cpuid;
            let cpuid: Vec<_> = match config.cpus {
                Cpus::OfHost { template, .. } => {
                    (0..count).map(|id| cpuid::for_vcpu(supported, id, count, template)).collect()
                }
                Cpus::Exactly(tables) => tables.to_vec(),
            };
            let at_boot = msr::at_boot();
            let msrs = match config.cpus {
                Cpus::OfHost { .. } => &at_boot[..],
                // A saved guest brings its own.
                Cpus::Exactly(_) => &[],
            };
            let create = |(id, cpuid): (u8, &Vec<kvm_cpuid_entry2>)| {
                let vcpu = vm.create_vcpu(id)?;
                vcpu.configure(cpuid, msrs)?;
                Ok(vcpu)
            };
            // First, for they take about as long to confine themselves as their vCPUs to be made.
            let threads = IdleThreads::spawn(count, confinement, Arc::clone(&vm))?;
            let vcpus = (0..).zip(&cpuid).map(create).collect::<Result<Vec<_>, KvmError>>()?;
            let (kvm_device, seccomp) = (config.kvm_device.to_owned(), config.seccomp);
            Ok::<_, Error>(Self { vcpus, cpuid, vm, threads, kvm_device, seccomp })
        })
    }
}

impl Shell {
    /// The memory, which may have no content yet.
    pub(crate) fn ram(&self) -> &GuestRam {
        self.vm.ram()
    }

    /// Whether a VM whose vCPUs have this CPUID can be put around it; its memory is another
    /// question.
    pub(crate) fn shows(&self, cpuid: &[Vec<kvm_cpuid_entry2>]) -> bool {
        self.cpuid == cpuid
    }

    /// Makes a restore around it shorter; see [`Vm::look_ahead`].
    pub(crate) fn look_ahead(&self, known: &FreshState) -> Result<(), KvmError> {
        self.vm.look_ahead(&self.vcpus, known)
    }

    /// Whether a guest with this profile can run in it.
    pub(crate) fn fits(&self, profile: &CpuProfile) -> Result<(), HostError> {
        profile.fits(self.vm.capabilities(), self.vcpus.first())
    }
}

impl Cpus<'_> {
    fn count(&self) -> usize {
        match self {
            Self::OfHost { count, .. } => usize::from(*count),
            Self::Exactly(tables) => tables.len(),
        }
    }
}

#[cfg(test)]
mod tests {
    use vm_memory::GuestAddress;

    use super::*;
    use crate::error::ErrorKind;

    fn shell(cpus: Cpus) -> Result<Shell, Error> {
        let ram = GuestRam::fresh(&[(GuestAddress(0), 2 << 20)]).unwrap();
        let config = ShellConfig { kvm_device: Path::new("/dev/kvm"), cpus, seccomp: true };
        Shell::new(&config, ram, &mut Recorder::new())
    }

    /// Nothing can be tested where there is no KVM, or none for this user.
    fn is_without_kvm(error: &Error) -> bool {
        matches!(error.kind(), ErrorKind::KvmMissing | ErrorKind::KvmPermission)
    }

    #[test]
    fn a_shell_shows_the_cpus_that_a_saved_guest_was_shown() {
        let template = &CpuTemplate::default();
        let first = match shell(Cpus::OfHost { count: 2, template }) {
            Ok(first) => first,
            Err(error) if is_without_kvm(&error) => return,
            Err(error) => panic!("{error}"),
        };
        let tables = |shell: &Shell| -> Vec<_> {
            shell.vcpus.iter().map(|vcpu| vcpu.cpuid().unwrap()).collect()
        };
        let shown = tables(&first);
        assert_ne!(shown[0], shown[1], "each has its number");
        assert_eq!(tables(&shell(Cpus::Exactly(&shown)).unwrap()), shown);
    }

    #[test]
    fn more_vcpus_than_a_vm_takes_are_refused() {
        let error = shell(Cpus::Exactly(&vec![Vec::new(); 256])).unwrap_err();
        if !is_without_kvm(&error) {
            assert_eq!(*error.kind(), ErrorKind::Config, "{error}");
            assert!(error.to_string().contains("256 vCPUs"), "{error}");
        }
    }
}

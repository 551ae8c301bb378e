//! Creating a VM, and starting it.

use std::sync::Once;

use super::stopped::Stopped;
use super::{Created, MicroVm, Running, TransitionError};
use crate::boot::{Boot, archive};
use crate::config::VmConfig;
use crate::error::Error;
use crate::kvm::emulates_ring_0;
use crate::machine::Machine;
use crate::phase::Phase;
use crate::timings::Recorder;

impl MicroVm<Created> {
    /// Assembles a VM and loads its kernel: no instruction of the guest runs yet.
    ///
    /// Takes about 1 ms, of which KVM_CREATE_VM is the largest part, and the copy of kernel and
    /// initramfs to guest memory (a distribution's kernel: some 20 ms, and some 100 ms more at
    /// the [`Kernel`](crate::Kernel)'s first use). Memory is reserved, not touched.
    ///
    /// # Errors
    ///
    /// [`KvmMissing`], [`KvmPermission`] and [`KvmUnsupported`] for a `/dev/kvm` that cannot be used, [`Kvm`]
    /// where it refuses a request; [`Config`] for a value of the configuration that is refused; [`Kernel`], and
    /// [`Initramfs`], also of the agent and its modules, where they cannot be read or do not fit; [`Disk`] and
    /// [`Network`] where one cannot be had; [`Resources`] for a limit of the host. Nothing is left behind.
    ///
    /// [`KvmMissing`]: crate::ErrorKind::KvmMissing
    /// [`KvmPermission`]: crate::ErrorKind::KvmPermission
    /// [`KvmUnsupported`]: crate::ErrorKind::KvmUnsupported
    /// [`Kvm`]: crate::ErrorKind::Kvm
    /// [`Config`]: crate::ErrorKind::Config
    /// [`Kernel`]: crate::ErrorKind::Kernel
    /// [`Initramfs`]: crate::ErrorKind::Initramfs
    /// [`Disk`]: crate::ErrorKind::Disk
    /// [`Network`]: crate::ErrorKind::Network
    /// [`Resources`]: crate::ErrorKind::Resources
    ///
    /// ```no_run
    /// use dormouse::{Kernel, MicroVm, VmConfig};
    ///
    /// let vm = MicroVm::create(VmConfig::new(Kernel::installed()?).memory_mib(256))?;
    /// let ended = vm.start()?.wait();
    /// println!("{}", ended.exit_status());
    /// # Ok::<(), dormouse::Error>(())
    /// ```
    pub fn create(config: VmConfig) -> Result<Self, Error> {
        let mut recorder = Recorder::new();
        let (kernel, initramfs, cmdline, machine_config) = config.parts();
        recorder.run(Phase::Config, || machine_config.check())?;
        if machine_config.agent.is_some() {
            warn_of_emulation();
        }
        let vmlinux = recorder.run(Phase::Kernel, || kernel.load())?;
        let archive =
            recorder.run(Phase::Initramfs, || archive(kernel, initramfs, machine_config))?;

        let (machine, vcpus) = Machine::new(machine_config, &mut recorder)?;
        let boot = Boot {
            kernel: &vmlinux,
            protocol: kernel.boot_protocol(),
            initramfs: archive.as_deref(),
            cmdline,
            memory_bytes: machine_config.memory_bytes,
            vcpus: machine_config.vcpus,
            virtio_devices: machine.virtio_devices(),
        };
        recorder.run(Phase::Load, || {
            let entry = boot.load(machine.ram())?;
            // The others wait for the boot vCPU to wake them.
            if let Some(boot_vcpu) = vcpus.first() {
                boot_vcpu.enter_at(entry)?;
            }
            Ok::<_, Error>(())
        })?;
        let console = machine.console().clone();
        let origin = Box::default();
        let stopped = Stopped::new(vcpus, Box::new(machine), origin);
        Ok(Self { state: Created { stopped }, console, recorder })
    }

    /// Lets the guest run: gives each vCPU to its thread and returns, in some 10 µs. The guest
    /// runs its first instruction some 50 µs later.
    ///
    /// # Errors
    ///
    /// [`ErrorKind::Resources`](crate::ErrorKind::Resources) where a vCPU's thread is gone.
    pub fn start(self) -> Result<MicroVm<Running>, TransitionError<Created>> {
        let Self { state, console, mut recorder } = self;
        match recorder.timed(Phase::Start, || Running::of(state.stopped)) {
            Ok(state) => Ok(MicroVm { state, console, recorder }),
            Err((stopped, error)) => {
                let vm = MicroVm { state: Created { stopped }, console, recorder };
                let error = vm.error(Phase::Start, error);
                Err(TransitionError { vm, error })
            }
        }
    }
}

/// Says once what whoever waits for a guest's agent would else learn after a minute.
fn warn_of_emulation() {
    static ONCE: Once = Once::new();
    ONCE.call_once(|| {
        if emulates_ring_0("/sys/module".as_ref()) {
            tracing::warn!(
                "this KVM emulates ring 0: stock Linux kernels do not boot, and end as crashed after a minute or so; use \
                 a machine whose CPU shows vmx or svm"
            );
        }
    });
}

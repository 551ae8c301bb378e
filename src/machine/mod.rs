//! The machine: memory, KVM's VM and the devices, put together in one place.
//!
//! [`Machine::new`] is the only assembly, and never writes guest RAM: a boot loads a kernel into
//! the memory afterwards. The vCPUs are not part of it: whoever may run them owns them.

mod devices;
mod reaper;
mod vcpu_threads;

pub(crate) use self::vcpu_threads::{NotRun, Running, VcpuThreads};

use std::io;
use std::path::PathBuf;
use std::sync::Arc;

use thiserror::Error as ThisError;

use crate::arch::{cpuid, layout, msr};
use crate::config::MachineConfig;
use crate::console::{Console, panic_message};
use crate::devices::SerialInput;
use crate::error::{Error, ErrorKind};
use crate::event_loop::Watch;
use crate::exit::{ExitLatch, ExitStatus};
use crate::kvm::{Kvm, KvmError, Vcpu, Vm};
use crate::memory::GuestRam;
use crate::phase::Phase;
use crate::timings::Recorder;
use crate::virtio::QueueError;
use devices::Devices;
use reaper::Reaped;

/// Why a machine cannot be put together, beyond what its parts say.
#[derive(Debug, ThisError)]
pub(crate) enum MachineError {
    #[error("cannot make an eventfd")]
    EventFd(#[source] io::Error),
    #[error("cannot start a thread for vCPU {id}")]
    Thread { id: u8, source: io::Error },
    #[error("a vCPU's thread has ended")]
    ThreadGone,
    #[error("cannot open the disk {}", path.display())]
    Disk { path: PathBuf, source: io::Error },
    #[error("cannot open the host's random source")]
    Entropy(#[source] io::Error),
    #[error("a device has a queue of an impossible size")]
    Queue(#[source] QueueError),
}

impl From<MachineError> for Error {
    fn from(error: MachineError) -> Self {
        if let MachineError::Disk { .. } = error {
            return Error::new(ErrorKind::Disk, error);
        }
        Error::new(ErrorKind::Resources, error)
            .fix("raise the limits of open files and processes (ulimit -n, ulimit -u)")
    }
}

/// A machine without its vCPUs.
#[derive(Debug)]
pub(crate) struct Machine {
    parts: Reaped<Parts>,
    exit: Arc<ExitLatch>,
    console: Console,
    serial_input: SerialInput,
    virtio_devices: u32,
}

/// What takes long to take down, in the order in which it goes: vCPU threads end, doorbells are
/// answered no more, the VM closes (its RAM is unmapped with it).
#[derive(Debug)]
struct Parts {
    threads: VcpuThreads,
    _watches: Vec<Watch>,
    vm: Arc<Vm>,
}

impl Machine {
    /// Puts a machine together as `config` says, which must be a checked one. Returns it with
    /// its vCPUs, which have their CPUID and the reset values of their registers.
    pub(crate) fn new(
        config: &MachineConfig,
        recorder: &mut Recorder,
    ) -> Result<(Self, Vec<Vcpu>), Error> {
        let ram = recorder
            .run(Phase::Memory, || GuestRam::anonymous(&layout::ram_ranges(config.memory_bytes)))?;
        let (kvm, vm) = recorder.run(Phase::Kvm, || {
            let kvm = Kvm::open(&config.kvm_device)?;
            let max = kvm.capabilities().max_vcpus;
            if usize::from(config.vcpus) > max {
                return Err(KvmError::TooManyVcpus { count: config.vcpus, max });
            }
            let vm = Arc::new(Vm::new(&kvm, Arc::new(ram))?);
            Ok((kvm, vm))
        })?;

        let exit = Arc::new(ExitLatch::default());
        let writer = config.console_writer.as_ref().map(|output| Arc::clone(&output.0));
        let console = Console::new(config.console_tail_bytes, writer);
        let Devices { bus, serial_input, watches } =
            recorder.run(Phase::Devices, || Devices::new(config, &vm, &exit, &console))?;

        let first_run = Arc::clone(recorder.first_run());
        let (vcpus, threads) = recorder.run(Phase::Vcpus, || {
            let vcpus = (0..config.vcpus)
                .map(|id| {
                    let supported = &kvm.capabilities().supported_cpuid;
                    let cpuid = cpuid::for_vcpu(supported, id, config.vcpus, &config.cpu);
                    let vcpu = vm.create_vcpu(id)?;
                    vcpu.configure(&cpuid, &msr::at_boot())?;
                    Ok(vcpu)
                })
                .collect::<Result<Vec<_>, KvmError>>()?;
            let threads =
                VcpuThreads::spawn(config.vcpus, Arc::new(bus), Arc::clone(&exit), first_run)?;
            Ok::<_, Error>((vcpus, threads))
        })?;

        let virtio_devices = watches.len() as u32;
        let parts = Reaped::new(Parts { threads, _watches: watches, vm });
        Ok((Self { parts, virtio_devices, exit, console, serial_input }, vcpus))
    }

    /// The guest's memory.
    pub(crate) fn ram(&self) -> &GuestRam {
        self.parts.vm.ram()
    }

    /// How many virtio devices there are; their addresses and interrupts follow from it.
    pub(crate) fn virtio_devices(&self) -> u32 {
        self.virtio_devices
    }

    /// The threads that run vCPUs.
    pub(crate) fn threads(&self) -> &VcpuThreads {
        &self.parts.threads
    }

    /// What the guest wrote.
    pub(crate) fn console(&self) -> &Console {
        &self.console
    }

    /// Where the host types.
    pub(crate) fn serial_input(&self) -> &SerialInput {
        &self.serial_input
    }

    /// How the guest ended, if it did. A reset after the console showed a panic was a panic.
    pub(crate) fn exit_status(&self) -> Option<ExitStatus> {
        let status = self.exit.get()?.clone();
        Some(match status {
            ExitStatus::Rebooted => match panic_message(&self.console.tail()) {
                Some(message) => ExitStatus::Panicked { message: Some(message) },
                None => ExitStatus::Rebooted,
            },
            ExitStatus::Panicked { message: None } => {
                ExitStatus::Panicked { message: panic_message(&self.console.tail()) }
            }
            other => other,
        })
    }

    /// Ends the guest from the host's side; a guest that ended before did so first.
    pub(crate) fn end(&self) {
        self.exit.report(ExitStatus::Terminated);
    }
}

impl Drop for Machine {
    fn drop(&mut self) {
        // The reaper may come late; the guest stops now.
        self.parts.threads.halt();
    }
}

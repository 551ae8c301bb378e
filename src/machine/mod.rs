//! The machine: memory, KVM's VM and the devices, put together in one place.
//!
//! [`Machine::from_shell`] is the only assembly, and never writes guest RAM: a boot loads a kernel into
//! the memory afterwards. The vCPUs are not part of it: whoever may run them owns them.

mod device_state;
mod devices;
pub(crate) mod disk_io;
mod shell;
mod state;
mod vcpu_threads;

pub(crate) use self::shell::{Shell, ShellConfig};
use self::vcpu_threads::VcpuThreads;
pub(crate) use self::vcpu_threads::{NotRun, Running};

use std::io;
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, MutexGuard, OnceLock, PoisonError};
use std::time::{Duration, Instant};

use kvm_bindings::kvm_cpuid_entry2;
use thiserror::Error as ThisError;

pub(crate) use self::state::MachineState;
use crate::arch::layout;
use crate::config::MachineConfig;
use crate::console::{Console, ConsoleSink};
use crate::devices::{SerialInput, VmGenId};
use crate::error::{Error, ErrorKind};
use crate::exit::{ExitLatch, ExitStatus};
use crate::kvm::{CpuProfile, Vcpu, Vm};
use crate::memory::{GuestRam, MemoryError};
use crate::metrics::DeviceMetrics;
use crate::phase::Phase;
use crate::protocol::HOST_PORT;
use crate::timings::Recorder;
use crate::virtio::{Backlog, QueueError};
use crate::vsock::{Vsock, VsockError, VsockListener};
pub(crate) use devices::Controls;
use devices::{Devices, VirtioSlot};

/// Why a machine cannot be put together, beyond what its parts say.
#[derive(Debug, ThisError)]
pub(crate) enum MachineError {
    #[error("cannot make an eventfd")]
    EventFd(#[source] io::Error),
    #[error("cannot start a thread for vCPU {id}")]
    Thread { id: u8, source: io::Error },
    #[error("a vCPU's thread has ended")]
    ThreadGone,
    #[error("cannot start a thread for disks")]
    DiskThread(#[source] io::Error),
    #[error("cannot use the network's socket")]
    Socket(#[source] io::Error),
    #[error("cannot open the host's random source")]
    Entropy(#[source] io::Error),
    #[error("cannot make the vsock device{}", at(path.as_deref()))]
    Vsock { path: Option<PathBuf>, source: io::Error },
    #[error("the VM has no agent")]
    NoAgent,
    #[error("a device has a queue of an impossible size")]
    Queue(#[source] QueueError),
}

impl From<MachineError> for Error {
    fn from(error: MachineError) -> Self {
        let fix = match &error {
            MachineError::NoAgent => {
                Some("add `.agent(AgentConfig::new())` to the VM's configuration")
            }
            MachineError::Vsock { path: Some(_), source } => match source.kind() {
                io::ErrorKind::AddrInUse => Some(
                    "choose a path where nothing is; what is there may be another VM's, and can be removed where \
                     nobody listens at it any more",
                ),
                io::ErrorKind::NotFound => Some("make the directory first, or choose another"),
                io::ErrorKind::PermissionDenied | io::ErrorKind::ReadOnlyFilesystem => {
                    Some("choose a directory that this user may write to")
                }
                io::ErrorKind::InvalidInput => {
                    Some("choose a path of up to 107 bytes, without NUL")
                }
                _ => match source.raw_os_error() {
                    Some(libc::EMFILE | libc::ENFILE | libc::ENOMEM | libc::ENOBUFS) => None,
                    _ => Some("choose another path"),
                },
            },
            _ => None,
        };
        match fix {
            Some(fix) => Error::new(ErrorKind::Config, error).fix(fix),
            None => Error::new(ErrorKind::Resources, error)
                .fix("raise the limits of open files and processes (ulimit -n, ulimit -u)"),
        }
    }
}

/// The words for a vsock device's UNIX socket.
fn at(path: Option<&Path>) -> String {
    path.map(|path| format!(" with its UNIX socket {}", path.display())).unwrap_or_default()
}

/// A machine without its vCPUs.
#[derive(Debug)]
pub(crate) struct Machine {
    exit: Arc<ExitLatch>,
    console: Console,
    serial_input: SerialInput,
    generation: Arc<VmGenId>,
    // In this order: doorbells are answered no more, and the threads are the last to hold the VM.
    virtio: Vec<VirtioSlot>,
    vsock: Option<Vsock>,
    agent_calls: Option<Arc<Backlog>>,
    controls: Controls,
    vm: Arc<Vm>,
    threads: VcpuThreads,
    config: MachineConfig,
    /// What each vCPU was given.
    cpuid: Vec<Vec<kvm_cpuid_entry2>>,
    /// Once somebody asked.
    profile: OnceLock<CpuProfile>,
    /// Held by who saves it: two at once would lend its disks twice.
    saving: Mutex<()>,
}

impl Machine {
    /// Puts a machine together as `config` says, which must be a checked one. Returns it with
    /// its vCPUs, which have their CPUID and the reset values of their registers.
    pub(crate) fn new(
        config: &MachineConfig,
        recorder: &mut Recorder,
    ) -> Result<(Self, Vec<Vcpu>), Error> {
        let ram = recorder.run(Phase::Memory, || {
            let ram = GuestRam::reserve(&layout::ram_ranges(config.memory_bytes))?;
            ram.map_fresh()?;
            Ok::<_, MemoryError>(ram)
        })?;
        let shell = Shell::new(&ShellConfig::from(config), ram, recorder)?;
        Self::from_shell(shell, config, None, recorder)
    }

    /// Puts a machine together around a shell that was made ahead, for a configuration with its
    /// memory, its vCPUs and its confinement. Its memory has its content, or gets it before the
    /// machine runs. A console that a VM had before goes on.
    pub(crate) fn from_shell(
        shell: Shell,
        config: &MachineConfig,
        console: Option<&Console>,
        recorder: &mut Recorder,
    ) -> Result<(Self, Vec<Vcpu>), Error> {
        shell.threads.rouse();
        let mut config = config.with_absolute_paths();
        config.kvm_device.clone_from(&shell.kvm_device);
        config.seccomp = shell.seccomp;
        let exit = Arc::new(ExitLatch::default());
        let writer = config.console_writer.as_ref().map(|output| Arc::clone(&output.0));
        let console = match console {
            Some(console) => console.clone(),
            None => Console::new(config.console_tail_bytes),
        };
        let sink = ConsoleSink::new(console.clone(), writer);
        let Devices { bus, serial_input, generation, virtio, vsock, agent_calls, controls } =
            recorder.run(Phase::Devices, || Devices::new(&config, &shell.vm, &exit, sink))?;
        let Shell { vcpus, cpuid, vm, threads, .. } = shell;
        let generation = Arc::new(generation);
        let first_run = Arc::clone(recorder.first_run());
        let threads = threads.attach(bus, Arc::clone(&exit), first_run, Arc::clone(&generation));
        // Only now: a path that is bound to has to be short.
        config.make_socket_absolute();
        let machine = Self {
            exit,
            console,
            serial_input,
            generation,
            virtio,
            vsock,
            agent_calls,
            controls,
            vm,
            threads,
            config,
            cpuid,
            profile: OnceLock::new(),
            saving: Mutex::default(),
        };
        Ok((machine, vcpus))
    }

    /// The guest's memory.
    pub(crate) fn ram(&self) -> &GuestRam {
        self.vm.ram()
    }

    /// What it was made from.
    pub(crate) fn config(&self) -> &MachineConfig {
        &self.config
    }

    /// How many virtio devices there are; their addresses and interrupts follow from it.
    pub(crate) fn virtio_devices(&self) -> u32 {
        self.virtio.len() as u32
    }

    /// What each virtio device has done.
    pub(crate) fn metrics(&self) -> Vec<DeviceMetrics> {
        self.virtio.iter().map(VirtioSlot::metrics).collect()
    }

    /// How much processor time its vCPUs have used.
    pub(crate) fn cpu_time(&self) -> Duration {
        self.threads.cpu_time()
    }

    /// The devices that the host has something to say to.
    pub(crate) fn controls(&self) -> &Controls {
        &self.controls
    }

    /// Lets the guest run: its devices, then its vCPUs. Where a thread is gone, all vCPUs come
    /// back.
    pub(crate) fn run(&self, vcpus: Vec<Vcpu>) -> Result<Running, NotRun> {
        for device in &self.virtio {
            device.resume();
        }
        self.serial_input.wake();
        self.threads.run(vcpus)
    }

    /// As [`run`](Self::run). Where a thread is gone, the guest has ended; one that has ended does not run again.
    pub(crate) fn run_or_end(&self, vcpus: Vec<Vcpu>) -> Running {
        if self.exit.get().is_some() {
            return self.threads.keep(vcpus);
        }
        self.run(vcpus).unwrap_or_else(|NotRun { vcpus, error }| {
            self.exit.report(ExitStatus::Crashed { reason: error.to_string() });
            self.threads.keep(vcpus)
        })
    }

    /// Stops the guest: its vCPUs, then its devices, each after the request that it is at.
    pub(crate) fn stop(&self, running: Running) -> Vec<Vcpu> {
        let vcpus = self.threads.stop(running);
        for device in &self.virtio {
            device.pause();
        }
        vcpus
    }

    /// Makes the guest another one than those that have the same memory; see [`VmGenId::renew`].
    pub(crate) fn renew_generation(&self) -> Result<(), Error> {
        Ok(self.generation.renew()?)
    }

    /// Waits until the guest ends by itself.
    pub(crate) fn wait(&self, running: Running) -> Vec<Vcpu> {
        self.threads.wait(running)
    }

    /// As [`wait`](Self::wait), but gives up after a time. A guest that has ended by then gets a
    /// moment more for its vCPUs to come back; where they do not, its end is told.
    pub(crate) fn wait_timeout(
        &self,
        running: Running,
        timeout: Duration,
    ) -> Result<Vec<Vcpu>, (Running, Option<ExitStatus>)> {
        const GRACE: Duration = Duration::from_millis(200);
        match self.threads.wait_timeout(running, timeout) {
            Ok(vcpus) => Ok(vcpus),
            Err(running) => match self.exit_status() {
                None => Err((running, None)),
                Some(status) => {
                    let waited = self.threads.wait_timeout(running, GRACE);
                    waited.map_err(|running| (running, Some(status)))
                }
            },
        }
    }

    /// The host's side of the vsock device.
    pub(crate) fn vsock(&self) -> Result<Vsock, Error> {
        Ok(self.vsock.clone().ok_or(VsockError::NoDevice)?)
    }

    /// The connections of the guest's agent, which wait here whoever looks, or nobody.
    pub(crate) fn agent_listener(&self) -> Result<VsockListener, Error> {
        let backlog = self.agent_calls.as_ref().ok_or(MachineError::NoAgent)?;
        Ok(VsockListener::kept(Arc::clone(backlog), HOST_PORT, self.vsock()?))
    }

    /// What the guest wrote.
    pub(crate) fn console(&self) -> &Console {
        &self.console
    }

    /// Where the host types.
    pub(crate) fn serial_input(&self) -> &SerialInput {
        &self.serial_input
    }

    /// Its configuration for a file.
    pub(crate) fn config_to_save(&self) -> MachineConfig {
        self.config_now().to_be_saved()
    }

    /// Its configuration with the limits that it has by now.
    pub(crate) fn config_now(&self) -> MachineConfig {
        let mut config = self.config.clone();
        for (block, disk) in config.blocks.iter_mut().zip(&self.controls.disks) {
            block.rate_limit = disk.with(|disk| disk.rate_limit());
        }
        for (network, device) in config.networks.iter_mut().zip(&self.controls.networks) {
            (network.receive_limit, network.transmit_limit) = device.with(|net| net.rate_limits());
        }
        if let Some(entropy) = &self.controls.entropy {
            config.entropy_rate_limit = entropy.with(|rng| rng.rate_limit());
        }
        config
    }

    /// Waits until nobody else saves it.
    pub(crate) fn saving(&self) -> MutexGuard<'_, ()> {
        self.saving.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// How the guest ended, if it did.
    pub(crate) fn exit_status(&self) -> Option<ExitStatus> {
        Some(self.console.explain(self.exit.get()?.clone()))
    }

    /// A descriptor that is readable once the guest has ended.
    #[cfg(feature = "session")]
    pub(crate) fn ended(&self) -> std::io::Result<std::os::fd::OwnedFd> {
        self.exit.descriptor()
    }

    /// Ends the guest from the host's side; a guest that ended before did so first. Its devices serve nothing any more;
    /// what they are at is given up, and waited for for a moment only: a disk may hang.
    pub(crate) fn end(&mut self) {
        const PATIENCE: Duration = Duration::from_secs(5);
        self.exit.report(ExitStatus::Terminated);
        self.threads.halt();
        for device in &self.virtio {
            device.give_up();
        }
        let until = Instant::now() + PATIENCE;
        for device in &self.virtio {
            device.drain(until);
        }
        // A vCPU's thread may be waiting for one of them too.
        for device in &mut self.virtio {
            device.close();
        }
    }
}

impl Drop for Machine {
    fn drop(&mut self) {
        // The threads' own end may take a while; the guest stops now.
        self.threads.halt();
    }
}

//! A virtual CPU: its registers before the start, and one entry into the guest at a time.

use std::io;
use std::sync::atomic::{AtomicBool, AtomicU32, Ordering};
use std::sync::{Arc, Mutex};

use kvm_bindings::{
    CpuId, KVM_SYSTEM_EVENT_CRASH, KVM_SYSTEM_EVENT_RESET, KVM_SYSTEM_EVENT_SHUTDOWN,
    kvm_cpuid_entry2, kvm_run,
};
use kvm_ioctls::{VcpuExit, VcpuFd};

use super::{KvmError, Vm, kick, msrs};
use crate::arch::msr::Msr;
use crate::arch::regs::Entry;
use crate::bus::Bus;
use crate::exit::ExitStatus;

/// A vCPU that whoever owns it may run.
#[derive(Debug)]
pub(crate) struct Vcpu {
    pub(super) fd: VcpuFd,
    id: u8,
    // Keeps the VM and its memory for as long as KVM_RUN can touch them.
    pub(super) vm: Arc<Vm>,
    /// The model-specific registers that make up its state, once that is known.
    pub(super) msr_indexes: Mutex<Option<Vec<u32>>>,
    /// Once it was asked, for it is we who change it.
    tsc_khz: AtomicU32,
    /// Its guest will find the pause that it is in forgiven, or has no clock that could tell it.
    pub(super) is_forgiven: AtomicBool,
    /// The guest asked a device, and has not taken the answer.
    unsettled: bool,
}

/// Why the guest returned to the host.
#[derive(Debug)]
pub(crate) enum VmExit {
    /// The guest asked a device, and was answered.
    Handled,
    /// Somebody wants something of the thread.
    Interrupted,
    /// The guest is over.
    Ended(ExitStatus),
}

impl Vcpu {
    pub(super) fn new(fd: VcpuFd, id: u8, vm: Arc<Vm>) -> Self {
        Self {
            fd,
            id,
            vm,
            msr_indexes: Mutex::default(),
            tsc_khz: AtomicU32::new(0),
            is_forgiven: AtomicBool::new(false),
            unsettled: false,
        }
    }

    /// The vCPU's number, which is also its APIC id.
    pub(crate) fn id(&self) -> u8 {
        self.id
    }

    /// Gives the vCPU its CPUID (api.rst §4.20), the MSRs of a booted machine (§4.19), and lets
    /// a kick through to KVM_RUN.
    pub(crate) fn configure(
        &self,
        cpuid: &[kvm_cpuid_entry2],
        msrs: &[Msr],
    ) -> Result<(), KvmError> {
        let cpuid = CpuId::from_entries(cpuid).map_err(|_| KvmError::CpuidEntries)?;
        self.fd.set_cpuid2(&cpuid).map_err(KvmError::call("KVM_SET_CPUID2"))?;
        msrs::write(&self.fd, msrs)?;
        kick::open_kick_in_run(&self.fd)
    }

    #[cfg(test)]
    /// The CPUID that the vCPU has (api.rst §4.53): the one that it was given, but for the bits that
    /// follow the guest's own registers.
    pub(crate) fn cpuid(&self) -> Result<Vec<kvm_cpuid_entry2>, KvmError> {
        let cpuid = self.fd.get_cpuid2(kvm_bindings::KVM_MAX_CPUID_ENTRIES);
        Ok(cpuid.map_err(KvmError::call("KVM_GET_CPUID2"))?.as_slice().to_vec())
    }

    /// Sets the boot vCPU's registers to a kernel's entry (api.rst §4.11, §4.13).
    pub(crate) fn enter_at(&self, entry: Entry) -> Result<(), KvmError> {
        let mut sregs = self.fd.get_sregs().map_err(KvmError::call("KVM_GET_SREGS"))?;
        entry.set_sregs(&mut sregs);
        self.fd.set_sregs(&sregs).map_err(KvmError::call("KVM_SET_SREGS"))?;
        self.fd.set_regs(&entry.regs()).map_err(KvmError::call("KVM_SET_REGS"))
    }

    /// The frequency of its TSC, in kHz (api.rst §4.56).
    pub(crate) fn tsc_khz(&self) -> Result<u32, KvmError> {
        let known = self.tsc_khz.load(Ordering::Relaxed);
        if known != 0 {
            return Ok(known);
        }
        let khz = self.fd.get_tsc_khz().map_err(KvmError::call("KVM_GET_TSC_KHZ"))?;
        self.tsc_khz.store(khz, Ordering::Relaxed);
        Ok(khz)
    }

    /// Changes the frequency of its TSC (api.rst §4.55).
    pub(super) fn set_tsc_khz(&self, khz: u32) -> Result<(), KvmError> {
        self.fd.set_tsc_khz(khz).map_err(KvmError::call("KVM_SET_TSC_KHZ"))?;
        self.tsc_khz.store(khz, Ordering::Relaxed);
        Ok(())
    }

    /// Tells a guest with a paravirtual clock that it was stopped, so that its watchdogs do not
    /// take the pause for a hang (api.rst §4.76). A guest without one is none the wiser.
    pub(crate) fn forgive_pause(&self) {
        if !self.is_forgiven.swap(false, Ordering::Relaxed) {
            let _ = self.fd.kvmclock_ctrl();
        }
    }

    /// Lets the guest take the answer of a device that it asked last, and brings it to the end of
    /// that instruction: until then the registers are those of neither before nor after (api.rst
    /// §5, on KVM_EXIT_IO and KVM_EXIT_MMIO). One instruction may ask several times.
    ///
    /// Takes one entry into KVM where an answer is to be taken, else nothing. No guest code runs.
    pub(crate) fn settle(&mut self, bus: &Bus) -> VmExit {
        self.fd.set_kvm_immediate_exit(1);
        let mut exit = VmExit::Interrupted;
        while self.unsettled {
            exit = self.run(bus);
        }
        self.fd.set_kvm_immediate_exit(0);
        exit
    }

    /// Runs the guest until it asks for something, and answers from the bus (api.rst §4.10).
    pub(crate) fn run(&mut self, bus: &Bus) -> VmExit {
        let exit = self.enter(bus);
        self.unsettled = matches!(exit, VmExit::Handled);
        exit
    }

    fn enter(&mut self, bus: &Bus) -> VmExit {
        let run: *const kvm_run = self.fd.get_kvm_run();
        match self.fd.run() {
            Ok(VcpuExit::IoOut(port, data)) => {
                let size = io_size(run);
                for access in data.chunks(size) {
                    bus.pio.write(port.into(), access);
                }
                VmExit::Handled
            }
            Ok(VcpuExit::IoIn(port, data)) => {
                let size = io_size(run);
                for access in data.chunks_mut(size) {
                    bus.pio.read(port.into(), access);
                }
                VmExit::Handled
            }
            Ok(VcpuExit::MmioWrite(address, data)) => {
                bus.mmio.write(address, data);
                VmExit::Handled
            }
            Ok(VcpuExit::MmioRead(address, data)) => {
                bus.mmio.read(address, data);
                VmExit::Handled
            }
            Ok(VcpuExit::Intr) => VmExit::Interrupted,
            Ok(VcpuExit::Shutdown) => VmExit::Ended(ExitStatus::TripleFault),
            Ok(VcpuExit::SystemEvent(KVM_SYSTEM_EVENT_SHUTDOWN, _)) => {
                VmExit::Ended(ExitStatus::PoweredOff)
            }
            Ok(VcpuExit::SystemEvent(KVM_SYSTEM_EVENT_RESET, _)) => {
                VmExit::Ended(ExitStatus::Rebooted)
            }
            Ok(VcpuExit::SystemEvent(KVM_SYSTEM_EVENT_CRASH, _)) => {
                VmExit::Ended(ExitStatus::Panicked { message: None })
            }
            Ok(VcpuExit::InternalError) => {
                let what = internal_error(run);
                self.crashed(what)
            }
            Ok(VcpuExit::FailEntry(reason, cpu)) => self
                .crashed(format!("the CPU refused to enter the guest: {reason:#x} on CPU {cpu}")),
            Ok(other) => {
                let what = format!("an exit that no guest of this machine causes: {other:?}");
                self.crashed(what)
            }
            Err(errno) => self.not_run(errno.errno()),
        }
    }

    /// What an error of KVM_RUN means.
    pub(super) fn not_run(&self, errno: i32) -> VmExit {
        let cause = io::Error::from_raw_os_error(errno);
        match errno {
            libc::EINTR => {
                kick::take_kick();
                VmExit::Interrupted
            }
            // One that another has started, or not yet.
            libc::EAGAIN if self.id > 0 => VmExit::Interrupted,
            // Linux 6.14 makes it at the VM's first entry.
            libc::EAGAIN => self.crashed(format!(
                "KVM has no thread for the VM's huge pages: {cause}; raise the limit of processes (ulimit -u, pids.max)"
            )),
            _ => self.crashed(format!("KVM_RUN failed: {cause}")),
        }
    }

    fn crashed(&self, what: String) -> VmExit {
        let reason = match self.fd.get_regs() {
            Ok(regs) => format!("{what} (vCPU {}, rip {:#x})", self.id, regs.rip),
            Err(_) => format!("{what} (vCPU {})", self.id),
        };
        VmExit::Ended(ExitStatus::Crashed { reason })
    }
}

/// The size of one access of a port exit: `rep outsb` brings many of one byte at once.
fn io_size(run: *const kvm_run) -> usize {
    // SAFETY: `run` points to the vCPU's mapped `kvm_run`, which lives as long as its vCPU; KVM
    // writes it during KVM_RUN only, and the last exit was KVM_EXIT_IO, whose member this is.
    let io = unsafe { (*run).__bindgen_anon_1.io };
    usize::from(io.size).max(1)
}

/// What an internal error of KVM is about (api.rst, KVM_EXIT_INTERNAL_ERROR).
fn internal_error(run: *const kvm_run) -> String {
    // SAFETY: as in `io_size`; the last exit was KVM_EXIT_INTERNAL_ERROR, whose member this is.
    let suberror = unsafe { (*run).__bindgen_anon_1.internal.suberror };
    match suberror {
        kvm_bindings::KVM_INTERNAL_ERROR_EMULATION => {
            "KVM could not emulate an instruction; where /dev/kvm emulates all of ring 0, as that \
             of kvm_pvm does, no stock kernel runs: use a machine whose CPU shows vmx or svm"
                .to_owned()
        }
        kvm_bindings::KVM_INTERNAL_ERROR_DELIVERY_EV => {
            "KVM could not deliver an exception".to_owned()
        }
        other => format!("KVM reported internal error {other}"),
    }
}

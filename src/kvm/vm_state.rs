//! The state of a VM inside KVM: its interrupt controllers, its clock and its vCPUs.
//!
//! Sources: api.rst §4.26, §4.27 (interrupt controllers), §4.29, §4.30 (clock). There is no PIT.

use std::fmt;
use std::sync::{Arc, OnceLock, PoisonError};

use kvm_bindings::{
    KVM_IRQCHIP_IOAPIC, KVM_IRQCHIP_PIC_MASTER, KVM_IRQCHIP_PIC_SLAVE, kvm_clock_data, kvm_irqchip,
};
use serde::{Deserialize, Serialize};

use super::clock::{self, ClockState};
use super::{KvmError, Vcpu, VcpuState, Vm, msrs};
use crate::arch::msr::IA32_TSC;
use crate::bounded;
use crate::config::Clock;

/// What KVM knows about a guest, but for its memory and its CPUID.
#[derive(Clone, Serialize, Deserialize)]
pub(crate) struct VmState {
    pub(super) clock: ClockState,
    /// In the order of [`CHIPS`].
    pub(super) irqchips: [kvm_irqchip; 3],
    #[serde(deserialize_with = "bounded::list")]
    pub(super) vcpus: Vec<VcpuState>,
}

/// What VMs of one kind are before they run: the same, so that who has looked at one knows all. The
/// kind is the number of vCPUs and what CPUID they have.
pub(crate) type FreshState = OnceLock<Arc<VmState>>;

/// What is known of a VM that has not run.
pub(super) type Fresh = Arc<VmState>;

/// As for the registers of a vCPU.
const _: () = assert!(size_of::<kvm_irqchip>() == 520);

const CHIPS: [u32; 3] = [KVM_IRQCHIP_PIC_MASTER, KVM_IRQCHIP_PIC_SLAVE, KVM_IRQCHIP_IOAPIC];

impl VmState {
    /// How many vCPUs are saved.
    pub(crate) fn vcpus(&self) -> usize {
        self.vcpus.len()
    }

    /// The registers that are saved of the first vCPU, by index.
    pub(crate) fn msrs(&self) -> Vec<u32> {
        let first = self.vcpus.first().map_or(&[][..], |vcpu| &vcpu.msrs);
        first.iter().map(|msr| msr.index).collect()
    }
}

impl Vm {
    /// Reads everything of a VM whose vCPUs are all stopped and [settled](Vcpu::settle), and whose
    /// devices raise no interrupt meanwhile. Takes some 100 µs a vCPU.
    pub(crate) fn state(&self, vcpus: &[Vcpu]) -> Result<VmState, KvmError> {
        let clock = self.clock(vcpus)?;
        let mut irqchips = [kvm_irqchip::default(); 3];
        for (chip, chip_id) in irqchips.iter_mut().zip(CHIPS) {
            chip.chip_id = chip_id;
            self.fd.get_irqchip(chip).map_err(KvmError::call("KVM_GET_IRQCHIP"))?;
        }
        let vcpus = vcpus.iter().map(Vcpu::state).collect::<Result<_, _>>()?;
        Ok(VmState { clock, irqchips, vcpus })
    }

    /// Looks at a VM whose vCPUs have their CPUID and have not run, ahead of a restore: at what is
    /// not `known` of its kind. Takes 10 µs, and the first of a kind ten times that.
    pub(crate) fn look_ahead(&self, vcpus: &[Vcpu], known: &FreshState) -> Result<(), KvmError> {
        let state = match known.get() {
            Some(state) => state,
            None => {
                let state = Arc::new(self.state(vcpus)?);
                known.get_or_init(|| state)
            }
        };
        *self.fresh.lock().unwrap_or_else(PoisonError::into_inner) = Some(Arc::clone(state));
        Ok(())
    }

    /// Takes a state over. The vCPUs have the CPUID of those that were saved, and have not run;
    /// devices come after, so that an interrupt that they raise is not overwritten.
    ///
    /// # Errors
    ///
    /// Another number of vCPUs; a TSC of another frequency, on a host that scales none; a value
    /// that KVM refuses. The VM is then of no more use.
    pub(crate) fn restore(
        &self,
        state: &VmState,
        vcpus: &[Vcpu],
        policy: Clock,
    ) -> Result<(), KvmError> {
        let saved = state.vcpus.len();
        if saved != vcpus.len() {
            return Err(KvmError::VcpuCount { saved, vcpus: vcpus.len() });
        }
        let fresh = self.fresh.lock().unwrap_or_else(PoisonError::into_inner).take();
        let fresh = fresh.as_deref();
        let fresh_vcpu = |id: usize| fresh.and_then(|fresh| fresh.vcpus.get(id));
        // First, for the base of the TSCs depends on it.
        for vcpu in vcpus {
            state.clock.set_frequency(vcpu)?;
        }
        let shift = state.clock.shift(&self.clock(vcpus)?, policy);
        for (id, (vcpu, state)) in vcpus.iter().zip(&state.vcpus).enumerate() {
            vcpu.restore(state, fresh_vcpu(id), &shift)?;
        }
        // After the TSCs: kvmclock follows them only where they agree. No flags: with them KVM
        // would add the time that has passed, which is the policy's to choose.
        let clock = kvm_clock_data { clock: shift.kvmclock_ns, ..Default::default() };
        self.fd.set_clock(&clock).map_err(KvmError::call("KVM_SET_CLOCK"))?;
        for (index, (chip, chip_id)) in state.irqchips.iter().zip(CHIPS).enumerate() {
            let mut chip = *chip;
            chip.chip_id = chip_id;
            let fresh = fresh.and_then(|fresh| fresh.irqchips.get(index));
            if fresh.is_some_and(|fresh| registers(fresh) == registers(&chip)) {
                continue;
            }
            self.fd.set_irqchip(&chip).map_err(KvmError::call("KVM_SET_IRQCHIP"))?;
        }
        Ok(())
    }

    /// This moment on the VM's clocks.
    pub(super) fn clock(&self, vcpus: &[Vcpu]) -> Result<ClockState, KvmError> {
        let data = self.fd.get_clock().map_err(KvmError::call("KVM_GET_CLOCK"))?;
        let Some(vcpu) = vcpus.first() else {
            return Ok(ClockState::new(&data, None, 0));
        };
        // What all TSCs count from is the same, whichever vCPU's is asked. KVM moves the offset of one that waited while
        // the host was suspended: both are read now.
        let tsc = msrs::read(&vcpu.fd, &[IA32_TSC])?.first().map(|tsc| tsc.value);
        let base =
            tsc.zip(clock::tsc_offset(&vcpu.fd)?).map(|(tsc, offset)| tsc.wrapping_sub(offset));
        Ok(ClockState::new(&data, base, vcpu.tsc_khz()?))
    }
}

/// The registers of an interrupt controller.
fn registers(chip: &kvm_irqchip) -> &[i8; 512] {
    // SAFETY: all members of the union are plain numbers, this one is as long as the union, and
    // every byte of it was written: it began as zeros.
    unsafe { &chip.chip.dummy }
}

impl fmt::Debug for VmState {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        // Kilobytes of registers tell nobody anything.
        let Self { clock, irqchips: _, vcpus } = self;
        f.debug_struct("VmState")
            .field("clock", clock)
            .field("vcpus", &vcpus.len())
            .finish_non_exhaustive()
    }
}

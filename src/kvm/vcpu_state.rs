//! The state of a vCPU: all that a guest can find out about it, as plain data.
//!
//! Sources: api.rst, at each call; for the order, arch/x86/kvm/x86.c, whose calls have effects on
//! one another.

use std::sync::atomic::Ordering;
use std::sync::{MutexGuard, PoisonError};

use kvm_bindings::{
    Xsave, kvm_debugregs, kvm_lapic_state, kvm_mp_state, kvm_regs, kvm_sregs, kvm_vcpu_events,
    kvm_xcrs,
};
use kvm_ioctls::Cap;
use serde::{Deserialize, Serialize};

use super::clock::{self, ClockShift};
use super::{KvmError, Vcpu, msrs};
use crate::arch::msr::{self, Msr};

/// A vCPU between two instructions, in the structures of KVM's API.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub(crate) struct VcpuState {
    pub(super) mp_state: kvm_mp_state,
    pub(super) regs: kvm_regs,
    pub(super) sregs: kvm_sregs,
    pub(super) xcrs: kvm_xcrs,
    /// The XSAVE area, without the zeros at its end.
    pub(super) xsave: Vec<u32>,
    pub(super) debug_regs: kvm_debugregs,
    pub(super) lapic: kvm_lapic_state,
    /// Every register that KVM gave, in rising order of their numbers.
    pub(super) msrs: Vec<Msr>,
    /// What the vCPU's TSC adds to the common counter, where KVM told.
    pub(super) tsc_offset: Option<u64>,
    pub(super) events: kvm_vcpu_events,
}

/// Their bytes are in snapshots, as Linux's x86-64 ABI has them: another length is another format.
const _: () = {
    assert!(size_of::<kvm_mp_state>() == 4 && size_of::<kvm_regs>() == 144);
    assert!(size_of::<kvm_sregs>() == 312 && size_of::<kvm_xcrs>() == 392);
    assert!(size_of::<kvm_debugregs>() == 128 && size_of::<kvm_lapic_state>() == 1024);
    assert!(size_of::<kvm_vcpu_events>() == 64);
};

/// More than any x86 CPU has: the bound for a list that comes from a file.
const MAX_MSRS: usize = 1024;

impl Vcpu {
    /// Reads everything of a vCPU that is stopped, and [settled](Vcpu::settle).
    ///
    /// KVM_GET_MP_STATE comes first and KVM_GET_VCPU_EVENTS last, since calls settle what is
    /// pending: the first delivers INIT and SIPI, each may move an exception on.
    pub(super) fn state(&self) -> Result<VcpuState, KvmError> {
        let fd = &self.fd;
        let mp_state = fd.get_mp_state().map_err(KvmError::call("KVM_GET_MP_STATE"))?;
        let regs = fd.get_regs().map_err(KvmError::call("KVM_GET_REGS"))?;
        let sregs = fd.get_sregs().map_err(KvmError::call("KVM_GET_SREGS"))?;
        let xcrs = fd.get_xcrs().map_err(KvmError::call("KVM_GET_XCRS"))?;
        let xsave = self.xsave()?;
        let debug_regs = fd.get_debug_regs().map_err(KvmError::call("KVM_GET_DEBUGREGS"))?;
        let lapic = fd.get_lapic().map_err(KvmError::call("KVM_GET_LAPIC"))?;
        let msrs = self.msrs()?;
        let tsc_offset = clock::tsc_offset(fd)?;
        let events = fd.get_vcpu_events().map_err(KvmError::call("KVM_GET_VCPU_EVENTS"))?;
        Ok(VcpuState {
            mp_state,
            regs,
            sregs,
            xcrs,
            xsave,
            debug_regs,
            lapic,
            msrs,
            tsc_offset,
            events,
        })
    }

    /// Takes a state over. The vCPU has its CPUID, and has not run; `fresh` is what it is now,
    /// where that is known.
    ///
    /// The order: SREGS before LAPIC, because they hold the APIC's mode; XCRS before XSAVE; the
    /// TSC and LAPIC before IA32_TSC_DEADLINE, which is compared with the one, and counts only
    /// where the other's timer is in that mode; events last, because KVM_SET_REGS clears
    /// exceptions.
    pub(super) fn restore(
        &self,
        state: &VcpuState,
        fresh: Option<&VcpuState>,
        shift: &ClockShift,
    ) -> Result<(), KvmError> {
        if state.msrs.len() > MAX_MSRS {
            return Err(KvmError::MsrEntries);
        }
        let differs = |is_same: fn(&VcpuState, &VcpuState) -> bool| {
            fresh.is_none_or(|fresh| !is_same(fresh, state))
        };
        let fd = &self.fd;
        if differs(|fresh, state| fresh.mp_state == state.mp_state) {
            fd.set_mp_state(state.mp_state).map_err(KvmError::call("KVM_SET_MP_STATE"))?;
        }
        fd.set_regs(&state.regs).map_err(KvmError::call("KVM_SET_REGS"))?;
        fd.set_sregs(&state.sregs).map_err(KvmError::call("KVM_SET_SREGS"))?;
        if differs(|fresh, state| fresh.xcrs == state.xcrs) {
            fd.set_xcrs(&state.xcrs).map_err(KvmError::call("KVM_SET_XCRS"))?;
        }
        if differs(|fresh, state| fresh.xsave == state.xsave) {
            self.set_xsave(&state.xsave)?;
        }
        if differs(|fresh, state| fresh.debug_regs == state.debug_regs) {
            fd.set_debug_regs(&state.debug_regs).map_err(KvmError::call("KVM_SET_DEBUGREGS"))?;
        }
        let apic = |state: &VcpuState| (state.lapic, state.sregs.apic_base);
        if fresh.is_none_or(|fresh| apic(fresh) != apic(state)) {
            fd.set_lapic(&state.lapic).map_err(KvmError::call("KVM_SET_LAPIC"))?;
        }
        match state.tsc(shift) {
            Tsc::Offset(offset) => clock::set_tsc_offset(fd, offset)?,
            Tsc::Value(value) => msrs::write(fd, &[Msr { index: msr::IA32_TSC, value }])?,
        }
        let is_clock = |msr: &Msr| matches!(msr.index, msr::IA32_TSC | msr::IA32_TSC_DEADLINE);
        let others: Vec<Msr> = state.msrs.iter().filter(|msr| !is_clock(msr)).copied().collect();
        msrs::restore(fd, &others, fresh.map(|fresh| &fresh.msrs[..]))?;
        // Zero is a timer that is not set, which a new vCPU has.
        let deadline = state.msr(msr::IA32_TSC_DEADLINE).filter(|value| *value != 0);
        if let Some(value) = deadline {
            msrs::write(fd, &[Msr { index: msr::IA32_TSC_DEADLINE, value }])?;
        }
        if differs(|fresh, state| fresh.events == state.events) {
            fd.set_vcpu_events(&state.events).map_err(KvmError::call("KVM_SET_VCPU_EVENTS"))?;
        }
        // Now, while nobody waits for the guest to run.
        if state.has_kvmclock() {
            self.forgive_pause();
        }
        self.is_forgiven.store(true, Ordering::Relaxed);

        // A snapshot of this guest holds what this one held, also what this KVM does not list and a look ahead did
        // not find.
        let saved = state.msrs.iter().map(|msr| msr.index);
        let listed = self.vm.capabilities().msrs.iter().copied();
        let indexes: Vec<u32> = saved.chain(listed).collect();
        *self.msr_indexes() = Some(msr::to_save(&indexes));
        Ok(())
    }

    /// The model-specific registers. Which ones there are is found out once.
    fn msrs(&self) -> Result<Vec<Msr>, KvmError> {
        let mut indexes = self.msr_indexes();
        if let Some(known) = &*indexes {
            return msrs::read(&self.fd, known);
        }
        let found = msrs::read(&self.fd, &msr::to_save(&self.vm.capabilities().msrs))?;
        *indexes = Some(found.iter().map(|msr| msr.index).collect());
        Ok(found)
    }

    fn msr_indexes(&self) -> MutexGuard<'_, Option<Vec<u32>>> {
        self.msr_indexes.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// The XSAVE area (api.rst §4.141), without the zeros at its end.
    fn xsave(&self) -> Result<Vec<u32>, KvmError> {
        let mut area = self.empty_xsave()?;
        // SAFETY: the area has the length that KVM gives for this VM. It grows for a process that
        // asks for more registers, which KVM forbids once the process has made a vCPU.
        unsafe { self.fd.get_xsave2(&mut area) }
            .or_else(|errno| match errno.errno() {
                // Before 5.17 the area was always of one page.
                libc::ENOTTY | libc::EINVAL if area.as_slice().is_empty() => {
                    let old = self.fd.get_xsave()?;
                    // SAFETY: the length, which is what must not change, is that of `area`: none.
                    unsafe { area.as_mut_fam_struct() }.xsave.region = old.region;
                    Ok(())
                }
                _ => Err(errno),
            })
            .map_err(KvmError::call("KVM_GET_XSAVE2"))?;
        let mut words = area.as_fam_struct_ref().xsave.region.to_vec();
        words.extend_from_slice(area.as_slice());
        let len = words.iter().rposition(|word| *word != 0).map_or(0, |last| last + 1);
        words.truncate(len);
        Ok(words)
    }

    fn set_xsave(&self, words: &[u32]) -> Result<(), KvmError> {
        let mut area = self.empty_xsave()?;
        let (region, extra) = words.split_at(words.len().min(XSAVE_REGION_WORDS));
        let room = area.as_slice().len();
        let Some(rest) = area.as_mut_slice().get_mut(..extra.len()) else {
            return Err(KvmError::XsaveArea {
                saved: 4 * words.len(),
                room: 4 * (XSAVE_REGION_WORDS + room),
            });
        };
        rest.copy_from_slice(extra);
        // SAFETY: the length, which is what must not change, is not touched.
        unsafe { area.as_mut_fam_struct() }.xsave.region[..region.len()].copy_from_slice(region);
        // SAFETY: the area has the length that KVM gives for this VM, as in `xsave`.
        unsafe { self.fd.set_xsave2(&area) }.map_err(KvmError::call("KVM_SET_XSAVE"))
    }

    /// An area as long as KVM's for this VM.
    fn empty_xsave(&self) -> Result<Xsave, KvmError> {
        let bytes = usize::try_from(self.vm.fd.check_extension_int(Cap::Xsave2)).unwrap_or(0);
        let extra = bytes.div_ceil(4).saturating_sub(XSAVE_REGION_WORDS);
        Xsave::new(extra).map_err(|_| KvmError::XsaveArea { saved: bytes, room: 0 })
    }
}

/// Words of the area in `struct kvm_xsave` that every kernel has.
const XSAVE_REGION_WORDS: usize = 1024;

/// How a vCPU's TSC is set.
#[derive(Debug, PartialEq, Eq)]
enum Tsc {
    Offset(u64),
    Value(u64),
}

impl VcpuState {
    fn tsc(&self, shift: &ClockShift) -> Tsc {
        match self.tsc_offset.zip(shift.tsc_offset) {
            Some((offset, shift)) => Tsc::Offset(offset.wrapping_add(shift)),
            None => {
                let saved = self.msr(msr::IA32_TSC).unwrap_or(0);
                Tsc::Value(saved.wrapping_add(shift.tsc_ticks))
            }
        }
    }

    /// Whether the guest has a clock of KVM's, which counts its pauses.
    pub(super) fn has_kvmclock(&self) -> bool {
        let is_on = |index: &u32| self.msr(*index).is_some_and(|value| value & 1 != 0);
        msr::KVM_SYSTEM_TIME.iter().any(is_on)
    }

    /// A register's saved value.
    pub(super) fn msr(&self, index: u32) -> Option<u64> {
        self.msrs.iter().find(|msr| msr.index == index).map(|msr| msr.value)
    }
}

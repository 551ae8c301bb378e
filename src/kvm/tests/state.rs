//! What a restored vCPU knows, and how its clocks go on.

use std::path::Path;
use std::sync::Arc;
use std::sync::atomic::Ordering;

use kvm_bindings::kvm_irqchip__bindgen_ty_1;

use super::super::clock::{self, ClockState};
use super::super::{CpuProfile, FreshState, Kvm, KvmError, VmExit, VmState, msrs};
use super::Guest;
use crate::arch::cpuid;
use crate::arch::msr::{IA32_TSC, KVM_SYSTEM_TIME, Msr};
use crate::config::{Clock, CpuTemplate, CpuidRegister};
use crate::exit::ExitStatus;

/// `mov dx, 0x100; xor eax, eax; 1: out dx, al; inc eax; jmp 1b`
const COUNTER: &[u8] = &[0x66, 0xba, 0x00, 0x01, 0x31, 0xc0, 0xee, 0xff, 0xc0, 0xeb, 0xfb];

/// `mov dx, 0x100; xor eax, eax; in al, dx; out dx, al; jmp -5`
const ECHO: &[u8] = &[0x66, 0xba, 0x00, 0x01, 0x31, 0xc0, 0xec, 0xee, 0xeb, 0xfc];

const HOUR_NS: u64 = 3_600_000_000_000;

/// Saves a guest as a file would, and puts a new one beside it, over the same memory.
fn next_generation(guest: &mut Guest, policy: Clock) -> (VmState, Guest) {
    for vcpu in &mut guest.vcpus {
        assert!(matches!(vcpu.settle(&guest.bus), VmExit::Interrupted));
    }
    let state = through_serde(&guest.vm.state(&guest.vcpus).unwrap());
    let restored = restored(guest, &state, policy).unwrap();
    (state, restored)
}

fn through_serde(state: &VmState) -> VmState {
    serde_json::from_str(&serde_json::to_string(state).unwrap()).unwrap()
}

fn restored(guest: &Guest, state: &VmState, policy: Clock) -> Result<Guest, KvmError> {
    let ram = Arc::clone(guest.vm.ram());
    let new = Guest::new(guest.vcpus.len() as u8, ram).expect("a KVM as before");
    new.vm.restore(state, &new.vcpus, policy)?;
    Ok(new)
}

#[test]
fn a_tenth_generation_runs_on_and_holds_what_the_first_one_held() {
    let Some(mut guest) = Guest::with_code(1, COUNTER) else { return };
    guest.step();
    let (first, mut guest) = next_generation(&mut guest, Clock::Advance);
    let mut last = first.clone();
    for generation in 1..10 {
        guest.step();
        guest.step();
        assert_eq!(guest.written(), [2 * generation - 1, 2 * generation]);
        (last, guest) = next_generation(&mut guest, Clock::Advance);
    }
    let indexes =
        |state: &VmState| -> Vec<u32> { state.vcpus[0].msrs.iter().map(|msr| msr.index).collect() };
    assert_eq!(indexes(&first), indexes(&last));
    assert!(indexes(&first).len() > 20, "{:x?}", indexes(&first));
}

#[test]
fn restoring_what_was_saved_changes_nothing_but_time() {
    let Some(mut guest) = Guest::with_code(2, COUNTER) else { return };
    guest.step();
    // What a restore has to carry, and a new vCPU does not have.
    let fd = &guest.vcpus[0].fd;
    let mut debug_regs = fd.get_debug_regs().unwrap();
    debug_regs.db[0] = 0x1234;
    fd.set_debug_regs(&debug_regs).unwrap();
    msrs::write(fd, &[Msr { index: 0xc000_0082, value: 0xffff_8000_0000_1000 }]).unwrap();
    let (saved, mut guest) = next_generation(&mut guest, Clock::Freeze);
    let (again, _) = next_generation(&mut guest, Clock::Freeze);
    assert_same_but_for_time(&saved, &again);
    assert_eq!(saved.vcpus[0].debug_regs.db[0], 0x1234);
    assert_eq!(saved.vcpus[0].msr(0xc000_0082), Some(0xffff_8000_0000_1000));
}

fn assert_same_but_for_time(saved: &VmState, again: &VmState) {
    for (saved, again) in saved.vcpus.iter().zip(&again.vcpus) {
        let mut timeless = again.clone();
        for (msr, saved) in timeless.msrs.iter_mut().zip(&saved.msrs) {
            if msr.index == IA32_TSC {
                assert!(msr.value >= saved.value);
                msr.value = saved.value;
            }
        }
        timeless.tsc_offset = saved.tsc_offset;
        assert_eq!(timeless, *saved);
    }
    let bytes = |state: &VmState| serde_json::to_vec(&state.irqchips).unwrap();
    assert_eq!(bytes(saved), bytes(again));
}

/// What is as in a new VM is not written, and each thing that is not is.
#[test]
fn a_restore_that_looked_ahead_leaves_nothing_out() {
    let Some(mut guest) = Guest::with_code(2, COUNTER) else { return };
    guest.step();
    let (plain, _) = next_generation(&mut guest, Clock::Freeze);
    let with = |change: fn(&mut VmState)| {
        let mut state = plain.clone();
        change(&mut state);
        state
    };
    // The spurious interrupt's vector, and an address that the IOAPIC's fifth line goes to.
    let lapic = with(|state| state.vcpus[1].lapic.regs[0xf0] = 0x33);
    let ioapic = with(|state| {
        // SAFETY: every member of the union is plain numbers.
        let mut ioapic = unsafe { state.irqchips[2].chip.ioapic };
        ioapic.redirtbl[5].bits = 0x0100_0000_0001_0044;
        state.irqchips[2].chip = kvm_irqchip__bindgen_ty_1 { ioapic };
    });
    let pic = with(|state| {
        // SAFETY: as above.
        let mut pic = unsafe { state.irqchips[0].chip.pic };
        pic.imr = 0xfb;
        state.irqchips[0].chip = kvm_irqchip__bindgen_ty_1 { pic };
    });
    let debug = with(|state| state.vcpus[0].debug_regs.db[0] = 0x1234);
    // The first VM is looked at, the others are known by it.
    let known = FreshState::new();
    for state in [plain, lapic, ioapic, pic, debug] {
        let new = Guest::new(2, Arc::clone(guest.vm.ram())).expect("a KVM as before");
        new.vm.look_ahead(&new.vcpus, &known).unwrap();
        new.vm.restore(&state, &new.vcpus, Clock::Freeze).unwrap();
        assert_same_but_for_time(&state, &new.vm.state(&new.vcpus).unwrap());
    }
}

#[test]
fn a_vm_that_waited_for_its_restore_has_the_tsc_that_was_saved_whatever_the_host_did_meanwhile() {
    let Some(mut guest) = Guest::with_code(1, COUNTER) else { return };
    guest.step();
    let (state, other) = next_generation(&mut guest, Clock::Freeze);
    if !tsc_can_be_set(&other) {
        return;
    }
    let new = Guest::new(1, Arc::clone(guest.vm.ram())).expect("a KVM as before");
    new.vm.look_ahead(&new.vcpus, &FreshState::new()).unwrap();
    // As KVM does for all VMs when the host has been suspended, and counts from zero.
    let fd = &new.vcpus[0].fd;
    let offset = clock::tsc_offset(fd).unwrap().unwrap();
    clock::set_tsc_offset(fd, offset.wrapping_add(1 << 50)).unwrap();
    new.vm.restore(&state, &new.vcpus, Clock::Freeze).unwrap();
    let (tscs, _) = clocks(&new);
    let since = tscs[0].wrapping_sub(state.vcpus[0].msr(IA32_TSC).unwrap());
    assert!(since < u64::from(state.clock.tsc_khz) * 60_000, "{since}");
}

#[test]
fn registers_that_this_kvm_does_not_list_are_saved_again_also_after_a_look_ahead() {
    const IA32_APIC_BASE: u32 = 0x1b;
    let Some(mut guest) = Guest::with_code(1, COUNTER) else { return };
    guest.step();
    let (mut state, _) = next_generation(&mut guest, Clock::Freeze);
    let value = state.vcpus[0].sregs.apic_base;
    if msrs::read(&guest.vcpus[0].fd, &[IA32_APIC_BASE]).unwrap().is_empty() {
        return;
    }
    state.vcpus[0].msrs.push(Msr { index: IA32_APIC_BASE, value });
    // As many that are not there as have to be asked for in two calls.
    let absent = (0x8100_0000..).take(300).map(|index| Msr { index, value: 0 });
    state.vcpus[0].msrs.extend(absent);
    let new = Guest::new(1, Arc::clone(guest.vm.ram())).expect("a KVM as before");
    new.vm.look_ahead(&new.vcpus, &FreshState::new()).unwrap();
    new.vm.restore(&state, &new.vcpus, Clock::Freeze).unwrap();
    let again = new.vm.state(&new.vcpus).unwrap();
    assert_eq!(again.vcpus[0].msr(IA32_APIC_BASE), Some(value));
}

#[test]
fn only_a_cpu_that_is_to_be_started_waits_for_it() {
    let Some(guest) = Guest::with_code(2, COUNTER) else { return };
    let not_run = |id: usize, errno| guest.vcpus[id].not_run(errno);
    assert!(matches!(not_run(1, libc::EAGAIN), VmExit::Interrupted));
    let VmExit::Ended(ExitStatus::Crashed { reason }) = not_run(0, libc::EAGAIN) else { panic!() };
    assert!(reason.contains("pids.max"), "{reason}");
    assert!(matches!(not_run(0, libc::EBADF), VmExit::Ended(_)));
}

#[test]
fn a_restored_guest_is_told_of_its_pause_once_before_it_runs() {
    let Some(mut guest) = Guest::with_code(1, COUNTER) else { return };
    let is_told = |guest: &Guest| guest.vcpus[0].is_forgiven.load(Ordering::Relaxed);
    assert!(!is_told(&guest), "it has not been stopped");
    let (mut state, guest) = next_generation(&mut guest, Clock::Freeze);
    assert!(is_told(&guest));
    guest.vcpus[0].forgive_pause();
    assert!(!is_told(&guest), "the next pause is another one");

    let vcpu = &mut state.vcpus[0];
    vcpu.msrs.retain(|msr| !KVM_SYSTEM_TIME.contains(&msr.index));
    assert!(!vcpu.has_kvmclock());
    for (index, value, is_on) in
        [(0x12, 0x1000, false), (0x12, 0x1001, true), (0x4b56_4d01, 1, true)]
    {
        vcpu.msrs.push(Msr { index, value });
        assert_eq!(vcpu.has_kvmclock(), is_on);
        vcpu.msrs.pop();
    }
}

#[test]
fn an_answer_that_the_guest_has_not_taken_is_part_of_what_is_saved() {
    let Some(mut guest) = Guest::with_code(1, ECHO) else { return };
    guest.peer.lock().unwrap().answer = b'x';
    guest.step();
    let (state, mut guest) = next_generation(&mut guest, Clock::Advance);
    assert_eq!(state.vcpus[0].regs.rax, u64::from(b'x'));
    guest.step();
    assert_eq!(guest.written(), b"x");
}

/// Whether this KVM moves a guest's TSC: one that runs guests without the CPU's help does not.
fn tsc_can_be_set(guest: &Guest) -> bool {
    let fd = &guest.vcpus[0].fd;
    clock::tsc_offset(fd).unwrap().is_none_or(|offset| {
        clock::set_tsc_offset(fd, offset + 1).unwrap();
        clock::tsc_offset(fd).unwrap() != Some(offset)
    })
}

/// The TSCs at one moment, and kvmclock.
fn clocks(guest: &Guest) -> (Vec<u64>, ClockState) {
    let now = guest.vm.clock(&guest.vcpus).unwrap();
    let tsc = |fd| msrs::read(fd, &[IA32_TSC]).unwrap()[0].value;
    let tscs = guest.vcpus.iter().map(|vcpu| match now.tsc_base {
        Some(base) => base.wrapping_add(clock::tsc_offset(&vcpu.fd).unwrap().unwrap()),
        None => tsc(&vcpu.fd),
    });
    (tscs.collect(), now)
}

#[test]
fn an_hour_passes_for_all_clocks_or_for_none() {
    let Some(mut guest) = Guest::with_code(2, COUNTER) else { return };
    guest.step();
    let (mut state, other) = next_generation(&mut guest, Clock::Freeze);
    let settable = tsc_can_be_set(&other);
    state.clock.realtime_ns -= HOUR_NS;
    let hour_ticks = u64::from(state.clock.tsc_khz) * 3_600_000;
    for (policy, ns, ticks) in [(Clock::Advance, HOUR_NS, hour_ticks), (Clock::Freeze, 0, 0)] {
        let guest = restored(&guest, &state, policy).unwrap();
        let (tscs, now) = clocks(&guest);
        let saved = state.vcpus.iter().map(|vcpu| vcpu.msr(IA32_TSC).unwrap());
        // A minute for a machine that is busy.
        for (tsc, saved) in tscs.iter().zip(saved).filter(|_| settable) {
            let passed = tsc - saved;
            assert!((ticks..ticks + hour_ticks / 60).contains(&passed), "{policy:?} {passed}");
        }
        let passed = now.kvmclock_ns - state.clock.kvmclock_ns;
        assert!((ns..ns + HOUR_NS / 60).contains(&passed), "{policy:?} {passed}");
        if now.tsc_base.is_some() {
            assert_eq!(tscs[0], tscs[1], "vCPUs whose TSCs are one");
        }
    }
}

#[test]
fn states_that_do_not_fit_are_refused_in_words() {
    let Some(mut guest) = Guest::with_code(1, COUNTER) else { return };
    let (state, _) = next_generation(&mut guest, Clock::Freeze);
    let refused = |change: fn(&mut VmState)| {
        let mut state = state.clone();
        change(&mut state);
        match restored(&guest, &state, Clock::Freeze) {
            Ok(_) => panic!("taken"),
            Err(error) => error.to_string(),
        }
    };
    let one = |state: &mut VmState| state.vcpus.push(state.vcpus[0].clone());
    assert_eq!(refused(one), "the state is that of 2 vCPUs, and there are 1");
    let msr = |state: &mut VmState| {
        state.vcpus[0].msrs.push(Msr { index: 0xdead_0000, value: 1 });
    };
    assert_eq!(refused(msr), "KVM refuses the model-specific register 0xdead0000");
    let value = |state: &mut VmState| {
        let msr = state.vcpus[0].msrs.iter_mut().find(|msr| msr.index == 0x2ff);
        msr.expect("IA32_MTRR_DEF_TYPE").value = u64::MAX;
    };
    assert_eq!(refused(value), "KVM refuses the model-specific register 0x2ff");
    let area = |state: &mut VmState| state.vcpus[0].xsave = vec![1; 1 << 20];
    assert!(refused(area).starts_with("an XSAVE area of 4194304 bytes, where"));
    let many = |state: &mut VmState| {
        let msr = state.vcpus[0].msrs[0];
        state.vcpus[0].msrs = vec![msr; 100_000];
    };
    assert_eq!(refused(many), "a vCPU's state has too many model-specific registers");
    let cr0 = |state: &mut VmState| state.vcpus[0].sregs.cr4 = u64::MAX;
    assert_eq!(refused(cr0), "KVM_SET_SREGS failed");
}

#[test]
fn a_tsc_of_another_frequency_is_refused_with_both() {
    let Some(mut guest) = Guest::with_code(1, COUNTER) else { return };
    let (mut state, _) = next_generation(&mut guest, Clock::Freeze);
    // No CPU scales to it.
    state.clock.tsc_khz = 1;
    let error = restored(&guest, &state, Clock::Freeze).err().expect("refused");
    assert!(error.to_string().starts_with("the guest's TSC runs at 1 kHz, this host's at "));
}

#[test]
fn a_guest_fits_the_host_that_it_was_saved_on() {
    let Some(guest) = Guest::with_code(2, COUNTER) else { return };
    let kvm = Kvm::open(Path::new("/dev/kvm")).unwrap();
    let supported = &kvm.capabilities().supported_cpuid;
    // What was forced on a guest is not asked of a host.
    let template = CpuTemplate::default().set(1, 0, CpuidRegister::Ecx, 1 << 16);
    let cpuid = cpuid::for_vcpu(supported, 0, 2, &template);
    guest.vcpus[0].configure(&cpuid, &[]).unwrap();
    let profile = {
        let cpuid = guest.vcpus.iter().map(|vcpu| vcpu.cpuid().unwrap()).collect();
        CpuProfile::new(kvm.capabilities(), cpuid, guest.vcpus.first()).unwrap()
    };
    profile.fits(kvm.capabilities(), None).unwrap();
    profile.fits(kvm.capabilities(), guest.vcpus.first()).unwrap();
    assert_eq!(profile.cpuid().unwrap().len(), 2);
}

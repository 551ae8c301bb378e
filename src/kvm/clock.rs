//! The guest's clocks across a snapshot: kvmclock and the TSCs go on together.
//!
//! A saved state notes one moment: what kvmclock, the host's wall clock and the TSC showed. A
//! restore chooses how much later the guest finds itself, once for all its clocks and all its
//! vCPUs.
//!
//! Each vCPU's TSC is a common counter (the host's, scaled) plus an offset of its own. Where KVM
//! tells offsets (5.16 and later), they are moved all by the same number, so that vCPUs differ as
//! they did, to the tick: by nothing. On older kernels IA32_TSC is written, and KVM itself gives
//! vCPUs one offset whose values are less than a second apart from each other.
//!
//! A KVM that runs guests without the CPU's help (the module `kvm_pvm`) takes both and does
//! neither: its guests read the host's own TSC, which goes on by itself as long as the host is up.
//!
//! Sources: api.rst §4.29 (KVM_GET_CLOCK), §4.30; devices/vcpu.rst §4 (KVM_VCPU_TSC_CTRL).

use std::io;
use std::time::{SystemTime, UNIX_EPOCH};

use kvm_bindings::{
    KVM_CLOCK_REALTIME, KVM_VCPU_TSC_CTRL, KVM_VCPU_TSC_OFFSET, kvm_clock_data, kvm_device_attr,
};
use kvm_ioctls::{Cap, VcpuFd};
use serde::{Deserialize, Serialize};
use vmm_sys_util::ioctl::ioctl_with_ref;
use vmm_sys_util::ioctl_iow_nr;

use super::{KvmError, Vcpu};
use crate::config::Clock;

ioctl_iow_nr!(KVM_SET_DEVICE_ATTR, kvm_bindings::KVMIO, 0xe1, kvm_device_attr);
ioctl_iow_nr!(KVM_GET_DEVICE_ATTR, kvm_bindings::KVMIO, 0xe2, kvm_device_attr);

/// One moment, as each clock showed it.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct ClockState {
    /// The guest's kvmclock.
    pub(crate) kvmclock_ns: u64,
    /// The host's wall clock, since 1970.
    pub(crate) realtime_ns: u64,
    /// What vCPUs' TSCs are counted from, where KVM tells: the host's TSC, scaled to theirs.
    pub(crate) tsc_base: Option<u64>,
    /// The frequency of the TSCs.
    pub(crate) tsc_khz: u32,
}

/// What is added to the guest's clocks: one for all of its vCPUs.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct ClockShift {
    /// What kvmclock shall show.
    pub(super) kvmclock_ns: u64,
    /// Added to saved values of IA32_TSC.
    pub(super) tsc_ticks: u64,
    /// Added to saved offsets, modulo 2^64. None where either side does not tell them.
    pub(super) tsc_offset: Option<u64>,
}

/// No guest sleeps longer: kvmclock has to stay far from its end, which is that of 64 bits.
const LONGEST_SLEEP_NS: u64 = 100 * 365 * 24 * 3600 * 1_000_000_000;

impl ClockState {
    /// From what KVM says at `now`, which its kernel completes with the wall clock from 5.16 on.
    pub(super) fn new(clock: &kvm_clock_data, tsc_base: Option<u64>, tsc_khz: u32) -> Self {
        let realtime_ns = if clock.flags & KVM_CLOCK_REALTIME != 0 {
            clock.realtime
        } else {
            let now = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default();
            u64::try_from(now.as_nanos()).unwrap_or(u64::MAX)
        };
        Self { kvmclock_ns: clock.clock, realtime_ns, tsc_base, tsc_khz }
    }

    /// How the saved clocks go on at the moment `now`, which a restored VM's own clocks show.
    pub(super) fn shift(&self, now: &Self, policy: Clock) -> ClockShift {
        let elapsed_ns = match policy {
            Clock::Advance => {
                now.realtime_ns.saturating_sub(self.realtime_ns).min(LONGEST_SLEEP_NS)
            }
            Clock::Freeze => 0,
        };
        // 2^63 ns at 2^32 kHz are less than 2^95.
        let ticks = u128::from(elapsed_ns) * u128::from(self.tsc_khz) / 1_000_000;
        let tsc_ticks = ticks as u64;
        let tsc_offset = self
            .tsc_base
            .zip(now.tsc_base)
            .map(|(saved_base, base)| saved_base.wrapping_add(tsc_ticks).wrapping_sub(base));
        ClockShift {
            kvmclock_ns: self.kvmclock_ns.saturating_add(elapsed_ns),
            tsc_ticks,
            tsc_offset,
        }
    }

    /// Gives a vCPU the saved frequency of its TSC, where it differs and the host can.
    pub(super) fn set_frequency(&self, vcpu: &Vcpu) -> Result<(), KvmError> {
        let host_khz = vcpu.tsc_khz()?;
        if same_frequency(self.tsc_khz, host_khz) {
            return Ok(());
        }
        let refused = KvmError::TscFrequency { saved_khz: self.tsc_khz, host_khz };
        // Zero would mean the host's own.
        if self.tsc_khz == 0 || !vcpu.vm.fd.check_extension(Cap::TscControl) {
            return Err(refused);
        }
        vcpu.set_tsc_khz(self.tsc_khz).map_err(|_| refused)
    }
}

/// Whether a TSC is the saved one as far as a guest can tell: within 250 ppm, which is what Linux's
/// own correction of a clock bears.
pub(super) fn same_frequency(saved_khz: u32, host_khz: u32) -> bool {
    let (saved, host) = (u64::from(saved_khz), u64::from(host_khz));
    saved.abs_diff(host) * 1_000_000 <= saved * 250
}

/// The offset of a vCPU's TSC, where KVM tells.
pub(super) fn tsc_offset(vcpu: &VcpuFd) -> Result<Option<u64>, KvmError> {
    let mut offset = 0u64;
    let attribute = tsc_attribute(&raw mut offset);
    // SAFETY: the descriptor is a vCPU, and KVM writes the 8 bytes at `addr`, which are `offset`.
    match unsafe { ioctl_with_ref(vcpu, KVM_GET_DEVICE_ATTR(), &attribute) } {
        0 => Ok(Some(offset)),
        _ => match io::Error::last_os_error() {
            // A kernel without vCPU attributes, or without this one.
            error
                if matches!(
                    error.raw_os_error(),
                    Some(libc::ENOTTY | libc::ENXIO | libc::EINVAL)
                ) =>
            {
                Ok(None)
            }
            source => Err(KvmError::Call { call: "KVM_GET_DEVICE_ATTR", source }),
        },
    }
}

/// Sets the offset of a vCPU's TSC.
pub(super) fn set_tsc_offset(vcpu: &VcpuFd, mut offset: u64) -> Result<(), KvmError> {
    let attribute = tsc_attribute(&raw mut offset);
    // SAFETY: the descriptor is a vCPU, and KVM reads the 8 bytes at `addr`, which are `offset`.
    match unsafe { ioctl_with_ref(vcpu, KVM_SET_DEVICE_ATTR(), &attribute) } {
        0 => Ok(()),
        _ => {
            let source = io::Error::last_os_error();
            Err(KvmError::Call { call: "KVM_SET_DEVICE_ATTR", source })
        }
    }
}

fn tsc_attribute(offset: *mut u64) -> kvm_device_attr {
    kvm_device_attr {
        flags: 0,
        group: KVM_VCPU_TSC_CTRL,
        attr: u64::from(KVM_VCPU_TSC_OFFSET),
        addr: offset as u64,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const SAVED: ClockState = ClockState {
        kvmclock_ns: 5_000_000_000,
        realtime_ns: 1_700_000_000_000_000_000,
        tsc_base: Some(1_000_000),
        tsc_khz: 2_000_000,
    };

    /// A host that started anew, and `seconds` later.
    fn later(seconds: i64) -> ClockState {
        let realtime_ns = SAVED.realtime_ns.wrapping_add_signed(seconds * 1_000_000_000);
        ClockState { kvmclock_ns: 77, realtime_ns, tsc_base: Some(400), ..SAVED }
    }

    #[test]
    fn a_guest_that_slept_finds_all_clocks_later_by_the_same_time() {
        let shift = SAVED.shift(&later(10), Clock::Advance);
        assert_eq!(shift.kvmclock_ns, 15_000_000_000);
        assert_eq!(shift.tsc_ticks, 20_000_000_000);
        // A vCPU that showed base + offset shows, at the new base, that and the ticks.
        let offset = 123u64.wrapping_sub(456);
        let shown = 400u64.wrapping_add(offset).wrapping_add(shift.tsc_offset.unwrap());
        assert_eq!(shown, 1_000_000u64.wrapping_add(offset) + 20_000_000_000);
    }

    #[test]
    fn a_frozen_guest_finds_its_clocks_as_they_were() {
        let shift = SAVED.shift(&later(1_000_000), Clock::Freeze);
        assert_eq!((shift.kvmclock_ns, shift.tsc_ticks), (SAVED.kvmclock_ns, 0));
        assert_eq!(400u64.wrapping_add(shift.tsc_offset.unwrap()), 1_000_000);
    }

    #[test]
    fn time_never_goes_back_nor_overflows() {
        let frozen = SAVED.shift(&later(0), Clock::Freeze);
        assert_eq!(SAVED.shift(&later(-3600), Clock::Advance), frozen);
        let hostile = ClockState {
            kvmclock_ns: u64::MAX,
            realtime_ns: 0,
            tsc_base: Some(u64::MAX),
            tsc_khz: u32::MAX,
        };
        let now = ClockState { realtime_ns: u64::MAX, ..later(0) };
        assert_eq!(hostile.shift(&now, Clock::Advance).kvmclock_ns, u64::MAX);
    }

    #[test]
    fn hosts_without_offsets_get_values_instead() {
        let old = ClockState { tsc_base: None, ..later(1) };
        let shift = SAVED.shift(&old, Clock::Advance);
        assert_eq!((shift.tsc_offset, shift.tsc_ticks), (None, 2_000_000_000));
        let shift = ClockState { tsc_base: None, ..SAVED }.shift(&later(1), Clock::Advance);
        assert_eq!(shift.tsc_offset, None);
    }

    #[test]
    fn frequencies_are_the_same_within_250_ppm() {
        let same = |host_khz| same_frequency(2_000_000, host_khz);
        assert!(same(2_000_500) && same(1_999_500));
        assert!(!same(2_000_501) && !same(1_999_499) && !same(0));
        assert!(!same_frequency(0, 2_000_000));
    }

    #[test]
    fn the_wall_clock_is_kvms_where_it_tells() {
        let clock = kvm_clock_data { clock: 9, realtime: 42, ..Default::default() };
        let told = kvm_clock_data { flags: KVM_CLOCK_REALTIME, ..clock };
        assert_eq!(ClockState::new(&told, None, 1).realtime_ns, 42);
        assert!(ClockState::new(&clock, None, 1).realtime_ns > 1_600_000_000_000_000_000);
    }
}

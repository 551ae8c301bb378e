//! Model-specific registers: those that a boot firmware would have set, and those that make up a
//! vCPU's state.
//!
//! Source: Intel SDM vol. 4; vol. 3A §12.11 (MTRRs), §16.3 (machine checks); Linux
//! Documentation/virt/kvm/x86/msr.rst (KVM's own).

use serde::{Deserialize, Serialize};

pub(crate) const IA32_TSC: u32 = 0x10;
pub(crate) const IA32_TSC_DEADLINE: u32 = 0x6e0;
/// Where the guest has its kvmclock, by the register's old number and by its new one; bit 0 is
/// whether it has one.
pub(crate) const KVM_SYSTEM_TIME: [u32; 2] = [0x12, 0x4b56_4d01];

const IA32_MISC_ENABLE: u32 = 0x1a0;
const FAST_STRINGS: u64 = 1;
const IA32_MTRR_DEF_TYPE: u32 = 0x2ff;
const MTRR_ENABLE: u64 = 1 << 11;
const WRITE_BACK: u64 = 6;

/// One register and its value.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct Msr {
    pub(crate) index: u32,
    pub(crate) value: u64,
}

/// MSRs of a vCPU before its first instruction: string moves are fast, memory is write-back.
pub(crate) fn at_boot() -> [Msr; 2] {
    [
        Msr { index: IA32_MISC_ENABLE, value: FAST_STRINGS },
        Msr { index: IA32_MTRR_DEF_TYPE, value: MTRR_ENABLE | WRITE_BACK },
    ]
}

/// The registers to save, given those that KVM lists, in rising order. What this host's KVM does
/// not have is among them: reading finds out.
///
/// KVM's list (api.rst §4.3) lacks MTRRs and the banks of machine checks, which a guest sets too.
/// Hyper-V's registers are left out: they take effect in guests that are shown Hyper-V's CPUID
/// alone, and two of them are clocks, which never read the same twice.
pub(crate) fn to_save(listed: &[u32]) -> Vec<u32> {
    const HYPER_V: std::ops::Range<u32> = 0x4000_0000..0x4000_0200;
    let mtrrs = (0x200..0x210).chain([0x250, 0x258, 0x259]).chain(0x268..0x270);
    // 32 banks of four registers.
    let machine_checks = 0x400..0x480;
    let mut indexes: Vec<u32> = listed
        .iter()
        .copied()
        .filter(|index| !HYPER_V.contains(index))
        .chain(mtrrs)
        .chain([IA32_TSC, IA32_MTRR_DEF_TYPE, IA32_TSC_DEADLINE])
        .chain(machine_checks)
        .collect();
    indexes.sort_unstable();
    indexes.dedup();
    indexes
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_a_guest_sets_is_saved_also_where_kvm_does_not_list_it() {
        let saved = to_save(&[0x4b56_4d01, 0x4000_0020, 0x174, 0x10]);
        for index in [IA32_TSC, 0x174, 0x2ff, 0x20f, 0x26f, 0x400, 0x47f, 0x6e0, 0x4b56_4d01] {
            assert_eq!(saved.iter().filter(|saved| **saved == index).count(), 1, "{index:#x}");
        }
        assert!(!saved.contains(&0x4000_0020), "Hyper-V's reference counter");
        assert!(saved.is_sorted());
    }
}

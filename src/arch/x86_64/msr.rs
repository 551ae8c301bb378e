//! Model-specific registers that a boot firmware would have set.
//!
//! Source: Intel SDM vol. 4; vol. 3A §12.11 (MTRRs). All others keep KVM's reset values.

use kvm_bindings::kvm_msr_entry;

const IA32_MISC_ENABLE: u32 = 0x1a0;
const FAST_STRINGS: u64 = 1;
const IA32_MTRR_DEF_TYPE: u32 = 0x2ff;
const MTRR_ENABLE: u64 = 1 << 11;
const WRITE_BACK: u64 = 6;

/// MSRs of a vCPU before its first instruction: string moves are fast, memory is write-back.
pub(crate) fn at_boot() -> [kvm_msr_entry; 2] {
    let entry = |index, data| kvm_msr_entry { index, data, ..Default::default() };
    [entry(IA32_MISC_ENABLE, FAST_STRINGS), entry(IA32_MTRR_DEF_TYPE, MTRR_ENABLE | WRITE_BACK)]
}

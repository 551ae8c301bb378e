//! What a guest was shown of its CPU, beside what another CPU has.
//!
//! Compared are the leaves of CPUID whose bits are features, the layout of the XSAVE area, which
//! the guest's own XSAVE instructions follow, and the width of physical addresses. All others are
//! topology, caches and names, which a guest may keep although they are another CPU's.
//!
//! Sources: Intel SDM vol. 2A, CPUID; AMD APM vol. 3, appendix E; Linux
//! Documentation/virt/kvm/x86/cpuid.rst.

use kvm_bindings::kvm_cpuid_entry2;

use crate::config::CpuidRegister::{self, Eax, Ebx, Ecx, Edx};

/// The registers whose bits are features: leaf, subleaf, register.
const FEATURES: &[(u32, u32, CpuidRegister)] = &[
    (0x1, 0, Ecx),
    (0x1, 0, Edx),
    (0x7, 0, Ebx),
    (0x7, 0, Ecx),
    (0x7, 0, Edx),
    (0x7, 1, Eax),
    (0x7, 1, Ebx),
    (0x7, 1, Ecx),
    (0x7, 1, Edx),
    (0x7, 2, Edx),
    // The states that XSAVE saves, user's and supervisor's, and its kinds.
    (0xd, 0, Eax),
    (0xd, 0, Edx),
    (0xd, 1, Eax),
    (0xd, 1, Ecx),
    (0xd, 1, Edx),
    // What KVM itself offers.
    (0x4000_0001, 0, Eax),
    (0x8000_0001, 0, Ecx),
    (0x8000_0001, 0, Edx),
    (0x8000_0007, 0, Ebx),
    (0x8000_0007, 0, Edx),
    (0x8000_0008, 0, Ebx),
    (0x8000_0021, 0, Eax),
];
const XSAVE: u32 = 0xd;
const ADDRESS_SIZES: u32 = 0x8000_0008;

/// A feature of CPUID, or several, that one side has and the other lacks.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct MissingFeatures {
    pub(crate) leaf: u32,
    pub(crate) subleaf: u32,
    pub(crate) register: CpuidRegister,
    pub(crate) bits: u32,
}

/// The features in `shown` that are not in `supported`.
pub(crate) fn missing(
    shown: &[kvm_cpuid_entry2],
    supported: &[kvm_cpuid_entry2],
) -> Vec<MissingFeatures> {
    let each = FEATURES.iter().map(|&(leaf, subleaf, register)| {
        let bits =
            value(shown, leaf, subleaf, register) & !value(supported, leaf, subleaf, register);
        MissingFeatures { leaf, subleaf, register, bits }
    });
    each.filter(|missing| missing.bits != 0).collect()
}

/// Leaves out, of the features that `shown` has, those that `supported` lacks: what a VMM adds
/// itself, and what a template forces on a guest. They never were the CPU's.
pub(crate) fn of_the_cpu(
    shown: &[kvm_cpuid_entry2],
    supported: &[kvm_cpuid_entry2],
) -> Vec<kvm_cpuid_entry2> {
    let mut features = shown.to_vec();
    for absent in missing(shown, supported) {
        for entry in features.iter_mut().filter(|entry| is(entry, absent.leaf, absent.subleaf)) {
            *register_of(entry, absent.register) &= !absent.bits;
        }
    }
    features
}

/// The components of the XSAVE area that lie elsewhere in another CPU's area, or have another
/// size; those that are missing there are missing features.
pub(crate) fn moved_xsave_components(
    shown: &[kvm_cpuid_entry2],
    supported: &[kvm_cpuid_entry2],
) -> Vec<u32> {
    let components = shown.iter().filter(|entry| entry.function == XSAVE && entry.index >= 2);
    let moved = components.filter(|shown| {
        let there = supported.iter().find(|entry| is(entry, XSAVE, shown.index));
        there.is_some_and(|there| (there.eax, there.ebx) != (shown.eax, shown.ebx))
    });
    moved.map(|entry| entry.index).collect()
}

/// The bits of a physical address, 0 where a CPU does not say.
pub(crate) fn physical_address_bits(cpuid: &[kvm_cpuid_entry2]) -> u32 {
    value(cpuid, ADDRESS_SIZES, 0, Eax) & 0xff
}

/// Who made the CPU: the twelve letters of leaf 0.
pub(crate) fn vendor(cpuid: &[kvm_cpuid_entry2]) -> String {
    let letters = [Ebx, Edx, Ecx].map(|register| value(cpuid, 0, 0, register).to_le_bytes());
    letters
        .concat()
        .iter()
        .map(|&letter| char::from(letter))
        .filter(char::is_ascii_graphic)
        .collect()
}

/// Family, model and stepping, as Linux counts them.
pub(crate) fn signature(cpuid: &[kvm_cpuid_entry2]) -> [u32; 3] {
    let eax = value(cpuid, 1, 0, Eax);
    let field = |from: u32, bits: u32| (eax >> from) & ((1 << bits) - 1);
    let (family, model) = (field(8, 4), field(4, 4));
    [
        if family == 0xf { family + field(20, 8) } else { family },
        if family == 0x6 || family == 0xf { model | (field(16, 4) << 4) } else { model },
        field(0, 4),
    ]
}

fn is(entry: &kvm_cpuid_entry2, leaf: u32, subleaf: u32) -> bool {
    entry.function == leaf && entry.index == subleaf
}

/// A register of a leaf, 0 where there is none.
fn value(cpuid: &[kvm_cpuid_entry2], leaf: u32, subleaf: u32, register: CpuidRegister) -> u32 {
    let mut found = cpuid.iter().copied().find(|entry| is(entry, leaf, subleaf));
    found.as_mut().map_or(0, |entry| *register_of(entry, register))
}

/// A register of a leaf, to change.
pub(super) fn register_of(entry: &mut kvm_cpuid_entry2, register: CpuidRegister) -> &mut u32 {
    match register {
        Eax => &mut entry.eax,
        Ebx => &mut entry.ebx,
        Ecx => &mut entry.ecx,
        Edx => &mut entry.edx,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn entry(function: u32, index: u32, [eax, ebx, ecx, edx]: [u32; 4]) -> kvm_cpuid_entry2 {
        kvm_cpuid_entry2 { function, index, eax, ebx, ecx, edx, ..Default::default() }
    }

    #[test]
    fn each_missing_bit_is_named_with_its_leaf_and_register() {
        let shown = [
            entry(1, 0, [0x55, 0x66, 0b1011, 0b1]),
            entry(7, 0, [0, 1 << 16, 0, 0]),
            entry(7, 1, [0b110, 0, 0, 0]),
        ];
        let supported = [entry(1, 0, [0, 0, 0b0011, 0b1]), entry(7, 1, [0b010, 0, 0, 0])];
        let named = missing(&shown, &supported);
        let of = |leaf, subleaf, register, bits| MissingFeatures { leaf, subleaf, register, bits };
        assert_eq!(named, [of(1, 0, Ecx, 0b1000), of(7, 0, Ebx, 1 << 16), of(7, 1, Eax, 0b100)]);
        assert_eq!(missing(&supported, &shown), []);
    }

    #[test]
    fn what_was_forced_on_a_guest_is_not_asked_of_another_cpu() {
        let shown = [entry(1, 0, [0, 0, 0b1111, 0])];
        let here = [entry(1, 0, [0, 0, 0b0111, 0])];
        let there = [entry(1, 0, [0, 0, 0b0011, 0])];
        let features = of_the_cpu(&shown, &here);
        assert_eq!(missing(&features, &here), []);
        assert_eq!(missing(&features, &there)[0].bits, 0b0100);
    }

    #[test]
    fn an_xsave_area_of_another_layout_is_found() {
        let shown = [entry(0xd, 2, [256, 576, 0, 0]), entry(0xd, 9, [8, 2688, 0, 0])];
        let other = [entry(0xd, 2, [256, 576, 0, 0]), entry(0xd, 9, [8, 2432, 0, 0])];
        assert_eq!(moved_xsave_components(&shown, &other), [9]);
        assert_eq!(moved_xsave_components(&shown, &shown), [0; 0]);
        assert_eq!(moved_xsave_components(&shown, &[]), [0; 0]);
    }

    #[test]
    fn a_cpu_is_named_as_linux_names_it() {
        let zen3 = [
            entry(0, 0, [0x10, 0x6874_7541, 0x444d_4163, 0x6974_6e65]),
            entry(1, 0, [0x00a2_0f12, 0, 0, 0]),
            entry(0x8000_0008, 0, [0x3030, 0, 0, 0]),
        ];
        assert_eq!(vendor(&zen3), "AuthenticAMD");
        assert_eq!(signature(&zen3), [0x19, 0x21, 2]);
        assert_eq!(physical_address_bits(&zen3), 48);
        assert_eq!(signature(&[entry(1, 0, [0x0005_0657, 0, 0, 0])]), [6, 0x55, 7]);
        assert_eq!((vendor(&[]), physical_address_bits(&[])), (String::new(), 0));
    }
}

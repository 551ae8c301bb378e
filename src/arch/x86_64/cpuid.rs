//! What CPUID tells the guest: what KVM offers on this host, the topology of this VM, the
//! template's changes.
//!
//! Sources: Intel SDM vol. 2A, CPUID; AMD APM vol. 3, appendix E; Linux
//! Documentation/virt/kvm/x86/cpuid.rst. The topology is one package, one core a vCPU, one
//! thread a core; the APIC id is the vCPU's number.

use kvm_bindings::{CpuId, KVM_CPUID_FLAG_SIGNIFCANT_INDEX, kvm_cpuid_entry2};

use super::features::register_of;
use crate::config::CpuTemplate;

/// Leaf 1, ECX: the local APIC's timer takes TSC deadlines. KVM does it with its own local APIC,
/// and leaves it to the VMM to say so.
const TSC_DEADLINE: u32 = 1 << 24;
/// Leaf 1, ECX: the CPU runs under a hypervisor, which describes itself from leaf 0x4000_0000.
const HYPERVISOR: u32 = 1 << 31;
/// Leaf 1, EDX: EBX bits 16-23 count logical processors.
const HTT: u32 = 1 << 28;

/// Extended topology level types.
const LEVEL_THREAD: u32 = 1;
const LEVEL_CORE: u32 = 2;

/// CPUID of vCPU `id` out of `count`.
pub(crate) fn for_vcpu(
    supported: &CpuId,
    id: u8,
    count: u8,
    template: &CpuTemplate,
) -> Vec<kvm_cpuid_entry2> {
    let mut entries: Vec<kvm_cpuid_entry2> = supported
        .as_slice()
        .iter()
        .filter(|entry| !matches!(entry.function, 0xb | 0x1f))
        .copied()
        .collect();
    let max_leaf = entries.iter().find(|entry| entry.function == 0).map_or(0, |entry| entry.eax);
    let amd = entries.iter().any(|entry| entry.function == 0 && is_amd(entry));
    let topology = Topology { id: u32::from(id), count: u32::from(count), amd };
    hide_unusable_amx(&mut entries);
    hide_shadow_stacks(&mut entries);
    hide_nested_virtualization(&mut entries);
    for leaf in [0xb, 0x1f] {
        if leaf <= max_leaf {
            entries.extend(topology.extended_topology(leaf));
        }
    }
    for entry in &mut entries {
        topology.patch(entry);
    }
    apply(template, &mut entries);
    entries
}

fn apply(template: &CpuTemplate, entries: &mut [kvm_cpuid_entry2]) {
    for change in &template.changes {
        let same = |entry: &&mut kvm_cpuid_entry2| {
            entry.function == change.leaf && entry.index == change.subleaf
        };
        for entry in entries.iter_mut().filter(same) {
            let register = register_of(entry, change.register);
            *register = (*register & !change.clear) | change.set;
        }
    }
}

/// Where one vCPU stands among the others.
struct Topology {
    id: u32,
    count: u32,
    /// Leaves that AMD and Intel use differently.
    amd: bool,
}

/// Whether leaf 0 names AMD, or Hygon, which follows it.
fn is_amd(leaf: &kvm_cpuid_entry2) -> bool {
    let vendor = [leaf.ebx, leaf.edx, leaf.ecx].map(u32::to_le_bytes).concat();
    vendor == b"AuthenticAMD" || vendor == b"HygonGenuine"
}

/// KVM lists AMX (leaf 7, EDX bits 22, 24 and 25) also where it does not let guests have the
/// registers (leaf 0xd, EAX bits 17 and 18), for which a process has to ask.
fn hide_unusable_amx(entries: &mut [kvm_cpuid_entry2]) {
    const AMX: u32 = 1 << 22 | 1 << 24 | 1 << 25;
    const TILES: u32 = 3 << 17;
    let is =
        |function| move |entry: &&kvm_cpuid_entry2| entry.function == function && entry.index == 0;
    let tiles = entries.iter().find(is(0xd)).is_some_and(|entry| entry.eax & TILES == TILES);
    if !tiles {
        for entry in entries.iter_mut().filter(|entry| entry.function == 7 && entry.index == 0) {
            entry.edx &= !AMX;
        }
    }
}

/// Shadow stacks (leaf 7, ECX bit 7): the pointer to the one in use is in no structure that a VM's
/// state is made of, but in a register of KVM_GET_ONE_REG alone, from Linux 6.18 on. A guest that
/// was restored without it would die of its next return.
fn hide_shadow_stacks(entries: &mut [kvm_cpuid_entry2]) {
    const SHADOW_STACKS: u32 = 1 << 7;
    for entry in entries.iter_mut().filter(|entry| entry.function == 7 && entry.index == 0) {
        entry.ecx &= !SHADOW_STACKS;
    }
}

/// VMX (leaf 1, ECX bit 5) and SVM (leaf 0x8000_0001, ECX bit 2): what a guest's own guests are is
/// in KVM_GET_NESTED_STATE alone (api.rst §4.114), which no snapshot has. A hypervisor that was
/// restored without it would find its guests gone in the middle of their work.
fn hide_nested_virtualization(entries: &mut [kvm_cpuid_entry2]) {
    for entry in entries {
        match entry.function {
            0x1 => entry.ecx &= !(1 << 5),
            0x8000_0001 => entry.ecx &= !(1 << 2),
            _ => {}
        }
    }
}

impl Topology {
    /// Bits of an APIC id that number the cores.
    fn core_bits(&self) -> u32 {
        self.count.next_power_of_two().trailing_zeros()
    }

    fn patch(&self, entry: &mut kvm_cpuid_entry2) {
        let Self { id, count, .. } = *self;
        match entry.function {
            0x1 => {
                // APIC id, logical processors; CLFLUSH size and brand stay.
                entry.ebx = (entry.ebx & 0xffff) | (id << 24) | (count << 16);
                entry.ecx |= TSC_DEADLINE | HYPERVISOR;
                entry.edx = if count > 1 { entry.edx | HTT } else { entry.edx & !HTT };
            }
            // Deterministic cache parameters, Intel and AMD: type in EAX bits 0-4, level in bits
            // 5-7, sharing in bits 14-25. Intel's leaf also counts the cores in bits 26-31.
            0x4 | 0x8000_001d if entry.eax & 0x1f != 0 => {
                let level = (entry.eax >> 5) & 7;
                let sharing = if level >= 3 { count - 1 } else { 0 };
                entry.eax = (entry.eax & 0x3fff) | (sharing << 14);
                if entry.function == 0x4 {
                    entry.eax |= (count - 1) << 26;
                }
            }
            // Core count, and the bits of an APIC id that number the cores.
            0x8000_0008 if self.amd => entry.ecx = (self.core_bits() << 12) | (count - 1),
            // Extended APIC id; core id with one thread a core; node 0 of one.
            0x8000_001e => {
                entry.eax = id;
                entry.ebx = id;
                entry.ecx = 0;
            }
            _ => {}
        }
    }

    /// The levels thread, core and, to end the list, none.
    fn extended_topology(&self, leaf: u32) -> [kvm_cpuid_entry2; 3] {
        let level = |index: u32, shift: u32, processors: u32, kind: u32| kvm_cpuid_entry2 {
            function: leaf,
            index,
            flags: KVM_CPUID_FLAG_SIGNIFCANT_INDEX,
            eax: shift,
            ebx: processors,
            ecx: (kind << 8) | index,
            edx: self.id,
            ..Default::default()
        };
        [
            level(0, 0, 1, LEVEL_THREAD),
            level(1, self.core_bits(), self.count, LEVEL_CORE),
            level(2, 0, 0, 0),
        ]
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::config::CpuidRegister;

    fn host() -> CpuId {
        let entry = |function, eax, ebx, ecx, edx| kvm_cpuid_entry2 {
            function,
            eax,
            ebx,
            ecx,
            edx,
            ..Default::default()
        };
        CpuId::from_entries(&[
            entry(0, 0x10, 0x6874_7541, 0x444d_4163, 0x6974_6e65),
            entry(1, 0, 0x0710_0800, 1 << 21 | 1 << 5, HTT),
            entry(4, 0xfc1f_c143, 0, 0, 0),
            entry(7, 0, 1 << 16, 1 << 7, 0),
            entry(0xb, 1, 2, 0x100, 7),
            entry(0x8000_0001, 0, 0, 1 << 2 | 1 << 6, 0),
            entry(0x8000_0008, 0, 0, 0xffff, 0),
        ])
        .unwrap()
    }

    fn leaf(entries: &[kvm_cpuid_entry2], function: u32, index: u32) -> kvm_cpuid_entry2 {
        *entries.iter().find(|e| e.function == function && e.index == index).unwrap()
    }

    #[test]
    fn each_vcpu_sees_its_own_number_and_all_their_count() {
        let entries = for_vcpu(&host(), 3, 6, &CpuTemplate::default());
        assert_eq!(leaf(&entries, 1, 0).ebx, 0x0306_0800);
        assert_eq!(leaf(&entries, 0xb, 0).edx, 3);
        assert_eq!(leaf(&entries, 0xb, 1).eax, 3, "3 bits number 6 cores");
        assert_eq!(leaf(&entries, 0xb, 1).ebx, 6);
        assert_eq!(leaf(&entries, 0x8000_0008, 0).ecx, 0x3005);
        assert!(entries.iter().all(|e| e.function != 0x1f), "above the host's highest leaf");
    }

    #[test]
    fn one_vcpu_shares_nothing() {
        let entries = for_vcpu(&host(), 0, 1, &CpuTemplate::default());
        assert_eq!(leaf(&entries, 1, 0).edx & HTT, 0);
        assert_eq!(leaf(&entries, 0xb, 1).eax, 0);
        assert_eq!(leaf(&entries, 4, 0).eax >> 14, 0);
    }

    #[test]
    fn what_a_restore_would_lose_is_not_shown() {
        let entries = for_vcpu(&host(), 0, 1, &CpuTemplate::default());
        assert_eq!(leaf(&entries, 7, 0).ecx & 1 << 7, 0, "shadow stacks");
        assert_eq!(leaf(&entries, 1, 0).ecx & 1 << 5, 0, "VMX");
        assert_eq!(leaf(&entries, 0x8000_0001, 0).ecx, 1 << 6, "SVM, and nothing else");
    }

    #[test]
    fn a_template_has_the_last_word() {
        let template = CpuTemplate::default()
            .clear(7, 0, CpuidRegister::Ebx, 1 << 16)
            .clear(1, 0, CpuidRegister::Ecx, HYPERVISOR)
            .set(7, 0, CpuidRegister::Edx, 1 << 10)
            .set(0x1234, 0, CpuidRegister::Eax, 1);
        let entries = for_vcpu(&host(), 0, 1, &template);
        assert_eq!(leaf(&entries, 7, 0).ebx, 0);
        assert_eq!(leaf(&entries, 7, 0).edx, 1 << 10);
        assert_eq!(leaf(&entries, 1, 0).ecx & HYPERVISOR, 0);
        assert!(entries.iter().all(|e| e.function != 0x1234));
    }
}

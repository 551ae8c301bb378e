//! What the guest's CPUID shows.

use serde::{Deserialize, Serialize};

/// Changes to what the guest's CPUID shows: bits to clear and to set.
///
/// The starting point is what KVM offers on this host (KVM_GET_SUPPORTED_CPUID), but for what a
/// snapshot could not keep: shadow stacks, and VMX and SVM, by which a guest has guests of its own.
/// A VM that is to run on several hosts hides what not all of them have.
///
/// ```
/// use dormouse::{CpuTemplate, CpuidRegister};
///
/// // Leaf 7, EBX bit 16: AVX-512 Foundation.
/// let template = CpuTemplate::default().clear(7, 0, CpuidRegister::Ebx, 1 << 16);
/// ```
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(transparent)]
pub struct CpuTemplate {
    pub(crate) changes: Vec<CpuidChange>,
}

impl CpuTemplate {
    /// Clears the bits of `mask` in one register of one leaf. A leaf that the host does not have
    /// stays away.
    #[must_use]
    pub fn clear(self, leaf: u32, subleaf: u32, register: CpuidRegister, mask: u32) -> Self {
        self.change(CpuidChange { leaf, subleaf, register, clear: mask, set: 0 })
    }

    /// Sets the bits of `mask` in one register of one leaf that the host has. KVM emulates
    /// nothing for it: a bit that the CPU cannot keep misleads the guest.
    #[must_use]
    pub fn set(self, leaf: u32, subleaf: u32, register: CpuidRegister, mask: u32) -> Self {
        self.change(CpuidChange { leaf, subleaf, register, clear: 0, set: mask })
    }

    fn change(mut self, change: CpuidChange) -> Self {
        self.changes.push(change);
        self
    }
}

/// One change of a [`CpuTemplate`].
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub(crate) struct CpuidChange {
    pub(crate) leaf: u32,
    #[serde(default)]
    pub(crate) subleaf: u32,
    pub(crate) register: CpuidRegister,
    #[serde(default)]
    pub(crate) clear: u32,
    #[serde(default)]
    pub(crate) set: u32,
}

/// A register that CPUID returns.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
#[allow(missing_docs)]
pub enum CpuidRegister {
    Eax,
    Ebx,
    Ecx,
    Edx,
}

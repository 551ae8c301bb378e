//! x86-64: a PC without most of a PC.

pub(crate) mod acpi;
pub(crate) mod boot_params;
pub(crate) mod cpuid;
pub(crate) mod features;
pub(crate) mod firmware;
pub(crate) mod layout;
pub(crate) mod msr;
pub(crate) mod regs;

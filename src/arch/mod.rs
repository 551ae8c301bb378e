//! What differs between processor architectures, as plain data: where things lie in guest
//! memory, what registers and CPUID hold at the start, what the tables for the guest say.
//!
//! Nothing here talks to KVM. This is the one place of the library that looks at `target_arch`.

#[cfg(target_arch = "x86_64")]
mod x86_64;

#[cfg(target_arch = "x86_64")]
pub(crate) use self::x86_64::*;

#[cfg(not(target_arch = "x86_64"))]
compile_error!("dormouse runs on x86-64 only, so far");

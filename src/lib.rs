//! MicroVMs inside your process.

#![deny(unsafe_op_in_unsafe_fn)]

mod arch;
mod boot;
mod bus;
mod cmdline;
mod config;
mod console;
mod devices;
mod error;
mod exit;
mod initramfs;
mod kernel;
mod kvm;
mod machine;
mod memory;
mod microvm;
mod timings;

pub use cmdline::Cmdline;
pub use config::{CpuTemplate, CpuidRegister, VmConfig};
pub use console::Console;
pub use error::{Error, ErrorKind};
pub use exit::ExitStatus;
pub use initramfs::{Initramfs, InitramfsBuilder};
pub use kernel::{BootProtocol, InstalledKernel, Kernel};
pub use microvm::{
    AnyMicroVm, Created, MicroVm, Paused, Running, State, Terminated, TransitionError,
};
pub use timings::{Phase, Timing, Timings};

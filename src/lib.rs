//! MicroVMs inside your process.

#![warn(missing_docs, unreachable_pub)]
#![warn(clippy::unwrap_used, clippy::expect_used, clippy::panic)]
#![warn(clippy::print_stdout, clippy::print_stderr)]

mod arch;
mod boot;
mod bus;
mod cmdline;
mod config;
mod console;
mod devices;
mod error;
mod exit;
mod host;
mod initramfs;
mod kernel;
mod kvm;
mod machine;
mod memory;
mod microvm;
mod phase;
mod timings;

pub use cmdline::Cmdline;
pub use config::{CpuTemplate, CpuidRegister, VmConfig};
pub use console::Console;
pub use error::{Error, ErrorKind};
pub use exit::ExitStatus;
pub use host::{Host, HostKernel, KvmStatus, Problem, Virtualization};
pub use initramfs::{Initramfs, InitramfsBuilder};
pub use kernel::{BootProtocol, InstalledKernel, Kernel};
pub use microvm::{
    AnyMicroVm, Created, MicroVm, Paused, Running, State, Terminated, TransitionError,
};
pub use phase::Phase;
pub use timings::{Timing, Timings};

//! The names of what a VM goes through: one set for timings, spans and errors.

use std::fmt;

use serde::{Deserialize, Serialize};

macro_rules! phases {
    ($($(#[$doc:meta])* $variant:ident = $name:literal,)*) => {
        /// A step of a transition: names a timing, a `tracing` span and the stage of an
        /// [`Error`](crate::Error).
        #[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Serialize, Deserialize)]
        #[serde(rename_all = "snake_case")]
        #[non_exhaustive]
        pub enum Phase {
            $($(#[$doc])* $variant,)*
        }

        impl Phase {
            /// The name as it stands in spans and in serialized timings.
            pub fn as_str(self) -> &'static str {
                match self { $(Self::$variant => $name,)* }
            }

            /// A span's name is part of its static metadata, hence one call site a phase.
            pub(crate) fn span(self) -> tracing::Span {
                match self { $(Self::$variant => tracing::debug_span!($name),)* }
            }
        }
    };
}

phases! {
    /// Checking the configuration. No system call.
    Config = "config",
    /// Reading, unpacking and checking the kernel; nothing where the [`Kernel`](crate::Kernel)
    /// was used before, because it keeps the result.
    Kernel = "kernel",
    /// Reading the initramfs, where it is a file.
    Initramfs = "initramfs",
    /// Reserving guest RAM: one `mmap` a region, no page touched.
    Memory = "memory",
    /// `/dev/kvm`, KVM_CREATE_VM, the memory slots, and then the interrupt controllers.
    Kvm = "kvm",
    /// Devices, their interrupts and their places on the bus.
    Devices = "devices",
    /// Virtual CPUs, their CPUID, and the threads that run them.
    Vcpus = "vcpus",
    /// Kernel, initramfs, command line and ACPI tables to guest RAM; registers to the vCPU.
    Load = "load",
    /// Giving the vCPUs to their threads.
    Start = "start",
    /// From the start to the first entry of vCPU 0 into the guest.
    FirstRun = "first_run",
    /// From the first entry of vCPU 0 to its first return; the first instruction that the host
    /// can notice lies in between.
    FirstExit = "first_exit",
    /// Stopping every vCPU.
    Pause = "pause",
    /// Letting every vCPU run on.
    Resume = "resume",
    /// Saving the VM, to files or in memory.
    Save = "save",
    /// Bringing the state of a saved VM to a machine.
    Restore = "restore",
    /// Making pages the VM's own that a guest like it wrote first.
    Populate = "populate",
    /// Waiting for the guest's end.
    Wait = "wait",
    /// Ending the guest.
    Terminate = "terminate",
    /// Talking to the agent in the guest.
    Agent = "agent",
    /// Feeding the console.
    Console = "console",
}

impl fmt::Display for Phase {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.as_str())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn phases_serialize_under_their_own_names() {
        for phase in [Phase::Config, Phase::FirstRun, Phase::Terminate] {
            let json = serde_json::to_string(&phase).unwrap();
            assert_eq!(json, format!("\"{}\"", phase.as_str()));
        }
    }
}

//! How a guest ended: one value, set once, by whoever sees the end first.
//!
//! Devices and vCPU threads report the end of the guest to an [`ExitLatch`]; everything above
//! reads it. The latch never blocks a reporter and never changes its mind.

use std::fmt;
use std::io;
use std::os::fd::OwnedFd;
use std::sync::OnceLock;

use rustix::event::{EventfdFlags, eventfd};
use serde::{Deserialize, Serialize};

/// How a guest ended.
///
/// The five ends that a guest can come to by itself are told apart by what it did to the
/// machine: the ACPI sleep register, the ACPI reset register or the keyboard controller's reset
/// line, the pvpanic port, or a triple fault.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
#[non_exhaustive]
pub enum ExitStatus {
    /// The guest switched the machine off (`poweroff`; ACPI 6.5 §4.8.3.7, sleep type S5).
    PoweredOff,
    /// The guest asked for a reset (`reboot`; ACPI 6.5 §4.8.3.6, or port 0x64). A microVM does
    /// not start again by itself: create another one.
    Rebooted,
    /// The guest's kernel panicked.
    ///
    /// Known from the pvpanic device, which Linux drives with its modules `pvpanic` and `pvpanic-mmio`;
    /// or,
    /// where no driver is loaded, from the kernel's own words on the console before a reset
    /// (`panic=-1`, which is part of the default command line). The words are the guest's and
    /// are to be believed as far as the guest is.
    Panicked {
        /// The kernel's message, such as `VFS: Unable to mount root fs`, where the console
        /// showed one.
        message: Option<String>,
    },
    /// A virtual CPU met an exception while it delivered a double fault, and shut down.
    TripleFault,
    /// The host ended the guest.
    Terminated,
    /// The guest could not be run any further; the text says what KVM reported.
    Crashed {
        /// What KVM reported, with the instruction pointer where there is one.
        reason: String,
    },
}

impl ExitStatus {
    /// Whether the guest ended as it wished, by switching the machine off or resetting it.
    pub fn is_clean(&self) -> bool {
        matches!(self, Self::PoweredOff | Self::Rebooted)
    }
}

impl fmt::Display for ExitStatus {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::PoweredOff => f.write_str("the guest powered off"),
            Self::Rebooted => f.write_str("the guest rebooted"),
            Self::Panicked { message: None } => f.write_str("the guest's kernel panicked"),
            Self::Panicked { message: Some(message) } => {
                write!(f, "the guest's kernel panicked: {message}")
            }
            Self::TripleFault => f.write_str("the guest triple faulted"),
            Self::Terminated => f.write_str("the guest was terminated by the host"),
            Self::Crashed { reason } => write!(f, "the guest crashed: {reason}"),
        }
    }
}

/// Why a program in the guest was not started.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
#[non_exhaustive]
pub enum ExecFailure {
    /// There is no such program, or no such user.
    NotFound,
    /// It is there, but cannot be run: no program, or not for this user.
    NotExecutable,
    /// The working directory cannot be entered.
    BadDirectory,
    /// The guest's processes stand still, to be saved: after [`Agent::freeze`](crate::Agent::freeze), or since the session
    /// goes to sleep. Nothing of it ran.
    Frozen,
    /// Something else: no memory, too many processes.
    Other,
}

/// How a program in the guest ended.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum ProcessStatus {
    /// It exited with this code.
    Code(i32),
    /// A signal of this number ended it.
    Signal(i32),
    /// Its time was over, and it was killed.
    TimedOut,
}

impl ProcessStatus {
    /// Whether it exited with the code 0.
    pub fn success(self) -> bool {
        self == Self::Code(0)
    }

    /// The code that it exited with, if it did.
    pub fn code(self) -> Option<i32> {
        match self {
            Self::Code(code) => Some(code),
            Self::Signal(_) | Self::TimedOut => None,
        }
    }

    /// The signal that ended it, if one did.
    pub fn signal(self) -> Option<i32> {
        match self {
            Self::Signal(signal) => Some(signal),
            Self::Code(_) | Self::TimedOut => None,
        }
    }
}

impl fmt::Display for ProcessStatus {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Code(code) => write!(f, "exit code {code}"),
            Self::Signal(signal) => write!(f, "signal {signal}"),
            Self::TimedOut => f.write_str("its time was over"),
        }
    }
}

/// The first reported end of a guest; later reports are dropped.
#[derive(Debug, Default)]
pub(crate) struct ExitLatch {
    status: OnceLock<ExitStatus>,
    /// An eventfd, where somebody wants to be woken.
    ended: OnceLock<OwnedFd>,
}

impl ExitLatch {
    /// Reports the end of the guest. Whoever runs its vCPUs looks at the latch after each exit.
    pub(crate) fn report(&self, status: ExitStatus) {
        // A second report loses: the guest ended for the first reason.
        if self.status.set(status).is_ok() {
            self.wake();
        }
    }

    /// A descriptor that is readable once the guest has ended.
    pub(crate) fn descriptor(&self) -> io::Result<OwnedFd> {
        let ended = eventfd(0, EventfdFlags::CLOEXEC | EventfdFlags::NONBLOCK)?;
        let descriptor = self.ended.get_or_init(|| ended).try_clone()?;
        if self.get().is_some() {
            self.wake();
        }
        Ok(descriptor)
    }

    fn wake(&self) {
        if let Some(ended) = self.ended.get() {
            // A counter that is full is readable too.
            let _ = rustix::io::write(ended, &1u64.to_ne_bytes());
        }
    }

    /// The reported end, if there is one.
    pub(crate) fn get(&self) -> Option<&ExitStatus> {
        self.status.get()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn first_report_wins() {
        let latch = ExitLatch::default();
        assert_eq!(latch.get(), None);
        latch.report(ExitStatus::PoweredOff);
        latch.report(ExitStatus::TripleFault);
        assert_eq!(latch.get(), Some(&ExitStatus::PoweredOff));
    }
}

//! The one public error: what was attempted, at which stage, why it failed, what to do about it,
//! and the guest's last words.
//!
//! Each layer has an error enum of its own, with a conversion into [`Error`] beside it that
//! chooses the [`ErrorKind`] and the fix. So this module knows no layer.

use std::error::Error as StdError;
use std::fmt;

use crate::exit::{ExecFailure, ExitStatus, ProcessStatus};
use crate::phase::Phase;

/// What went wrong, for a program to act on. The text is in [`Error`]'s `Display`.
#[derive(Clone, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub enum ErrorKind {
    /// There is no KVM device on this machine.
    KvmMissing,
    /// The KVM device may not be opened by this user.
    KvmPermission,
    /// The device is not KVM, or its KVM lacks something that a VM needs.
    KvmUnsupported,
    /// KVM refused a request.
    Kvm,
    /// A value of the configuration is refused.
    Config,
    /// The kernel cannot be found, read, unpacked or loaded.
    Kernel,
    /// The initramfs cannot be read, built or placed.
    Initramfs,
    /// A disk cannot be opened, copied into a snapshot, or found as it was.
    Disk,
    /// A network interface cannot be made: no tap, no right to it, or no passt.
    Network,
    /// A snapshot cannot be written or read, is damaged, or does not fit this host.
    Snapshot,
    /// A container image cannot be read, is damaged, or is more than is allowed; or its registry does not give it.
    Image,
    /// The caller's own progress ended it.
    Interrupted,
    /// The host could not give the memory, threads or descriptors that were asked for; or a limit of the call was
    /// reached, as of a program's output.
    Resources,
    /// The guest has ended, or this VM was suspended or dropped, so it cannot do what was asked.
    GuestEnded(ExitStatus),
    /// The time is over; the guest is alive.
    Timeout,
    /// The guest does not take the console's input.
    ConsoleFull,
    /// Nobody in the guest listens at the port, of vsock or TCP.
    Refused,
    /// The vsock port of the host has a listener.
    PortInUse,
    /// The agent in the guest is not there, of another version, or broken; or the connection to it
    /// ended in the middle of a call, as when the VM was suspended.
    Agent,
    /// A program in the guest was not started.
    ExecFailed(ExecFailure),
    /// A program in the guest ended otherwise than by `exit(0)`.
    ProcessFailed(ProcessStatus),
    /// A hook in the guest failed, or its time was over.
    Hook,
    /// A template cannot be made of the configuration, was deactivated, or its VMs are not as they
    /// should be.
    Template,
    /// The sessions are open elsewhere, the name of one is taken or unknown, or its record is damaged.
    Session,
    /// The session sleeps, and is not to be woken by this.
    SessionSuspended,
    /// The session is over, or about to be.
    SessionEnded,
    /// A program in the guest does not answer as HTTP asks.
    Http,
    /// A token for an endpoint cannot be made or renewed.
    Token,
    /// A file of the guest, or of the host, cannot be read or written.
    File(std::io::ErrorKind),
}

/// Why a call failed.
///
/// `Display` gives one line: what was attempted, why it failed, and what to do about it:
///
/// > cannot open /dev/kvm: Permission denied (os error 13); add your user to the group kvm …
///
/// `Debug`, which is what a `main` that returns a `Result` prints, adds the stage and the last
/// lines of the guest's console.
pub struct Error(Box<Inner>);

struct Inner {
    kind: ErrorKind,
    phase: Option<Phase>,
    cause: Box<dyn StdError + Send + Sync>,
    fix: Option<String>,
    console_tail: Option<String>,
}

impl Error {
    pub(crate) fn new(kind: ErrorKind, cause: impl StdError + Send + Sync + 'static) -> Self {
        Self(Box::new(Inner {
            kind,
            phase: None,
            cause: Box::new(cause),
            fix: None,
            console_tail: None,
        }))
    }

    /// Says what the user can do about it.
    pub(crate) fn fix(mut self, fix: impl Into<String>) -> Self {
        self.0.fix = Some(fix.into());
        self
    }

    /// Marks the stage at which it happened; the innermost mark stays.
    pub(crate) fn at(mut self, phase: Phase) -> Self {
        self.0.phase.get_or_insert(phase);
        self
    }

    /// Adds the guest's last words; an empty tail adds nothing.
    pub(crate) fn console(mut self, tail: String) -> Self {
        if !tail.is_empty() {
            self.0.console_tail = Some(tail);
        }
        self
    }

    /// The same, for another who waits for what failed. Its causes are text.
    #[cfg(feature = "session")]
    pub(crate) fn again(&self) -> Self {
        Self(Box::new(Inner {
            kind: self.0.kind.clone(),
            phase: self.0.phase,
            cause: self.causes().into(),
            fix: self.0.fix.clone(),
            console_tail: self.0.console_tail.clone(),
        }))
    }

    /// What was attempted, and why it failed.
    fn causes(&self) -> String {
        let mut text = self.0.cause.to_string();
        let mut cause = self.0.cause.source();
        while let Some(next) = cause {
            text = format!("{text}: {next}");
            cause = next.source();
        }
        text
    }

    /// What went wrong, to match on.
    pub fn kind(&self) -> &ErrorKind {
        &self.0.kind
    }

    /// The stage at which it went wrong.
    pub fn phase(&self) -> Option<Phase> {
        self.0.phase
    }

    /// What to do about it, where that is known.
    pub fn how_to_fix(&self) -> Option<&str> {
        self.0.fix.as_deref()
    }

    /// The last lines that the guest wrote to its console, where there was a guest.
    pub fn console_tail(&self) -> Option<&str> {
        self.0.console_tail.as_deref()
    }
}

impl fmt::Display for Error {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.causes())?;
        match &self.0.fix {
            Some(fix) => write!(f, "; {fix}"),
            None => Ok(()),
        }
    }
}

/// A guest's text for the eyes of a person: control characters could steer a terminal.
pub(crate) fn printable(text: &str) -> String {
    text.chars()
        .map(|c| if c.is_control() && c != '\t' { char::REPLACEMENT_CHARACTER } else { c })
        .collect()
}

impl fmt::Debug for Error {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self.0.phase {
            Some(phase) => write!(f, "{self} (stage: {phase})")?,
            None => write!(f, "{self}")?,
        }
        if let Some(tail) = &self.0.console_tail {
            f.write_str("\nthe guest's console ended with:")?;
            for line in tail.lines() {
                write!(f, "\n    {}", printable(line))?;
            }
        }
        Ok(())
    }
}

// The chain of causes is part of `Display`, so `source` has nothing left to add.
impl StdError for Error {}

#[cfg(test)]
mod tests {
    use super::*;
    use std::io;

    #[derive(Debug, thiserror::Error)]
    #[error("cannot open /dev/kvm")]
    struct Open(#[source] io::Error);

    fn denied() -> Error {
        let cause = Open(io::Error::from_raw_os_error(libc::EACCES));
        Error::new(ErrorKind::KvmPermission, cause).fix("add your user to the group kvm")
    }

    #[test]
    fn display_gives_attempt_reason_and_fix_in_one_line() {
        assert_eq!(
            denied().to_string(),
            "cannot open /dev/kvm: Permission denied (os error 13); add your user to the group kvm"
        );
    }

    #[test]
    #[cfg(feature = "session")]
    fn an_error_is_told_to_several_in_the_same_words() {
        let error = denied().at(Phase::Kvm).console("one\n".into());
        let again = error.again();
        assert_eq!(format!("{again:?}"), format!("{error:?}"));
        assert_eq!((again.kind(), again.how_to_fix()), (error.kind(), error.how_to_fix()));
    }

    #[test]
    fn debug_adds_the_stage_and_the_console() {
        let error = denied().at(Phase::Kvm).at(Phase::Load).console("one\ntwo\n".into());
        let text = format!("{error:?}");
        assert!(text.contains("(stage: kvm)"), "{text}");
        assert!(text.ends_with("ended with:\n    one\n    two"), "{text}");
    }

    #[test]
    fn error_is_one_word_and_crosses_threads() {
        fn assert_send_sync<T: Send + Sync>() {}
        assert_send_sync::<Error>();
        assert_eq!(size_of::<Error>(), size_of::<usize>());
    }
}

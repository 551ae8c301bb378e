//! [`MicroVm`]: a VM whose state is its type.
//!
//! ```text
//!               start               pause               suspend
//!   Created ──────────▶ Running ◀─────────▶ Paused ──────────────▶ Suspended
//!                        │  ▲     resume     │  ▲                   │     │
//!                        │  └────────────────│──│──────── resume ───┘     │ into_snapshot
//!                  wait, │                   │  │ restore, fork           ▼
//!              terminate ▼         terminate ▼  └──────────────────── Snapshot
//!                           Terminated
//! ```
//!
//! A transition takes the VM and gives it back in its new state, so a call that does not fit the
//! state does not compile. States carry their data: `Created` and `Paused` hold the vCPUs,
//! `Running` holds the proof that the threads have them, `Suspended` where the VM lies. There is no
//! state to check at run time.

mod agent;
mod any;
mod asleep;
mod created;
mod devices;
mod paused;
mod restored;
mod running;
mod saving;
mod slept;
mod state;
mod stopped;
mod suspended;
mod terminated;
mod vsock;

#[cfg(feature = "agent")]
pub(crate) use self::agent::CloneIdentity;
pub use self::any::AnyMicroVm;
pub use self::restored::PreparedShell;
pub use self::state::{Created, Paused, Running, State, Suspended, Terminated};
pub(crate) use self::stopped::OnEnd;

use std::fmt;

use thiserror::Error as ThisError;

use crate::console::Console;
use crate::error::{Error, ErrorKind};
use crate::exit::ExitStatus;
use crate::phase::Phase;
use crate::timings::{Recorder, Timings};

/// A microVM in one of its states: [`Created`], [`Running`], [`Paused`], [`Suspended`],
/// [`Terminated`].
///
/// It lives in this process: a thread for each vCPU, a mapping for the guest's memory, some file
/// descriptors. Dropping it ends the guest, but for one that sleeps in files, and returns at once;
/// descriptors, threads and memory are given back within milliseconds, by its own threads as they end.
/// A VM that was [suspended](MicroVm::<Running>::suspend) to files stays in them:
/// [`MicroVm::<Suspended>::open`] finds it again, and [`terminate`](MicroVm::<Suspended>::terminate) ends it.
///
/// A `MicroVm` belongs to the process that created it: KVM refuses it to a child after `fork`.
#[must_use = "dropping a `MicroVm` ends its guest, unless it sleeps in files"]
pub struct MicroVm<S: State> {
    state: S,
    console: Console,
    recorder: Recorder,
}

impl<S: State> MicroVm<S> {
    /// What the guest wrote to its serial port; the handle outlives the VM.
    pub fn console(&self) -> &Console {
        &self.console
    }

    /// What the transitions so far took, phase by phase.
    pub fn timings(&self) -> Timings {
        self.recorder.timings()
    }

    /// An error of this VM's: with its stage and the guest's last words.
    pub(crate) fn error(&self, phase: Phase, error: impl Into<Error>) -> Error {
        error.into().at(phase).console(self.console.last_lines())
    }
}

impl<S: State> fmt::Debug for MicroVm<S> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "MicroVm<{}>", S::NAME)
    }
}

/// A transition that failed: why, and the VM in the state that it is in now.
///
/// `?` turns it into an [`Error`] and drops the VM.
pub struct TransitionError<S: State> {
    /// The VM, in the state that it is in now.
    pub vm: MicroVm<S>,
    /// Why the transition failed.
    pub error: Error,
}

impl<S: State> From<TransitionError<S>> for Error {
    fn from(failed: TransitionError<S>) -> Self {
        failed.error
    }
}

impl<S: State> fmt::Display for TransitionError<S> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.error.fmt(f)
    }
}

impl<S: State> fmt::Debug for TransitionError<S> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.error.fmt(f)
    }
}

impl<S: State> std::error::Error for TransitionError<S> {}

/// Why a transition of a sound VM fails.
#[derive(Debug, ThisError)]
enum LifecycleError {
    #[error("cannot {attempt}: {status}")]
    Ended { attempt: &'static str, status: ExitStatus },
    #[error("the guest has not ended within {seconds} s")]
    Timeout { seconds: f64 },
    #[error("{status}, but a vCPU's thread is still busy: a console writer blocks")]
    NotBack { status: ExitStatus },
    #[error("the guest does not read its console: {bytes} bytes do not fit its input queue")]
    ConsoleFull { bytes: usize },
}

impl From<LifecycleError> for Error {
    fn from(error: LifecycleError) -> Self {
        let kind = match &error {
            LifecycleError::Ended { status, .. } | LifecycleError::NotBack { status } => {
                ErrorKind::GuestEnded(status.clone())
            }
            LifecycleError::Timeout { .. } => ErrorKind::Timeout,
            LifecycleError::ConsoleFull { .. } => ErrorKind::ConsoleFull,
        };
        Error::new(kind, error)
    }
}

/// A VM moves between threads, and is used by several, whatever its state.
const _: () = {
    const fn assert_threads<T: Send + Sync>() {}
    assert_threads::<MicroVm<Created>>();
    assert_threads::<MicroVm<Running>>();
    assert_threads::<MicroVm<Paused>>();
    assert_threads::<MicroVm<Suspended>>();
    assert_threads::<MicroVm<Terminated>>();
    assert_threads::<AnyMicroVm>();
};

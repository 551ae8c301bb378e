//! What a session does by itself: when it sleeps, for how long, what wakes it, when it ends.

use std::time::{Duration, Instant};

use serde::{Deserialize, Serialize};

use super::error::SessionError;

/// What becomes of a session whose process ended while it ran.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
#[non_exhaustive]
pub enum Lost {
    /// It is over, and says so.
    #[default]
    Report,
    /// It is suspended, as it was when it slept the last time: what it did since is gone. It is over where it never
    /// slept, and where a disk outside of its files has changed since, or is one of which nobody can tell that its guest
    /// has not written to it: a device, or a file that was moved ([`disk_base`](crate::RestoreOptions::disk_base)).
    Restore,
}

/// What a session does by itself. Everything is off unless set, but that requests wake it, and that a guest which
/// uses more than a tenth of a vCPU is [not idle](field@Self::busy_cpu). Durations are of any length, and go by a clock
/// that nobody sets.
///
/// ```
/// use std::time::Duration;
/// use dormouse::{Lost, SessionPolicy};
///
/// let policy = SessionPolicy::new()
///     .idle_after(Duration::from_secs(300))
///     .suspended_at_most(Duration::from_secs(30 * 86_400))
///     .lost(Lost::Restore);
/// assert_eq!(policy.lifetime, None);
/// ```
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(default)]
#[non_exhaustive]
pub struct SessionPolicy {
    /// Suspends it when for this long nothing went on: no request, stream, call to its agent or lease, no more
    /// processor time than [`busy_cpu`](Self::busy_cpu). A lease is held by the host,
    /// [`Session::keep_awake`](super::Session::keep_awake), or by the guest, as long as it has a file
    /// `/run/dormouse/keep-awake`. One that cannot be suspended is tried again, after a time that doubles up to 5 minutes.
    pub idle_after: Option<Duration>,
    /// Ends it when it has been suspended for this long.
    pub suspended_at_most: Option<Duration>,
    /// Ends it when it has lived for this long, running and suspended time together.
    pub lifetime: Option<Duration>,
    /// Whether requests and calls wake it. Else it takes [`Session::resume`](super::Session::resume).
    pub auto_resume: bool,
    /// A guest that uses more processor time than this is not idle: 0.1, which it is unless set, is a tenth of one vCPU,
    /// over the time that it would have to be idle for. It is looked at again when that time has passed once more, so
    /// that it can sleep later than [`idle_after`](field@Self::idle_after) after its last request, whose own
    /// processor time can count too. None: processor time does not count.
    pub busy_cpu: Option<f64>,
    /// What becomes of it where the process ends while it runs.
    pub lost: Lost,
    /// Whether what is suspended outlives a power cut too (fsync), and not the process alone.
    pub sync: bool,
}

impl Default for SessionPolicy {
    fn default() -> Self {
        Self {
            idle_after: None,
            suspended_at_most: None,
            lifetime: None,
            auto_resume: true,
            busy_cpu: Some(0.1),
            lost: Lost::Report,
            sync: false,
        }
    }
}

impl SessionPolicy {
    /// It never sleeps by itself and never ends by itself; requests wake it.
    pub fn new() -> Self {
        Self::default()
    }

    /// Sets [`idle_after`](field@Self::idle_after).
    #[must_use]
    pub fn idle_after(mut self, duration: Duration) -> Self {
        self.idle_after = Some(duration);
        self
    }

    /// Sets [`suspended_at_most`](field@Self::suspended_at_most).
    #[must_use]
    pub fn suspended_at_most(mut self, duration: Duration) -> Self {
        self.suspended_at_most = Some(duration);
        self
    }

    /// Sets [`lifetime`](field@Self::lifetime).
    #[must_use]
    pub fn lifetime(mut self, duration: Duration) -> Self {
        self.lifetime = Some(duration);
        self
    }

    /// Sets [`auto_resume`](field@Self::auto_resume).
    #[must_use]
    pub fn auto_resume(mut self, on: bool) -> Self {
        self.auto_resume = on;
        self
    }

    /// Sets [`busy_cpu`](field@Self::busy_cpu): a share of one vCPU, or none.
    #[must_use]
    pub fn busy_cpu(mut self, share: impl Into<Option<f64>>) -> Self {
        self.busy_cpu = share.into();
        self
    }

    /// Sets [`lost`](field@Self::lost).
    #[must_use]
    pub fn lost(mut self, lost: Lost) -> Self {
        self.lost = lost;
        self
    }

    /// Sets [`sync`](field@Self::sync).
    #[must_use]
    pub fn sync(mut self, on: bool) -> Self {
        self.sync = on;
        self
    }

    pub(super) fn check(&self) -> Result<(), SessionError> {
        match self.busy_cpu {
            Some(share) if !share.is_finite() || share < 0.0 => {
                Err(SessionError::BusyCpu { share })
            }
            _ => Ok(()),
        }
    }
}

/// When `duration` will have passed since `since`; never, where that is beyond all clocks.
pub(super) fn after(since: Instant, duration: Option<Duration>) -> Option<Instant> {
    since.checked_add(duration?)
}

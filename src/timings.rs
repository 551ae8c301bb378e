//! What each transition of a VM cost, phase by phase.
//!
//! A [`Recorder`] runs a phase inside a `tracing` span of the same name, notes when it began and
//! how long it took, and marks an error that leaves it with the phase. So timings, spans and
//! errors use one set of names.

use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::{Duration, Instant};

use serde::{Deserialize, Serialize};

use crate::error::Error;
use crate::phase::Phase;

/// One phase that ran: when, after the call that made this handle of the VM, and for how long. That is the call
/// of `create`, `restore`, `fork` or `open`.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[non_exhaustive]
pub struct Timing {
    /// What ran.
    pub phase: Phase,
    /// Nanoseconds between the call that made this handle and the phase's beginning.
    pub start_ns: u64,
    /// Nanoseconds that the phase took.
    pub duration_ns: u64,
}

/// The phases of a VM's transitions so far, in the order in which they ended.
///
/// ```
/// # use dormouse::{Phase, Timings};
/// fn report(timings: &Timings) {
///     let boot = timings.duration(Phase::Load) + timings.duration(Phase::Kvm);
///     println!("{}", boot.as_micros());
/// }
/// ```
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(transparent)]
pub struct Timings {
    phases: Vec<Timing>,
}

/// Timings kept for one VM. A VM that is paused and resumed for ever must not grow.
const MAX_TIMINGS: usize = 256;

impl Timings {
    /// Every phase, in the order in which it ended. The first 256 are kept, and those of the
    /// first run. A wait that ran out is no phase.
    pub fn iter(&self) -> impl Iterator<Item = &Timing> {
        self.phases.iter()
    }

    /// The time spent in a phase, summed over all its runs; zero where it never ran.
    pub fn duration(&self, phase: Phase) -> Duration {
        let runs = self.phases.iter().filter(|timing| timing.phase == phase);
        Duration::from_nanos(runs.fold(0, |sum: u64, run| sum.saturating_add(run.duration_ns)))
    }

    pub(crate) fn push(&mut self, timing: Timing) {
        if self.phases.len() < MAX_TIMINGS {
            self.phases.push(timing);
        }
    }
}

/// Measures phases against one beginning.
#[derive(Debug)]
pub(crate) struct Recorder {
    origin: Instant,
    timings: Timings,
    first_run: Arc<FirstRun>,
}

impl Recorder {
    pub(crate) fn new() -> Self {
        let origin = Instant::now();
        let first_run = Arc::new(FirstRun { origin, ..FirstRun::default() });
        Self { origin, timings: Timings::default(), first_run }
    }

    /// Where the thread of vCPU 0 notes its first run.
    pub(crate) fn first_run(&self) -> &Arc<FirstRun> {
        &self.first_run
    }

    /// The phases so far, and those of the first run that are over.
    pub(crate) fn timings(&self) -> Timings {
        let mut timings = self.timings.clone();
        timings.phases.extend(self.first_run.timings());
        timings.phases.sort_by_key(|timing| timing.start_ns + timing.duration_ns);
        timings
    }

    /// Runs one phase: in its span, timed.
    pub(crate) fn timed<T>(&mut self, phase: Phase, work: impl FnOnce() -> T) -> T {
        let _entered = phase.span().entered();
        let start = Instant::now();
        let result = work();
        self.passed(phase, start);
        result
    }

    /// Notes a phase that began at `start` and ends now.
    pub(crate) fn passed(&mut self, phase: Phase, start: Instant) {
        self.timings.push(Timing {
            phase,
            start_ns: nanos(start.duration_since(self.origin)),
            duration_ns: nanos(start.elapsed()),
        });
    }

    /// Runs one phase that may fail; its error is marked with it.
    pub(crate) fn run<T, E: Into<Error>>(
        &mut self,
        phase: Phase,
        work: impl FnOnce() -> Result<T, E>,
    ) -> Result<T, Error> {
        self.timed(phase, work).map_err(|error| error.into().at(phase))
    }
}

/// When vCPU 0 was given to its thread, first entered the guest, and first came out of it. Its
/// thread notes it without a lock: nanoseconds after the origin, 0 for not yet.
#[derive(Debug)]
pub(crate) struct FirstRun {
    origin: Instant,
    started: AtomicU64,
    entered: AtomicU64,
    left: AtomicU64,
}

impl FirstRun {
    /// vCPU 0 is given to its thread.
    pub(crate) fn started(&self) {
        self.mark(&self.started);
    }

    /// vCPU 0 is about to enter the guest. Whether it was the first time.
    pub(crate) fn entered(&self) -> bool {
        self.mark(&self.entered)
    }

    /// vCPU 0 came out of the guest.
    pub(crate) fn left(&self) {
        self.mark(&self.left);
    }

    fn mark(&self, what: &AtomicU64) -> bool {
        let now = nanos(self.origin.elapsed()).max(1);
        what.compare_exchange(0, now, Ordering::Relaxed, Ordering::Relaxed).is_ok()
    }

    fn timings(&self) -> impl Iterator<Item = Timing> {
        let load = |what: &AtomicU64| what.load(Ordering::Relaxed);
        let (started, entered, left) = (load(&self.started), load(&self.entered), load(&self.left));
        [(Phase::FirstRun, started, entered), (Phase::FirstExit, entered, left)]
            .into_iter()
            .filter(|(_, start, end)| *start != 0 && *end != 0)
            .map(|(phase, start, end)| Timing {
                phase,
                start_ns: start,
                duration_ns: end.saturating_sub(start),
            })
    }
}

impl Default for FirstRun {
    fn default() -> Self {
        Self {
            origin: Instant::now(),
            started: AtomicU64::new(0),
            entered: AtomicU64::new(0),
            left: AtomicU64::new(0),
        }
    }
}

/// Nanoseconds of a duration; 584 years are enough.
pub(crate) fn nanos(duration: Duration) -> u64 {
    u64::try_from(duration.as_nanos()).unwrap_or(u64::MAX)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_vm_that_is_paused_for_ever_keeps_a_bounded_list() {
        let mut recorder = Recorder::new();
        for _ in 0..10_000 {
            recorder.run(Phase::Pause, || Ok::<_, Error>(())).unwrap();
        }
        assert_eq!(recorder.timings().iter().count(), MAX_TIMINGS);
    }

    #[test]
    fn a_phase_runs_in_a_span_of_its_name() {
        use std::sync::Mutex;
        use tracing::span::{Attributes, Id, Record};

        #[derive(Default)]
        struct Names(Mutex<Vec<&'static str>>);

        impl tracing::Subscriber for Names {
            fn enabled(&self, _: &tracing::Metadata<'_>) -> bool {
                true
            }
            fn new_span(&self, span: &Attributes<'_>) -> Id {
                self.0.lock().unwrap().push(span.metadata().name());
                Id::from_u64(1)
            }
            fn record(&self, _: &Id, _: &Record<'_>) {}
            fn record_follows_from(&self, _: &Id, _: &Id) {}
            fn event(&self, _: &tracing::Event<'_>) {}
            fn enter(&self, _: &Id) {}
            fn exit(&self, _: &Id) {}
        }

        let names = Arc::new(Names::default());
        tracing::subscriber::with_default(Arc::clone(&names), || {
            Recorder::new().timed(Phase::Load, || ());
        });
        assert_eq!(*names.0.lock().unwrap(), [Phase::Load.as_str()]);
    }
}

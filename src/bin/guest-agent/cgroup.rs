//! The cgroup of all that runs in the guest but the agent: what is frozen for a snapshot.
//!
//! Source: Linux Documentation/admin-guide/cgroup-v2.rst.

use std::fs::{self, File, OpenOptions};
use std::io;
use std::sync::{Condvar, Mutex, MutexGuard, OnceLock, PoisonError};
use std::thread;
use std::time::{Duration, Instant};

use crate::protocol::{Failure, FailureKind};
use crate::sys::{self, CgroupFds};

const DIRECTORY: &str = "/sys/fs/cgroup/guest";

/// How long processes may take to start, and then to stop.
const PATIENCE: Duration = Duration::from_secs(5);

static GUEST: OnceLock<CgroupFds> = OnceLock::new();

static GATE: Gate = Gate::new();

/// What whoever starts a process goes through. He waits, out of the reach of signals, until it has executed its
/// program, and so would wait for as long as it is frozen.
struct Gate {
    starts: Mutex<Starts>,
    last_is_over: Condvar,
}

struct Starts {
    under_way: usize,
    is_closed: bool,
}

/// The leave to start a process, until it runs its program.
pub(crate) struct Start<'a>(&'a Gate);

impl Gate {
    const fn new() -> Self {
        let starts = Mutex::new(Starts { under_way: 0, is_closed: false });
        Self { starts, last_is_over: Condvar::new() }
    }

    fn enter(&self) -> Option<Start<'_>> {
        let mut starts = self.lock();
        if starts.is_closed {
            return None;
        }
        starts.under_way += 1;
        Some(Start(self))
    }

    /// From now on nothing is started. Waits for so long until what was being started runs.
    fn close(&self, patience: Duration) -> io::Result<()> {
        let mut starts = self.lock();
        starts.is_closed = true;
        let last = &self.last_is_over;
        let waited = last.wait_timeout_while(starts, patience, |starts| starts.under_way > 0);
        let over = waited.unwrap_or_else(PoisonError::into_inner).1;
        if over.timed_out() { Err(io::ErrorKind::TimedOut.into()) } else { Ok(()) }
    }

    fn open(&self) {
        self.lock().is_closed = false;
    }

    fn lock(&self) -> MutexGuard<'_, Starts> {
        self.starts.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Drop for Start<'_> {
    fn drop(&mut self) {
        self.0.lock().under_way -= 1;
        self.0.last_is_over.notify_all();
    }
}

/// The leave to start a process; none while the guest's processes are frozen.
pub(crate) fn begin_start() -> Option<Start<'static>> {
    GATE.enter()
}

/// Makes the cgroup, where cgroups of version 2 are mounted.
pub(crate) fn make() -> io::Result<()> {
    fs::create_dir(DIRECTORY)?;
    let directory = File::open(DIRECTORY)?.into();
    let processes = OpenOptions::new().write(true).open(format!("{DIRECTORY}/cgroup.procs"))?;
    let _ = GUEST.set(CgroupFds { directory, processes: processes.into() });
    Ok(())
}

/// Where to put what is started; none if the kernel has no cgroups of version 2.
pub(crate) fn descriptors() -> Option<&'static CgroupFds> {
    GUEST.get()
}

/// Freezing and thawing are several steps each, and one comes after the other: the last that is asked for stays.
static TURN: Mutex<()> = Mutex::new(());

/// Stops all processes, and writes what they have written to the disks.
pub(crate) fn freeze() -> Result<(), Failure> {
    if descriptors().is_none() {
        return Err(Failure::new(FailureKind::Other, "freeze without cgroups of version 2"));
    }
    let _turn = TURN.lock();
    // Most is written while they still run.
    sys::sync();
    let frozen =
        GATE.close(PATIENCE).and_then(|()| set_frozen(true)).and_then(|()| wait_until_frozen());
    if let Err(error) = frozen {
        let _ = set_frozen(false);
        GATE.open();
        return Err(Failure::of("freeze the guest's processes", &error));
    }
    sys::sync();
    Ok(())
}

/// Lets them go on.
pub(crate) fn thaw() -> Result<(), Failure> {
    if descriptors().is_none() {
        return Ok(());
    }
    let _turn = TURN.lock();
    let thawed = set_frozen(false);
    // Whatever came of that: it cannot be known here that they stand still.
    GATE.open();
    thawed.map_err(|error| Failure::of("thaw the guest's processes", &error))
}

fn set_frozen(frozen: bool) -> io::Result<()> {
    let text = if frozen { "1" } else { "0" };
    fs::write(format!("{DIRECTORY}/cgroup.freeze"), text)
}

fn wait_until_frozen() -> io::Result<()> {
    let deadline = Instant::now() + PATIENCE;
    let mut pause = Duration::from_micros(200);
    loop {
        let events = fs::read_to_string(format!("{DIRECTORY}/cgroup.events"))?;
        if events.lines().any(|line| line == "frozen 1") {
            return Ok(());
        }
        if Instant::now() > deadline {
            return Err(io::ErrorKind::TimedOut.into());
        }
        thread::sleep(pause);
        pause = (pause * 2).min(Duration::from_millis(20));
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn from_when_the_gate_closes_nothing_is_started_and_it_is_closed_when_the_last_start_is_over() {
        let gate = Gate::new();
        let start = gate.enter().unwrap();
        thread::scope(|scope| {
            let closing = scope.spawn(|| gate.close(PATIENCE));
            while gate.enter().is_some() {
                thread::yield_now();
            }
            thread::sleep(Duration::from_millis(50));
            assert!(!closing.is_finished());
            drop(start);
            closing.join().unwrap().unwrap();
        });
        assert!(gate.enter().is_none());
        gate.open();
        let start = gate.enter().unwrap();
        let error = gate.close(Duration::from_millis(10)).unwrap_err();
        assert_eq!(error.kind(), io::ErrorKind::TimedOut);
        drop(start);
        assert!(gate.enter().is_none());
    }
}

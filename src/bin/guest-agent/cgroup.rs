//! The cgroup of all that runs in the guest but the agent: what is frozen for a snapshot.
//!
//! Source: Linux Documentation/admin-guide/cgroup-v2.rst.

use std::fs::{self, File, OpenOptions};
use std::io;
use std::sync::OnceLock;
use std::thread;
use std::time::{Duration, Instant};

use crate::protocol::{Failure, FailureKind};
use crate::sys::{self, CgroupFds};

const DIRECTORY: &str = "/sys/fs/cgroup/guest";

/// How long processes may take to stop.
const PATIENCE: Duration = Duration::from_secs(5);

static GUEST: OnceLock<CgroupFds> = OnceLock::new();

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

/// Stops all processes, and writes what they have written to the disks.
pub(crate) fn freeze() -> Result<(), Failure> {
    if descriptors().is_none() {
        return Err(Failure::new(FailureKind::Other, "freeze without cgroups of version 2"));
    }
    // Most is written while they still run.
    sys::sync();
    let frozen = set_frozen(true).and_then(|()| wait_until_frozen());
    if let Err(error) = frozen {
        let _ = set_frozen(false);
        return Err(Failure::of("freeze the guest's processes", &error));
    }
    sys::sync();
    Ok(())
}

/// Lets them go on.
pub(crate) fn thaw() -> Result<(), Failure> {
    match descriptors() {
        None => Ok(()),
        Some(_) => set_frozen(false).map_err(|e| Failure::of("thaw the guest's processes", &e)),
    }
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

//! The processes that the agent starts, and those that become its children when their parents end:
//! one thread waits for all of them.

use std::collections::BTreeMap;
use std::io::{self, PipeReader, PipeWriter, Read, Write};
use std::sync::{Condvar, Mutex, MutexGuard, Once, PoisonError};
use std::thread;
use std::time::{Duration, Instant};

use crate::cgroup;
use crate::sys::{self, LaunchFault, Program, WaitStatus};

static CHILDREN: Children = Children {
    table: Mutex::new(Table { exits: BTreeMap::new(), forks: 0, is_empty: true }),
    changed: Condvar::new(),
};
static REAPER: Once = Once::new();

struct Children {
    table: Mutex<Table>,
    changed: Condvar,
}

/// Forks and reaping hold its lock: no child ends before it is in here, and no process ID is used
/// for a signal after it was given up.
struct Table {
    /// Where the status of each child goes that somebody waits for.
    exits: BTreeMap<i32, PipeWriter>,
    forks: u64,
    /// Whether there are no children at all, also none that were left by their parents.
    is_empty: bool,
}

/// A process that the agent has started, the leader of a session and of a process group.
pub(crate) struct Child {
    pub(crate) pid: i32,
    /// Can be read when the process has ended.
    pub(crate) exit: PipeReader,
}

impl Child {
    /// Starts a program, in the guest's cgroup. Waits until it is executed.
    pub(crate) fn start(program: Program) -> Result<Self, LaunchFault> {
        REAPER.call_once(|| {
            let reaper = thread::Builder::new().stack_size(64 << 10);
            // It fails where memory is out before anything runs.
            let _ = reaper.spawn(|| CHILDREN.reap_forever());
        });
        let (exit, status) = io::pipe()?;
        let launched = {
            let mut table = CHILDREN.table();
            let launched = sys::launch(&program, cgroup::descriptors())?;
            table.exits.insert(launched.pid, status);
            table.forks += 1;
            table.is_empty = false;
            CHILDREN.changed.notify_all();
            launched
        };
        // The child has its own copies of the streams, and whoever reads them waits for all to close.
        drop(program);
        Ok(Self { pid: launched.wait()?, exit })
    }

    /// How it ended: waits for that.
    pub(crate) fn status(&mut self) -> io::Result<WaitStatus> {
        let mut status = [0; 4];
        self.exit.read_exact(&mut status)?;
        Ok(WaitStatus(i32::from_le_bytes(status)))
    }

    /// Sends a signal to its process group, unless it has ended.
    pub(crate) fn signal(&self, signal: i32) -> io::Result<()> {
        let table = CHILDREN.table();
        match table.exits.contains_key(&self.pid) {
            true => sys::kill(self.pid, signal),
            false => Ok(()),
        }
    }
}

/// Waits until there is no process below the agent any more, for so long at most. Says whether there
/// is none.
pub(crate) fn wait_for_all(patience: Duration) -> bool {
    let deadline = Instant::now() + patience;
    let mut table = CHILDREN.table();
    while !table.is_empty {
        let left = deadline.saturating_duration_since(Instant::now());
        if left.is_zero() {
            break;
        }
        let waited = CHILDREN.changed.wait_timeout(table, left);
        table = waited.unwrap_or_else(PoisonError::into_inner).0;
    }
    table.is_empty
}

impl Children {
    fn table(&self) -> MutexGuard<'_, Table> {
        self.table.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn reap_forever(&self) -> ! {
        loop {
            let forks = self.table().forks;
            match sys::exited_child() {
                Ok(pid) => self.reap(pid),
                Err(error) if error.raw_os_error() == Some(sys::ECHILD) => {
                    self.wait_for_fork(forks)
                }
                // Interrupted.
                Err(_) => {}
            }
        }
    }

    fn reap(&self, pid: i32) {
        let mut table = self.table();
        let Some(status) = sys::reap(pid) else { return };
        if let Some(mut exit) = table.exits.remove(&pid) {
            // An error is that nobody wants to know.
            let _ = exit.write_all(&status.0.to_le_bytes());
        }
    }

    /// Without children, there are none until the agent forks again.
    fn wait_for_fork(&self, forks: u64) {
        let mut table = self.table();
        while table.forks == forks {
            table.is_empty = true;
            self.changed.notify_all();
            table = self.changed.wait(table).unwrap_or_else(PoisonError::into_inner);
        }
    }
}

//! The processes that the agent starts, and those that become its children when their parents end.
//!
//! Who starts one waits for it, on the same thread, so that none is waited for twice and no process ID
//! is used after it was given up. The others are children of the main thread: the kernel gives orphans
//! to that one.

use std::io;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::thread;
use std::time::{Duration, Instant};

use crate::cgroup;
use crate::sys::{self, LaunchFault, Program, WaitStatus};

const SIGKILL: i32 = 9;

/// How often it is looked whether all are gone.
const LOOK: Duration = Duration::from_millis(5);

/// A process that the agent has started, the leader of a session and of a process group. It is killed
/// where nobody waits for it.
pub(crate) struct Child {
    pub(crate) pid: i32,
    end: OwnedFd,
    status: Option<WaitStatus>,
}

impl Child {
    /// Starts a program, in the guest's cgroup. Waits until it is executed. The thread has to be there for as
    /// long as the child.
    pub(crate) fn start(program: Program) -> Result<Self, LaunchFault> {
        let launched = sys::launch(&program, cgroup::descriptors())?;
        Ok(Self { pid: launched.pid, end: launched.end, status: None })
    }

    /// Can be read when it has ended.
    pub(crate) fn end(&self) -> BorrowedFd<'_> {
        self.end.as_fd()
    }

    /// How it ended: waits for that.
    pub(crate) fn wait(&mut self) -> io::Result<WaitStatus> {
        if let Some(status) = self.status {
            return Ok(status);
        }
        let status = sys::wait(self.pid)?;
        self.status = Some(status);
        Ok(status)
    }

    /// Sends a signal to its process group, unless it has ended.
    pub(crate) fn signal(&self, signal: i32) -> io::Result<()> {
        match self.status {
            None => sys::kill(self.pid, signal),
            Some(_) => Ok(()),
        }
    }
}

impl Drop for Child {
    fn drop(&mut self) {
        if self.status.is_none() {
            let _ = self.signal(SIGKILL);
            let _ = self.wait();
        }
    }
}

/// Waits until there is no process below the agent any more, for so long at most. Says whether there
/// is none.
pub(crate) fn wait_for_all(patience: Duration) -> bool {
    let deadline = Instant::now() + patience;
    while sys::has_children() {
        if Instant::now() >= deadline {
            return false;
        }
        thread::sleep(LOOK);
    }
    true
}

/// Waits for orphans for ever: what the main thread does. Every thread has to hold back SIGCHLD
/// ([`sys::hold_child_signals`]), which comes for each process that ends or becomes an orphan ended.
pub(crate) fn reap_orphans() -> ! {
    loop {
        while sys::reap_orphan() {}
        sys::wait_for_child_signal();
    }
}

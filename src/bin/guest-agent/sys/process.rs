//! Starting processes, and their ends.
//!
//! Not by `std::process`, which copies the agent's page tables, and cannot put a process into a cgroup
//! from its first instruction on.

use std::ffi::{CString, c_char, c_int, c_long, c_uint, c_ulong, c_void};
use std::io;
use std::os::fd::{AsRawFd, OwnedFd, RawFd};
use std::ptr;
use std::thread;

use super::clone::{Cloned, clone_and_run, clone_and_run_plainly};
use super::{checked, ioctl};

const SIGKILL: c_int = 9;
/// From here on are those that the C library has a use for.
const SIGNALS: c_int = 32;
const SIGCHLD: c_int = 17;
const SIG_BLOCK: c_int = 0;
const SIG_SETMASK: c_int = 2;
/// SIGCHLD alone, as a `sigset_t`: a bit a signal, of which the first is 1.
const CHILD_SIGNALS: [u64; 16] = {
    let mut set = [0; 16];
    set[0] = 1 << (SIGCHLD - 1);
    set
};
const TIOCSCTTY: c_ulong = 0x540e;
const RLIMIT_NOFILE: c_int = 7;
const O_WRONLY_CLOEXEC: c_int = 0o1 | 0o2_000_000;
const ENOENT: i32 = 2;
const EACCES: i32 = 13;
const ENOTDIR: i32 = 20;

const P_ALL: c_int = 0;
const P_PID: c_int = 1;
const WNOHANG: c_int = 1;
const WEXITED: c_int = 4;
const WNOWAIT: c_int = 0x0100_0000;
/// Not the children of other threads (`__WNOTHREAD`).
const WNOTHREAD: c_int = 0x2000_0000;

// The C library's functions of these names tell all threads of the process, which in a child are
// not there.
#[cfg(target_arch = "x86_64")]
const SYS_SETGROUPS: c_long = 116;
#[cfg(target_arch = "x86_64")]
const SYS_SETRESUID: c_long = 117;
#[cfg(target_arch = "x86_64")]
const SYS_SETRESGID: c_long = 119;
#[cfg(target_arch = "aarch64")]
const SYS_SETGROUPS: c_long = 159;
#[cfg(target_arch = "aarch64")]
const SYS_SETRESUID: c_long = 147;
#[cfg(target_arch = "aarch64")]
const SYS_SETRESGID: c_long = 149;

unsafe extern "C" {
    fn syscall(number: c_long, ...) -> c_long;
    fn setsid() -> c_int;
    fn dup2(from: c_int, to: c_int) -> c_int;
    fn chdir(path: *const c_char) -> c_int;
    fn execve(path: *const c_char, argv: *const *const c_char, env: *const *const c_char) -> c_int;
    fn _exit(code: c_int) -> !;
    fn __errno_location() -> *mut c_int;
    fn open(path: *const c_char, flags: c_int, ...) -> c_int;
    fn write(fd: c_int, bytes: *const c_void, count: usize) -> isize;
    fn close(fd: c_int) -> c_int;
    fn signal(signal: c_int, handler: usize) -> usize;
    fn sigprocmask(how: c_int, set: *const [u64; 16], old: *mut [u64; 16]) -> c_int;
    fn sigwait(set: *const [u64; 16], signal: *mut c_int) -> c_int;
    fn setrlimit(resource: c_int, limit: *const [u64; 2]) -> c_int;
    fn waitid(kind: c_int, id: c_uint, info: *mut [i32; 32], options: c_int) -> c_int;
    fn waitpid(pid: c_int, status: *mut c_int, options: c_int) -> c_int;
    #[link_name = "kill"]
    fn c_kill(pid: c_int, signal: c_int) -> c_int;
}

/// A program, with all that it begins with.
pub(crate) struct Program {
    /// Where it may be: the first that is there is executed.
    pub(crate) candidates: Vec<CString>,
    pub(crate) argv: Vec<CString>,
    pub(crate) env: Vec<CString>,
    pub(crate) cwd: CString,
    pub(crate) uid: u32,
    pub(crate) gid: u32,
    /// None leaves all of these as they are.
    pub(crate) groups: Option<Vec<u32>>,
    pub(crate) streams: [OwnedFd; 3],
    /// Whether the streams are a terminal, which becomes that of its session.
    pub(crate) terminal: bool,
}

/// Where a program's start can fail.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(u8)]
pub(crate) enum LaunchStep {
    Fork = 0,
    Setup = 1,
    User = 2,
    Directory = 3,
    Execute = 4,
}

#[derive(Debug)]
pub(crate) struct LaunchFault {
    pub(crate) step: LaunchStep,
    pub(crate) source: io::Error,
}

impl From<io::Error> for LaunchFault {
    fn from(source: io::Error) -> Self {
        Self { step: LaunchStep::Fork, source }
    }
}

/// A process that has executed its program.
pub(crate) struct Launched {
    pub(crate) pid: i32,
    /// Can be read when it has ended.
    pub(crate) end: OwnedFd,
}

/// A cgroup's directory and its list of processes, to put processes into.
pub(crate) struct CgroupFds {
    pub(crate) directory: OwnedFd,
    pub(crate) processes: OwnedFd,
}

/// Has a child execute a program in a session of its own, and waits until it has.
pub(crate) fn launch(
    program: &Program,
    cgroup: Option<&CgroupFds>,
) -> Result<Launched, LaunchFault> {
    let pointers = |list: &[CString]| -> Vec<*const c_char> {
        list.iter().map(|text| text.as_ptr()).chain([ptr::null()]).collect()
    };
    let (argv, env) = (pointers(&program.argv), pointers(&program.env));
    let mut child = Child {
        program,
        argv: &argv,
        env: &env,
        processes: None,
        is_of_init: std::process::id() == 1,
        fault: None,
    };
    let Cloned { pid, pidfd } = child.launch(cgroup)?;
    if let Some((step, errno)) = child.fault {
        // It has ended already, or is about to.
        let _ = wait(pid);
        return Err(LaunchFault { step, source: io::Error::from_raw_os_error(errno) });
    }
    let end = match pidfd {
        Some(pidfd) => Ok(pidfd),
        None => end_of(pid),
    };
    match end {
        Ok(end) => Ok(Launched { pid, end }),
        Err(source) => {
            let _ = kill(pid, SIGKILL);
            let _ = wait(pid);
            Err(source.into())
        }
    }
}

/// What can be read when a child has ended, where the kernel has no descriptors of processes: a thread
/// waits for it.
fn end_of(pid: i32) -> io::Result<OwnedFd> {
    let (end, writer) = io::pipe()?;
    let waiter = thread::Builder::new().stack_size(64 << 10);
    waiter.spawn(move || {
        let mut info = [0; 32];
        // SAFETY: the kernel writes a `siginfo_t`, which has 128 bytes.
        while unsafe { waitid(P_PID, pid as c_uint, &mut info, WEXITED | WNOWAIT) } < 0 {
            if io::Error::last_os_error().kind() != io::ErrorKind::Interrupted {
                break;
            }
        }
        drop(writer);
    })?;
    Ok(end.into())
}

/// What the child has to know before it executes its program, in the memory of its parent, who waits.
struct Child<'a> {
    program: &'a Program,
    argv: &'a [*const c_char],
    env: &'a [*const c_char],
    processes: Option<RawFd>,
    is_of_init: bool,
    /// What it could not do, and the error's number.
    fault: Option<(LaunchStep, i32)>,
}

impl Child<'_> {
    fn launch(&mut self, cgroup: Option<&CgroupFds>) -> io::Result<Cloned> {
        let directory = cgroup.map(|cgroup| cgroup.directory.as_raw_fd());
        // SAFETY: `run` executes a program or ends, and keeps to `self` and to system calls.
        if let Ok(cloned) = unsafe { clone_and_run(directory, Self::run, self) } {
            return Ok(cloned);
        }
        // A kernel before 5.7: the child goes into its cgroup itself.
        self.processes = cgroup.map(|cgroup| cgroup.processes.as_raw_fd());
        // SAFETY: as above.
        unsafe { clone_and_run_plainly(Self::run, self) }
    }

    /// Executes the program. The parent's other threads run meanwhile, in the same memory, and may hold
    /// any lock: nothing here allocates, locks or panics.
    extern "C" fn run(child: *mut Self) {
        // SAFETY: it is the `self` of `launch`, whose thread waits until the child has another memory.
        let child = unsafe { &mut *child };
        let step = child.try_run();
        let errno = io::Error::last_os_error().raw_os_error().unwrap_or(0);
        child.fault = Some((step, errno));
        // SAFETY: it ends this process; nothing of the parent's is flushed.
        unsafe { _exit(127) }
    }

    /// Comes back only with an error, in errno: the step that failed.
    fn try_run(&self) -> LaunchStep {
        let program = self.program;
        // SAFETY: all pointers are to what `program` and `launch` hold: text with a NUL at its end,
        // lists with a null at theirs, numbers as many as are said.
        unsafe {
            if let Some(processes) = self.processes
                && write(processes, b"0".as_ptr().cast(), 1) < 0
            {
                return LaunchStep::Setup;
            }
            if setsid() < 0 {
                return LaunchStep::Setup;
            }
            for (to, from) in (0..).zip(&program.streams) {
                if dup2(from.as_raw_fd(), to) < 0 {
                    return LaunchStep::Setup;
                }
            }
            if program.terminal && ioctl(0, TIOCSCTTY, 0) < 0 {
                return LaunchStep::Setup;
            }
            // What the standard library or whoever started this process ignores, and what is handled: a
            // handler would run in the agent's memory, and whoever has the program's user may soon send
            // signals. SIGKILL and SIGSTOP refuse. Then what nobody blocks.
            for number in 1..SIGNALS {
                signal(number, 0);
            }
            sigprocmask(SIG_SETMASK, &[0; 16], ptr::null_mut());
            if self.is_of_init {
                self.be_ordinary();
            }
            if let Some(groups) = &program.groups {
                let (uid, gid) = (program.uid as c_long, program.gid as c_long);
                if syscall(SYS_SETGROUPS, groups.len(), groups.as_ptr()) < 0
                    || syscall(SYS_SETRESGID, gid, gid, gid) < 0
                    || syscall(SYS_SETRESUID, uid, uid, uid) < 0
                {
                    return LaunchStep::User;
                }
            }
            if chdir(program.cwd.as_ptr()) < 0 {
                return LaunchStep::Directory;
            }
        }
        self.execute()
    }

    fn execute(&self) -> LaunchStep {
        let mut refused = false;
        for path in &self.program.candidates {
            // SAFETY: the path ends with a NUL, the lists with a null.
            unsafe { execve(path.as_ptr(), self.argv.as_ptr(), self.env.as_ptr()) };
            match io::Error::last_os_error().raw_os_error() {
                Some(EACCES) => refused = true,
                Some(ENOENT | ENOTDIR) => {}
                _ => return LaunchStep::Execute,
            }
        }
        // SAFETY: this thread's errno is its own, and the parent's thread does not look at it.
        unsafe { *__errno_location() = if refused { EACCES } else { ENOENT } };
        LaunchStep::Execute
    }

    /// Gives up what the first process has: protection when memory is out, and many descriptors.
    unsafe fn be_ordinary(&self) {
        // SAFETY: the path ends with a NUL, and the kernel reads as many bytes as there are, and a
        // `struct rlimit`.
        unsafe {
            let score = open(c"/proc/self/oom_score_adj".as_ptr(), O_WRONLY_CLOEXEC);
            if score >= 0 {
                write(score, b"0".as_ptr().cast(), 1);
                close(score);
            }
            setrlimit(RLIMIT_NOFILE, &[1024, 524_288]);
        }
    }
}

/// How a process ended (wait(2)).
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct WaitStatus(pub(crate) i32);

impl WaitStatus {
    /// The signal that ended it.
    pub(crate) fn signal(self) -> Option<i32> {
        let signal = self.0 & 0x7f;
        (signal != 0).then_some(signal)
    }

    pub(crate) fn code(self) -> i32 {
        self.0 >> 8 & 0xff
    }
}

/// Takes the status of a child: waits until it has ended.
pub(crate) fn wait(pid: i32) -> io::Result<WaitStatus> {
    let mut status = 0;
    loop {
        // SAFETY: the kernel writes one int.
        match checked(unsafe { waitpid(pid, &mut status, 0) }) {
            Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
            result => return result.map(|_| WaitStatus(status)),
        }
    }
}

/// Forgets a child of this thread that has ended. Says whether there was one.
pub(crate) fn reap_orphan() -> bool {
    // SAFETY: the kernel writes nothing.
    unsafe { waitpid(-1, ptr::null_mut(), WNOHANG | WNOTHREAD) > 0 }
}

/// Has this thread, and those that it starts from now on, hold back SIGCHLD until somebody waits for it.
pub(crate) fn hold_child_signals() {
    // SAFETY: the set is larger than any `sigset_t`.
    unsafe { sigprocmask(SIG_BLOCK, &CHILD_SIGNALS, ptr::null_mut()) };
}

/// Waits for SIGCHLD: one stands for all that came since the last.
pub(crate) fn wait_for_child_signal() {
    let mut signal = 0;
    // SAFETY: the set is larger than any `sigset_t`, and one int is written.
    unsafe { sigwait(&CHILD_SIGNALS, &mut signal) };
}

/// Whether there are children of any thread.
pub(crate) fn has_children() -> bool {
    let mut info = [0; 32];
    // SAFETY: the kernel writes a `siginfo_t`, which has 128 bytes.
    let looked = checked(unsafe { waitid(P_ALL, 0, &mut info, WEXITED | WNOWAIT | WNOHANG) });
    !looked.is_err_and(|error| error.raw_os_error() == Some(super::ECHILD))
}

/// A signal to a process group.
pub(crate) fn kill(group: i32, signal: i32) -> io::Result<()> {
    // Others would be everybody's.
    if group <= 1 {
        return Err(io::ErrorKind::InvalidInput.into());
    }
    // SAFETY: it takes integers.
    checked(unsafe { c_kill(-group, signal) })?;
    Ok(())
}

/// A signal to one process.
pub(crate) fn kill_process(pid: i32, signal: i32) -> io::Result<()> {
    // The others are groups, and the agent itself.
    if pid <= 1 {
        return Err(io::ErrorKind::InvalidInput.into());
    }
    // SAFETY: it takes integers.
    checked(unsafe { c_kill(pid, signal) })?;
    Ok(())
}

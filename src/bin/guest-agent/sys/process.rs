//! Starting processes, and their ends.
//!
//! Not by `std::process`, which would wait for children that it could not execute, beside the
//! reaper who waits for all (children.rs), and cannot put a process into a cgroup from its first
//! instruction on.

use std::ffi::{CString, c_char, c_int, c_long, c_uint, c_ulong, c_void};
use std::io::{self, Read};
use std::os::fd::{AsRawFd, OwnedFd, RawFd};
use std::ptr;

use super::{checked, ioctl};

const SIGPIPE: c_int = 13;
const SIGCHLD: u64 = 17;
const SIG_SETMASK: c_int = 2;
const TIOCSCTTY: c_ulong = 0x540e;
const RLIMIT_NOFILE: c_int = 7;
const O_WRONLY_CLOEXEC: c_int = 0o1 | 0o2_000_000;
const ENOENT: i32 = 2;
const EACCES: i32 = 13;
const ENOTDIR: i32 = 20;

const P_ALL: c_int = 0;
const WNOHANG: c_int = 1;
const WEXITED: c_int = 4;
const WNOWAIT: c_int = 0x0100_0000;

const CLONE_INTO_CGROUP: u64 = 0x2_0000_0000;
const SYS_CLONE3: c_long = 435;
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
    fn fork() -> c_int;
    fn setsid() -> c_int;
    fn dup2(from: c_int, to: c_int) -> c_int;
    fn chdir(path: *const c_char) -> c_int;
    fn execve(path: *const c_char, argv: *const *const c_char, env: *const *const c_char) -> c_int;
    fn _exit(code: c_int) -> !;
    fn open(path: *const c_char, flags: c_int, ...) -> c_int;
    fn write(fd: c_int, bytes: *const c_void, count: usize) -> isize;
    fn close(fd: c_int) -> c_int;
    fn signal(signal: c_int, handler: usize) -> usize;
    fn sigprocmask(how: c_int, set: *const [u64; 16], old: *mut [u64; 16]) -> c_int;
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

/// A process that was forked, and says in a moment whether it executes its program.
pub(crate) struct Launched {
    pub(crate) pid: i32,
    report: io::PipeReader,
}

impl Launched {
    /// Waits until the program is executed.
    pub(crate) fn wait(mut self) -> Result<i32, LaunchFault> {
        let mut report = Vec::new();
        self.report.read_to_end(&mut report)?;
        let [step, a, b, c, d] = report[..] else {
            return Ok(self.pid);
        };
        let step = match step {
            1 => LaunchStep::Setup,
            2 => LaunchStep::User,
            3 => LaunchStep::Directory,
            _ => LaunchStep::Execute,
        };
        let source = io::Error::from_raw_os_error(i32::from_le_bytes([a, b, c, d]));
        Err(LaunchFault { step, source })
    }
}

/// A cgroup's directory and its list of processes, to put processes into.
pub(crate) struct CgroupFds {
    pub(crate) directory: OwnedFd,
    pub(crate) processes: OwnedFd,
}

/// `struct clone_args` (clone(2)).
#[repr(C)]
#[derive(Default)]
struct CloneArgs {
    flags: u64,
    pidfd: u64,
    child_tid: u64,
    parent_tid: u64,
    exit_signal: u64,
    stack: u64,
    stack_size: u64,
    tls: u64,
    set_tid: u64,
    set_tid_size: u64,
    cgroup: u64,
}

/// Forks, and has the child execute a program in a session of its own.
pub(crate) fn launch(
    program: &Program,
    cgroup: Option<&CgroupFds>,
) -> Result<Launched, LaunchFault> {
    let pointers = |list: &[CString]| -> Vec<*const c_char> {
        list.iter().map(|text| text.as_ptr()).chain([ptr::null()]).collect()
    };
    let (argv, env) = (pointers(&program.argv), pointers(&program.env));
    let (report, reporter) = io::pipe()?;
    let mut child = Child {
        program,
        argv: &argv,
        env: &env,
        processes: None,
        reporter: reporter.as_raw_fd(),
        is_of_init: std::process::id() == 1,
    };
    let mut pid = -1;
    if let Some(cgroup) = cgroup {
        let args = CloneArgs {
            flags: CLONE_INTO_CGROUP,
            exit_signal: SIGCHLD,
            cgroup: cgroup.directory.as_raw_fd() as u64,
            ..CloneArgs::default()
        };
        // SAFETY: without a stack and with memory of its own, the child goes on behind this call as
        // behind fork(); it calls nothing but what may be called there (see `Child::run`).
        pid = unsafe { syscall(SYS_CLONE3, &args, size_of::<CloneArgs>()) } as c_int;
        if pid < 0 {
            // A kernel before 5.7: the child goes there itself.
            child.processes = Some(cgroup.processes.as_raw_fd());
        }
    }
    if pid < 0 {
        // SAFETY: as above.
        pid = checked(unsafe { fork() })?;
    }
    if pid == 0 {
        child.run();
    }
    Ok(Launched { pid, report })
}

/// What the child has to know between fork and exec.
struct Child<'a> {
    program: &'a Program,
    argv: &'a [*const c_char],
    env: &'a [*const c_char],
    processes: Option<RawFd>,
    reporter: RawFd,
    is_of_init: bool,
}

impl Child<'_> {
    /// Executes the program. Other threads of the parent may have held any lock when it was forked:
    /// nothing here allocates, locks or panics.
    fn run(&self) -> ! {
        let step = self.try_run();
        let errno = io::Error::last_os_error().raw_os_error().unwrap_or(0);
        self.report(step, errno)
    }

    fn report(&self, step: LaunchStep, errno: i32) -> ! {
        let [a, b, c, d] = errno.to_le_bytes();
        let report = [step as u8, a, b, c, d];
        // SAFETY: the kernel reads as many bytes as there are; nothing of the parent's is flushed.
        unsafe {
            write(self.reporter, report.as_ptr().cast(), report.len());
            _exit(127)
        }
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
            // What the standard library ignores, and what nobody blocks.
            signal(SIGPIPE, 0);
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
        if refused {
            self.report(LaunchStep::Execute, EACCES);
        }
        self.report(LaunchStep::Execute, ENOENT)
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

/// Waits until a child has ended, any one, and leaves it as it is.
pub(crate) fn exited_child() -> io::Result<i32> {
    /// Where `si_pid` is in a `siginfo_t`, in words of 32 bits.
    const PID_AT: usize = 4;
    let mut info = [0; 32];
    // SAFETY: the kernel writes a `siginfo_t`, which has 128 bytes.
    checked(unsafe { waitid(P_ALL, 0, &mut info, WEXITED | WNOWAIT) })?;
    Ok(info[PID_AT])
}

/// Takes the status of a child that has ended.
pub(crate) fn reap(pid: i32) -> Option<WaitStatus> {
    let mut status = 0;
    // SAFETY: the kernel writes one int.
    let reaped = unsafe { waitpid(pid, &mut status, WNOHANG) };
    (reaped == pid).then_some(WaitStatus(status))
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

//! What a process asks of the kernel, system call by system call: ptrace(2), as strace does it.
//!
//! The tracer waits for all children of its process, so it is for a process that has no others.

use std::fs::{self, File};
use std::io::{self, Write};
use std::mem::{MaybeUninit, size_of};
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};
use std::process::{Child, ExitStatus};
use std::ptr;

use libc::{c_int, c_void, pid_t, ptrace_syscall_info};

// linux/ptrace.h.
const OPTIONS: usize = 1 /* TRACESYSGOOD */ | 2 | 4 | 8 /* forks, clones */ | (1 << 20) /* EXITKILL */;

/// A system call that began, with the path that it names.
#[derive(Debug)]
pub struct Call {
    pub number: i64,
    pub args: [u64; 6],
    pub path: Option<PathBuf>,
    /// What a clone shares with whoever makes it: none where it is not known, as of any other call.
    clone_flags: u64,
}

impl Call {
    /// Whether it makes a process, and not a thread of its own. The C library's fork is a clone.
    pub fn is_fork(&self) -> bool {
        match self.number {
            libc::SYS_fork | libc::SYS_vfork => true,
            libc::SYS_clone | libc::SYS_clone3 => self.clone_flags & libc::CLONE_THREAD as u64 == 0,
            _ => false,
        }
    }

    /// Whether it opens a file to read it, and for nothing else.
    pub fn is_read_only(&self) -> bool {
        let flags = (libc::O_ACCMODE | libc::O_CREAT | libc::O_TRUNC) as u64;
        self.number == libc::SYS_openat && self.args[2] & flags == libc::O_RDONLY as u64
    }
}

/// All that was seen of a process, to its end.
#[derive(Debug)]
pub struct Trace {
    pub calls: Vec<Call>,
    /// Those that were delivered.
    pub signals: Vec<c_int>,
    pub status: ExitStatus,
}

/// Traces a process that waits for a line of its standard input, from that on.
pub fn trace(mut child: Child) -> io::Result<Trace> {
    let pid = child.id() as pid_t;
    seize(pid)?;
    child.stdin.take().expect("a pipe").write_all(b"\n")?;
    let (mut calls, mut signals) = (Vec::new(), Vec::new());
    loop {
        let mut status = 0;
        // SAFETY: it writes to `status` alone.
        let thread = unsafe { libc::waitpid(-1, &mut status, libc::__WALL) };
        if thread < 0 {
            return Err(io::Error::last_os_error());
        }
        if libc::WIFEXITED(status) || libc::WIFSIGNALED(status) {
            if thread != pid {
                continue;
            }
            use std::os::unix::process::ExitStatusExt;
            return Ok(Trace { calls, signals, status: ExitStatus::from_raw(status) });
        }
        let mut signal = 0;
        match (libc::WSTOPSIG(status), status >> 16) {
            (stop, 0) if stop == libc::SIGTRAP | 0x80 => calls.extend(entered(thread)),
            (_, 0) => {
                signal = libc::WSTOPSIG(status);
                signals.push(signal);
            }
            // A thread or a process that is new, or that was interrupted.
            (_, _) => {}
        }
        // SAFETY: the thread is stopped, and nothing of this process is touched. It may have been killed.
        unsafe {
            libc::ptrace(libc::PTRACE_SYSCALL, thread, ptr::null_mut::<c_void>(), signal as usize)
        };
    }
}

/// Stops every thread of a process at its next system call. New ones are seized as they come.
fn seize(pid: pid_t) -> io::Result<()> {
    for task in fs::read_dir(format!("/proc/{pid}/task"))? {
        let thread: pid_t =
            task?.file_name().to_string_lossy().parse().map_err(io::Error::other)?;
        let nothing = ptr::null_mut::<c_void>();
        // SAFETY: nothing of this process is touched.
        let seized = unsafe { libc::ptrace(libc::PTRACE_SEIZE, thread, nothing, OPTIONS) };
        // SAFETY: as above.
        let stops = unsafe { libc::ptrace(libc::PTRACE_INTERRUPT, thread, nothing, nothing) };
        if seized < 0 || stops < 0 {
            match io::Error::last_os_error() {
                // It has ended since it was listed.
                error if error.raw_os_error() == Some(libc::ESRCH) => {}
                error => return Err(error),
            }
        }
    }
    Ok(())
}

/// The call that a thread has stopped in front of; none behind one.
fn entered(thread: pid_t) -> Option<Call> {
    let mut info = MaybeUninit::<ptrace_syscall_info>::zeroed();
    let size = size_of::<ptrace_syscall_info>();
    // SAFETY: the kernel writes up to `size` bytes of `info`.
    let written =
        unsafe { libc::ptrace(libc::PTRACE_GET_SYSCALL_INFO, thread, size, info.as_mut_ptr()) };
    if written <= 0 {
        return None;
    }
    // SAFETY: all bytes were zeros, which are values of all its fields, or were written by the kernel.
    let info = unsafe { info.assume_init() };
    if info.op != libc::PTRACE_SYSCALL_INFO_ENTRY {
        return None;
    }
    // SAFETY: that is the operation's field.
    let entry = unsafe { info.u.entry };
    let number = entry.nr as i64;
    let path = path_args(number).map(|(directory, name)| {
        let name = text(thread, entry.args[name]).unwrap_or_default();
        let directory = directory.map_or(libc::AT_FDCWD, |at| entry.args[at] as c_int);
        let link = match directory {
            libc::AT_FDCWD => format!("/proc/{thread}/cwd"),
            descriptor => format!("/proc/{thread}/fd/{descriptor}"),
        };
        fs::read_link(link).unwrap_or_default().join(name)
    });
    let clone_flags = match number {
        libc::SYS_clone => entry.args[0],
        // The first field of what it points to.
        libc::SYS_clone3 => word(thread, entry.args[0]).unwrap_or_default(),
        _ => 0,
    };
    Some(Call { number, args: entry.args, path, clone_flags })
}

/// Which arguments of a call that opens, makes, moves or removes files are a directory and a path in it.
fn path_args(number: i64) -> Option<(Option<usize>, usize)> {
    match number {
        libc::SYS_openat
        | libc::SYS_openat2
        | libc::SYS_mkdirat
        | libc::SYS_unlinkat
        | libc::SYS_mknodat
        | libc::SYS_execveat => Some((Some(0), 1)),
        libc::SYS_linkat | libc::SYS_renameat | libc::SYS_renameat2 => Some((Some(2), 3)),
        libc::SYS_symlinkat => Some((Some(1), 2)),
        libc::SYS_open
        | libc::SYS_creat
        | libc::SYS_mkdir
        | libc::SYS_rmdir
        | libc::SYS_unlink
        | libc::SYS_mknod
        | libc::SYS_truncate
        | libc::SYS_execve => Some((None, 0)),
        libc::SYS_link | libc::SYS_rename | libc::SYS_symlink => Some((None, 1)),
        _ => None,
    }
}

/// What a thread sees as its memory.
fn memory(thread: pid_t) -> io::Result<File> {
    File::open(Path::new("/proc").join(thread.to_string()).join("mem"))
}

/// The eight bytes at an address of a thread.
fn word(thread: pid_t, address: u64) -> io::Result<u64> {
    let mut bytes = [0; 8];
    memory(thread)?.read_exact_at(&mut bytes, address)?;
    Ok(u64::from_ne_bytes(bytes))
}

/// The bytes at an address of a thread up to the next NUL.
fn text(thread: pid_t, address: u64) -> io::Result<PathBuf> {
    use std::os::unix::ffi::OsStringExt;
    let memory = memory(thread)?;
    let (mut bytes, mut byte) = (Vec::new(), [0]);
    loop {
        memory.read_exact_at(&mut byte, address + bytes.len() as u64)?;
        match byte {
            [0] => return Ok(std::ffi::OsString::from_vec(bytes).into()),
            [byte] => bytes.push(byte),
        }
    }
}

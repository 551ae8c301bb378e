//! What the crate's own threads may ask of the kernel: the device thread, and those that run
//! vCPUs.
//!
//! A guest that takes such a thread over, through a fault of ours or of KVM, opens no file,
//! starts no program, and makes no memory executable. A call that is not in the lists fails with
//! EPERM, and nobody is killed or sent a signal: code of the embedding program runs on these
//! threads too (console writers, subscribers of `tracing`, allocators), and sees an error. No
//! other thread has the filter.
//!
//! Source: Linux Documentation/userspace-api/seccomp_filter.rst. The lists are what the threads
//! were seen to call, what their C library calls on rarer paths, and what such code may need.

mod program;

use std::collections::BTreeMap;
use std::process;
use std::sync::{Arc, Mutex, PoisonError};

use seccompiler::BpfProgram;
use thiserror::Error as ThisError;

use self::program::{Allowed, Condition, compile};

/// Calls of the language's and the C library's own, and of what the embedding program runs here.
const RUNTIME: &[i64] = &[
    libc::SYS_futex,             // locks, channels, condition variables
    libc::SYS_sched_yield,       // a lock that is about to be free
    libc::SYS_munmap,            // the allocator; a VM's memory, and the thread's stack
    libc::SYS_mremap,            // the allocator, for large blocks
    libc::SYS_brk,               // the allocator
    libc::SYS_madvise,           // the allocator; pages that a guest gives back
    libc::SYS_sched_getaffinity, // the allocator counts the CPUs before it makes an arena
    libc::SYS_getrandom,         // keys of the allocator and of hash tables
    libc::SYS_clock_gettime,     // clocks, where the vDSO cannot read them
    libc::SYS_gettimeofday,      // the same
    libc::SYS_time,              // the same
    libc::SYS_getcpu,            // allocators with an arena for each CPU
    libc::SYS_nanosleep,         // a console writer that sleeps
    libc::SYS_clock_nanosleep,   // the same
    libc::SYS_restart_syscall,   // a sleep that a debugger interrupted
    libc::SYS_getpid,            // a kick; an abort
    libc::SYS_gettid,            // the same; names of threads in logs
    libc::SYS_rt_sigtimedwait,   // takes a kick away
    libc::SYS_rt_sigprocmask,    // the thread's end; an abort
    libc::SYS_rt_sigreturn,      // the end of the embedding program's handler for a fault
    libc::SYS_rt_sigaction,      // such a handler takes itself off, or it would be called for ever
    libc::SYS_sigaltstack,       // the thread's end frees the stack for such handlers
    libc::SYS_exit,              // the thread's end
    libc::SYS_exit_group,        // code of the embedding program may end it here
    // A backtrace asks where the program is, and the answer is kept for those of all threads.
    libc::SYS_readlink,
    // The C library changes the user of a process in each of its threads, and aborts where they
    // disagree.
    libc::SYS_setuid,
    libc::SYS_setgid,
    libc::SYS_setreuid,
    libc::SYS_setregid,
    libc::SYS_setresuid,
    libc::SYS_setresgid,
    libc::SYS_setgroups,
];

/// Calls on descriptors that are open: those of devices, wherever they are served (a doorbell may
/// come as an exit, to a vCPU's thread), and those that a console writer writes to.
const DESCRIPTORS: &[i64] = &[
    libc::SYS_read,            // eventfds, timers, the random source, tap devices
    libc::SYS_write,           // eventfds, console writers, log files, standard error at a panic
    libc::SYS_readv,           // tap devices, sockets
    libc::SYS_writev,          // the same, console writers
    libc::SYS_pread64,         // disks, one buffer
    libc::SYS_pwrite64,        // the same
    libc::SYS_preadv,          // disks, many buffers
    libc::SYS_pwritev,         // the same
    libc::SYS_preadv2,         // disks, where it must not wait
    libc::SYS_pwritev2,        // the same
    libc::SYS_lseek,           // disks' sizes; console writers
    libc::SYS_fallocate,       // disks: discard, write zeroes
    libc::SYS_fdatasync,       // disks: flush
    libc::SYS_fsync,           // console writers that sync
    libc::SYS_io_uring_enter,  // disks, where it has to wait
    libc::SYS_epoll_wait,      // the device thread's sleep
    libc::SYS_epoll_pwait,     // the same
    libc::SYS_epoll_ctl,       // a VM's devices come and go
    libc::SYS_poll,            // whether a tap device is up
    libc::SYS_ppoll,           // a console writer that waits for its stream
    libc::SYS_timerfd_settime, // rate limiters
    libc::SYS_recvfrom,        // sockets: vsock, user networks, log daemons
    libc::SYS_recvmsg,         // the same
    libc::SYS_sendto,          // the same
    libc::SYS_sendmsg,         // the same
    libc::SYS_accept4,         // vsock: a program connects to the guest
    libc::SYS_connect,         // vsock: the guest connects to a program
    libc::SYS_shutdown,        // vsock: either end closes one direction
    libc::SYS_getsockopt,      // vsock: how a connection went
    libc::SYS_close,           // a VM's descriptors, at its end
];

/// `ioctl` requests on open descriptors.
const FIONBIO: u32 = 0x5421; // vsock: sockets that are not waited for
const TCGETS: u32 = 0x5401; // a console writer asks whether it writes to a terminal
const TUNSETOFFLOAD: u32 = 0x4004_54d0; // a network's driver begins
/// Those of a vCPU.
const KVM_RUN: u32 = 0xae80;
const KVM_GET_REGS: u32 = 0x8090_ae81; // where a guest crashed

/// Why a thread cannot be confined.
#[derive(Debug, ThisError)]
#[error("the kernel takes no seccomp filter: {0}")]
pub(crate) struct SeccompError(#[from] seccompiler::Error);

/// A thread of ours, by what it does.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Confinement {
    Device,
    Vcpu,
}

/// Both programs, and the process that they are for: a child after a fork has another number.
struct Programs {
    process: u32,
    device: BpfProgram,
    vcpu: BpfProgram,
}

static PROGRAMS: Mutex<Option<Arc<Programs>>> = Mutex::new(None);

impl Confinement {
    /// Confines the calling thread, for the rest of its life.
    pub(crate) fn apply(self) -> Result<(), SeccompError> {
        let programs = programs();
        Ok(seccompiler::apply_filter(match self {
            Self::Device => &programs.device,
            Self::Vcpu => &programs.vcpu,
        })?)
    }

    fn compile(self) -> BpfProgram {
        let mut calls: BTreeMap<i64, Option<Condition>> =
            RUNTIME.iter().chain(DESCRIPTORS).map(|call| (*call, None)).collect();
        // A kick, or an abort: signals for this process alone.
        calls.insert(libc::SYS_tgkill, is(0, &[process::id()]));
        // Memory for data, never for code.
        let no_code = Condition { argument: 2, mask: libc::PROT_EXEC as u32, values: vec![0] };
        calls.insert(libc::SYS_mmap, Some(no_code.clone()));
        calls.insert(libc::SYS_mprotect, Some(no_code));
        // vsock, with a program that listens or one that has the other end: sockets of this host.
        calls.insert(libc::SYS_socket, is(0, &[libc::AF_UNIX as u32]));
        calls.insert(libc::SYS_socketpair, is(0, &[libc::AF_UNIX as u32]));
        // A second descriptor of a file, and whether it is waited for; no signals from it.
        let commands = [libc::F_DUPFD_CLOEXEC, libc::F_GETFD, libc::F_GETFL, libc::F_SETFL];
        calls.insert(libc::SYS_fcntl, is(1, &commands.map(|command| command as u32)));
        // Whoever has a disk last lets go of its lock.
        calls.insert(libc::SYS_flock, is(1, &[libc::LOCK_UN as u32]));
        let requests: &[u32] = match self {
            Self::Device => &[FIONBIO, TCGETS, TUNSETOFFLOAD],
            Self::Vcpu => &[KVM_RUN, KVM_GET_REGS, FIONBIO, TCGETS, TUNSETOFFLOAD],
        };
        calls.insert(libc::SYS_ioctl, is(1, requests));
        if self == Self::Vcpu {
            // The last of a VM's threads takes its devices down: vsock's socket has a name.
            calls.insert(libc::SYS_unlink, None);
        }
        let calls: Vec<Allowed> =
            calls.into_iter().map(|(number, condition)| (number as u32, condition)).collect();
        compile(&calls)
    }
}

/// An argument is one of these.
fn is(argument: u8, values: &[u32]) -> Option<Condition> {
    Some(Condition { argument, mask: u32::MAX, values: values.to_vec() })
}

/// The compiled programs: made once in a process.
fn programs() -> Arc<Programs> {
    let mut made = PROGRAMS.lock().unwrap_or_else(PoisonError::into_inner);
    let process = process::id();
    if let Some(programs) = &*made
        && programs.process == process
    {
        return Arc::clone(programs);
    }
    let (device, vcpu) = (Confinement::Device.compile(), Confinement::Vcpu.compile());
    Arc::clone(made.insert(Arc::new(Programs { process, device, vcpu })))
}

#[cfg(test)]
mod tests;

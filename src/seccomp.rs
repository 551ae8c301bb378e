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

use std::collections::BTreeMap;
use std::process;
use std::sync::{Arc, Mutex, PoisonError};

use seccompiler::{
    BackendError, BpfProgram, SeccompAction, SeccompCmpArgLen, SeccompCmpOp, SeccompCondition,
    SeccompFilter, SeccompRule, TargetArch,
};
use thiserror::Error as ThisError;

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
const FIONBIO: u64 = 0x5421; // vsock: sockets that are not waited for
const TCGETS: u64 = 0x5401; // a console writer asks whether it writes to a terminal
const TUNSETOFFLOAD: u64 = 0x4004_54d0; // a network's driver begins
/// Those of a vCPU.
const KVM_RUN: u64 = 0xae80;
const KVM_GET_REGS: u64 = 0x8090_ae81; // where a guest crashed

/// Why a thread cannot be confined.
#[derive(Debug, ThisError)]
pub(crate) enum SeccompError {
    #[error("cannot compile a seccomp filter: {0}")]
    Compile(#[from] BackendError),
    #[error("the kernel takes no seccomp filter: {0}")]
    Apply(#[from] seccompiler::Error),
}

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
        let programs = programs()?;
        Ok(seccompiler::apply_filter(match self {
            Self::Device => &programs.device,
            Self::Vcpu => &programs.vcpu,
        })?)
    }

    fn compile(self) -> Result<BpfProgram, BackendError> {
        let mut rules = BTreeMap::new();
        for call in RUNTIME.iter().chain(DESCRIPTORS) {
            rules.insert(*call, Vec::new());
        }
        // A kick, or an abort: signals for this process alone.
        let own_process = vec![equals(0, process::id().into())?];
        rules.insert(libc::SYS_tgkill, own_process);
        // Memory for data, never for code.
        let no_code = |call| Ok::<_, BackendError>((call, vec![lacks(2, libc::PROT_EXEC as u64)?]));
        rules.extend([no_code(libc::SYS_mmap)?, no_code(libc::SYS_mprotect)?]);
        // vsock, with a program that listens or one that has the other end: sockets of this host.
        let local = |call| Ok::<_, BackendError>((call, vec![equals(0, libc::AF_UNIX as u64)?]));
        rules.extend([local(libc::SYS_socket)?, local(libc::SYS_socketpair)?]);
        // A second descriptor of a file, and whether it is waited for; no signals when it is ready.
        let commands = [libc::F_DUPFD_CLOEXEC, libc::F_GETFD, libc::F_GETFL, libc::F_SETFL];
        let commands = commands.iter().map(|command| equals(1, *command as u64));
        rules.insert(libc::SYS_fcntl, commands.collect::<Result<_, _>>()?);
        let requests: &[u64] = match self {
            Self::Device => &[FIONBIO, TCGETS, TUNSETOFFLOAD],
            Self::Vcpu => &[KVM_RUN, KVM_GET_REGS, FIONBIO, TCGETS, TUNSETOFFLOAD],
        };
        let requests = requests.iter().map(|request| equals(1, *request));
        rules.insert(libc::SYS_ioctl, requests.collect::<Result<_, _>>()?);
        if self == Self::Vcpu {
            // The last of a VM's threads takes its devices down: vsock's socket has a name.
            rules.insert(libc::SYS_unlink, Vec::new());
        }
        let refused = SeccompAction::Errno(libc::EPERM as u32);
        let arch = TargetArch::x86_64;
        SeccompFilter::new(rules, refused, SeccompAction::Allow, arch)?.try_into()
    }
}

/// The compiled programs: made once in a process.
fn programs() -> Result<Arc<Programs>, BackendError> {
    let mut made = PROGRAMS.lock().unwrap_or_else(PoisonError::into_inner);
    let process = process::id();
    if let Some(programs) = &*made
        && programs.process == process
    {
        return Ok(Arc::clone(programs));
    }
    let (device, vcpu) = (Confinement::Device.compile()?, Confinement::Vcpu.compile()?);
    Ok(Arc::clone(made.insert(Arc::new(Programs { process, device, vcpu }))))
}

/// An argument of 32 bits is this.
fn equals(argument: u8, value: u64) -> Result<SeccompRule, BackendError> {
    condition(argument, SeccompCmpOp::Eq, value)
}

/// An argument of 32 bits has none of these bits.
fn lacks(argument: u8, bits: u64) -> Result<SeccompRule, BackendError> {
    condition(argument, SeccompCmpOp::MaskedEq(bits), 0)
}

fn condition(
    argument: u8,
    operator: SeccompCmpOp,
    value: u64,
) -> Result<SeccompRule, BackendError> {
    let condition = SeccompCondition::new(argument, SeccompCmpArgLen::Dword, operator, value)?;
    SeccompRule::new(vec![condition])
}

#[cfg(test)]
mod tests;

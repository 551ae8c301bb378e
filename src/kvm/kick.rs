//! How a running vCPU is stopped, without a signal handler.
//!
//! A vCPU's thread keeps every signal blocked, so none is ever delivered to it. KVM_RUN alone
//! opens the kick signal, through KVM_SET_SIGNAL_MASK (api.rst §4.24): when it is pending, or
//! comes, KVM_RUN returns EINTR with the signal still pending, and the thread takes it away. The
//! embedding process sees no handler and no delivered signal. A kick that comes before KVM_RUN
//! is entered waits for it, so none is lost.

use std::io;
use std::mem::MaybeUninit;
use std::ptr;

use vmm_sys_util::ioctl::ioctl_with_ref;
use vmm_sys_util::ioctl_iow_nr;

use super::KvmError;

ioctl_iow_nr!(KVM_SET_SIGNAL_MASK, kvm_bindings::KVMIO, 0x8b, kvm_bindings::kvm_signal_mask);

/// The signal that kicks: one that no kernel sends. It is only ever sent to a thread of ours that
/// has it blocked. A real-time signal would be queued, and fail where the queue is full.
const KICK: libc::c_int = libc::SIGSTKFLT;

/// Signals that the thread's own faults raise. They stay open, so that the embedding process's
/// handlers for them, such as a crash reporter, work here as elsewhere.
const FAULTS: [libc::c_int; 6] =
    [libc::SIGSEGV, libc::SIGBUS, libc::SIGFPE, libc::SIGILL, libc::SIGTRAP, libc::SIGSYS];

/// Blocks every signal but faults in the calling thread.
pub(crate) fn block_signals() {
    let set = full_set_without(&FAULTS);
    // SAFETY: `set` is an initialized signal set, and the old mask is not asked for.
    unsafe { libc::pthread_sigmask(libc::SIG_SETMASK, &set, ptr::null_mut()) };
}

/// Takes a pending kick away from the calling thread.
pub(super) fn take_kick() {
    let mut set = MaybeUninit::uninit();
    // SAFETY: sigemptyset initializes the set that it is given.
    unsafe { libc::sigemptyset(set.as_mut_ptr()) };
    // SAFETY: initialized just above.
    unsafe { libc::sigaddset(set.as_mut_ptr(), KICK) };
    let now = libc::timespec { tv_sec: 0, tv_nsec: 0 };
    // SAFETY: the set is initialized, the information is not asked for, the time is a valid one.
    unsafe { libc::sigtimedwait(set.as_ptr(), ptr::null_mut(), &now) };
}

/// Opens the kick signal inside this vCPU's KVM_RUN.
pub(super) fn open_kick_in_run(vcpu: &kvm_ioctls::VcpuFd) -> Result<(), KvmError> {
    /// `struct kvm_signal_mask`: the length of the kernel's signal set, then the set.
    #[repr(C, packed)]
    struct SignalMask {
        len: u32,
        blocked: u64,
    }
    // The kernel numbers signals from 1.
    let bit = |signal: libc::c_int| 1u64 << (signal - 1);
    // The C library's own signals, below the first real-time one, are open too, as they are in
    // the thread: setuid in the process waits until each thread has taken one.
    let internal = (32..libc::SIGRTMIN()).fold(0, |set, signal| set | bit(signal));
    let mask = SignalMask { len: size_of::<u64>() as u32, blocked: !(bit(KICK) | internal) };
    // SAFETY: the descriptor is a vCPU, and KVM reads `len` bytes after the length.
    match unsafe { ioctl_with_ref(vcpu, KVM_SET_SIGNAL_MASK(), &mask) } {
        0 => Ok(()),
        _ => {
            Err(KvmError::Call { call: "KVM_SET_SIGNAL_MASK", source: io::Error::last_os_error() })
        }
    }
}

/// A thread that can be kicked out of KVM_RUN.
#[derive(Clone, Copy, Debug)]
pub(crate) struct KickTarget {
    tid: libc::pid_t,
}

impl KickTarget {
    /// The calling thread, which must have its signals blocked by [`block_signals`].
    pub(crate) fn current() -> Self {
        // SAFETY: gettid has no arguments and cannot fail.
        Self { tid: unsafe { libc::gettid() } }
    }

    /// Makes the thread's current or next KVM_RUN return. The caller knows that the thread is
    /// alive: a number that the kernel gave to another thread would be a signal for that one.
    pub(crate) fn kick(self) {
        // SAFETY: the system call has no memory arguments; the thread blocks the signal, so it
        // is never delivered.
        unsafe { libc::syscall(libc::SYS_tgkill, libc::getpid(), self.tid, KICK) };
    }
}

fn full_set_without(open: &[libc::c_int]) -> libc::sigset_t {
    let mut set = MaybeUninit::uninit();
    // SAFETY: sigfillset initializes the set that it is given.
    unsafe { libc::sigfillset(set.as_mut_ptr()) };
    for &signal in open {
        // SAFETY: initialized just above.
        unsafe { libc::sigdelset(set.as_mut_ptr(), signal) };
    }
    // SAFETY: initialized above.
    unsafe { set.assume_init() }
}

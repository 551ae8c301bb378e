//! A child that shares its parent's memory until it executes a program: no page table is copied, and
//! no page after it. The parent's thread waits meanwhile (CLONE_VFORK of clone(2)).
//!
//! The C library has no call for it: its `vfork` and `clone` cannot put the child into a cgroup, nor
//! give a descriptor for it.

use std::arch::asm;
use std::ffi::{c_int, c_long, c_void};
use std::io;
use std::mem::MaybeUninit;
use std::os::fd::{FromRawFd, OwnedFd, RawFd};

const SIGCHLD: u64 = 17;
const CLONE_VM: u64 = 0x100;
const CLONE_PIDFD: u64 = 0x1000;
const CLONE_VFORK: u64 = 0x4000;
const CLONE_INTO_CGROUP: u64 = 0x2_0000_0000;
const SYS_CLONE3: c_long = 435;
#[cfg(target_arch = "x86_64")]
const SYS_CLONE: c_long = 56;
#[cfg(target_arch = "aarch64")]
const SYS_CLONE: c_long = 220;

/// What the child's few calls need, many times over.
const STACK_BYTES: usize = 16 << 10;

#[repr(C, align(16))]
struct Stack([MaybeUninit<u8>; STACK_BYTES]);

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

/// A child that has executed its program, or has ended.
pub(super) struct Cloned {
    pub(super) pid: c_int,
    /// None before Linux 5.7.
    pub(super) pidfd: Option<OwnedFd>,
}

/// Has a child run `run`, in this cgroup if there is one, and waits until it executes a program or ends.
///
/// # Safety
///
/// `run` ends the process or executes a program, and what it points to may be used by the child while
/// the caller waits. It needs no more stack than there is, and calls nothing that needs to know in which
/// thread it is.
pub(super) unsafe fn clone_and_run<T>(
    cgroup: Option<RawFd>,
    run: extern "C" fn(*mut T),
    argument: *mut T,
) -> io::Result<Cloned> {
    let mut stack = MaybeUninit::<Stack>::uninit();
    let mut pidfd: c_int = -1;
    let args = CloneArgs {
        flags: CLONE_VM | CLONE_VFORK | CLONE_PIDFD | cgroup.map_or(0, |_| CLONE_INTO_CGROUP),
        pidfd: &raw mut pidfd as u64,
        exit_signal: SIGCHLD,
        stack: stack.as_mut_ptr() as u64,
        stack_size: STACK_BYTES as u64,
        cgroup: cgroup.unwrap_or(0) as u64,
        ..CloneArgs::default()
    };
    let (run, argument) = (run as *const c_void, argument.cast::<c_void>());
    // SAFETY: the kernel reads the arguments and writes the descriptor; the child has the stack to itself,
    // and the caller answers for the rest.
    let pid = unsafe {
        call(SYS_CLONE3, &raw const args as u64, size_of::<CloneArgs>() as u64, run, argument)
    };
    if pid >= 0 {
        // SAFETY: the kernel has just made it.
        let pidfd = (pidfd >= 0).then(|| unsafe { OwnedFd::from_raw_fd(pidfd) });
        return Ok(Cloned { pid: pid as c_int, pidfd });
    }
    Err(io::Error::from_raw_os_error(-pid as i32))
}

/// As [`clone_and_run`], without a cgroup and a descriptor, where the kernel is older.
///
/// # Safety
///
/// As that one.
pub(super) unsafe fn clone_and_run_plainly<T>(
    run: extern "C" fn(*mut T),
    argument: *mut T,
) -> io::Result<Cloned> {
    let mut stack = MaybeUninit::<Stack>::uninit();
    let top = stack.as_mut_ptr() as u64 + STACK_BYTES as u64;
    let flags = CLONE_VM | CLONE_VFORK | SIGCHLD;
    // SAFETY: as above.
    let pid =
        unsafe { call(SYS_CLONE, flags, top, run as *const c_void, argument.cast::<c_void>()) };
    match pid {
        0.. => Ok(Cloned { pid: pid as c_int, pidfd: None }),
        _ => Err(io::Error::from_raw_os_error(-pid as i32)),
    }
}

/// A system call that comes back twice, the second time on another stack, where it calls `run`.
///
/// # Safety
///
/// The call is a clone with a stack, and `run` never returns.
#[cfg(target_arch = "x86_64")]
unsafe fn call(
    number: c_long,
    a: u64,
    b: u64,
    run: *const c_void,
    argument: *const c_void,
) -> c_long {
    let result: c_long;
    // SAFETY: the child leaves by `run`; the parent finds all registers that are not named as they were.
    unsafe {
        asm!(
            "syscall",
            "test rax, rax",
            "jnz 2f",
            "xor ebp, ebp",
            "mov rdi, r12",
            "call r13",
            "ud2",
            "2:",
            inlateout("rax") number => result,
            in("rdi") a,
            in("rsi") b,
            in("rdx") 0,
            in("r10") 0,
            in("r8") 0,
            in("r12") argument,
            in("r13") run,
            lateout("rcx") _,
            lateout("r11") _,
        );
    }
    result
}

/// A system call that comes back twice, the second time on another stack, where it calls `run`.
///
/// # Safety
///
/// The call is a clone with a stack, and `run` never returns.
#[cfg(target_arch = "aarch64")]
unsafe fn call(
    number: c_long,
    a: u64,
    b: u64,
    run: *const c_void,
    argument: *const c_void,
) -> c_long {
    let result: c_long;
    // SAFETY: the child leaves by `run`; the parent finds all registers that are not named as they were.
    unsafe {
        asm!(
            "svc 0",
            "cbnz x0, 2f",
            "mov x29, xzr",
            "mov x0, x20",
            "blr x21",
            "brk 1",
            "2:",
            inlateout("x0") a => result,
            in("x1") b,
            in("x2") 0,
            in("x3") 0,
            in("x4") 0,
            in("x8") number,
            in("x20") argument,
            in("x21") run,
        );
    }
    result
}

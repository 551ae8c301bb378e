use super::*;

/// What the thread's status says of a field.
fn status(field: &str) -> String {
    let status = std::fs::read_to_string("/proc/thread-self/status").unwrap();
    let line = status.lines().find(|line| line.starts_with(field)).unwrap();
    line.split_whitespace().last().unwrap().to_owned()
}

/// Runs in a confined thread.
fn confined<T: Send + 'static>(
    confinement: Confinement,
    act: impl FnOnce() -> T + Send + 'static,
) -> T {
    let confined = move || {
        confinement.apply().unwrap();
        act()
    };
    std::thread::spawn(confined).join().unwrap()
}

#[test]
fn a_confined_thread_computes_and_writes_but_opens_nothing() {
    use std::io::Write;
    let before = status("Seccomp_filters:");
    for confinement in [Confinement::Device, Confinement::Vcpu] {
        let mut file = std::fs::File::create("/dev/null").unwrap();
        confined(confinement, move || {
            let refused = |error: std::io::Error| error.raw_os_error() == Some(libc::EPERM);
            assert!(refused(std::fs::File::open("/dev/null").unwrap_err()));
            assert!(refused(std::net::TcpListener::bind("127.0.0.1:0").unwrap_err()));
            assert!(std::process::Command::new("true").status().is_err());
            assert!(refused(std::thread::Builder::new().spawn(|| {}).unwrap_err()));
            file.write_all(&vec![7; 64 << 20]).unwrap();
            std::thread::sleep(std::time::Duration::from_millis(1));
            std::os::unix::net::UnixStream::pair().unwrap().0.set_nonblocking(true).unwrap();
            let mut blocks: Vec<Vec<u8>> = (0..1000).map(|at| vec![1; at * 100]).collect();
            blocks.sort();
            drop(std::collections::HashMap::<u8, u8>::new());
            // A panic in a console writer is caught.
            std::panic::catch_unwind(|| panic!("in a confined thread")).unwrap_err();
        });
    }
    assert_eq!(status("Seccomp_filters:"), before, "the caller's thread stays as it was");
}

#[test]
fn a_confined_thread_lets_go_of_locks_and_takes_none() {
    use crate::file_lock::{Locked, LockedFile};
    let file = vmm_sys_util::tempfile::TempFile::new().unwrap();
    let open = || std::fs::File::open(file.as_path()).unwrap();
    for confinement in [Confinement::Device, Confinement::Vcpu] {
        let Locked::Ours(locked) = LockedFile::exclusive_now(open()).unwrap() else {
            panic!("it is taken")
        };
        let (copy, other) = (locked.try_clone().unwrap(), open());
        confined(confinement, move || {
            drop(locked);
            let refused = LockedFile::shared(other).unwrap_err();
            assert_eq!(refused.raw_os_error(), Some(libc::EPERM));
        });
        assert!(matches!(LockedFile::exclusive_now(open()).unwrap(), Locked::Ours(_)));
        drop(copy);
    }
}

/// Sends signal 0, which is none, to a thread: 0 where another one might be sent.
fn signal(process: i32, thread: i32) -> i64 {
    // SAFETY: the call has no memory arguments.
    unsafe { libc::syscall(libc::SYS_tgkill, process, thread, 0) }
}

#[test]
fn no_memory_becomes_code_and_no_other_process_gets_a_signal() {
    use std::process::{Command, Stdio};
    // It ends when its input does: with this test.
    let mut child = Command::new("cat").stdin(Stdio::piped()).spawn().unwrap();
    let other = child.id() as i32;
    assert_eq!(signal(other, other), 0);
    confined(Confinement::Vcpu, move || {
        let (read, code) = (libc::PROT_READ, libc::PROT_READ | libc::PROT_EXEC);
        let map = |protection| {
            let flags = libc::MAP_PRIVATE | libc::MAP_ANONYMOUS;
            // SAFETY: a new mapping, which no other memory is replaced by.
            unsafe { libc::mmap(std::ptr::null_mut(), 4096, protection, flags, -1, 0) }
        };
        assert_eq!(map(code), libc::MAP_FAILED);
        let page = map(read);
        assert_ne!(page, libc::MAP_FAILED);
        // SAFETY: the page is this test's own.
        assert_eq!(unsafe { libc::mprotect(page, 4096, code) }, -1);
        // SAFETY: as above, and not used any more.
        assert_eq!(unsafe { libc::munmap(page, 4096) }, 0);
        // SAFETY: the calls have no arguments.
        let (process, thread) = unsafe { (libc::getpid(), libc::gettid()) };
        assert_eq!(signal(process, thread), 0);
        assert_eq!(signal(other, other), -1);
        assert_eq!(std::io::Error::last_os_error().raw_os_error(), Some(libc::EPERM));
    });
    child.wait().unwrap();
}

#[test]
fn programs_are_made_once() {
    let first = programs();
    assert!(Arc::ptr_eq(&first, &programs()));
    assert!(first.device.len() < 110 && first.vcpu.len() < 110);
}

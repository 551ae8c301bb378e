//! Vsock where the guest has no driver: what those who wait are told, and what is left behind.

use std::thread;
use std::time::Duration;

use dormouse::{ErrorKind, ExitStatus, MicroVm, Vsock, VsockConfig};

use crate::guest::Program;
use crate::scratch::Scratch;
use crate::{PATIENCE, config, resources};

fn waiters(vsock: &Vsock) -> [thread::JoinHandle<dormouse::Error>; 2] {
    let listener = vsock.listen(1).unwrap();
    let connecting = vsock.begin_connect(1).unwrap();
    [
        thread::spawn(move || listener.accept().unwrap_err()),
        thread::spawn(move || connecting.finish_timeout(PATIENCE).unwrap_err()),
    ]
}

#[test]
fn those_who_wait_for_a_vm_that_is_ended_are_told_so() {
    let ended = ErrorKind::GuestEnded(ExitStatus::Terminated);
    let vm = MicroVm::create(config(&Program::Heartbeat).vsock(VsockConfig::default())).unwrap();
    let before = vm.listen(7).unwrap();
    assert_eq!(vm.listen(7).unwrap_err().kind(), &ErrorKind::PortInUse);
    let vm = vm.start().unwrap();
    let error = vm.connect_timeout(1, Duration::from_millis(1)).unwrap_err();
    assert_eq!(error.kind(), &ErrorKind::Timeout, "no driver answers");
    let vsock = vm.vsock().unwrap();
    let waiters = waiters(&vsock);
    let vm = vm.pause().unwrap().resume().unwrap();
    let vm = vm.terminate();
    assert_eq!(vm.exit_status(), &ExitStatus::Terminated);
    for waiter in waiters {
        assert_eq!(waiter.join().unwrap().kind(), &ended);
    }
    assert_eq!(before.accept().unwrap_err().kind(), &ended);
    assert_eq!(vsock.listen(7).unwrap_err().kind(), &ended);
    assert_eq!(vsock.connect(7).unwrap_err().kind(), &ended);
}

#[test]
fn without_a_vsock_device_the_error_says_how_to_have_one() {
    let vm = MicroVm::create(config(&Program::Halt)).unwrap();
    let error = vm.listen(1).unwrap_err();
    assert_eq!(error.kind(), &ErrorKind::Config);
    assert!(error.to_string().contains("add `.vsock(VsockConfig::default())`"), "{error}");
}

#[test]
fn a_unix_socket_that_cannot_be_made_is_named_with_what_to_do() {
    let scratch = Scratch::new();
    let path = scratch.join("taken");
    std::fs::write(&path, "").unwrap();
    let config = config(&Program::Halt).vsock(VsockConfig::default().unix_socket(&path));
    let error = MicroVm::create(config).unwrap_err();
    assert_eq!(error.kind(), &ErrorKind::Config);
    let text = error.to_string();
    assert!(text.contains(path.to_str().unwrap()) && text.contains("remove"), "{text}");
}

#[test]
fn vms_with_vsock_leave_nothing_behind() {
    if !resources::alone("vms_with_vsock_leave_nothing_behind") {
        return;
    }
    let scratch = Scratch::new();
    let path = scratch.join("vsock");
    let round = || {
        let vsock = VsockConfig::default().unix_socket(&path);
        let vm = MicroVm::create(config(&Program::Heartbeat).vsock(vsock)).unwrap();
        let vm = vm.start().unwrap();
        let waiters = waiters(&vm.vsock().unwrap());
        drop(vm);
        for waiter in waiters {
            waiter.join().unwrap();
        }
        assert!(!path.exists());
    };
    for _ in 0..10 {
        round();
    }
    let before = resources::settled();
    for _ in 0..100 {
        round();
    }
    resources::assert_back_to(&before);
}

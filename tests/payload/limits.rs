//! Many VMs, one after the other and side by side; and what is left of them.

use std::io::Write;
use std::time::{Duration, Instant};

use dormouse::{ErrorKind, ExitStatus, MicroVm};

use crate::guest::Program;
use crate::{PATIENCE, config, create, resources};

#[test]
fn a_thousand_created_and_dropped_vms_leave_nothing_behind() {
    if !resources::alone("a_thousand_created_and_dropped_vms_leave_nothing_behind") {
        return;
    }
    let round = || drop(MicroVm::create(config(&Program::Halt)).unwrap());
    for _ in 0..10 {
        round();
    }
    let before = resources::settled();
    for _ in 0..1000 {
        round();
    }
    resources::assert_back_to(&before);
}

#[test]
fn two_hundred_started_and_terminated_vms_leave_nothing_behind() {
    if !resources::alone("two_hundred_started_and_terminated_vms_leave_nothing_behind") {
        return;
    }
    let round = |vcpus| {
        let vm = MicroVm::create(config(&Program::Heartbeat).vcpus(vcpus)).unwrap();
        let ended = vm.start().unwrap().terminate();
        assert_eq!(ended.exit_status(), &ExitStatus::Terminated);
    };
    for vcpus in 1..10 {
        round(vcpus);
    }
    let before = resources::settled();
    for vm in 0..200 {
        round(1 + vm % 4);
    }
    resources::assert_back_to(&before);
}

#[test]
fn vms_dropped_in_any_state_leave_nothing_behind() {
    if !resources::alone("vms_dropped_in_any_state_leave_nothing_behind") {
        return;
    }
    let round = || {
        let config = || config(&Program::Heartbeat).vcpus(2).entropy(true);
        let vm = || MicroVm::create(config()).unwrap();
        drop(vm());
        drop(vm().start().unwrap());
        drop(vm().start().unwrap().pause().unwrap());
        drop(vm().start().unwrap().pause().unwrap().resume().unwrap());
        let _ = vm().start().unwrap().pause().unwrap().terminate();
    };
    round();
    let before = resources::settled();
    for _ in 0..20 {
        round();
    }
    resources::assert_back_to(&before);
}

#[test]
fn two_hundred_vms_run_side_by_side() {
    // Each tenth of them is busy, the others halt.
    let vms: Vec<_> = (0..200)
        .map(|vm| {
            let program = if vm % 10 == 0 { Program::Heartbeat } else { Program::Halt };
            let (vm, output) = create(&program);
            (vm.start().unwrap(), output)
        })
        .collect();
    for (_, output) in &vms {
        assert_eq!(output.next(), b'B');
    }
    for (_, output) in vms.iter().step_by(10) {
        output.so_far();
        assert_eq!(output.next(), b'.');
    }
    for (vm, _) in vms {
        assert_eq!(vm.exit_status(), None);
        assert_eq!(vm.terminate().exit_status(), &ExitStatus::Terminated);
    }
}

#[test]
fn one_vm_that_dies_leaves_the_others_alone() {
    let (living, output) = create(&Program::Heartbeat);
    let living = living.start().unwrap();
    assert_eq!(output.next(), b'B');
    for program in [Program::Fault, Program::Script(vec![(0x600, 0x34)])] {
        let (vm, _) = create(&program);
        let _ = vm.start().unwrap().wait_timeout(PATIENCE).unwrap();
    }
    output.so_far();
    assert_eq!(output.next(), b'.');
    assert_eq!(living.exit_status(), None);
}

#[test]
fn a_console_writer_that_panics_ends_its_guest_and_nothing_else() {
    struct Panics;
    impl Write for Panics {
        fn write(&mut self, _: &[u8]) -> std::io::Result<usize> {
            panic!("the embedding program's fault")
        }
        fn flush(&mut self) -> std::io::Result<()> {
            Ok(())
        }
    }
    let vm = MicroVm::create(config(&Program::Heartbeat).vcpus(2).console(Panics)).unwrap();
    let ended = vm.start().unwrap().wait_timeout(PATIENCE).unwrap();
    let ExitStatus::Crashed { reason } = ended.exit_status() else {
        panic!("{}", ended.exit_status());
    };
    assert!(reason.contains("panicked"), "{reason}");
}

#[test]
fn a_drop_does_not_wait_for_a_console_writer_that_blocks() {
    struct Blocks;
    impl Write for Blocks {
        fn write(&mut self, bytes: &[u8]) -> std::io::Result<usize> {
            std::thread::sleep(Duration::from_secs(5));
            Ok(bytes.len())
        }
        fn flush(&mut self) -> std::io::Result<()> {
            Ok(())
        }
    }
    let vm = MicroVm::create(config(&Program::Heartbeat).console(Blocks)).unwrap();
    let vm = vm.start().unwrap();
    std::thread::sleep(Duration::from_millis(100));
    let begin = Instant::now();
    drop(vm);
    // Not a measurement: five seconds apart from the five that the writer takes.
    assert!(begin.elapsed() < Duration::from_secs(3));
}

#[test]
fn the_process_keeps_its_signal_handlers_and_its_mask() {
    let before = resources::signals();
    let (vm, output) = create(&Program::Heartbeat);
    let vm = vm.start().unwrap();
    output.next();
    let ended = vm.pause().unwrap().resume().unwrap().terminate();
    assert_eq!(ended.exit_status(), &ExitStatus::Terminated);
    assert_eq!(resources::signals(), before);
}

#[test]
fn a_guest_is_stopped_at_once_however_early_and_quiet_it_is() {
    // It never comes out of the guest by itself: the kick alone ends it.
    for round in 0..200 {
        let vm = MicroVm::create(config(&Program::Halt).vcpus(1 + round % 3)).unwrap();
        let vm = vm.start().unwrap();
        let vm = if round % 2 == 0 { vm } else { vm.pause().unwrap().resume().unwrap() };
        assert_eq!(vm.terminate().exit_status(), &ExitStatus::Terminated);
    }
}

#[test]
fn a_process_changes_its_user_while_a_guest_sleeps() {
    if !resources::alone("a_process_changes_its_user_while_a_guest_sleeps") {
        return;
    }
    let (vm, output) = create(&Program::Halt);
    let vm = vm.start().unwrap();
    assert_eq!(output.next(), b'B');
    std::thread::sleep(Duration::from_millis(50));
    let (done, changed) = std::sync::mpsc::channel();
    std::thread::spawn(move || {
        // SAFETY: neither call has memory arguments; the group stays what it is.
        let result = unsafe { libc::setgid(libc::getgid()) };
        done.send(result).unwrap();
    });
    // The C library waits until each thread of the process has taken a signal of its own.
    assert_eq!(changed.recv_timeout(PATIENCE), Ok(0));
    assert_eq!(vm.terminate().exit_status(), &ExitStatus::Terminated);
}

#[test]
fn a_guest_is_stopped_where_the_user_may_queue_no_signal() {
    if !resources::alone("a_guest_is_stopped_where_the_user_may_queue_no_signal") {
        return;
    }
    let none = libc::rlimit { rlim_cur: 0, rlim_max: 0 };
    // SAFETY: the limit is a valid one, of this process alone.
    assert_eq!(unsafe { libc::setrlimit(libc::RLIMIT_SIGPENDING, &none) }, 0);
    let (vm, output) = create(&Program::Halt);
    let vm = vm.start().unwrap();
    assert_eq!(output.next(), b'B');
    assert_eq!(vm.terminate().exit_status(), &ExitStatus::Terminated);
}

#[test]
fn vms_whose_console_writers_block_hold_up_no_others() {
    if !resources::alone("vms_whose_console_writers_block_hold_up_no_others") {
        return;
    }
    struct Blocks;
    impl Write for Blocks {
        fn write(&mut self, _: &[u8]) -> std::io::Result<usize> {
            std::thread::sleep(Duration::from_secs(1_000_000));
            Ok(0)
        }
        fn flush(&mut self) -> std::io::Result<()> {
            Ok(())
        }
    }
    for _ in 0..10 {
        let vm = MicroVm::create(config(&Program::Heartbeat).console(Blocks)).unwrap();
        drop(vm.start().unwrap());
    }
    let before = resources::settled();
    for _ in 0..100 {
        drop(MicroVm::create(config(&Program::Halt)).unwrap());
    }
    resources::assert_back_to(&before);
}

#[test]
fn a_guest_that_has_ended_is_never_reported_as_a_timeout() {
    for _ in 0..50 {
        let (vm, _output) = create(&Program::Script(vec![(0x600, 0x34)]));
        let mut vm = vm.start().unwrap();
        loop {
            match vm.wait_timeout(Duration::from_micros(300)) {
                Ok(_) => break,
                Err(failed) => {
                    let timeout = failed.error.kind() == &ErrorKind::Timeout;
                    assert!(timeout, "{:?}", failed.error);
                    vm = failed.vm;
                }
            }
        }
    }
}

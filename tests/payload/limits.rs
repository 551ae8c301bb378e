//! Many VMs, one after the other and side by side; and what is left of them.

use std::io::Write;
use std::sync::mpsc::{Sender, channel};
use std::time::Duration;

use dormouse::{BlockConfig, ErrorKind, ExitStatus, MicroVm};

use crate::blocking::{Blocks, blocking};
use crate::guest::Program;
use crate::scratch::Scratch;
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
    // More VMs of each state than mappings are forgiven.
    for _ in 0..50 {
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
    let (writer, gate) = blocking();
    let vm = MicroVm::create(config(&Program::Heartbeat).console(writer)).unwrap();
    let vm = vm.start().unwrap();
    gate.until_begun();
    drop(vm);
    assert_eq!(gate.was_let_go(), None, "it was waited for");
}

#[test]
fn the_disk_of_a_vm_that_is_dropped_is_free_though_its_console_writer_blocks() {
    let scratch = Scratch::new();
    let disk = BlockConfig::new(scratch.disk("image"));
    let (writer, gate) = blocking();
    let first = config(&Program::Heartbeat).block(disk.clone()).console(writer);
    let vm = MicroVm::create(first).unwrap().start().unwrap();
    gate.until_begun();
    drop(vm);
    drop(MicroVm::create(config(&Program::Halt).block(disk)).unwrap());
    assert_eq!(gate.was_let_go(), None, "it was waited for");
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
fn a_disk_beyond_the_limit_of_a_files_size_is_refused_and_the_process_lives() {
    if !resources::alone("a_disk_beyond_the_limit_of_a_files_size_is_refused_and_the_process_lives")
    {
        return;
    }
    let scratch = Scratch::new();
    let disk = scratch.join("disk");
    std::fs::File::create(&disk).unwrap().set_len(1 << 30).unwrap();
    let limit = libc::rlimit { rlim_cur: 512 << 20, rlim_max: 512 << 20 };
    // SAFETY: the limit is a valid one, of this process alone.
    assert_eq!(unsafe { libc::setrlimit(libc::RLIMIT_FSIZE, &limit) }, 0);
    let private = BlockConfig::new(&disk).discard_writes();
    let error = MicroVm::create(config(&Program::Halt).block(private)).unwrap_err();
    assert_eq!(error.kind(), &ErrorKind::Disk);
    assert!(error.to_string().contains("ulimit -f"), "{error}");
}

#[test]
fn vms_whose_console_writers_block_hold_up_no_others() {
    if !resources::alone("vms_whose_console_writers_block_hold_up_no_others") {
        return;
    }
    /// Says that it has begun, and has no end.
    struct Hangs(Sender<()>);
    impl Write for Hangs {
        fn write(&mut self, _: &[u8]) -> std::io::Result<usize> {
            self.0.send(()).unwrap();
            std::thread::sleep(Duration::from_secs(1_000_000));
            Ok(0)
        }
        fn flush(&mut self) -> std::io::Result<()> {
            Ok(())
        }
    }
    let (begun, has_begun) = channel();
    for _ in 0..10 {
        let writer = Hangs(begun.clone());
        let vm = MicroVm::create(config(&Program::Heartbeat).console(writer)).unwrap();
        let vm = vm.start().unwrap();
        has_begun.recv_timeout(PATIENCE).unwrap();
        drop(vm);
    }
    let before = resources::settled_with(10);
    for _ in 0..100 {
        drop(MicroVm::create(config(&Program::Halt)).unwrap());
    }
    resources::assert_back_to(&before);
}

#[test]
fn a_guest_that_has_ended_is_waited_for_a_moment_more_and_never_reported_as_a_timeout() {
    const ROUNDS: usize = 50;
    let mut came = 0;
    for _ in 0..ROUNDS {
        let (vm, _output) = create(&Program::Script(vec![(0x600, 0x34)]));
        let vm = vm.start().unwrap();
        while vm.exit_status().is_none() {
            std::thread::yield_now();
        }
        let ended = match vm.wait_timeout(Duration::ZERO) {
            Ok(ended) => {
                came += 1;
                ended
            }
            // Its thread may have stood still for longer than the moment.
            Err(failed) => {
                let ended = ErrorKind::GuestEnded(ExitStatus::PoweredOff);
                assert_eq!(failed.error.kind(), &ended, "{:?}", failed.error);
                failed.vm.wait()
            }
        };
        assert_eq!(ended.exit_status(), &ExitStatus::PoweredOff);
    }
    assert!(came > ROUNDS / 2, "{came} of {ROUNDS} came back");
}

#[test]
fn a_guest_that_has_ended_and_whose_thread_does_not_come_back_is_no_timeout() {
    /// What a writer panics with. It is dropped when the guest's end is known, and before its vCPU is back.
    struct Lingers(Blocks);
    impl Drop for Lingers {
        fn drop(&mut self) {
            self.0.wait();
        }
    }
    struct Panics(Option<Blocks>);
    impl Write for Panics {
        fn write(&mut self, _: &[u8]) -> std::io::Result<usize> {
            std::panic::panic_any(Lingers(self.0.take().expect("one write")))
        }
        fn flush(&mut self) -> std::io::Result<()> {
            Ok(())
        }
    }
    let (blocks, mut gate) = blocking();
    let writer = Panics(Some(blocks));
    let vm = MicroVm::create(config(&Program::Heartbeat).console(writer)).unwrap();
    let vm = vm.start().unwrap();
    gate.until_begun();
    let failed = vm.wait_timeout(Duration::ZERO).unwrap_err();
    let ended = matches!(failed.error.kind(), ErrorKind::GuestEnded(ExitStatus::Crashed { .. }));
    assert!(ended, "{:?}", failed.error);
    assert_eq!(gate.was_let_go(), None);
    gate.open();
    let ended = failed.vm.wait_timeout(PATIENCE).unwrap();
    assert!(matches!(ended.exit_status(), ExitStatus::Crashed { .. }), "{}", ended.exit_status());
}

//! The transitions of a VM, and how a guest's end is seen.

use std::thread::sleep;
use std::time::Duration;

use dormouse::{AnyMicroVm, ErrorKind, ExitStatus, MicroVm, Phase, Running, Terminated};

use crate::guest::Program;
use crate::{PATIENCE, config, create};

fn end_of(program: Program) -> MicroVm<Terminated> {
    let (vm, _output) = create(&program);
    vm.start().unwrap().wait_timeout(PATIENCE).unwrap()
}

#[test]
fn a_guest_that_beats_stops_while_paused_and_goes_on_after() {
    let (vm, output) = create(&Program::Heartbeat);
    let mut vm = vm.start().unwrap();
    assert_eq!(output.next(), b'B');
    for _ in 0..20 {
        assert_eq!(output.next(), b'.');
        let paused = vm.pause().unwrap();
        output.so_far();
        sleep(Duration::from_millis(5));
        assert_eq!(output.so_far(), b"", "a paused guest runs");
        vm = paused.resume().unwrap();
    }
    assert_eq!(output.next(), b'.');
    assert_eq!(vm.exit_status(), None);
    let ended = vm.terminate();
    assert_eq!(ended.exit_status(), &ExitStatus::Terminated);
}

#[test]
fn a_guest_uses_cpu_time_while_it_spins_none_while_paused_or_asleep_and_it_never_falls() {
    const WORK: Duration = Duration::from_millis(40);
    // What the threads themselves take to stop and to begin again.
    const LITTLE: Duration = Duration::from_millis(5);
    let (vm, output) = create(&Program::Script(Vec::new()));
    let vm = vm.start().unwrap();
    assert_eq!(output.next(), b'B');
    let works = |vm: &MicroVm<Running>| {
        let end = vm.cpu_time() + WORK;
        while vm.cpu_time() < end {
            sleep(Duration::from_millis(5));
        }
    };
    works(&vm);
    let ran = vm.cpu_time();
    let paused = vm.pause().unwrap();
    let stopped = paused.cpu_time();
    assert!(stopped >= ran);
    sleep(WORK);
    assert!(paused.cpu_time() - stopped < LITTLE, "{:?} after {stopped:?}", paused.cpu_time());
    let vm = paused.resume().unwrap();
    works(&vm);
    let paused = vm.pause().unwrap();
    let slept = paused.cpu_time();
    assert!(slept >= stopped + WORK);
    let vm = paused.suspend_in_memory().unwrap().resume().unwrap();
    assert!(vm.cpu_time() >= slept);
    works(&vm);
    // A clone has done nothing yet.
    let clone = vm.pause().unwrap().fork(1).unwrap().remove(0);
    assert!(clone.cpu_time() < LITTLE);
}

#[test]
fn a_guest_that_waits_uses_next_to_no_cpu_time() {
    let (vm, output) = create(&Program::Halt);
    let vm = vm.start().unwrap();
    assert_eq!(output.next(), b'B');
    sleep(Duration::from_millis(20));
    let begin = vm.cpu_time();
    sleep(Duration::from_millis(100));
    assert!(vm.cpu_time() - begin < Duration::from_millis(20));
}

#[test]
fn each_end_of_a_guest_has_its_own_status() {
    let script = |port, value| Program::Script(vec![(port, value)]);
    assert_eq!(end_of(script(0x600, 0x34)).exit_status(), &ExitStatus::PoweredOff);
    assert_eq!(end_of(script(0x602, 1)).exit_status(), &ExitStatus::Rebooted);
    assert_eq!(end_of(script(0x64, 0xfe)).exit_status(), &ExitStatus::Rebooted);
    let panicked = ExitStatus::Panicked { message: None };
    assert_eq!(end_of(script(0x505, 1)).exit_status(), &panicked);
    assert_eq!(end_of(Program::Fault).exit_status(), &ExitStatus::TripleFault);
}

#[test]
fn a_panic_on_the_console_before_a_reset_is_a_panic_with_its_message() {
    let mut script: Vec<(u16, u8)> =
        b"Kernel panic - not syncing: no init\r\n".iter().map(|byte| (0x3f8, *byte)).collect();
    script.push((0x602, 1));
    let ended = end_of(Program::Script(script));
    let message = Some("no init".to_owned());
    assert_eq!(ended.exit_status(), &ExitStatus::Panicked { message });
}

#[test]
fn calls_on_a_guest_that_ended_say_how_it_ended_with_its_last_words() {
    let (vm, output) = create(&Program::Script(vec![(0x3f8, b'!'), (0x600, 0x34)]));
    let vm = vm.start().unwrap();
    assert_eq!(output.next(), b'B');
    while vm.exit_status().is_none() {
        sleep(Duration::from_millis(1));
    }
    let error = vm.console_input("x").unwrap_err();
    assert_eq!(error.kind(), &ErrorKind::GuestEnded(ExitStatus::PoweredOff));
    let failed = vm.pause().unwrap_err();
    assert_eq!(failed.error.to_string(), "cannot pause: the guest powered off");
    assert_eq!(failed.error.phase(), Some(Phase::Pause));
    assert_eq!(failed.error.console_tail(), Some("B!"));
    assert_eq!(failed.vm.exit_status(), &ExitStatus::PoweredOff);
}

#[test]
fn wait_timeout_gives_a_living_vm_back() {
    let (vm, output) = create(&Program::Heartbeat);
    let vm = vm.start().unwrap();
    let failed = vm.wait_timeout(Duration::from_millis(20)).unwrap_err();
    assert_eq!(failed.error.kind(), &ErrorKind::Timeout);
    assert_eq!(output.next(), b'B');
    assert_eq!(failed.vm.terminate().exit_status(), &ExitStatus::Terminated);
}

#[test]
fn terminate_keeps_the_status_of_a_guest_that_ended_before() {
    let (vm, _output) = create(&Program::Script(vec![(0x600, 0x34)]));
    let vm = vm.start().unwrap();
    while vm.exit_status().is_none() {
        sleep(Duration::from_millis(1));
    }
    assert_eq!(vm.terminate().exit_status(), &ExitStatus::PoweredOff);
}

#[test]
fn what_the_host_types_comes_back_from_an_echoing_guest() {
    let (vm, output) = create(&Program::Echo);
    let vm = vm.start().unwrap();
    assert_eq!(output.next(), b'B');
    let text: Vec<u8> = (0..5000).map(|n| b'a' + (n % 16) as u8).collect();
    vm.console_input(&text).unwrap();
    let echoed: Vec<u8> = text.iter().map(|_| output.next()).collect();
    assert_eq!(echoed, text);
    vm.console_input("q").unwrap();
    let ended = vm.wait_timeout(PATIENCE).unwrap();
    assert_eq!(ended.exit_status(), &ExitStatus::PoweredOff);
}

#[test]
fn input_that_a_guest_does_not_read_is_refused_whole_when_its_queue_is_full() {
    let (vm, output) = create(&Program::Halt);
    let vm = vm.start().unwrap();
    assert_eq!(output.next(), b'B');
    let queue = vec![b'x'; 64 << 10];
    vm.console_input(&queue).unwrap();
    let error = vm.console_input(&queue).unwrap_err();
    assert_eq!(error.kind(), &ErrorKind::ConsoleFull);
    assert!(error.to_string().contains("65536 bytes do not fit"), "{error}");
    assert_eq!(error.phase(), Some(Phase::Console));
    assert_eq!(vm.exit_status(), None);
}

#[test]
fn a_string_instruction_writes_each_of_its_bytes() {
    let ended = end_of(Program::String);
    assert_eq!(ended.console().tail(), "Btext");
}

#[test]
fn timings_name_every_phase_once_in_the_order_of_their_ends() {
    let (vm, output) = create(&Program::Heartbeat);
    let vm = vm.start().unwrap();
    output.next();
    output.next();
    let ended = vm.pause().unwrap().resume().unwrap().terminate();
    let timings = ended.timings();
    let ends = timings.iter().map(|timing| timing.start_ns + timing.duration_ns);
    assert!(ends.is_sorted(), "{timings:?}");
    let mut names: Vec<&str> = timings.iter().map(|timing| timing.phase.as_str()).collect();
    names.sort_unstable();
    let mut all = [
        "config",
        "kernel",
        "initramfs",
        "memory",
        "kvm",
        "devices",
        "vcpus",
        "load",
        "start",
        "pause",
        "resume",
        "terminate",
        "first_run",
        "first_exit",
    ];
    all.sort_unstable();
    assert_eq!(names, all);
    let json = serde_json::to_value(&timings).unwrap();
    assert_eq!(json[0]["phase"], "config");
    assert!(json[0]["duration_ns"].is_u64());
}

#[test]
fn vms_of_any_state_live_in_one_collection() {
    let vm = |program| MicroVm::create(config(&program)).unwrap();
    let paused = vm(Program::Heartbeat).start().unwrap().pause().unwrap();
    let asleep = vm(Program::Halt).start().unwrap().pause().unwrap().suspend_in_memory().unwrap();
    let vms: Vec<AnyMicroVm> = vec![
        vm(Program::Halt).into(),
        vm(Program::Halt).start().unwrap().into(),
        paused.into(),
        asleep.into(),
        vm(Program::Halt).start().unwrap().terminate().into(),
    ];
    let names: Vec<&str> = vms.iter().map(AnyMicroVm::state_name).collect();
    assert_eq!(names, ["Created", "Running", "Paused", "Suspended", "Terminated"]);
}

#[test]
fn a_guest_that_has_ended_does_not_run_on_where_it_cannot_be_suspended() {
    let scratch = crate::scratch::Scratch::new();
    // It spins after its last word, which says that it is off.
    let (vm, _output) = create(&Program::Script(vec![(0x600, 0x34)]));
    let vm = vm.start().unwrap();
    while vm.exit_status().is_none() {
        sleep(Duration::from_millis(1));
    }
    let failed = vm.suspend(scratch.join("asleep")).unwrap_err();
    assert_eq!(failed.error.kind(), &ErrorKind::GuestEnded(ExitStatus::PoweredOff));
    let ended = failed.vm.wait_timeout(PATIENCE).unwrap();
    assert_eq!(ended.exit_status(), &ExitStatus::PoweredOff);
}

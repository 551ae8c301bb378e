//! The serial console, both ways, and what a pause does to a guest that talks.

use std::thread::sleep;
use std::time::Duration;

use dormouse::{ExitStatus, MicroVm};

use crate::{COMPLAINTS, Release, Transcript, config};

#[test]
fn a_shell_on_the_console_answers_what_is_typed() {
    let transcript = Transcript::default();
    let script = "setsid cttyhack sh; poweroff -f";
    let guest = config(Release::Linux6_12.kernel(), script).console(transcript.clone());
    let vm = MicroVm::create(guest).unwrap().start().unwrap();
    // The prompt begins with the working directory, which busyboxes write differently.
    transcript.wait_for(" # ");
    vm.console_input("echo $((6 * 7)) is the answer\n").unwrap();
    transcript.wait_for("42 is the answer\n");
    // Longer than the port's own buffer, in one go.
    let words = "dormouse ".repeat(100);
    vm.console_input(format!("echo {words} | wc -w\n")).unwrap();
    transcript.wait_for("\n100\n");
    vm.console_input("exit\n").unwrap();
    let vm = transcript.end_of(vm);
    assert_eq!(vm.exit_status(), &ExitStatus::PoweredOff);
    assert!(vm.console().tail().contains("42 is the answer"));
}

#[test]
fn a_paused_guest_is_silent_and_goes_on_without_complaint() {
    let transcript = Transcript::default();
    let script = r#"
exec < /dev/ttyS0
(i=0; while [ ! -e /enough ]; do i=$((i + 1)); echo tick $i; usleep 20000; done; dmesg; echo the end of its log) &
read line; echo > /enough
sleep 1000"#;
    let guest = config(Release::Linux6_1.kernel(), script).vcpus(2).console(transcript.clone());
    let mut vm = MicroVm::create(guest).unwrap().start().unwrap();
    transcript.wait_for("tick 3\n");
    for round in 0..5 {
        let paused = vm.pause().unwrap();
        let before = transcript.text();
        sleep(Duration::from_millis(300));
        assert_eq!(transcript.text(), before, "a paused guest wrote, in round {round}");
        vm = paused.resume().unwrap();
        let last = before.matches("tick").count();
        transcript.wait_for(&format!("tick {}\n", last + 3));
    }
    vm.console_input("enough\n").unwrap();
    transcript.wait_for("the end of its log\n");
    let text = transcript.text();
    for complaint in COMPLAINTS {
        assert!(!text.contains(complaint), "{text}");
    }
    let _ = vm.terminate();
}

//! What the crate's threads may do, and that no others are touched.

use std::fs::{self, File};
use std::io::{self, Write};
use std::sync::mpsc::{Receiver, Sender, channel};
use std::thread::sleep;
use std::time::{Duration, Instant};

use dormouse::{ExitStatus, MicroVm};

use crate::guest::Program;
use crate::{PATIENCE, config, resources};

/// Each thread of this process: its name, and its number of seccomp filters.
fn filters() -> Vec<(String, u32)> {
    let tasks = fs::read_dir("/proc/self/task").unwrap().map(|task| task.unwrap().path());
    // One that ends meanwhile, as those of a VM before may, is not there.
    let status = tasks.filter_map(|task| fs::read_to_string(task.join("status")).ok());
    let threads = status.map(|status| {
        let field = |name: &str| {
            let line = status.lines().find_map(|line| line.strip_prefix(name)).unwrap();
            line.trim().to_owned()
        };
        (field("Name:"), field("Seccomp_filters:").parse().unwrap())
    });
    threads.collect()
}

#[test]
fn the_threads_of_a_vm_are_confined_and_no_others() {
    if !resources::alone("the_threads_of_a_vm_are_confined_and_no_others") {
        return;
    }
    let before = filters();
    let base = before[0].1;
    assert!(before.iter().all(|(_, filters)| *filters == base), "{before:?}");
    let start = |seccomp| {
        let (writer, output) = crate::output();
        let config = config(&Program::Heartbeat).vcpus(2).entropy(true).seccomp(seccomp);
        let vm = MicroVm::create(config.console(writer)).unwrap().start().unwrap();
        assert_eq!(output.next(), b'B');
        vm
    };
    for (seccomp, vcpus) in [(true, base + 1), (false, base)] {
        let vm = start(seccomp);
        // The second vCPU's thread, and the device's, come to it in their own time.
        let begin = Instant::now();
        let threads = loop {
            let threads = filters();
            let of = |name: &str| {
                let named = threads.iter().filter(|thread| thread.0.starts_with(name));
                named.map(|thread| thread.1).collect::<Vec<_>>()
            };
            if of("dormouse-vcpu") == [vcpus; 2] && of("dormouse-device") == [base + 1] {
                break threads;
            }
            assert!(begin.elapsed() < PATIENCE, "{threads:?}");
            sleep(Duration::from_millis(1));
        };
        // KVM has a thread of its own in a VM's process, which never leaves the kernel.
        let ours = |name: &str| name.starts_with("dormouse-") || name.starts_with("kvm-");
        let others = threads.iter().filter(|thread| !ours(&thread.0));
        assert!(others.clone().all(|thread| thread.1 == base), "{threads:?}");
        assert_eq!(others.count(), before.len());
        assert_eq!(vm.terminate().exit_status(), &ExitStatus::Terminated);
    }
    // What comes after them is as free as what was before.
    File::open("/proc/self/status").unwrap();
    assert!(std::process::Command::new("true").status().unwrap().success());
}

/// Opens a file at each write, and says how that went.
struct Opens(Sender<Option<i32>>);

impl Write for Opens {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        let opened = File::open("/proc/self/status");
        let _ = self.0.send(opened.err().and_then(|error| error.raw_os_error()));
        Ok(bytes.len())
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

#[test]
fn a_console_writer_that_opens_a_file_gets_an_error_and_the_guest_goes_on() {
    for (seccomp, expected) in [(true, Some(libc::EPERM)), (false, None)] {
        let (sender, opened): (_, Receiver<Option<i32>>) = channel();
        let config = config(&Program::Heartbeat).seccomp(seccomp).console(Opens(sender));
        let vm = MicroVm::create(config).unwrap().start().unwrap();
        for _ in 0..20 {
            assert_eq!(opened.recv_timeout(PATIENCE).unwrap(), expected);
        }
        assert_eq!(vm.exit_status(), None);
        assert_eq!(vm.terminate().exit_status(), &ExitStatus::Terminated);
    }
}

#[test]
fn a_backtrace_on_a_confined_thread_spoils_none_elsewhere() {
    if !resources::alone("a_backtrace_on_a_confined_thread_spoils_none_elsewhere") {
        return;
    }
    /// Takes a backtrace at each write.
    struct Traces(Sender<String>);
    impl Write for Traces {
        fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
            let _ = self.0.send(std::backtrace::Backtrace::force_capture().to_string());
            Ok(bytes.len())
        }
        fn flush(&mut self) -> io::Result<()> {
            Ok(())
        }
    }
    let (sender, traces) = channel();
    let vm = MicroVm::create(config(&Program::Heartbeat).console(Traces(sender))).unwrap();
    let vm = vm.start().unwrap();
    assert!(!traces.recv_timeout(PATIENCE).unwrap().is_empty());
    assert_eq!(vm.terminate().exit_status(), &ExitStatus::Terminated);
    let trace = std::backtrace::Backtrace::force_capture().to_string();
    assert!(trace.contains("a_backtrace_on_a_confined_thread"), "{trace}");
}

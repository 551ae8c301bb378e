//! What the guest is there for: a program that is started when everything else is set up. It may have a
//! signal of its own that asks it to end.

use std::collections::BTreeMap;
use std::fs::{self, File, OpenOptions};
use std::io;
use std::os::fd::OwnedFd;
use std::sync::{Mutex, PoisonError, mpsc};

use crate::children::Child;
use crate::console::say;
use crate::protocol::{Failure, Program};
use crate::sys::{self, POLLIN, PollFd, WaitStatus};
use crate::{program, threads};

/// Who is asked to end by a signal of its own, as long as the number is that process's.
static ASKED_BY_SIGNAL: Mutex<Option<Running>> = Mutex::new(None);

#[derive(Clone, Copy)]
struct Running {
    pid: i32,
    stop_signal: i32,
}

/// Starts it, with the console as its output.
pub(crate) fn start(
    entrypoint: &Program,
    stop_signal: Option<i32>,
    at_its_end: impl FnOnce() + Send + 'static,
) -> Result<(), Failure> {
    let streams = streams().map_err(|error| Failure::of("open the console", &error))?;
    let account = program::account(entrypoint)?;
    let (entrypoint, (report, started)) = (entrypoint.clone(), mpsc::channel());
    // Who starts a child waits for it.
    let waiting =
        threads::spawn(move || match program::start(&entrypoint, account, streams, false) {
            Ok(child) => {
                note(child.pid, stop_signal);
                let _ = report.send(Ok(()));
                wait(child);
                at_its_end();
            }
            Err(failure) => {
                let _ = report.send(Err(failure));
            }
        });
    waiting.map_err(|error| Failure::of("wait for the entrypoint", &error))?;
    started.recv().unwrap_or(Ok(()))
}

fn streams() -> io::Result<[OwnedFd; 3]> {
    let console = OpenOptions::new().write(true).open("/dev/console");
    let console = console.or_else(|_| OpenOptions::new().write(true).open("/dev/null"))?;
    Ok([File::open("/dev/null")?.into(), console.try_clone()?.into(), console.into()])
}

fn note(pid: i32, stop_signal: Option<i32>) {
    let running = stop_signal.map(|stop_signal| Running { pid, stop_signal });
    *ASKED_BY_SIGNAL.lock().unwrap_or_else(PoisonError::into_inner) = running;
}

fn wait(mut child: Child) {
    // It is nobody's process any more before its number can be another's.
    let _ = sys::poll(&mut [PollFd::new(Some(child.end()), POLLIN)], None);
    *ASKED_BY_SIGNAL.lock().unwrap_or_else(PoisonError::into_inner) = None;
    match child.wait() {
        Ok(WaitStatus(0)) | Err(_) => {}
        Ok(status) => match status.signal() {
            Some(signal) => say(&format!("the entrypoint was ended by signal {signal}")),
            None => say(&format!("the entrypoint ended with status {}", status.code())),
        },
    }
}

/// Asks it to end, where it runs and has a signal for that, and says which process it is.
pub(crate) fn ask_to_end() -> Option<i32> {
    let asked = ASKED_BY_SIGNAL.lock().unwrap_or_else(PoisonError::into_inner);
    let Running { pid, stop_signal } = (*asked)?;
    let _ = sys::kill_process(pid, stop_signal);
    Some(pid)
}

/// The processes that neither are this one nor come from it: what a program has started is its own to end,
/// in the way that its signal asks for.
pub(crate) fn others(pid: i32) -> Vec<i32> {
    others_among(&parents(), pid)
}

/// Each process's parent.
fn parents() -> BTreeMap<i32, i32> {
    let entries = fs::read_dir("/proc").into_iter().flatten().flatten();
    let processes = entries.filter_map(|entry| entry.file_name().to_str()?.parse().ok());
    processes
        .filter_map(|pid: i32| {
            let stat = fs::read(format!("/proc/{pid}/stat")).ok()?;
            Some((pid, parent(&String::from_utf8_lossy(&stat))?))
        })
        .collect()
}

/// Of /proc/PID/stat, where a program's name may hold anything (proc_pid_stat(5)).
fn parent(stat: &str) -> Option<i32> {
    let (_, behind_the_name) = stat.rsplit_once(')')?;
    behind_the_name.split_whitespace().nth(1)?.parse().ok()
}

fn others_among(parents: &BTreeMap<i32, i32>, pid: i32) -> Vec<i32> {
    let comes_from_it = |process: i32| {
        let ancestors = std::iter::successors(Some(process), |one| parents.get(one).copied());
        // Processes end while they are looked at: what was read need not be a tree.
        ancestors.take(parents.len() + 1).any(|one| one == pid)
    };
    let all = parents.keys().copied();
    all.filter(|&process| process > 1 && !comes_from_it(process)).collect()
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::host;

    #[test]
    fn what_comes_from_a_process_is_known_by_its_parents() {
        let parents =
            [(1, 0), (2, 0), (9, 2), (10, 1), (11, 10), (12, 11), (20, 1), (30, 31), (31, 30)];
        assert_eq!(others_among(&parents.into(), 10), [2, 9, 20, 30, 31]);
        assert_eq!(others_among(&parents.into(), 11), [2, 9, 10, 20, 30, 31]);
    }

    #[test]
    fn a_parent_is_found_behind_any_name() {
        assert_eq!(parent("7 (a) S 3 7 7 0"), Some(3));
        assert_eq!(parent("7 (a) R 1) S 3 7 7 0"), Some(3));
        assert_eq!(parent("7 (a"), None);
        let own = i32::try_from(std::process::id()).unwrap();
        assert!(parents().contains_key(&own));
        assert!(!others(own).contains(&own));
    }

    #[test]
    fn it_is_asked_by_its_own_signal_for_as_long_as_it_runs() {
        let script = "trap 'exit 7' USR1; trap 'exit 8' TERM; echo; while :; do sleep 0.01; done";
        let (said, says) = io::pipe().unwrap();
        let null = || OwnedFd::from(File::open("/dev/null").unwrap());
        let shell = host::program(&["/bin/sh", "-c", script]);
        let mut child = program::start(&shell, None, [null(), says.into(), null()], false).unwrap();
        io::Read::read_exact(&mut &said, &mut [0]).unwrap();
        // SIGTERM as all others, where it has none.
        note(child.pid, None);
        assert_eq!(ask_to_end(), None);
        note(child.pid, Some(10));
        assert_eq!(ask_to_end(), Some(child.pid));
        assert_eq!(child.wait().unwrap().code(), 7);
        let shell = host::program(&["/bin/sh", "-c", "exit 3"]);
        let child = program::start(&shell, None, [null(), null(), null()], false).unwrap();
        note(child.pid, Some(10));
        wait(child);
        assert_eq!(ask_to_end(), None);
    }
}

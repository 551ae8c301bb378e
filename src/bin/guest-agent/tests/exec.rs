use std::fs;
use std::io::{Read, Write};
use std::net::Shutdown;
use std::os::unix::fs::PermissionsExt;
use std::os::unix::net::UnixStream;
use std::path::Path;
use std::thread;
use std::time::Duration;

use crate::connection::Connection;
use crate::host::{call, dial_with, exec, failure};
use crate::protocol::{
    Bytes, Call, Channel, Control, Credit, Exec, Exit, ExitCode, FailureKind, Frame, LAST_BYTES,
    MAX_DATA_BYTES, Reply, WINDOW_BYTES, WindowSize,
};
use crate::scratch::Scratch;

#[derive(Debug, Default)]
pub(crate) struct Ran {
    pub(crate) stdout: Vec<u8>,
    stderr: Vec<u8>,
    credit: usize,
    ends: usize,
    exit: Option<Exit>,
}

pub(crate) fn begin(exec: Exec) -> (Connection, u32) {
    let mut connection = call(&Call::Exec(exec));
    match connection.receive_message().unwrap() {
        Reply::Started(pid) => (connection, pid),
        other => panic!("{other:?}"),
    }
}

/// Takes a frame, and gives the agent credit for it if told to.
fn take(connection: &mut Connection, ran: &mut Ran, gives_credit: bool) {
    let frame = connection.receive().unwrap();
    let (channel, length) = (frame.channel, frame.bytes.len());
    match channel {
        Channel::Stdout => ran.stdout.extend_from_slice(frame.bytes),
        Channel::Stderr => ran.stderr.extend_from_slice(frame.bytes),
        Channel::Message => match frame.parse().unwrap() {
            Reply::Exited(exit) => ran.exit = Some(exit),
            Reply::Credit(credit) => ran.credit += credit.bytes as usize,
            other => panic!("{other:?}"),
        },
        Channel::Data | Channel::Call => panic!("the host's words from the agent"),
    }
    if channel == Channel::Message {
        return;
    }
    if length == 0 {
        ran.ends += 1;
    } else if gives_credit {
        let credit = Credit { channel: channel as u8, bytes: length as u32 };
        connection.send(&Control::Credit(credit)).unwrap();
    }
}

pub(crate) fn finish(connection: &mut Connection) -> Ran {
    let mut ran = Ran::default();
    while ran.exit.is_none() {
        take(connection, &mut ran, true);
    }
    ran
}

fn run(exec: Exec) -> Ran {
    finish(&mut begin(exec).0)
}

pub(crate) fn sh(script: &str) -> Exec {
    exec(&["sh", "-c", script])
}

fn refused(exec: Exec) -> FailureKind {
    let mut connection = call(&Call::Exec(exec));
    failure(connection.receive_message().unwrap()).kind
}

pub(crate) fn code(ran: &Ran) -> i32 {
    match ran.exit {
        Some(Exit { status: ExitCode::Code(code), timed_out: false }) => code,
        _ => panic!("{ran:?}"),
    }
}

/// The process whose number was written.
fn child(ran: &Ran) -> u32 {
    str::from_utf8(&ran.stdout).unwrap().trim().parse().unwrap()
}

fn is_alive(pid: u32) -> bool {
    let status = fs::read_to_string(format!("/proc/{pid}/stat")).unwrap_or_default();
    status.rsplit(')').next().is_some_and(|rest| !rest.is_empty() && !rest.starts_with(" Z"))
}

fn wait_until(what: &str, mut is_so: impl FnMut() -> bool) {
    for _ in 0..6000 {
        if is_so() {
            return;
        }
        thread::sleep(Duration::from_millis(10));
    }
    panic!("{what}");
}

#[test]
fn a_program_gives_its_output_and_its_status() {
    let ran = run(sh("echo out; echo err >&2; exit 7"));
    assert_eq!((&ran.stdout[..], &ran.stderr[..]), (&b"out\n"[..], &b"err\n"[..]));
    assert_eq!((code(&ran), ran.ends), (7, 2));
    let ran = run(sh("kill -USR1 $$"));
    assert_eq!(ran.exit, Some(Exit { status: ExitCode::Signal(10), timed_out: false }));
}

#[test]
fn a_program_has_the_arguments_environment_and_directory_that_it_is_given_and_no_others() {
    let mut exec = exec(&["/usr/bin/env"]);
    exec.program.env = vec![(Bytes::from("A"), Bytes::from(b"\xff b"))];
    assert_eq!(run(exec).stdout, b"A=\xff b\n");
    // Home is the environment's, or else the user's, where it is asked for.
    let mut exec = self::exec(&["/usr/bin/env"]);
    (exec.program.env, exec.program.home) = (Vec::new(), true);
    assert_eq!(run(exec.clone()).stdout, b"HOME=/root\n");
    exec.program.env = vec![(Bytes::from("HOME"), Bytes::from("/srv"))];
    assert_eq!(run(exec).stdout, b"HOME=/srv\n");
    let mut exec = sh("pwd; echo \"$0 $1\"");
    exec.program.argv.push(Bytes::from("x y"));
    exec.program.argv.push(Bytes::from("*"));
    exec.program.cwd = Some(Bytes::from("/usr"));
    assert_eq!(run(exec).stdout, b"/usr\nx y *\n");
    assert_eq!(run(sh("pwd; cat")).stdout, b"/\n");
    // Nothing of the agent's is open in it, and no signal ignored or blocked.
    let mut expected: Vec<_> = inherited().collect();
    // What `ls` reads the directory by.
    expected.extend((0..).map(|fd| fd.to_string()).find(|fd| !expected.contains(fd)));
    expected.sort();
    let ran = run(sh("ls /proc/self/fd; grep -E 'SigBlk|SigIgn' /proc/self/status >&2"));
    let mut found: Vec<_> =
        str::from_utf8(&ran.stdout).unwrap().lines().map(str::to_owned).collect();
    found.sort();
    assert_eq!(found, expected);
    // Those from 32 on are the C library's own, and as this process got them.
    for line in str::from_utf8(&ran.stderr).unwrap().lines() {
        let mask = u64::from_str_radix(line.split('\t').nth(1).unwrap(), 16).unwrap();
        assert_eq!(mask & 0x7fff_ffff, 0, "{line}");
    }
}

/// Descriptors that this process was started with for all that it starts.
fn inherited() -> impl Iterator<Item = String> {
    const O_CLOEXEC: u32 = 0o2_000_000;
    let entries = fs::read_dir("/proc/self/fdinfo").unwrap().flatten();
    entries.filter_map(|entry| {
        let info = fs::read_to_string(entry.path()).ok()?;
        let flags = info.lines().find_map(|line| line.strip_prefix("flags:\t"))?;
        let flags = u32::from_str_radix(flags, 8).ok()?;
        (flags & O_CLOEXEC == 0).then(|| entry.file_name().into_string().unwrap())
    })
}

#[test]
fn what_cannot_be_run_is_told_apart() {
    let dir = Scratch::new();
    let make = |name: &str, text: &str, mode| {
        let path = dir.path(name);
        fs::write(&path, text).unwrap();
        fs::set_permissions(&path, fs::Permissions::from_mode(mode)).unwrap();
        path.to_str().unwrap().to_owned()
    };
    let plain = make("plain", "#!/bin/sh\n", 0o644);
    let lost = make("lost", "#!/no/interpreter\n", 0o755);
    let text = make("text", "no program", 0o755);
    assert_eq!(refused(exec(&["no-such-program"])), FailureKind::NotFound);
    assert_eq!(refused(exec(&["/no/such/program"])), FailureKind::NotFound);
    assert_eq!(refused(exec(&[""])), FailureKind::NotFound);
    assert_eq!(refused(exec(&[])), FailureKind::NotFound);
    for program in [&plain, &lost, &text, "/tmp"] {
        assert_eq!(refused(exec(&[program])), FailureKind::NotExecutable, "{program}");
    }
    assert_eq!(refused(exec(&["true", "a\0b"])), FailureKind::Invalid);
    let mut moved = exec(&["true"]);
    moved.program.cwd = Some(Bytes::from("/no/such/directory"));
    assert_eq!(refused(moved), FailureKind::BadDirectory);
    let mut unknown = exec(&["true"]);
    unknown.program.user = Some("no-such-user".into());
    assert_eq!(refused(unknown), FailureKind::NotFound);
}

#[test]
fn a_program_runs_as_the_user_that_is_asked_for() {
    let mut exec = exec(&["id"]);
    exec.program.user = Some("12345:54321".into());
    let Some(ran) = run_if_root(exec) else { return };
    assert_eq!(String::from_utf8(ran.stdout).unwrap(), "uid=12345 gid=54321 groups=54321\n");
}

/// Only root may become another.
fn run_if_root(exec: Exec) -> Option<Ran> {
    let status = fs::read_to_string("/proc/self/status").unwrap();
    let is_root = status.lines().any(|line| line.starts_with("Uid:\t0\t"));
    is_root.then(|| run(exec))
}

#[test]
fn a_mebibyte_goes_through_cat_and_back() {
    let mut exec = exec(&["cat"]);
    exec.stdin = true;
    let (mut connection, _) = begin(exec);
    let sent: Vec<u8> =
        (0..1 << 20).map(|at: u32| (at.wrapping_mul(2_654_435_761) >> 24) as u8).collect();
    let (mut ran, mut at) = (Ran::default(), 0);
    while ran.exit.is_none() {
        while at < sent.len() && at + MAX_DATA_BYTES <= WINDOW_BYTES + ran.credit {
            crate::host::data(&mut connection, &sent[at..at + MAX_DATA_BYTES]);
            at += MAX_DATA_BYTES;
            if at == sent.len() {
                connection.queue_end().unwrap();
            }
        }
        connection.flush().unwrap();
        take(&mut connection, &mut ran, true);
    }
    assert!(ran.stdout == sent, "{} bytes", ran.stdout.len());
    assert_eq!(code(&ran), 0);
}

#[test]
fn no_more_comes_than_there_is_credit_for_and_nothing_is_lost() {
    let (mut connection, _) = begin(sh("head -c 1000000 /dev/zero; echo end >&2"));
    let mut ran = Ran::default();
    while ran.stdout.len() < WINDOW_BYTES {
        take(&mut connection, &mut ran, false);
    }
    assert_eq!(ran.stdout.len(), WINDOW_BYTES);
    let rest = Credit { channel: Channel::Stdout as u8, bytes: 1 << 20 };
    connection.send(&Control::Credit(rest)).unwrap();
    while ran.exit.is_none() {
        take(&mut connection, &mut ran, false);
    }
    assert_eq!((ran.stdout.len(), &ran.stderr[..]), (1_000_000, &b"end\n"[..]));
}

#[test]
fn what_a_program_wrote_before_its_end_comes_whole_also_without_credit() {
    // It ends at once, with the pipe full behind it.
    let (mut connection, _) = begin(sh("head -c 320000 /dev/zero"));
    let mut ran = Ran::default();
    while ran.exit.is_none() {
        take(&mut connection, &mut ran, false);
    }
    assert_eq!((ran.stdout.len(), code(&ran)), (320_000, 0));
}

#[test]
fn a_program_that_waits_for_its_reader_can_be_killed() {
    let (mut connection, _) = begin(sh("cat /dev/zero & exec cat /dev/zero >&2"));
    let mut ran = Ran::default();
    while ran.stdout.len() < WINDOW_BYTES || ran.stderr.len() < WINDOW_BYTES {
        take(&mut connection, &mut ran, false);
    }
    // Time to fill the pipes.
    thread::sleep(Duration::from_millis(100));
    connection.send(&Control::Signal(9)).unwrap();
    while ran.exit.is_none() {
        take(&mut connection, &mut ran, false);
    }
    assert_eq!(ran.exit, Some(Exit { status: ExitCode::Signal(9), timed_out: false }));
    for output in [&ran.stdout, &ran.stderr] {
        assert!(output.len() <= WINDOW_BYTES + LAST_BYTES, "{}", output.len());
    }
    assert_eq!(ran.ends, 2);
}

#[test]
fn a_background_process_that_holds_the_output_delays_no_end_and_may_go_on_writing() {
    let dir = Scratch::new();
    let (waits, path) = (dir.shell_waits_on("held"), dir.path("done"));
    let script = format!(
        "({waits}; head -c 300000 /dev/zero && echo yes > {}) & echo begun",
        path.display()
    );
    let ran = run(sh(&script));
    assert_eq!((&ran.stdout[..], code(&ran)), (&b"begun\n"[..], 0));
    fs::remove_file(dir.path("held")).unwrap();
    wait_until("the background process ends", || path.exists());
}

#[test]
fn a_timeout_kills_the_whole_group() {
    let mut exec = sh("sleep 1000 & echo $!; sleep 1000");
    // Enough to say the number, whatever else begins meanwhile.
    exec.timeout_ms = Some(10_000);
    let ran = run(exec);
    assert_eq!(ran.exit, Some(Exit { status: ExitCode::Signal(9), timed_out: true }));
    let child = child(&ran);
    wait_until("the other process of the group ends", || !is_alive(child));
}

#[test]
fn a_host_that_closes_ends_the_group() {
    for shut_down in [false, true] {
        let (mut connection, pid) = begin(sh("sleep 1000 & echo $!; wait"));
        let mut ran = Ran::default();
        take(&mut connection, &mut ran, true);
        let child = child(&ran);
        assert!(is_alive(child));
        let stream = connection.into_stream();
        if shut_down {
            stream.shutdown(Shutdown::Write).unwrap();
            wait_until("the group ends", || !is_alive(child));
        }
        drop(stream);
        wait_until("the group ends", || !is_alive(child) && !is_alive(pid));
    }
}

#[test]
fn a_connection_that_is_reset_ends_nothing() {
    let dir = Scratch::new();
    let path = dir.path("done");
    // A UNIX socket is reset if what it received was not read.
    let script = format!("head -c 500000 /dev/zero; read x; echo yes > {}", path.display());
    let mut exec = sh(&script);
    exec.stdin = true;
    let mut stream = dial_with(&Call::Exec(exec));
    let mut started = [0; 10];
    stream.read_exact(&mut started).unwrap();
    wait_until("there is something to read", || {
        stream.set_nonblocking(true).unwrap();
        let mut byte = [0];
        stream.read(&mut byte).is_ok()
    });
    thread::sleep(Duration::from_millis(100));
    drop(stream);
    wait_until("the program goes on without it", || path.exists());
}

#[test]
fn signals_reach_the_group() {
    let (mut connection, _) =
        begin(sh("trap 'echo caught; exit 3' USR2; echo ready; while :; do sleep 0.05; done"));
    let mut ran = Ran::default();
    take(&mut connection, &mut ran, true);
    connection.send(&Control::Signal(99)).unwrap();
    connection.send(&Control::Signal(12)).unwrap();
    while ran.exit.is_none() {
        take(&mut connection, &mut ran, true);
    }
    // The shell's sleep is in the group, and says that it was ended.
    assert!(ran.stdout.ends_with(b"caught\n"), "{ran:?}");
    assert_eq!(code(&ran), 3);
}

/// What it writes, until that ends with this.
fn shows(connection: &mut Connection, ran: &mut Ran, end: &[u8]) {
    while !ran.stdout.ends_with(end) {
        take(connection, ran, true);
    }
}

/// Ends its input. What it writes from then on, and how it ends.
fn ends(connection: &mut Connection) -> Ran {
    connection.queue_end().unwrap();
    connection.flush().unwrap();
    finish(connection)
}

#[test]
fn a_terminal_is_one_has_its_size_and_takes_its_keys() {
    let mut exec = sh(
        "test -t 0 && test -t 1 && test -t 2 && stty size && read line && echo \"<$line>\" && stty size; cat; echo bye",
    );
    exec.terminal = Some(WindowSize { rows: 33, columns: 77 });
    let (mut connection, _) = begin(exec);
    let mut ran = Ran::default();
    shows(&mut connection, &mut ran, b"33 77\r\n");
    connection.send(&Control::Resize(WindowSize { rows: 10, columns: 20 })).unwrap();
    crate::host::data(&mut connection, b"hello\n");
    connection.flush().unwrap();
    shows(&mut connection, &mut ran, b"10 20\r\n");
    assert_eq!(ran.stdout, b"33 77\r\nhello\r\n<hello>\r\n10 20\r\n");
    let ran = ends(&mut connection);
    assert_eq!(ran.stdout, b"bye\r\n");
    assert_eq!(ran.exit, Some(Exit { status: ExitCode::Code(0), timed_out: false }));
}

#[test]
fn the_end_of_a_terminals_input_is_one_in_the_middle_of_a_line_too() {
    for input in [&b"abc"[..], b"abc\n", b"abc\x04", b"a\rb"] {
        let mut exec = sh("stty -echo; echo ready; cat >/dev/null");
        exec.terminal = Some(WindowSize { rows: 24, columns: 80 });
        let (mut connection, _) = begin(exec);
        let mut ran = Ran::default();
        shows(&mut connection, &mut ran, b"ready\r\n");
        crate::host::data(&mut connection, input);
        let ran = ends(&mut connection);
        assert_eq!(code(&ran), 0, "{input:?}");
    }
}

#[test]
fn a_process_that_keeps_a_terminal_delays_no_end() {
    let dir = Scratch::new();
    let mut exec = sh(&format!("trap '' HUP; {} & echo begun", dir.shell_waits_on("held")));
    exec.terminal = Some(WindowSize { rows: 24, columns: 80 });
    let ran = run(exec);
    assert_eq!((&ran.stdout[..], code(&ran)), (&b"begun\r\n"[..], 0));
}

#[test]
fn input_that_nobody_reads_ends_nothing() {
    let mut exec = sh("exec 0<&-; sleep 0.2; echo done");
    exec.stdin = true;
    let (mut connection, _) = begin(exec);
    crate::host::data(&mut connection, &[0; 200_000]);
    connection.queue_end().unwrap();
    connection.flush().unwrap();
    let ran = finish(&mut connection);
    assert_eq!((&ran.stdout[..], code(&ran)), (&b"done\n"[..], 0));
}

#[test]
fn hundreds_run_at_once() {
    let threads: Vec<_> = (0..300)
        .map(|at: i32| {
            thread::spawn(move || {
                let ran = run(sh(&format!("sleep 0.2; echo {at}; exit {}", at % 100)));
                assert_eq!((ran.stdout, code_of(ran.exit)), (format!("{at}\n").into(), at % 100));
            })
        })
        .collect();
    threads.into_iter().for_each(|thread| thread.join().unwrap());
}

fn code_of(exit: Option<Exit>) -> i32 {
    match exit {
        Some(Exit { status: ExitCode::Code(code), .. }) => code,
        other => panic!("{other:?}"),
    }
}

/// Starts a program that waits, says something wrong, and waits for both to end.
fn misbehave(stdin: bool, what: impl FnOnce(&mut UnixStream)) {
    let mut exec = exec(&["sleep", "1000"]);
    exec.stdin = stdin;
    let (connection, pid) = begin(exec);
    let mut stream = connection.into_stream();
    what(&mut stream);
    wait_until("the program ends", || !Path::new(&format!("/proc/{pid}")).exists());
    let mut rest = Vec::new();
    let _ = stream.read_to_end(&mut rest);
}

#[test]
fn what_is_no_message_ends_the_call_and_the_program() {
    misbehave(false, |stream| stream.write_all(&[255; 100]).unwrap());
    misbehave(false, |stream| stream.write_all(&Frame::message(&Call::Freeze)).unwrap());
    misbehave(false, |stream| stream.write_all(&Frame::header(Channel::Stdout, 0)).unwrap());
    misbehave(true, |stream| {
        // More than the window, to a program that does not read.
        for _ in 0..8 {
            let mut frame = Frame::header(Channel::Data, MAX_DATA_BYTES).to_vec();
            frame.resize(frame.len() + MAX_DATA_BYTES, 0);
            if stream.write_all(&frame).is_err() {
                return;
            }
        }
    });
    misbehave(true, |stream| {
        stream.write_all(&Frame::header(Channel::Data, 0)).unwrap();
        stream.write_all(&Frame::header(Channel::Data, 0)).unwrap();
    });
}

#[test]
fn a_stream_ends_also_where_its_program_goes_on() {
    let (mut connection, pid) = begin(sh("exec >&- 2>&-; exec sleep 1000"));
    let mut ran = Ran::default();
    while ran.ends < 2 {
        take(&mut connection, &mut ran, false);
    }
    assert!(is_alive(pid));
    connection.send(&Control::Signal(9)).unwrap();
    let ran = finish(&mut connection);
    assert_eq!(ran.exit, Some(Exit { status: ExitCode::Signal(9), timed_out: false }));
}

#[test]
fn much_output_comes_in_large_pieces() {
    let (mut connection, _) = begin(sh("dd if=/dev/zero bs=65536 count=60 2>/dev/null"));
    let (mut ran, mut pieces) = (Ran::default(), 0);
    while ran.exit.is_none() {
        take(&mut connection, &mut ran, true);
        pieces += 1;
    }
    assert_eq!(ran.stdout.len(), 60 * 65536);
    assert!(pieces < 700, "{pieces}");
}

//! What a hostile guest may say, and trees there and back, over socket pairs: no VM.

use std::io::{Read, Write};
use std::os::unix::net::UnixStream as StdStream;
use std::sync::Arc;
use std::thread::JoinHandle;

use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::UnixStream;
use tokio::sync::watch;

use super::Agent;
use super::calls::Calls;
use super::connection::{Connection, ReadError};
use super::link::{Knowledge, Link};
use super::patience::Patience;
use super::process::Process;
use crate::config::AgentConfig;
use crate::console::Console;
use crate::error::ErrorKind;
use crate::exit::{ExitLatch, ProcessStatus};
use crate::protocol::{
    Bytes, Call, Channel, Control, Entry, Exit, ExitCode, FileKind, Frame, HEADER_BYTES,
    LAST_BYTES, MAX_DATA_BYTES, MAX_OPENING_BYTES, Reply, Stat, WINDOW_BYTES, Wire,
};
use crate::virtio::WeakDeviceHandle;
use crate::vsock::Vsock;

pub(super) fn pair() -> (Connection, StdStream) {
    let (ours, theirs) = UnixStream::pair().unwrap();
    let theirs = theirs.into_std().unwrap();
    theirs.set_nonblocking(false).unwrap();
    (Connection::new(ours), theirs)
}

#[tokio::test]
async fn frames_come_whole_whoever_stops_waiting_in_the_middle() {
    let (mut connection, mut agent) = pair();
    let mut bytes = Frame::message(&Reply::Done);
    bytes.extend(Frame::header(Channel::Stdout, 3));
    bytes.extend(b"abc");
    let mut frames = Vec::new();
    for byte in bytes {
        agent.write_all(&[byte]).unwrap();
        // Long enough to take the byte; whoever waits gives up unless it was a frame's last.
        let moment = std::time::Duration::from_millis(1);
        if let Ok(frame) = tokio::time::timeout(moment, connection.reader.next()).await {
            frames.push(frame.unwrap().unwrap());
        }
    }
    drop(agent);
    while let Some(frame) = connection.reader.next().await.unwrap() {
        frames.push(frame);
    }
    assert_eq!(frames, [(Channel::Message, vec![0]), (Channel::Stdout, b"abc".to_vec())]);
}

#[tokio::test]
async fn absurd_lengths_unknown_channels_and_cut_off_frames_are_errors() {
    for header in [[255, 255, 255, 255, 0], [1, 0, 1, 0, 2], [0, 0, 0, 0, 9]] {
        let (mut connection, mut agent) = pair();
        agent.write_all(&header).unwrap();
        assert!(matches!(connection.reader.next().await, Err(ReadError::Malformed(_))));
    }
    // Who has not said what for is not believed to have much to say.
    let (ours, theirs) = UnixStream::pair().unwrap();
    let mut theirs = theirs.into_std().unwrap();
    theirs.write_all(&Frame::header(Channel::Message, MAX_OPENING_BYTES + 1)).unwrap();
    let mut opened = Connection::opened(ours);
    assert!(matches!(opened.reader.next().await, Err(ReadError::Malformed(_))));
    let (mut connection, mut agent) = pair();
    agent.write_all(&Frame::header(Channel::Data, MAX_DATA_BYTES)).unwrap();
    agent.write_all(b"not all").unwrap();
    drop(agent);
    assert!(matches!(connection.reader.next().await, Err(ReadError::Ended)));
}

#[tokio::test]
async fn what_follows_the_frames_is_left_for_whoever_wants_bytes() {
    let (mut connection, mut agent) = pair();
    agent.write_all(&Frame::message(&Reply::Done)).unwrap();
    agent.write_all(b"bytes").unwrap();
    connection.writer.message(&Call::Freeze).await.unwrap();
    let reply: Reply = connection.reader.message().await.unwrap().unwrap();
    assert_eq!(reply, Reply::Done);
    let stream = connection.into_stream().unwrap().0.into_std().unwrap();
    stream.set_nonblocking(false).unwrap();
    let mut five = [0; 5];
    (&stream).read_exact(&mut five).unwrap();
    assert_eq!(&five, b"bytes");
}

/// An agent's handle, whose calls go to the guests of these sockets one after the other.
pub(super) fn agent_of(config: AgentConfig, count: usize) -> (Agent, Vec<StdStream>) {
    let calls = calls();
    let (kept, mut guests): (Vec<_>, Vec<_>) = (0..count).map(|_| pair()).unzip();
    kept.into_iter().for_each(|connection| calls.keep(connection));
    // The last to be kept is taken first.
    guests.reverse();
    let (_, knowledge) = watch::channel(Knowledge::Nothing);
    (Agent::new(Arc::new(Link::of_calls(calls, config, knowledge))), guests)
}

/// The calls of a VM that is gone: there are no connections but those that are kept.
pub(super) fn calls() -> Calls {
    let device = WeakDeviceHandle::gone();
    let vsock = Vsock::new(device, Arc::new(ExitLatch::default()), Console::new(0));
    Calls::new(vsock)
}

/// A program that runs, and the agent's side of it.
fn process() -> (Process, StdStream) {
    process_of(&calls())
}

pub(super) fn process_of(calls: &Calls) -> (Process, StdStream) {
    let (connection, agent) = pair();
    (Process::serve(connection, calls, 7, true), agent)
}

pub(super) fn piece(channel: Channel, bytes: &[u8]) -> Vec<u8> {
    [&Frame::header(channel, bytes.len())[..], bytes].concat()
}

pub(super) fn exited(code: i32) -> Vec<u8> {
    let exit = Exit { status: ExitCode::Code(code), timed_out: false };
    Frame::message(&Reply::Exited(exit))
}

/// What the host says next.
pub(super) fn heard(agent: &mut StdStream) -> (u8, Vec<u8>) {
    let mut header = [0; HEADER_BYTES];
    agent.read_exact(&mut header).unwrap();
    let (channel, length) = Frame::parse_header(header).unwrap();
    let mut body = vec![0; length];
    agent.read_exact(&mut body).unwrap();
    (channel as u8, body)
}

#[tokio::test(flavor = "multi_thread")]
async fn output_that_came_before_the_end_is_read_after_it() {
    let (mut process, mut agent) = process();
    agent.write_all(&piece(Channel::Stdout, b"out")).unwrap();
    agent.write_all(&piece(Channel::Stderr, b"err")).unwrap();
    agent.write_all(&exited(3)).unwrap();
    assert_eq!(process.wait().await.unwrap(), ProcessStatus::Code(3));
    assert_eq!(process.wait().await.unwrap(), ProcessStatus::Code(3), "it is said again");
    let (mut stdout, mut stderr) = (String::new(), String::new());
    process.stdout.take().unwrap().read_to_string(&mut stdout).await.unwrap();
    process.stderr.take().unwrap().read_to_string(&mut stderr).await.unwrap();
    assert_eq!((&stdout[..], &stderr[..]), ("out", "err"));
    let mut stdin = process.stdin.take().unwrap();
    assert_eq!(stdin.write(b"x").await.unwrap_err().kind(), std::io::ErrorKind::BrokenPipe);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_guest_that_sends_more_than_the_window_or_nonsense_is_cut_off() {
    let (mut flooded, mut agent) = process();
    let flood = piece(Channel::Stdout, &vec![0; MAX_DATA_BYTES]);
    for _ in 0..=(WINDOW_BYTES + LAST_BYTES) / MAX_DATA_BYTES {
        // It may have been cut off.
        let _ = agent.write_all(&flood);
    }
    assert_eq!(flooded.wait().await.unwrap_err().kind(), &ErrorKind::Agent);
    assert_eq!(flooded.wait().await.unwrap_err().kind(), &ErrorKind::Agent);
    for nonsense in [
        piece(Channel::Data, b"data"),
        Frame::message(&Reply::Done),
        piece(Channel::Message, &[99]),
        vec![0, 0, 0, 0, 77],
    ] {
        let (mut process, mut agent) = process();
        agent.write_all(&nonsense).unwrap();
        assert_eq!(process.wait().await.unwrap_err().kind(), &ErrorKind::Agent);
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_program_whose_output_nobody_reads_has_an_end() {
    let (mut process, mut agent) = process();
    let all = WINDOW_BYTES + LAST_BYTES;
    for _ in 0..all / MAX_DATA_BYTES {
        agent.write_all(&piece(Channel::Stdout, &vec![7; MAX_DATA_BYTES])).unwrap();
    }
    agent.write_all(&piece(Channel::Stdout, &[])).unwrap();
    agent.write_all(&exited(3)).unwrap();
    assert_eq!(process.wait().await.unwrap(), ProcessStatus::Code(3));
    let mut output = Vec::new();
    process.stdout.take().unwrap().read_to_end(&mut output).await.unwrap();
    assert!(output == vec![7; all]);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_connection_that_ends_before_the_program_is_said_to() {
    let (mut process, agent) = process();
    drop(agent);
    // The device of this VM is gone, so that is why.
    let error = process.wait().await.unwrap_err();
    assert!(matches!(error.kind(), ErrorKind::GuestEnded(_)), "{error}");
    let mut rest = Vec::new();
    process.stdout.take().unwrap().read_to_end(&mut rest).await.unwrap();
    assert!(rest.is_empty());
}

#[tokio::test(flavor = "multi_thread")]
async fn what_is_read_is_given_back_and_input_waits_for_room() {
    let (mut process, mut agent) = process();
    let mut stdout = process.stdout.take().unwrap();
    let mut buffer = vec![0; MAX_DATA_BYTES];
    for _ in 0..8 {
        agent.write_all(&piece(Channel::Stdout, &buffer)).unwrap();
        stdout.read_exact(&mut buffer).await.unwrap();
        let (channel, message) = heard(&mut agent);
        assert_eq!(channel, Channel::Message as u8);
        let Control::Credit(credit) = Control::from_bytes(&message).unwrap() else {
            panic!("{message:?}");
        };
        assert_eq!(
            (credit.channel, credit.bytes as usize),
            (Channel::Stdout as u8, MAX_DATA_BYTES)
        );
    }
    // Nobody reads any more: it is given back all the same.
    drop(stdout);
    agent.write_all(&piece(Channel::Stdout, &buffer)).unwrap();
    assert_eq!(heard(&mut agent).0, Channel::Message as u8);
    let mut stdin = process.stdin.take().unwrap();
    stdin.write_all(&vec![1; WINDOW_BYTES]).await.unwrap();
    let more = tokio::time::timeout(std::time::Duration::from_millis(50), stdin.write(b"x"));
    assert!(more.await.is_err(), "there is no room");
    let credit = crate::protocol::Credit { channel: Channel::Data as u8, bytes: 1 };
    agent.write_all(&Frame::message(&Reply::Credit(credit))).unwrap();
    assert_eq!(stdin.write(b"yz").await.unwrap(), 1);
    drop(stdin);
    let mut input = 0;
    loop {
        let (channel, body) = heard(&mut agent);
        assert_eq!(channel, Channel::Data as u8);
        if body.is_empty() {
            break;
        }
        input += body.len();
    }
    assert_eq!(input, WINDOW_BYTES + 1);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_guest_that_has_room_without_end_and_takes_nothing_is_sent_no_more_than_a_window() {
    let (mut process, mut agent) = process();
    let mut stdin = process.stdin.take().unwrap();
    let credit = crate::protocol::Credit { channel: Channel::Data as u8, bytes: u32::MAX };
    let granting = std::thread::spawn(move || {
        let credits = Frame::message(&Reply::Credit(credit)).repeat(100);
        while agent.write_all(&credits).is_ok() {}
    });
    let (input, mut taken) = (vec![7; 1 << 20], 0);
    let endless = async {
        while taken < 64 << 20 {
            taken += stdin.write(&input).await.unwrap();
        }
    };
    // What the connection holds, and a window.
    tokio::time::timeout(std::time::Duration::from_millis(300), endless).await.unwrap_err();
    assert!((WINDOW_BYTES..4 << 20).contains(&taken), "{taken}");
    drop(process);
    granting.join().unwrap();
}

#[tokio::test(flavor = "multi_thread")]
async fn a_guest_that_writes_without_end_and_does_not_hear_what_was_read_is_cut_off() {
    const MOST: usize = 256 << 20;
    let (mut process, mut agent) = process();
    let mut stdout = process.stdout.take().unwrap();
    let writing = std::thread::spawn(move || {
        let output = piece(Channel::Stdout, &[7; MAX_DATA_BYTES]);
        while agent.write_all(&output).is_ok() {}
    });
    let (mut buffer, mut read) = (vec![0; 1 << 20], 0);
    while read < MOST {
        match stdout.read(&mut buffer).await.unwrap() {
            0 => break,
            bytes => read += bytes,
        }
    }
    assert!(read < MOST);
    assert_eq!(process.wait().await.unwrap_err().kind(), &ErrorKind::Agent);
    drop(process);
    writing.join().unwrap();
}

#[tokio::test(flavor = "multi_thread")]
async fn the_connection_of_a_program_that_has_ended_is_for_the_next_call() {
    let calls = calls();
    let (mut process, mut agent) = process_of(&calls);
    let mut stdin = process.stdin.take().unwrap();
    stdin.write_all(b"input").await.unwrap();
    process.signal(15);
    assert_eq!(heard(&mut agent), (Channel::Data as u8, b"input".to_vec()));
    let signal = (Channel::Message as u8, Control::Signal(15).to_bytes());
    assert_eq!(heard(&mut agent), signal);
    agent.write_all(&exited(0)).unwrap();
    process.wait().await.unwrap();
    // What is said to a program that is no more is not said at all.
    process.signal(9);
    drop((stdin, process));
    let call = async |answer: &Reply, agent: &mut StdStream| {
        let mut connection = calls.call(&Call::Thaw).await.unwrap();
        assert_eq!(heard(agent), (Channel::Call as u8, Call::Thaw.to_bytes()));
        agent.write_all(&Frame::message(answer)).unwrap();
        assert_eq!(connection.reply(calls.vsock()).await.unwrap(), *answer);
        calls.keep(connection);
    };
    call(&Reply::Done, &mut agent).await;
    call(&Reply::Done, &mut agent).await;
    // What an agent has heard is not asked again, on whatever connection.
    let mut connection = calls.call(&Call::Freeze).await.unwrap();
    assert_eq!(heard(&mut agent), (Channel::Call as u8, Call::Freeze.to_bytes()));
    drop(agent);
    connection.reply(calls.vsock()).await.unwrap_err();
    assert!(calls.take().is_none());
}

#[tokio::test(flavor = "multi_thread")]
async fn a_program_that_is_dropped_or_cut_off_leaves_no_connection() {
    let calls = calls();
    let (process, mut agent) = process_of(&calls);
    drop(process);
    // It is closed, which kills the program; the end of the input may still come before.
    agent.read_to_end(&mut Vec::new()).unwrap();
    let (mut process, mut agent) = process_of(&calls);
    agent.write_all(&Frame::message(&Reply::Done)).unwrap();
    process.wait().await.unwrap_err();
    drop(process);
    assert!(calls.take().is_none());
}

#[tokio::test(flavor = "multi_thread")]
async fn who_has_the_streams_of_a_program_that_is_dropped_does_not_wait_for_ever() {
    let (mut process, _agent) = process();
    let mut stdout = process.stdout.take().unwrap();
    let mut stdin = process.stdin.take().unwrap();
    let reading = tokio::spawn(async move { stdout.read_to_end(&mut Vec::new()).await });
    // More than there is room for.
    let writing = tokio::spawn(async move { stdin.write_all(&vec![0; 64 << 20]).await });
    tokio::time::sleep(std::time::Duration::from_millis(50)).await;
    assert!(!reading.is_finished() && !writing.is_finished());
    drop(process);
    assert_eq!(reading.await.unwrap().unwrap(), 0);
    assert_eq!(writing.await.unwrap().unwrap_err().kind(), std::io::ErrorKind::BrokenPipe);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_call_that_is_too_long_is_refused_and_nothing_is_lost_by_it() {
    let (agent, _guests) = agent_of(AgentConfig::new(), 1);
    let error = agent.exec("x", ["a".repeat(2 << 20)]).await.unwrap_err();
    assert_eq!(error.kind(), &ErrorKind::Resources, "{error}");
    assert!(agent.calls().take().is_some());
}

#[tokio::test]
async fn an_agent_that_goes_silent_in_the_middle_is_not_waited_for_for_ever() {
    let (mut connection, mut agent) = pair();
    let limit = std::time::Duration::from_millis(20);
    // What comes begins the wait anew.
    agent.write_all(&Frame::message(&Reply::Done)).unwrap();
    agent.write_all(&Frame::header(Channel::Data, 100)).unwrap();
    let mut patience = Patience::new(limit);
    let reader = &mut connection.reader;
    let mut next = async || {
        std::future::poll_fn(|context| {
            let polled = reader.poll_next(context);
            patience.poll(context, polled)
        })
        .await
    };
    next().await.unwrap().unwrap().unwrap();
    assert_eq!(next().await.unwrap_err().kind(), &ErrorKind::Timeout);
    // It takes nothing any more.
    let mut patience = Patience::new(limit);
    let error = loop {
        let wrote = std::future::poll_fn(|context| {
            let polled = connection.writer.poll_raw(context, &[0; 4096]);
            patience.poll(context, polled)
        });
        if let Err(error) = wrote.await {
            break error;
        }
    };
    assert_eq!(error.kind(), &ErrorKind::Timeout);
}

/// A guest that answers the next call, and then says this again and again, until nobody listens.
fn endless(mut guest: StdStream, answer: Option<Vec<u8>>, again: Vec<u8>) -> JoinHandle<u64> {
    std::thread::spawn(move || {
        heard(&mut guest);
        guest.write_all(&answer.unwrap_or_default()).unwrap();
        let mut said = 0;
        while guest.write_all(&again).is_ok() {
            said += again.len() as u64;
        }
        said
    })
}

#[tokio::test(flavor = "multi_thread")]
async fn endless_directories_files_and_output_are_cut_off() {
    // More than the limit of each, and what sockets hold.
    const MOST: u64 = 80 << 20;
    let stat = Stat { kind: FileKind::File, mode: 0, uid: 0, gid: 0, size: 1, modified_ns: 0 };
    let (agent, mut guests) = agent_of(AgentConfig::new(), 3);
    let entry = Entry { name: Bytes(vec![b'x'; 255]), stat: stat.clone() };
    let guest = endless(guests.remove(0), None, Frame::message(&Reply::Entry(entry)));
    let error = agent.read_dir("/").await.unwrap_err();
    assert_eq!(error.kind(), &ErrorKind::Resources, "{error}");
    assert!(guest.join().unwrap() < MOST);

    let data = piece(Channel::Data, &[7; MAX_DATA_BYTES]);
    let guest = endless(guests.remove(0), Some(Frame::message(&Reply::Stat(stat))), data);
    let error = agent.read("/f").await.unwrap_err();
    assert_eq!(error.kind(), &ErrorKind::Resources, "{error}");
    assert!(guest.join().unwrap() < MOST);

    // A guest that heeds no window.
    let output = piece(Channel::Stdout, &[7; MAX_DATA_BYTES]);
    let started = Frame::message(&Reply::Started(7));
    let guest = endless(guests.remove(0), Some(started), output);
    let command = agent.command("yes").output_limit(1 << 20);
    let error = command.output().await.unwrap_err();
    assert!(matches!(error.kind(), ErrorKind::Resources | ErrorKind::Agent), "{error}");
    assert!(guest.join().unwrap() < MOST);
}

#[tokio::test(flavor = "multi_thread")]
async fn output_beyond_the_limit_is_an_error_or_cut_off() {
    let (agent, mut guests) = agent_of(AgentConfig::new(), 1);
    let mut guest = guests.remove(0);
    let answering = std::thread::spawn(move || {
        for _ in 0..3 {
            heard(&mut guest);
            let started = Frame::message(&Reply::Started(7));
            let output = [piece(Channel::Stdout, b"abc"), piece(Channel::Stdout, b"def")];
            guest.write_all(&[started, output.concat(), exited(3)].concat()).unwrap();
        }
    });
    let command = |limit| agent.command("job").output_limit(limit);
    let whole = command(6).truncate_output(true).output().await.unwrap();
    assert_eq!((&whole.stdout[..], whole.truncated), (&b"abcdef"[..], false));
    let cut = command(4).truncate_output(true).output().await.unwrap();
    assert_eq!((&cut.stdout[..], cut.truncated), (&b"abcd"[..], true));
    assert_eq!(cut.status, ProcessStatus::Code(3));
    let error = command(4).output().await.unwrap_err();
    assert_eq!(error.kind(), &ErrorKind::Resources, "{error}");
    answering.join().unwrap();
}

#[tokio::test(flavor = "multi_thread")]
async fn an_answer_to_another_question_or_none_at_all_is_an_error_that_says_so() {
    let (agent, guests) = agent_of(AgentConfig::new(), 3);
    let answers =
        [Frame::message(&Reply::Started(7)), Frame::header(Channel::Call, 0).to_vec(), vec![1; 64]];
    for (mut guest, answer) in guests.into_iter().zip(answers) {
        let answering = std::thread::spawn(move || {
            heard(&mut guest);
            guest.write_all(&answer).unwrap();
            guest
        });
        let error = agent.metadata("/f").await.unwrap_err();
        assert_eq!(error.kind(), &ErrorKind::Agent, "{error}");
        drop(answering.join().unwrap());
    }
}

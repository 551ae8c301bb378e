use std::io::{Read, Write};
use std::os::unix::net::UnixStream as StdStream;
use std::thread::JoinHandle;
use std::time::Duration;

use tokio::io::{AsyncReadExt, AsyncWriteExt};

use super::*;
use crate::agent::tests::{agent_of, exited, heard, pair, piece};
use crate::agent::{Calls, WriteOptions};
use crate::config::{AgentConfig, Hook, HookName};
use crate::protocol::{Channel, FileKind, Frame, Node, Reply, Stat, Wire};

#[tokio::test]
async fn what_goes_on_counts_until_it_is_dropped_and_both_are_changes() {
    let mut activity = Activity::new();
    let made = activity.last();
    assert_eq!(activity.open(), 0);
    std::thread::sleep(Duration::from_millis(2));
    let (one, two) = (activity.begin(), activity.clone().begin());
    assert_eq!(activity.open(), 2);
    let began = activity.last();
    assert!(began > made);
    // Two at once are one change.
    activity.changed().await;
    assert!(tokio::time::timeout(Duration::from_millis(5), activity.changed()).await.is_err());
    drop(one);
    activity.changed().await;
    assert_eq!(activity.open(), 1);
    assert!(activity.last() >= began);
    drop(two);
    assert_eq!(activity.open(), 0);
}

#[tokio::test]
async fn who_waits_is_woken_by_another_handle() {
    let activity = Activity::new();
    let mut waiting = activity.clone();
    let woken = tokio::spawn(async move {
        waiting.changed().await;
        waiting.open()
    });
    tokio::task::yield_now().await;
    let _ongoing = activity.begin();
    assert_eq!(woken.await.unwrap(), 1);
}

/// An agent that hears one call after the other on a connection that is kept, and what counts the calls.
struct Counted {
    agent: Agent,
    activity: Activity,
    calls: Calls,
    guest: StdStream,
}

fn counted() -> Counted {
    let hook = Hook::command(["/hook"]);
    let config = AgentConfig::new().hook(HookName::Suspend, hook);
    let (agent, mut guests) = agent_of(config, 1);
    let (activity, calls) = (Activity::new(), agent.calls().clone());
    let agent = agent.with_activity(activity.clone());
    Counted { agent, activity, calls, guest: guests.remove(0) }
}

impl Counted {
    /// Has the guest answer the next call, and returns what it was asked by.
    fn answers(&self, answer: Vec<u8>) -> JoinHandle<u8> {
        let mut guest = self.guest.try_clone().unwrap();
        std::thread::spawn(move || {
            let (channel, _) = heard(&mut guest);
            guest.write_all(&answer).unwrap();
            channel
        })
    }

    fn says(&mut self, bytes: &[u8]) {
        self.guest.write_all(bytes).unwrap();
    }

    /// A connection on which a call was broken off is not kept.
    fn reconnect(&mut self) {
        let (connection, guest) = pair();
        self.calls.forget();
        self.calls.keep(connection);
        self.guest = guest;
    }

    async fn is_over(&mut self) {
        while self.activity.open() > 0 {
            self.activity.changed().await;
        }
    }
}

fn done() -> Vec<u8> {
    Frame::message(&Reply::Done)
}

fn stat() -> Vec<u8> {
    let kind = FileKind::File;
    let stat = Stat { kind, mode: 0o644, uid: 0, gid: 0, size: 3, modified_ns: 0 };
    Frame::message(&Reply::Stat(stat))
}

#[tokio::test(flavor = "multi_thread")]
async fn a_program_counts_until_its_end_whatever_is_left_to_be_read() {
    let mut counted = counted();
    counted.answers(Frame::message(&Reply::Started(7)));
    let mut process = counted.agent.command("program").spawn().await.unwrap();
    assert_eq!(counted.activity.open(), 1);
    counted.says(&piece(Channel::Stdout, b"words"));
    counted.says(&exited(0));
    process.wait().await.unwrap();
    assert_eq!(counted.activity.open(), 0);
    // One whose connection breaks is known to nobody any more.
    counted.answers(Frame::message(&Reply::Started(8)));
    let mut broken = counted.agent.command("program").spawn().await.unwrap();
    counted.says(&done());
    broken.wait().await.unwrap_err();
    assert_eq!(counted.activity.open(), 0);
    // One that is dropped is killed.
    counted.reconnect();
    counted.answers(Frame::message(&Reply::Started(9)));
    let dropped = counted.agent.command("program").spawn().await.unwrap();
    assert_eq!(counted.activity.open(), 1);
    drop(dropped);
    counted.is_over().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_file_counts_while_it_is_open() {
    let mut counted = counted();
    counted.answers([stat(), piece(Channel::Data, b"abc")].concat());
    let mut file = counted.agent.open("/f").await.unwrap();
    file.read_exact(&mut [0; 3]).await.unwrap();
    assert_eq!(counted.activity.open(), 1);
    counted.says(&piece(Channel::Data, b""));
    assert_eq!(file.read(&mut [0]).await.unwrap(), 0);
    assert_eq!(counted.activity.open(), 0, "all has come");

    counted.answers(done());
    let mut file = counted.agent.create("/f", &WriteOptions::new()).await.unwrap();
    file.write_all(b"abc").await.unwrap();
    assert_eq!(counted.activity.open(), 1);
    assert_eq!(heard(&mut counted.guest).1, b"abc");
    counted.answers(done());
    file.finish().await.unwrap();
    assert_eq!(counted.activity.open(), 0);

    counted.answers(done());
    let dropped = counted.agent.create("/f", &WriteOptions::new()).await.unwrap();
    assert_eq!(counted.activity.open(), 1);
    drop(dropped);
    assert_eq!(counted.activity.open(), 0);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_stream_counts_for_as_long_as_it_lives() {
    let counted = counted();
    counted.answers(done());
    let mut stream = counted.agent.connect_tcp(80).await.unwrap();
    stream.write_all(b"x").await.unwrap();
    (&counted.guest).read_exact(&mut [0]).unwrap();
    counted.guest.shutdown(std::net::Shutdown::Both).unwrap();
    assert_eq!(stream.read(&mut [0]).await.unwrap(), 0);
    assert_eq!(counted.activity.open(), 1);
    drop(stream);
    assert_eq!(counted.activity.open(), 0);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_call_counts_until_its_answer_also_a_copy_and_one_that_fails() {
    let mut counted = counted();
    let began = counted.activity.last();
    counted.answers(done());
    counted.agent.remove("/f").await.unwrap();
    assert_eq!(counted.activity.open(), 0);
    assert!(counted.activity.last() > began);

    let file = concat!(env!("CARGO_MANIFEST_DIR"), "/Cargo.toml");
    let copying = tokio::spawn({
        let agent = counted.agent.clone();
        async move { agent.copy_in(file, "/f").await }
    });
    heard(&mut counted.guest);
    counted.says(&done());
    loop {
        let (channel, body) = heard(&mut counted.guest);
        assert_eq!(counted.activity.open(), 1);
        if channel == Channel::Message as u8 && body == Node::End.to_bytes() {
            break;
        }
    }
    counted.says(&done());
    copying.await.unwrap().unwrap();
    counted.is_over().await;

    counted.reconnect();
    let agent = counted.agent.clone();
    let asked = tokio::spawn(async move { agent.memory_bytes().await });
    heard(&mut counted.guest);
    assert_eq!(counted.activity.open(), 1);
    counted.guest.shutdown(std::net::Shutdown::Both).unwrap();
    asked.await.unwrap().unwrap_err();
    assert_eq!(counted.activity.open(), 0);
}

#[tokio::test(flavor = "multi_thread")]
async fn hooks_freezing_and_handles_that_were_not_given_a_counter_do_not_count() {
    let mut counted = counted();
    let began = counted.activity.last();
    counted.answers([Frame::message(&Reply::Started(7)), exited(0)].concat());
    counted.agent.run_hook(HookName::Suspend, "").await.unwrap();
    counted.answers(done());
    counted.agent.thaw().await.unwrap();
    counted.reconnect();
    let plain = counted.agent.uncounted();
    counted.answers(done());
    plain.remove("/f").await.unwrap();
    assert_eq!((counted.activity.open(), counted.activity.last()), (0, began));
}

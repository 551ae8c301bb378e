use std::io::{Read, Write};
use std::os::unix::net::{UnixListener, UnixStream as StdStream};

use vmm_sys_util::tempdir::TempDir;

use super::*;
use crate::agent::tests::{calls, heard, pair};
use crate::error::ErrorKind;
use crate::protocol::{Channel, Frame, Wire};

impl Link {
    /// One to an agent that is only heard on connections that are kept.
    pub(in crate::agent) fn of_calls(
        calls: Calls,
        config: AgentConfig,
        knowledge: watch::Receiver<Knowledge>,
    ) -> Self {
        let keeper = tokio::spawn(std::future::pending::<()>());
        Self { calls, config, renewal: None, knowledge, keeper, woken: None }
    }
}

/// A host, and the link that learns from it.
fn host(config: AgentConfig) -> (Arc<Host>, Link) {
    host_of(config, None)
}

fn host_of(config: AgentConfig, renewal: Option<Renewal>) -> (Arc<Host>, Link) {
    let calls = calls();
    let (report, knowledge) = watch::channel(Knowledge::Nothing);
    let host = Host {
        calls: calls.clone(),
        config: config.clone(),
        renewal,
        identity: None,
        greeted: AtomicBool::new(false),
        report,
    };
    (Arc::new(host), Link::of_calls(calls, config, knowledge))
}

fn hello(version: u32, fault: Option<Failure>) -> Hello {
    Hello { version, fault }
}

/// Greets an agent that says this, and answers so.
fn greet(host: &Arc<Host>, hello: Hello, answer: &[u8]) -> (JoinHandle<()>, StdStream) {
    let (connection, mut guest) = pair();
    let greeted = Arc::clone(host);
    let greeting = tokio::spawn(async move { greeted.hello(&hello, connection).await });
    let (channel, welcome) = heard(&mut guest);
    assert_eq!(channel, Channel::Message as u8);
    assert_eq!(Welcome::from_bytes(&welcome).unwrap().version, VERSION);
    guest.write_all(answer).unwrap();
    (greeting, guest)
}

fn done() -> Vec<u8> {
    Frame::message(&Reply::Done)
}

#[tokio::test(flavor = "multi_thread")]
async fn an_agent_of_another_version_is_named_with_what_to_do() {
    let (host, link) = host(AgentConfig::new());
    greet(&host, hello(VERSION + 1, None), b"").0.await.unwrap();
    let error = link.ready().await.unwrap_err();
    assert_eq!(error.kind(), &ErrorKind::Agent);
    let said = format!("version {} of the protocol, this crate version {VERSION}", VERSION + 1);
    assert!(error.to_string().contains(&said), "{error}");
    assert!(error.how_to_fix().unwrap().contains("make the snapshot again"), "{error}");
}

#[tokio::test(flavor = "multi_thread")]
async fn an_agent_is_ready_or_says_why_it_is_not() {
    let (host, link) = host(AgentConfig::new());
    let (_greeting, _guest) = greet(&host, hello(VERSION, None), &done());
    link.ready().await.unwrap();
    // Who else says hello is none.
    let (connection, mut other) = pair();
    host.hello(&hello(VERSION, None), connection).await;
    assert_eq!(other.read(&mut [0]).unwrap(), 0);

    let fault = |what: &str| Failure { kind: FailureKind::NotFound, errno: 2, what: what.into() };
    let (host, link) = self::host(AgentConfig::new());
    let (greeting, guest) = greet(&host, hello(VERSION, Some(fault("mount /data"))), &done());
    let error = link.ready().await.unwrap_err();
    assert!(error.to_string().contains("mount /data: No such file"), "{error}");
    // The line is held: an agent calls again when it ends.
    guest.set_nonblocking(true).unwrap();
    let read = (&guest).read(&mut [0]);
    assert_eq!(read.unwrap_err().kind(), io::ErrorKind::WouldBlock);
    drop(guest);
    greeting.await.unwrap();

    let (host, link) = self::host(AgentConfig::new());
    let failed = Frame::message(&Reply::Failed(fault("set the clock")));
    let (_greeting, _guest) = greet(&host, hello(VERSION, None), &failed);
    let error = link.ready().await.unwrap_err();
    assert!(error.to_string().contains("set the clock"), "{error}");
}

#[tokio::test(flavor = "multi_thread")]
async fn a_program_of_the_guest_does_not_pass_for_its_agent() {
    for (port, version, is_heard) in [
        (1023, VERSION, true),
        (1024, VERSION, false),
        (0, VERSION, false),
        (1024, VERSION - 1, false),
    ] {
        let (host, _link) = host(AgentConfig::new());
        let (ours, theirs) = UnixStream::pair().unwrap();
        let (ours, mut guest) = (ours.into_std().unwrap(), theirs.into_std().unwrap());
        guest.set_nonblocking(false).unwrap();
        guest.write_all(&Frame::message(&Opening::Hello(hello(version, None)))).unwrap();
        let answering = tokio::spawn(host.answer(VsockStream::from_socket(ours), port));
        let heard = guest.read(&mut [0]).unwrap();
        assert_eq!(heard == 1, is_heard, "{port}");
        drop(guest);
        answering.await.unwrap();
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn what_answers_nonsense_is_closed_and_an_agent_may_come_after_it() {
    let (host, link) = host(AgentConfig::new());
    for nonsense in [vec![255; 64], Frame::message(&Reply::Started(1)), Vec::new()] {
        let (greeting, mut guest) = greet(&host, hello(VERSION, None), &nonsense);
        guest.shutdown(std::net::Shutdown::Write).unwrap();
        greeting.await.unwrap();
        // Closed, or reset where something was left unread.
        assert!(matches!(guest.read(&mut [0]), Ok(0) | Err(_)));
    }
    assert!(matches!(*link.knowledge.borrow(), Knowledge::Nothing));
    let (_greeting, _guest) = greet(&host, hello(VERSION, None), &done());
    link.ready().await.unwrap();
}

#[tokio::test(flavor = "multi_thread")]
async fn a_service_is_what_the_configuration_names_and_nothing_else() {
    // The port of one that does not listen: nobody else gets it meanwhile.
    let listener = std::net::TcpListener::bind("127.0.0.1:0").unwrap();
    let connected = std::net::TcpStream::connect(listener.local_addr().unwrap()).unwrap();
    let refused = HostService::Tcp(connected.local_addr().unwrap());
    let config = AgentConfig::new().service("web", 80, refused);
    let (host, _link) = host(config);
    let (_greeting, _guest) = greet(&host, hello(VERSION, None), &done());
    for (name, kind) in [("web", FailureKind::Refused), ("127.0.0.1:22", FailureKind::NotAllowed)] {
        let (connection, mut guest) = pair();
        host.service(name, connection).await;
        let (_, reply) = heard(&mut guest);
        let Ok(Reply::Failed(failure)) = Reply::from_bytes(&reply) else { panic!("{reply:?}") };
        assert_eq!(failure.kind, kind, "{name}");
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_clone_reaches_services_when_it_is_another_and_not_before() {
    let dir = TempDir::new().unwrap();
    let path = dir.as_path().join("service");
    let services = UnixListener::bind(&path).unwrap();
    services.set_nonblocking(true).unwrap();
    let config = AgentConfig::new().service("db", 5432, HostService::Unix(path));
    let renewal = Renewal { machine_id: [7; 16], hostname: None, interfaces: Vec::new() };
    let failure = Failure { kind: FailureKind::Full, errno: 28, what: "write".into() };
    for (answer, is_another) in [(done(), true), (Frame::message(&Reply::Failed(failure)), false)] {
        let (host, _link) = host_of(config.clone(), Some(renewal.clone()));
        let (connection, mut guest) = pair();
        let asked = Arc::clone(&host);
        let served = tokio::spawn(async move { asked.service("db", connection).await });
        tokio::time::sleep(Duration::from_millis(20)).await;
        assert_eq!(services.accept().unwrap_err().kind(), io::ErrorKind::WouldBlock);
        let (_greeting, _agent) = greet(&host, hello(VERSION, None), &answer);
        if !is_another {
            served.await.unwrap();
            assert_eq!(guest.read(&mut [0]).unwrap(), 0);
            assert_eq!(services.accept().unwrap_err().kind(), io::ErrorKind::WouldBlock);
            continue;
        }
        let (_, reply) = heard(&mut guest);
        assert!(matches!(Reply::from_bytes(&reply), Ok(Reply::Done)), "{reply:?}");
        guest.write_all(b"hello").unwrap();
        guest.shutdown(std::net::Shutdown::Write).unwrap();
        let (mut service, _) = services.accept().unwrap();
        service.set_nonblocking(false).unwrap();
        let mut said = String::new();
        service.read_to_string(&mut said).unwrap();
        assert_eq!(said, "hello");
        drop(service);
        served.await.unwrap();
    }
}

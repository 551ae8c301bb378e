//! An endpoint in front of sessions. A bare-metal guest has no ports, so what is asked there is a server beside it.

use std::convert::Infallible;
use std::sync::Arc;

use dormouse::{
    Awake, Endpoint, EndpointOptions, Upstream, UpstreamFuture, UpstreamStream, Upstreams,
};
use http_body_util::{BodyExt, Empty, Full};
use hyper::body::{Bytes, Incoming};
use hyper::client::conn::http1::handshake;
use hyper::service::service_fn;
use hyper::{Request, Response};
use hyper_util::rt::TokioIo;
use tokio::net::{TcpStream, UnixStream};
use tokio::task::JoinSet;

use super::*;

/// A session whose every port is a server that greets.
struct Greeter(Session);

impl Upstream for Greeter {
    fn wake(&self) -> UpstreamFuture<'_, Awake> {
        Upstream::wake(&self.0)
    }

    fn connect(&self, _: u16) -> UpstreamFuture<'_, UpstreamStream> {
        Box::pin(async {
            assert_eq!(self.0.state(), SessionState::Running, "one that sleeps is asked");
            let (ours, theirs) = UnixStream::pair()?;
            tokio::spawn(async {
                let greet = service_fn(|_: Request<Incoming>| async {
                    Ok::<_, Infallible>(Response::new(Full::new(Bytes::from_static(b"hello"))))
                });
                let server = hyper::server::conn::http1::Builder::new();
                let _ = server.serve_connection(TokioIo::new(theirs), greet).await;
            });
            Ok(UpstreamStream::new(ours))
        })
    }
}

async fn ask(endpoint: &Endpoint, id: &str) -> (u16, Bytes) {
    let stream = TcpStream::connect(endpoint.address()).await.unwrap();
    let (mut sender, connection) = handshake(TokioIo::new(stream)).await.unwrap();
    tokio::spawn(connection);
    let request = Request::get("/").header("host", format!("{id}.localhost"));
    let answer = sender.send_request(request.body(Empty::<Bytes>::new()).unwrap()).await.unwrap();
    (answer.status().as_u16(), answer.into_body().collect().await.unwrap().to_bytes())
}

/// The status, and the stage that failed.
fn stage(answer: (u16, Bytes)) -> (u16, String) {
    let json: serde_json::Value = serde_json::from_slice(&answer.1).unwrap();
    (answer.0, json["stage"].as_str().unwrap().to_owned())
}

async fn endpoint(upstreams: impl Upstreams) -> Arc<Endpoint> {
    let options = EndpointOptions::new().without_tokens();
    Arc::new(Endpoint::bind("127.0.0.1:0", upstreams, options).await.unwrap())
}

/// One that leads to this session by every name.
async fn greeting(session: &Session) -> Arc<Endpoint> {
    let found = session.clone();
    endpoint(move |_: &str| Some(Arc::new(Greeter(found.clone())) as Arc<dyn Upstream>)).await
}

#[test]
fn requests_for_a_session_that_sleeps_are_all_answered_after_one_resume() {
    block_on(async {
        let house = House::new().await;
        let session = house.halted(SessionPolicy::new()).await;
        let endpoint = greeting(&session).await;
        let mut events = session.events();
        for _ in 0..3 {
            session.suspend().await.unwrap();
            let mut requests = JoinSet::new();
            for _ in 0..30 {
                let endpoint = Arc::clone(&endpoint);
                requests.spawn(async move { ask(&endpoint, "any").await });
            }
            assert_eq!(requests.join_all().await, vec![(200, Bytes::from("hello")); 30]);
            use SessionReason::{Requested, Traffic};
            use SessionState::{Running, Suspended, Suspending};
            let expected = [(Suspending, Requested), (Suspended, Requested), (Running, Traffic)];
            assert_eq!(told(&mut events, 3).await, expected);
        }
        assert!(events.try_next().is_none());
        assert_eq!(session.metering().requests, 90);
    });
}

#[test]
fn a_session_sleeps_between_requests_although_connections_are_kept() {
    block_on(async {
        let house = House::new().await;
        let session = house.halted(SessionPolicy::new().idle_after(SHORT)).await;
        let endpoint = greeting(&session).await;
        for _ in 0..3 {
            assert_eq!(ask(&endpoint, "any").await.0, 200);
            until(&session, SessionState::Suspended).await;
        }
    });
}

#[test]
fn a_session_without_ports_or_that_is_over_or_stays_asleep_is_no_hanging_request() {
    block_on(async {
        let house = House::new().await;
        let session = house.halted(SessionPolicy::new()).await;
        let endpoint = endpoint(house.sessions.clone()).await;
        assert_eq!(stage(ask(&endpoint, session.id()).await), (502, "connect".into()));
        session.set_policy(SessionPolicy::new().auto_resume(false)).await.unwrap();
        session.suspend().await.unwrap();
        assert_eq!(stage(ask(&endpoint, session.id()).await), (502, "wake".into()));
        session.terminate().await.unwrap();
        assert_eq!(stage(ask(&endpoint, session.id()).await), (404, "route".into()));
    });
}

#[test]
fn a_session_whose_files_are_damaged_is_a_bad_gateway_until_they_are_whole_again() {
    block_on(async {
        let house = House::new().await;
        let session = house.halted(SessionPolicy::new()).await;
        let endpoint = greeting(&session).await;
        session.suspend().await.unwrap();
        let state = house.path().join(session.id()).join("asleep/state");
        let whole = std::fs::read(&state).unwrap();
        for damaged in [&whole[..whole.len() / 2], b"", b"nonsense"] {
            std::fs::write(&state, damaged).unwrap();
            assert_eq!(stage(ask(&endpoint, "any").await), (502, "wake".into()));
            assert_eq!(session.state(), SessionState::Suspended);
        }
        std::fs::write(&state, whole).unwrap();
        assert_eq!(ask(&endpoint, "any").await, (200, Bytes::from("hello")));
    });
}

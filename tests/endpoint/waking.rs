//! Sessions that sleep when a request comes, and what keeps them awake.

use std::sync::atomic::Ordering::SeqCst;
use std::time::Duration;

use dormouse::EndpointLimits;
use tokio::task::JoinSet;

use crate::client::{get, h1, read, request};
use crate::{Setup, open, run};

#[test]
fn requests_for_a_session_that_sleeps_are_held_until_it_is_awake() {
    run(async {
        let setup = Setup::open().await;
        let address = setup.endpoint.address();
        setup.guest.is_awake.send_replace(false);
        let mut requests = JoinSet::new();
        for _ in 0..50 {
            requests.spawn(async move { get(address, "one.localhost", "/hello", "").await.body });
        }
        setup.guest.until_held(50).await;
        assert_eq!(setup.guest.connections.load(SeqCst), 0);
        assert!(requests.try_join_next().is_none());
        // Another session has nothing to do with it.
        setup.add("two", setup.app.port());
        assert_eq!(get(address, "two.localhost", "/hello", "").await.status, 200);
        setup.guest.is_awake.send_replace(true);
        assert!(requests.join_all().await.iter().all(|body| body == "hello\n"));
        setup.guest.until_held(0).await;
    });
}

#[test]
fn more_requests_than_may_wait_are_sent_away_for_a_while() {
    run(async {
        let mut limits = EndpointLimits::default();
        limits.session_held = 2;
        let setup = Setup::new(open().limits(limits)).await;
        let address = setup.endpoint.address();
        setup.guest.is_awake.send_replace(false);
        let mut requests = JoinSet::new();
        for _ in 0..3 {
            requests.spawn(async move { get(address, "one.localhost", "/hello", "").await });
        }
        // Whichever comes last; the others wait.
        let answer = requests.join_next().await.unwrap().unwrap();
        assert_eq!((answer.status, answer.stage().as_str()), (503, "wake"));
        assert_eq!(answer.header("retry-after"), Some("1"));
        assert_eq!(answer.json()["session"], "one");
        setup.guest.until_held(2).await;
        assert!(requests.try_join_next().is_none());
        // One that gives up makes room.
        requests.abort_all();
        while requests.join_next().await.is_some() {}
        setup.guest.until_held(0).await;
        let waits = tokio::spawn(async move { get(address, "one.localhost", "/hello", "").await });
        setup.guest.until_held(1).await;
        setup.guest.is_awake.send_replace(true);
        assert_eq!(waits.await.unwrap().status, 200);
    });
}

#[test]
fn a_session_that_does_not_wake_in_time_is_to_be_asked_again() {
    run(async {
        let mut limits = EndpointLimits::default();
        limits.wake_timeout = Duration::from_millis(100);
        let setup = Setup::new(open().limits(limits)).await;
        setup.guest.is_awake.send_replace(false);
        let answer = get(setup.endpoint.address(), "one.localhost", "/hello", "").await;
        assert_eq!((answer.status, answer.stage().as_str()), (503, "wake"));
        assert_eq!(answer.header("retry-after"), Some("1"));
        setup.guest.until_held(0).await;
    });
}

#[test]
fn a_session_that_cannot_wake_is_a_bad_gateway() {
    run(async {
        let setup = Setup::open().await;
        setup.guest.is_broken.store(true, SeqCst);
        let answer = get(setup.endpoint.address(), "one.localhost", "/hello", "").await;
        assert_eq!((answer.status, answer.stage().as_str()), (502, "wake"));
        // What is wrong with it is not for strangers.
        assert!(!answer.body.contains("secret"), "{answer:?}");
    });
}

#[test]
fn more_requests_than_a_session_may_have_are_too_many() {
    run(async {
        let mut limits = EndpointLimits::default();
        limits.session_requests = 3;
        let setup = Setup::new(open().limits(limits)).await;
        let address = setup.endpoint.address();
        let mut requests = JoinSet::new();
        for _ in 0..3 {
            requests.spawn(async move { get(address, "one.localhost", "/never", "").await.status });
        }
        setup.guest.until_held(3).await;
        let answer = get(address, "one.localhost", "/hello", "").await;
        assert_eq!((answer.status, answer.stage().as_str()), (429, "request"));
        assert_eq!(answer.header("retry-after"), Some("1"));
        setup.add("two", setup.app.port());
        assert_eq!(get(address, "two.localhost", "/hello", "").await.status, 200);
        // Who has gone is not counted.
        requests.shutdown().await;
        setup.guest.until_held(0).await;
        assert_eq!(get(address, "one.localhost", "/hello", "").await.status, 200);
    });
}

#[test]
fn a_session_is_held_awake_by_answers_and_not_by_connections_that_are_kept() {
    run(async {
        let setup = Setup::open().await;
        let mut sender = h1(setup.endpoint.address()).await;
        let answer = sender.send_request(request("/bytes/100000000")).await.unwrap();
        setup.guest.until_held(1).await;
        drop(answer);
        drop(sender);
        setup.guest.until_held(0).await;
        let mut sender = h1(setup.endpoint.address()).await;
        for _ in 0..20 {
            sender.ready().await.unwrap();
            let answer = sender.send_request(request("/hello")).await.unwrap();
            assert_eq!(read(answer).await.1, "hello\n");
        }
        setup.guest.until_held(0).await;
        assert!(sender.ready().await.is_ok());
        assert_eq!(setup.guest.connections.load(SeqCst), 2);
        assert_eq!(setup.guest.wakes.load(SeqCst), 21);
    });
}

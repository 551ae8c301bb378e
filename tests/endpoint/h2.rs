//! HTTP/2 without TLS, to the endpoint and to applications; gRPC as its specification puts it into HTTP/2.

use std::sync::Arc;
use std::sync::atomic::AtomicUsize;
use std::sync::atomic::Ordering::SeqCst;
use std::time::Duration;

use dormouse::EndpointLimits;
use http_body_util::BodyExt;
use hyper::body::{Bytes, Frame};
use hyper::header::{HeaderMap, HeaderValue};
use hyper::server::conn::http2;
use hyper::service::service_fn;
use hyper::{Method, Request, Version};
use hyper_util::rt::{TokioExecutor, TokioIo};
use serde_json::Value;
use tokio::task::JoinSet;
use tokio_tungstenite::WebSocketStream;
use tokio_tungstenite::tungstenite::protocol::Role;

use crate::app::App;
use crate::client::{h2, read, request, talk, upload};
use crate::streams::write;
use crate::websocket;
use crate::{Setup, run};

/// A request in HTTP/2's own form.
fn plain(path: &str) -> Request<http_body_util::Empty<Bytes>> {
    let mut request = request(&format!("http://one.localhost{path}"));
    request.headers_mut().remove("host");
    request
}

#[test]
fn a_client_that_begins_with_http_2_is_served_by_an_application_of_http_1() {
    run(async {
        let setup = Setup::open().await;
        let mut sender = h2(setup.endpoint.address()).await;
        let answer = sender.send_request(plain("/hello")).await.unwrap();
        assert_eq!(answer.version(), Version::HTTP_2);
        assert_eq!(read(answer).await.1, "hello\n");
        let mut cookies = plain("/a?b=c");
        for cookie in ["a=1", "b=2"] {
            cookies.headers_mut().append("cookie", HeaderValue::from_static(cookie));
        }
        let (_, seen) = read(sender.send_request(cookies).await.unwrap()).await;
        let seen: Value = serde_json::from_slice(&seen).unwrap();
        assert_eq!((&seen["target"], &seen["version"]), (&"/a?b=c".into(), &"HTTP/1.1".into()));
        assert_eq!(seen["headers"]["host"], "one.localhost");
        assert_eq!(seen["headers"]["cookie"], "a=1; b=2");
        assert_eq!(seen["headers"]["via"], "2.0 dormouse");
    });
}

#[test]
fn a_session_is_reached_by_path_over_http_2() {
    run(async {
        let setup = Setup::open().await;
        let mut sender = h2(setup.endpoint.address()).await;
        let by_path = request("http://localhost/sessions/one/hello");
        let (mut parts, body) = by_path.into_parts();
        parts.headers.clear();
        let by_path = Request::from_parts(parts, body);
        assert_eq!(read(sender.send_request(by_path).await.unwrap()).await.1, "hello\n");
        let mut other = plain("/hello");
        other.headers_mut().insert("host", HeaderValue::from_static("two.localhost"));
        let (status, text) = read(sender.send_request(other).await.unwrap()).await;
        assert_eq!(status, 400, "{text:?}");
        let mut connect = plain("/hello");
        *connect.method_mut() = Method::CONNECT;
        *connect.uri_mut() = "one.localhost:80".parse().unwrap();
        assert_eq!(sender.send_request(connect).await.unwrap().status(), 400);
        // What is refused is one stream, not the connection.
        assert_eq!(read(sender.send_request(plain("/hello")).await.unwrap()).await.0, 200);
    });
}

#[test]
fn many_streams_of_one_connection_go_on_at_once() {
    run(async {
        let setup = Setup::open().await;
        let sender = h2(setup.endpoint.address()).await;
        let mut streams = JoinSet::new();
        for _ in 0..100 {
            let mut sender = sender.clone();
            streams.spawn(async move {
                read(sender.send_request(plain("/bytes/100000")).await.unwrap()).await.1.len()
            });
        }
        assert_eq!(streams.join_all().await, [100_000; 100]);
        setup.guest.until_held(0).await;
    });
}

#[test]
fn grpc_goes_through_in_both_directions_with_its_trailers() {
    run(async {
        let setup = Setup::with_app(App::start_h2().await, crate::open()).await;
        let (sent, mut request) = upload("http://one.localhost/package.Service/Echo");
        let headers = request.headers_mut();
        headers.remove("host");
        headers.insert("content-type", HeaderValue::from_static("application/grpc+proto"));
        headers.insert("te", HeaderValue::from_static("trailers"));
        let mut sender = h2(setup.endpoint.address()).await;
        let answer = sender.send_request(request).await.unwrap();
        assert_eq!(answer.status(), 200);
        let mut body = answer.into_body();
        for number in 0..20_u8 {
            let message = Bytes::from(vec![0, 0, 0, 0, 1, number]);
            sent.send(Frame::data(message.clone())).await.unwrap();
            assert_eq!(body.frame().await.unwrap().unwrap().into_data().unwrap(), message);
        }
        let mut trailers = HeaderMap::new();
        trailers.insert("x-last", HeaderValue::from_static("word"));
        sent.send(Frame::trailers(trailers)).await.unwrap();
        drop(sent);
        let trailers = body.collect().await.unwrap().trailers().unwrap().clone();
        assert_eq!(trailers["grpc-status"], "0");
        assert_eq!(trailers["x-last"], "word");
    });
}

#[test]
fn requests_to_an_application_of_http_2_share_its_connection() {
    run(async {
        let setup = Setup::with_app(App::start_h2().await, crate::open()).await;
        let sender = h2(setup.endpoint.address()).await;
        let mut streams = JoinSet::new();
        for _ in 0..50 {
            let mut sender = sender.clone();
            streams.spawn(async move {
                let mut forced = plain("/seen");
                forced
                    .headers_mut()
                    .insert("x-aws-proxy-force-h2", HeaderValue::from_static("true"));
                let answer = sender.send_request(forced).await.unwrap();
                serde_json::from_slice::<Value>(&read(answer).await.1).unwrap()
            });
        }
        for seen in streams.join_all().await {
            assert_eq!(seen["version"], "HTTP/2.0");
            assert_eq!(seen["target"], "http://one.localhost/seen");
            assert_eq!(seen["headers"].get("x-aws-proxy-force-h2"), None);
        }
        assert_eq!(setup.guest.connections.load(SeqCst), 1);
        setup.guest.until_held(0).await;
    });
}

#[test]
fn a_client_of_http_1_reaches_an_application_of_http_2() {
    run(async {
        let setup = Setup::with_app(App::start_h2().await, crate::open()).await;
        let force = "X-aws-proxy-force-h2: 1\r\n";
        let address = setup.endpoint.address();
        let answer = crate::client::get(address, "one.localhost", "/hello", force).await;
        assert_eq!((answer.status, answer.body.as_str()), (200, "hello\n"));
        // One that does not speak it.
        let setup = Setup::open().await;
        let address = setup.endpoint.address();
        let answer = crate::client::get(address, "one.localhost", "/hello", force).await;
        assert_eq!((answer.status, answer.stage().as_str()), (502, "response"));
    });
}

#[test]
fn requests_to_a_port_that_cannot_be_reached_do_not_wait_for_one_another() {
    run(async {
        let mut limits = EndpointLimits::default();
        // One after the other they would take longer than the test may.
        limits.connect_timeout = Duration::from_secs(2);
        let setup = Setup::new(crate::open().limits(limits)).await;
        setup.guest.is_deaf.store(true, SeqCst);
        let address = setup.endpoint.address();
        let mut requests = JoinSet::new();
        for _ in 0..60 {
            let force = "X-aws-proxy-force-h2: 1\r\n";
            requests.spawn(crate::client::get(address, "one.localhost", "/hello", force));
        }
        for answer in requests.join_all().await {
            assert_eq!((answer.status, answer.stage().as_str()), (502, "connect"));
        }
    });
}

#[test]
fn large_bodies_go_through_both_ways_over_http_2() {
    const LARGE: usize = 16 << 20;
    run(async {
        for app in [App::start().await, App::start_h2().await] {
            let setup = Setup::with_app(app, crate::open()).await;
            let (sent, mut request) = upload("http://one.localhost/echo");
            request.headers_mut().remove("host");
            if setup.app.is_h2 {
                request.headers_mut().insert("x-aws-proxy-force-h2", HeaderValue::from_static("1"));
            }
            let mut sender = h2(setup.endpoint.address()).await;
            let writing = tokio::spawn(write(sent, LARGE));
            let answer = sender.send_request(request).await.unwrap();
            assert_eq!(read(answer).await.1.len(), LARGE);
            writing.await.unwrap();
        }
    });
}

#[test]
fn a_stream_that_its_client_gives_up_is_given_up_in_the_guest() {
    run(async {
        let setup = Setup::open().await;
        let mut sender = h2(setup.endpoint.address()).await;
        let answer = sender.send_request(plain("/bytes/1000000000")).await.unwrap();
        drop(answer);
        setup.guest.until_held(0).await;
        assert_eq!(read(sender.send_request(plain("/hello")).await.unwrap()).await.0, 200);
    });
}

/// A request for a WebSocket in HTTP/2's own form.
fn websocket(path: &str) -> Request<http_body_util::Empty<Bytes>> {
    let mut connect = plain(path);
    *connect.method_mut() = Method::CONNECT;
    connect.extensions_mut().insert(hyper::ext::Protocol::from_static("websocket"));
    connect.headers_mut().insert("sec-websocket-version", HeaderValue::from_static("13"));
    connect
}

#[test]
fn an_application_that_knows_no_websockets_opens_none_over_http_2() {
    run(async {
        let setup = Setup::open().await;
        let mut sender = h2(setup.endpoint.address()).await;
        let answer = sender.send_request(websocket("/hello")).await.unwrap();
        let (status, text) = read(answer).await;
        assert_eq!(status, 502);
        let text = String::from_utf8(text.to_vec()).unwrap();
        assert!(text.contains("does not take the WebSocket"), "{text}");
    });
}

#[test]
fn a_websocket_goes_through_a_stream_of_http_2() {
    run(async {
        let setup = Setup::with_app(websocket::echo().await, crate::open()).await;
        let mut sender = h2(setup.endpoint.address()).await;
        let answer = sender.send_request(websocket("/chat")).await.unwrap();
        assert_eq!(answer.status(), 200);
        assert_eq!(answer.headers().get("sec-websocket-accept"), None);
        let stream = TokioIo::new(hyper::upgrade::on(answer).await.unwrap());
        let mut socket = WebSocketStream::from_raw_socket(stream, Role::Client, None).await;
        talk(&mut socket).await;
        drop(socket);
        setup.guest.until_held(0).await;
    });
}

#[test]
fn a_websocket_of_http_2_is_a_stream_that_is_open_and_is_waited_for_when_the_endpoint_closes() {
    run(async {
        let mut limits = EndpointLimits::default();
        limits.header_timeout = Duration::from_secs(3);
        let setup = Setup::with_app(websocket::echo().await, crate::open().limits(limits)).await;
        let mut sender = h2(setup.endpoint.address()).await;
        let answer = sender.send_request(websocket("/chat")).await.unwrap();
        let stream = TokioIo::new(hyper::upgrade::on(answer).await.unwrap());
        let mut socket = WebSocketStream::from_raw_socket(stream, Role::Client, None).await;
        // Nothing else goes on on its connection meanwhile.
        tokio::time::sleep(Duration::from_secs(4)).await;
        talk(&mut socket).await;
        let closing = tokio::spawn(setup.endpoint.close(crate::PATIENCE));
        tokio::time::sleep(Duration::from_secs(4)).await;
        talk(&mut socket).await;
        assert!(!closing.is_finished());
        drop(socket);
        closing.await.unwrap();
    });
}

#[test]
fn who_holds_all_streams_that_an_application_allows_holds_up_nobody() {
    run(async {
        let app = App::serve(|stream| async move {
            let mut builder = http2::Builder::new(TokioExecutor::new());
            builder.max_concurrent_streams(64);
            let service = service_fn(crate::app::answer);
            let _ = builder.serve_connection(TokioIo::new(stream), service).await;
        });
        let mut limits = EndpointLimits::default();
        limits.streams = 1000;
        let setup = Setup::with_app(app.await, crate::open().limits(limits)).await;
        let mut sender = h2(setup.endpoint.address()).await;
        let mut open = Vec::new();
        for _ in 0..65 {
            let (sent, mut request) = upload("http://one.localhost/echo");
            request.headers_mut().remove("host");
            let forced = HeaderValue::from_static("true");
            request.headers_mut().insert("x-aws-proxy-force-h2", forced);
            open.push((sent, sender.send_request(request).await.unwrap()));
        }
        assert_eq!(setup.guest.connections.load(SeqCst), 2);
        drop(open);
        setup.guest.until_held(0).await;
    });
}

#[test]
fn an_upload_that_nobody_reads_stops_no_other_of_its_connection() {
    run(async {
        let setup = Setup::open().await;
        let mut sender = h2(setup.endpoint.address()).await;
        let (sent, mut unread) = upload("http://one.localhost/never");
        unread.headers_mut().remove("host");
        let mut other = sender.clone();
        let _unread = tokio::spawn(async move { other.send_request(unread).await });
        let given = Arc::new(AtomicUsize::new(0));
        let count = Arc::clone(&given);
        tokio::spawn(async move {
            while sent.send(Frame::data(Bytes::from_static(&[7; 16 << 10]))).await.is_ok() {
                count.fetch_add(1, SeqCst);
            }
        });
        // Until all that takes it on the way is full.
        let mut before = usize::MAX;
        while given.load(SeqCst) != before || before == 0 {
            before = given.load(SeqCst);
            tokio::time::sleep(Duration::from_millis(500)).await;
        }
        let (sent, mut read_at_once) = upload("http://one.localhost/length");
        read_at_once.headers_mut().remove("host");
        let answer = tokio::spawn(async move { sender.send_request(read_at_once).await });
        write(sent, 100_000).await;
        assert_eq!(read(answer.await.unwrap().unwrap()).await.1, "100000");
    });
}

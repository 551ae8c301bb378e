//! Applications that are down, hang, close early or do not speak HTTP, and VMs that die.

use std::sync::atomic::Ordering::SeqCst;
use std::sync::{Arc, Mutex};
use std::time::Duration;

use dormouse::EndpointLimits;
use http_body_util::{BodyExt, Full};
use hyper::body::{Bytes, Frame};
use hyper::{Method, Request};
use tokio::io::{AsyncReadExt, AsyncWriteExt};

use crate::app::App;
use crate::client::{exchange, get, h1, h2, read, request, upload};
use crate::{Setup, open, run};

async fn with(words: &'static [u8]) -> Setup {
    Setup::with_app(App::saying(words).await, open()).await
}

#[test]
fn an_application_that_is_down_is_a_bad_gateway() {
    run(async {
        let app = App::saying(b"").await;
        let port = app.port();
        drop(app);
        let setup = Setup::open().await;
        let header = format!("X-aws-proxy-port: {port}\r\n");
        // Its listener is closed by its task.
        let answer = loop {
            let answer = get(setup.endpoint.address(), "one.localhost", "/", &header).await;
            if answer.stage() == "connect" {
                break answer;
            }
        };
        assert_eq!(answer.status, 502);
        assert_eq!(answer.json()["session"], "one");
        assert_eq!(answer.header("cache-control"), Some("no-store"));
        // The client's connection is none the worse for it.
        let mut sender = h1(setup.endpoint.address()).await;
        let mut down = request("/");
        down.headers_mut().insert("x-aws-proxy-port", port.into());
        assert_eq!(read(sender.send_request(down).await.unwrap()).await.0, 502);
        sender.ready().await.unwrap();
        assert_eq!(read(sender.send_request(request("/hello")).await.unwrap()).await.0, 200);
    });
}

#[test]
fn an_application_that_hangs_is_not_waited_for_for_ever() {
    run(async {
        let mut limits = EndpointLimits::default();
        limits.answer_timeout = Duration::from_secs(8);
        let setup = Setup::new(open().limits(limits)).await;
        let address = setup.endpoint.address();
        // A body that takes longer than an answer may is no hanging: it goes on until the others have failed.
        let (sent, echoed) = upload("/echo");
        let mut sender = h1(address).await;
        let long = sender.send_request(echoed).await.unwrap();
        let never = get(address, "one.localhost", "/never", "");
        // One that takes a body and then says nothing.
        let post = "POST /never HTTP/1.1\r\nHost: one.localhost\r\nContent-Length: 5\r\nConnection: close\r\n\r\nhello";
        let (never, taken) = tokio::join!(never, exchange(address, post));
        assert_eq!((never.status, never.stage().as_str()), (504, "response"));
        assert!(taken.starts_with("HTTP/1.1 504"), "{taken}");
        setup.guest.until_held(1).await;
        sent.send(Frame::data("late".into())).await.unwrap();
        drop(sent);
        let (status, body) = read(long).await;
        assert_eq!((status.as_u16(), &body[..]), (200, &b"late"[..]));
        setup.guest.until_held(0).await;
    });
}

#[test]
fn an_application_that_closes_without_an_answer_is_a_bad_gateway() {
    run(async {
        for words in [&b""[..], b"HTTP/1.1 200 O", b"HTTP/1.1 200 OK\r\nContent-Length: 5\r\n"] {
            let setup = with(words).await;
            let answer = get(setup.endpoint.address(), "one.localhost", "/", "").await;
            assert_eq!((answer.status, answer.stage().as_str()), (502, "response"), "{words:?}");
        }
    });
}

#[test]
fn an_application_that_says_something_else_is_a_bad_gateway() {
    run(async {
        for words in [
            &b"SSH-2.0-OpenSSH_9.9\r\n\r\n"[..],
            b"\0\x01\x02\x03\x04\x05\x06\x07\r\n\r\n",
            b"HTTP/1.1 abc OK\r\n\r\n",
            b"HTTP/1.1 200 OK\r\nno colon\r\n\r\n",
            b"HTTP/1.1 200 OK\r\nContent-Length: 5\r\nContent-Length: 6\r\n\r\nhello",
            b"HTTP/1.1 200 OK\r\nContent-Length: five\r\n\r\nhello",
            b"HTTP/1.1 101 Switching Protocols\r\nConnection: upgrade\r\nUpgrade: x\r\n\r\n",
            b"HTTP/1.1 101 Switching Protocols\r\n\r\n",
            b"RTSP/1.0 200 OK\r\n\r\n",
        ] {
            let setup = with(words).await;
            let answer = get(setup.endpoint.address(), "one.localhost", "/", "").await;
            let words = String::from_utf8_lossy(words);
            assert_eq!((answer.status, answer.stage().as_str()), (502, "response"), "{words}");
        }
    });
}

#[test]
fn an_application_without_end_to_its_headers_is_a_bad_gateway() {
    run(async {
        let app = App::serve(|mut stream| async move {
            let _ = stream.write_all(b"HTTP/1.1 200 OK\r\n").await;
            while stream.write_all(b"X-More: and more\r\n").await.is_ok() {}
        });
        let setup = Setup::with_app(app.await, open()).await;
        let answer = get(setup.endpoint.address(), "one.localhost", "/", "").await;
        assert_eq!((answer.status, answer.stage().as_str()), (502, "response"));
    });
}

#[test]
fn an_answer_that_breaks_off_never_passes_for_a_whole_one() {
    run(async {
        for words in [
            &b"HTTP/1.1 200 OK\r\nContent-Length: 100\r\n\r\nhello"[..],
            b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n5\r\nhello\r\n",
            b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n5\r\nhel",
            b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n5\r\nhello\r\nzz\r\n",
        ] {
            let setup = with(words).await;
            let answer = h1(setup.endpoint.address()).await.send_request(request("/")).await;
            let answer = answer.unwrap();
            assert_eq!(answer.status(), 200);
            assert!(answer.into_body().collect().await.is_err(), "{words:?}");
            let mut sender = h2(setup.endpoint.address()).await;
            let answer = sender.send_request(request("http://one.localhost/")).await;
            // A reset of the stream may overtake the head.
            let whole = match answer {
                Ok(answer) => answer.into_body().collect().await.is_ok(),
                Err(_) => false,
            };
            assert!(!whole, "{words:?}");
        }
    });
}

#[test]
fn an_answer_without_a_length_ends_with_its_connection_unless_the_vm_died() {
    run(async {
        let setup = with(b"HTTP/1.1 200 OK\r\n\r\nhello").await;
        let answer = h1(setup.endpoint.address()).await.send_request(request("/")).await.unwrap();
        assert_eq!(read(answer).await.1, "hello");
        setup.guest.is_dead.store(true, SeqCst);
        let answer = h1(setup.endpoint.address()).await.send_request(request("/")).await.unwrap();
        assert!(answer.into_body().collect().await.is_err());
    });
}

#[test]
fn a_vm_that_dies_in_the_middle_of_an_answer_breaks_it_off() {
    run(async {
        let setup = Setup::open().await;
        let path = "/bytes/1000000000";
        let answer = h1(setup.endpoint.address()).await.send_request(request(path)).await.unwrap();
        let mut body = answer.into_body();
        assert!(body.frame().await.unwrap().unwrap().data_ref().is_some());
        let Setup { app, guest, endpoint, .. } = setup;
        drop(app);
        assert!(body.collect().await.is_err());
        guest.until_held(0).await;
        drop(endpoint);
    });
}

#[test]
fn a_connection_that_an_application_has_given_up_costs_no_request() {
    run(async {
        // It answers once a connection, and does not say so.
        let app = App::serve(|mut stream| async move {
            let mut request = Vec::new();
            while !request.ends_with(b"\r\n\r\n") && !request.ends_with(b"body") {
                match stream.read_u8().await {
                    Ok(byte) => request.push(byte),
                    Err(_) => return,
                }
            }
            let _ = stream.write_all(b"HTTP/1.1 200 OK\r\nContent-Length: 2\r\n\r\nok").await;
        });
        let setup = Setup::with_app(app.await, open()).await;
        let mut sender = h1(setup.endpoint.address()).await;
        for number in 0..100 {
            let method = [Method::GET, Method::POST][number % 2].clone();
            let request = Request::builder().method(method.clone()).uri("/");
            let body = if method == Method::POST { "body" } else { "" };
            let request = request.header("host", "one.localhost").body(Full::from(body)).unwrap();
            sender.ready().await.unwrap();
            let answer = sender.send_request(request).await.unwrap();
            assert_eq!(read(answer).await.1, "ok");
        }
    });
}

#[test]
fn a_request_is_sent_again_where_it_may_be_when_its_connection_is_closed_as_it_comes() {
    run(async {
        // It closes each connection with the second request on it, whose first letter it notes.
        let unheard = Arc::new(Mutex::new(Vec::new()));
        let notes = Arc::clone(&unheard);
        let app = App::serve(move |mut stream| {
            let notes = Arc::clone(&notes);
            async move {
                let mut request = [0; 4096];
                if matches!(stream.read(&mut request).await, Ok(1..)) {
                    let answer = b"HTTP/1.1 200 OK\r\nContent-Length: 2\r\n\r\nok";
                    let _ = stream.write_all(answer).await;
                    if matches!(stream.read(&mut request).await, Ok(1..)) {
                        notes.lock().unwrap().push(request[0]);
                    }
                }
            }
        });
        let setup = Setup::with_app(app.await, open()).await;
        let mut sender = h1(setup.endpoint.address()).await;
        let methods = [Method::GET, Method::DELETE, Method::OPTIONS, Method::POST];
        for method in methods.iter().cycle().take(40) {
            let request =
                Request::builder().method(method).uri("/").header("host", "one.localhost");
            sender.ready().await.unwrap();
            let answer = sender.send_request(request.body(Full::<Bytes>::default()).unwrap()).await;
            assert_eq!(read(answer.unwrap()).await.1, "ok", "{method}");
        }
        let unheard = unheard.lock().unwrap();
        assert!(unheard.contains(&b'D') && !unheard.contains(&b'P'), "{unheard:?}");
    });
}

#[test]
fn an_application_that_answers_before_it_has_read_the_request_is_heard() {
    run(async {
        let setup = with(b"HTTP/1.1 413 Content Too Large\r\nContent-Length: 3\r\n\r\nbig").await;
        let head = "POST / HTTP/1.1\r\nHost: one.localhost\r\nContent-Length: 10000000\r\n\r\n";
        let mut stream = tokio::net::TcpStream::connect(setup.endpoint.address()).await.unwrap();
        stream.write_all(head.as_bytes()).await.unwrap();
        let mut answer = [0; 12];
        stream.read_exact(&mut answer).await.unwrap();
        assert_eq!(&answer, b"HTTP/1.1 413");
    });
}

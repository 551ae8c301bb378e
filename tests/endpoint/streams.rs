//! Bodies that stream, both ways and as fast as who reads them; connections that are kept.

use std::sync::atomic::Ordering::SeqCst;
use std::time::Duration;

use http_body_util::{BodyExt, Full};
use hyper::body::{Bytes, Frame};
use hyper::header::{HeaderMap, HeaderValue};
use hyper::{Method, Request};
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::TcpStream;
use tokio::sync::mpsc;
use tokio::task::JoinSet;
use tokio::time::timeout;

use crate::app::App;
use crate::client::{exchange, get, h1, h2, read, request, send, upload};
use crate::{Setup, open, run};

/// More than what sockets and buffers on the way hold.
const LARGE: usize = 64 << 20;
/// What they may hold: that of the kernel is up to 10 MiB for each of two connections.
const HELD: usize = 32 << 20;

/// Writes so many bytes.
pub async fn write(sender: mpsc::Sender<Frame<Bytes>>, mut left: usize) {
    let piece = Bytes::from_static(&[b'u'; 64 << 10]);
    while left > 0 {
        let piece = piece.slice(..left.min(piece.len()));
        left -= piece.len();
        sender.send(Frame::data(piece)).await.unwrap();
    }
}

#[test]
fn events_arrive_one_by_one_while_the_answer_goes_on() {
    run(async {
        let setup = Setup::open().await;
        let (events, request) = upload("/echo");
        let mut sender = h1(setup.endpoint.address()).await;
        let answer = sender.send_request(request).await.unwrap();
        let mut body = answer.into_body();
        // Each is there before the next is sent, in both directions.
        for number in 0..100 {
            let event = format!("event: number\ndata: {number}\n\n");
            events.send(Frame::data(event.clone().into())).await.unwrap();
            let frame = body.frame().await.unwrap().unwrap();
            assert_eq!(frame.into_data().unwrap(), event);
        }
        drop(events);
        assert!(body.frame().await.is_none());
    });
}

#[test]
fn large_bodies_go_through_both_ways_at_once() {
    run(async {
        let setup = Setup::open().await;
        let (sent, request) = upload("/echo");
        let mut sender = h1(setup.endpoint.address()).await;
        let writing = tokio::spawn(write(sent, LARGE));
        let mut body = sender.send_request(request).await.unwrap().into_body();
        let mut length = 0;
        while let Some(frame) = body.frame().await {
            let data = frame.unwrap().into_data().unwrap();
            assert!(data.iter().all(|byte| *byte == b'u'));
            length += data.len();
        }
        writing.await.unwrap();
        assert_eq!(length, LARGE);

        sender.ready().await.unwrap();
        let (sent, request) = upload("/length");
        let writing = tokio::spawn(write(sent, LARGE));
        let answer = sender.send_request(request).await.unwrap();
        assert_eq!(read(answer).await.1, LARGE.to_string());
        writing.await.unwrap();
    });
}

#[test]
fn an_upload_waits_for_an_application_that_does_not_read() {
    run(async {
        let app = App::serve(|mut stream| async move {
            let mut head = [0; 4096];
            let _ = stream.read(&mut head).await;
            std::future::pending::<()>().await;
        });
        let setup = Setup::with_app(app.await, open()).await;
        let mut stream = TcpStream::connect(setup.endpoint.address()).await.unwrap();
        let head = "POST / HTTP/1.1\r\nHost: one.localhost\r\nContent-Length: 1000000000\r\n\r\n";
        stream.write_all(head.as_bytes()).await.unwrap();
        let mut sent = 0;
        // It takes nothing more when all on the way is full.
        while let Ok(count) =
            timeout(Duration::from_millis(500), stream.write(&[0; 64 << 10])).await
        {
            sent += count.unwrap();
            assert!(sent < HELD, "{sent} bytes that nobody reads");
        }
    });
}

#[test]
fn an_answer_waits_for_a_client_that_does_not_read() {
    run(async {
        let setup = Setup::open().await;
        let mut stream = TcpStream::connect(setup.endpoint.address()).await.unwrap();
        let head = "GET /counted HTTP/1.1\r\nHost: one.localhost\r\n\r\n";
        stream.write_all(head.as_bytes()).await.unwrap();
        let mut before = 0;
        loop {
            tokio::time::sleep(Duration::from_millis(500)).await;
            let sent = crate::app::SENT.load(SeqCst);
            assert!(sent < HELD, "{sent} bytes that nobody reads");
            if sent > 0 && sent == before {
                break;
            }
            before = sent;
        }
        // The connection is not kept for somebody else then.
        drop(stream);
        setup.guest.until_held(0).await;
        assert_eq!(
            get(setup.endpoint.address(), "one.localhost", "/hello", "").await.body,
            "hello\n"
        );
        assert_eq!(setup.guest.connections.load(SeqCst), 2);
    });
}

#[test]
fn a_client_that_asks_first_sends_its_body_when_the_application_wants_it() {
    run(async {
        let setup = Setup::open().await;
        let mut stream = TcpStream::connect(setup.endpoint.address()).await.unwrap();
        let head = "POST /length HTTP/1.1\r\nHost: one.localhost\r\nContent-Length: 5\r\n\
            Expect: 100-continue\r\n\r\n";
        stream.write_all(head.as_bytes()).await.unwrap();
        let mut said = [0; 25];
        stream.read_exact(&mut said).await.unwrap();
        assert_eq!(&said, b"HTTP/1.1 100 Continue\r\n\r\n");
        stream.write_all(b"hello").await.unwrap();
        let mut said = [0; 15];
        stream.read_exact(&mut said).await.unwrap();
        assert_eq!(&said, b"HTTP/1.1 200 OK");
    });
}

#[test]
fn a_client_that_asks_first_keeps_its_body_when_the_application_refuses_it() {
    run(async {
        let setup = Setup::open().await;
        let head = "POST /refuse HTTP/1.1\r\nHost: one.localhost\r\nContent-Length: 5\r\n\
            Expect: 100-continue\r\nConnection: close\r\n\r\n";
        let text = exchange(setup.endpoint.address(), head).await;
        assert!(text.starts_with("HTTP/1.1 413"), "{text}");
    });
}

#[test]
fn an_application_that_never_heard_of_asking_first_gets_the_body_all_the_same() {
    run(async {
        let app = App::serve(|mut stream| async move {
            let mut request = Vec::new();
            while !request.ends_with(b"hello") {
                let _ = stream.read_buf(&mut request).await;
            }
            let _ = stream.write_all(b"HTTP/1.1 200 OK\r\nContent-Length: 2\r\n\r\nok").await;
        });
        let setup = Setup::with_app(app.await, open()).await;
        let mut stream = TcpStream::connect(setup.endpoint.address()).await.unwrap();
        let head = "POST / HTTP/1.1\r\nHost: one.localhost\r\nContent-Length: 5\r\n\
            Expect: 100-continue\r\n\r\n";
        stream.write_all(head.as_bytes()).await.unwrap();
        let mut said = [0; 25];
        stream.read_exact(&mut said).await.unwrap();
        assert_eq!(&said, b"HTTP/1.1 100 Continue\r\n\r\n");
        stream.write_all(b"hello").await.unwrap();
        let mut said = [0; 15];
        stream.read_exact(&mut said).await.unwrap();
        assert_eq!(&said, b"HTTP/1.1 200 OK");
    });
}

#[test]
fn trailers_go_through_in_chunks() {
    run(async {
        let setup = Setup::open().await;
        let (sent, mut request) = upload("/echo");
        request.headers_mut().insert("te", HeaderValue::from_static("trailers"));
        request.headers_mut().insert("trailer", HeaderValue::from_static("x-sum"));
        let answer = h1(setup.endpoint.address()).await.send_request(request);
        let mut trailers = HeaderMap::new();
        trailers.insert("x-sum", HeaderValue::from_static("abc"));
        sent.send(Frame::data("data".into())).await.unwrap();
        sent.send(Frame::trailers(trailers)).await.unwrap();
        drop(sent);
        let collected = answer.await.unwrap().into_body().collect().await.unwrap();
        assert_eq!(collected.trailers().and_then(|all| all.get("x-sum")).unwrap(), "abc");
        assert_eq!(collected.to_bytes(), "data");
    });
}

#[test]
fn requests_that_are_sent_together_are_answered_in_their_order() {
    run(async {
        let setup = Setup::open().await;
        let one = |path: &str| format!("GET {path} HTTP/1.1\r\nHost: one.localhost\r\n\r\n");
        let last = "GET /c HTTP/1.1\r\nHost: one.localhost\r\nConnection: close\r\n\r\n";
        let text = exchange(setup.endpoint.address(), one("/a") + &one("/b") + last).await;
        let places: Vec<_> =
            ["\"/a\"", "\"/b\"", "\"/c\""].iter().map(|path| text.find(path)).collect();
        assert!(places.is_sorted() && places.iter().all(Option::is_some), "{text}");
    });
}

#[test]
fn methods_whose_answers_have_no_body_leave_the_connection_as_it_was() {
    run(async {
        let setup = Setup::open().await;
        let mut sender = h1(setup.endpoint.address()).await;
        for (method, length) in [(Method::HEAD, 0), (Method::GET, 6), (Method::DELETE, 6)] {
            let request = Request::builder().method(method).uri("/hello");
            let request = request.header("host", "one.localhost").body(Full::<Bytes>::default());
            sender.ready().await.unwrap();
            let answer = sender.send_request(request.unwrap()).await.unwrap();
            assert_eq!(answer.headers()["content-length"], "6");
            assert_eq!(read(answer).await.1.len(), length);
        }
        assert_eq!(setup.guest.connections.load(SeqCst), 1);
    });
}

#[test]
fn many_clients_are_served_at_once() {
    run(async {
        let setup = Setup::open().await;
        let address = setup.endpoint.address();
        let mut clients = JoinSet::new();
        for _ in 0..200 {
            clients.spawn(async move {
                let mut sender = h1(address).await;
                for _ in 0..5 {
                    sender.ready().await.unwrap();
                    let answer = sender.send_request(request("/hello")).await.unwrap();
                    assert_eq!(read(answer).await.1, "hello\n");
                }
            });
        }
        while let Some(client) = clients.join_next().await {
            client.unwrap();
        }
        setup.guest.until_held(0).await;
    });
}

#[test]
fn a_get_has_the_body_that_its_client_sends() {
    run(async {
        let setup = Setup::open().await;
        let chunked = "GET /length HTTP/1.1\r\nHost: one.localhost\r\nConnection: close\r\n\
            Transfer-Encoding: chunked\r\n\r\n5\r\nhello\r\n0\r\n\r\n";
        let answer = send(setup.endpoint.address(), chunked.to_owned()).await.unwrap();
        assert_eq!((answer.status, answer.body.as_str()), (200, "5"));
        let (sender, mut request) = upload("http://one.localhost/length");
        *request.method_mut() = Method::GET;
        request.headers_mut().remove("host");
        tokio::spawn(write(sender, 5000));
        let mut h2 = h2(setup.endpoint.address()).await;
        assert_eq!(read(h2.send_request(request).await.unwrap()).await.1, "5000");
    });
}

#[test]
fn a_connection_that_nobody_uses_ends_although_others_go_on() {
    run(async {
        let setup = Setup::open().await;
        let address = setup.endpoint.address();
        let (plain, open) = App::counted(false).await;
        let (other, open_h2) = App::counted(true).await;
        // It goes on all the time, at another port.
        let busy = tokio::spawn(get(address, "one.localhost", "/never", ""));
        for (app, force) in [(&plain, ""), (&other, "X-aws-proxy-force-h2: 1\r\n")] {
            let headers = format!("X-aws-proxy-port: {}\r\n{force}", app.port());
            for _ in 0..2 {
                let answer = get(address, "one.localhost", "/hello", &headers).await;
                assert_eq!((answer.status, answer.body.as_str()), (200, "hello\n"));
            }
        }
        for mut open in [open, open_h2] {
            open.wait_for(|open| *open == 0).await.unwrap();
        }
        assert!(!busy.is_finished());
        busy.abort();
    });
}

#[test]
fn an_endpoint_that_closes_lets_what_goes_on_come_to_its_end() {
    run(async {
        let Setup { endpoint, guest, app, .. } = Setup::open().await;
        let address = endpoint.address();
        // The head of its answer is there, and its end is for this test to say.
        let (sent, echoed) = upload("/echo");
        let mut busy = h1(address).await;
        let answer = busy.send_request(echoed).await.unwrap();
        let mut kept = h1(address).await;
        assert_eq!(read(kept.send_request(request("/hello")).await.unwrap()).await.0, 200);
        guest.until_held(1).await;
        let goes_on = async {
            // Nothing new is taken from when it closes on.
            while TcpStream::connect(address).await.is_ok() {
                tokio::task::yield_now().await;
            }
            sent.send(Frame::data("late".into())).await.unwrap();
            drop(sent);
            read(answer).await.1
        };
        let ((), body) = tokio::join!(endpoint.close(crate::PATIENCE), goes_on);
        assert_eq!(body, "late");
        // Its client sees the end when it looks at its socket.
        while kept.ready().await.is_ok() {
            tokio::task::yield_now().await;
        }
        assert!(TcpStream::connect(address).await.is_err());
        drop(app);
    });
}

#[test]
fn an_endpoint_that_is_dropped_ends_all_that_goes_on() {
    run(async {
        let Setup { endpoint, guest, app, .. } = Setup::open().await;
        let address = endpoint.address();
        let never = tokio::spawn(async move {
            exchange(address, "GET /never HTTP/1.1\r\nHost: one.localhost\r\n\r\n").await
        });
        guest.until_held(1).await;
        drop(endpoint);
        assert_eq!(never.await.unwrap(), "");
        guest.until_held(0).await;
        drop(app);
    });
}

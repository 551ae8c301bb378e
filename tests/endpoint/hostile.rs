//! Requests that two readers could understand differently, and clients that take more than they may. What the application
//! hears is looked at, too: it is the second reader.

use std::future::pending;
use std::net::SocketAddr;
use std::time::Duration;

use dormouse::EndpointLimits;
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::TcpStream;
use tokio::task::JoinSet;
use tokio::time::timeout;

use crate::app::App;
use crate::client::{Answer, exchange, get, request, send};
use crate::{Setup, client, open, run};

/// The answers to what is sent on one connection.
async fn answers(setup: &Setup, bytes: &str) -> Vec<u16> {
    let text = exchange(setup.endpoint.address(), bytes).await;
    let lines = text.split("HTTP/1.1 ").skip(1);
    lines.map(|line| line[..3].parse().unwrap()).collect()
}

#[test]
fn a_length_beside_chunks_is_not_believed_and_nothing_more_is_read() {
    run(async {
        let setup = Setup::open().await;
        // By its length, the body ends behind the second request.
        let second = "GET /second HTTP/1.1\r\nHost: one.localhost\r\n\r\n";
        for framing in [
            "Content-Length: 60\r\nTransfer-Encoding: chunked",
            "Transfer-Encoding: chunked\r\nContent-Length: 60",
            "Content-Length: 3\r\nTransfer-Encoding: CHUNKED",
        ] {
            let head =
                format!("POST /request HTTP/1.1\r\nHost: one.localhost\r\n{framing}\r\n\r\n");
            let text = exchange(setup.endpoint.address(), format!("{head}0\r\n\r\n{second}")).await;
            assert_eq!(text.matches("HTTP/1.1 200").count(), 1, "{framing}: {text}");
            let head = text.split("\r\n\r\n").nth(1).unwrap();
            assert!(head.contains("\"transfer-encoding\":\"chunked\""), "{head}");
            assert!(!head.contains("content-length"), "{head}");
        }
    });
}

#[test]
fn bodies_whose_length_is_not_clear_are_refused() {
    run(async {
        let setup = Setup::open().await;
        for framing in [
            "Content-Length: 5\r\nContent-Length: 6",
            "Content-Length: 5, 6",
            "Content-Length: 5, 5",
            "Content-Length: +5",
            "Content-Length: -5",
            "Content-Length: 0x5",
            "Content-Length: 5 5",
            "Content-Length: ",
            "Content-Length: 18446744073709551616",
            "Transfer-Encoding: identity",
            "Transfer-Encoding: xchunked",
            "Transfer-Encoding: chunked, identity",
            "Transfer-Encoding: chunked\r\nTransfer-Encoding: identity",
            "Transfer-Encoding : chunked",
            "Transfer-Encoding\x0b: chunked",
            "Transfer-Encoding: chunked\r\n\tidentity",
            "X-Folded: a\r\n b\r\nContent-Length: 5",
            "Content-Length: 5\r\n X-Folded: a",
            " X-Early: a\r\nContent-Length: 5",
            "X-Null: a\0b",
            "X-Return: a\rb",
            "X Space: a",
            ": none",
            "no colon",
        ] {
            let head = "POST /length HTTP/1.1\r\nHost: one.localhost\r\n";
            let answers = answers(&setup, &format!("{head}{framing}\r\n\r\nhello")).await;
            assert_eq!(answers, [400], "{framing}");
        }
        let old = "POST /length HTTP/1.0\r\nHost: one.localhost\r\nTransfer-Encoding: chunked\r\n\r\n0\r\n\r\n";
        assert_eq!(exchange(setup.endpoint.address(), old).await.split(' ').nth(1), Some("400"));
        assert_eq!(setup.guest.wakes.load(std::sync::atomic::Ordering::SeqCst), 0);
    });
}

#[test]
fn chunks_that_are_none_break_the_request_off_and_the_connection() {
    run(async {
        let setup = Setup::open().await;
        let second = "GET /second HTTP/1.1\r\nHost: one.localhost\r\n\r\n";
        for chunks in [
            "zz\r\nhello\r\n0\r\n\r\n",
            "-5\r\nhello\r\n0\r\n\r\n",
            "5\r\nhelloworld\r\n0\r\n\r\n",
            "10000000000000005\r\nhello\r\n0\r\n\r\n",
            "\r\nhello\r\n0\r\n\r\n",
        ] {
            let head = "POST /length HTTP/1.1\r\nHost: one.localhost\r\nTransfer-Encoding: chunked\r\n\r\n";
            let answers = answers(&setup, &format!("{head}{chunks}{second}")).await;
            assert_eq!(answers, [400], "{chunks:?}");
        }
    });
}

#[test]
fn what_is_no_http_is_refused() {
    run(async {
        let setup = Setup::open().await;
        let address = setup.endpoint.address();
        for bytes in [
            "\x16\x03\x01\x02\x00\x01\x00\x01\x7c\x03\x03",
            "GET /hello\r\n\r\n",
            "GET  /hello HTTP/1.1\r\n\r\n",
            "GET /hello HTTP/1.2\r\nHost: one.localhost\r\n\r\n",
            "GET /hello HTTP/2.0\r\nHost: one.localhost\r\n\r\n",
            "G\0T /hello HTTP/1.1\r\nHost: one.localhost\r\n\r\n",
            "GET /he llo HTTP/1.1\r\nHost: one.localhost\r\n\r\n",
            "PRI * HTTP/2.0\r\n\r\nSM\r\n\rX",
            "SSH-2.0-OpenSSH_9.9\r\n\r\n",
        ] {
            let answer = send(address, bytes).await;
            assert!(answer.is_none_or(|answer| answer.status == 400), "{bytes:?}");
        }
        // The preface of HTTP/2, and then something else.
        let text =
            exchange(address, "PRI * HTTP/2.0\r\n\r\nSM\r\n\r\nGET / HTTP/1.1\r\n\r\n").await;
        assert!(!text.contains("HTTP/1.1"), "{text:?}");
        assert_eq!(get(address, "one.localhost", "/hello", "").await.status, 200);
    });
}

#[test]
fn headers_that_are_too_many_or_too_large_are_refused() {
    run(async {
        let setup = Setup::open().await;
        let address = setup.endpoint.address();
        let many: String = (0..80).map(|number| format!("X-{number}: a\r\n")).collect();
        assert_eq!(get(address, "one.localhost", "/hello", &many).await.status, 200);
        let many: String = (0..200).map(|number| format!("X-{number}: a\r\n")).collect();
        assert_eq!(get(address, "one.localhost", "/hello", &many).await.status, 431);
        let large = format!("X-Large: {}\r\n", "a".repeat(60 << 10));
        assert_eq!(get(address, "one.localhost", "/hello", &large).await.status, 200);
        let larger = format!("X-Large: {}\r\n", "a".repeat(70 << 10));
        assert_eq!(get(address, "one.localhost", "/hello", &larger).await.status, 431);
        // The line is looked at before the headers have come.
        let path = format!("/{}", "a".repeat(1 << 20));
        let head = format!("GET {path} HTTP/1.1\r\nHost: one.localhost\r\n\r\n");
        let answer = send(address, head).await;
        assert!(answer.is_none_or(|answer| matches!(answer.status, 414 | 431)));
        // A line that never ends.
        let mut stream = TcpStream::connect(address).await.unwrap();
        let mut sent = 0;
        while stream.write_all(&[b'a'; 64 << 10]).await.is_ok() {
            sent += 64 << 10;
            assert!(sent < 32 << 20, "an endless line is read");
        }
        assert_eq!(get(address, "one.localhost", "/hello", "").await.status, 200);
    });
}

#[test]
fn a_client_of_http_2_with_headers_that_are_too_large_is_refused() {
    run(async {
        let setup = Setup::open().await;
        let mut sender = client::h2(setup.endpoint.address()).await;
        for _ in 0..2 {
            let mut large = request("http://one.localhost/hello");
            let value = "a".repeat(15 << 10).parse().unwrap();
            for number in 0..5 {
                let name: hyper::header::HeaderName = format!("x-{number}").parse().unwrap();
                large.headers_mut().insert(name, hyper::header::HeaderValue::clone(&value));
            }
            let answer = sender.send_request(large).await;
            assert!(answer.is_err() || answer.unwrap().status() == 431);
        }
        let answer = sender.send_request(request("http://one.localhost/hello")).await;
        assert_eq!(client::read(answer.unwrap()).await.0, 200);
    });
}

/// An endpoint that has little patience, and enough of it for a client that sends what it has to.
async fn impatient() -> Setup {
    let mut limits = EndpointLimits::default();
    limits.header_timeout = Duration::from_secs(6);
    limits.answer_timeout = Duration::from_secs(6);
    Setup::new(open().limits(limits)).await
}

/// What comes until the connection is closed, after these bytes and then nothing.
async fn after(address: SocketAddr, bytes: &str) -> String {
    let mut stream = TcpStream::connect(address).await.unwrap();
    stream.write_all(bytes.as_bytes()).await.unwrap();
    let mut answer = Vec::new();
    let _ = stream.read_to_end(&mut answer).await;
    String::from_utf8_lossy(&answer).into_owned()
}

#[test]
fn a_connection_on_which_no_request_comes_to_its_end_is_closed() {
    run(async {
        let setup = impatient().await;
        let address = setup.endpoint.address();
        let mut all = JoinSet::new();
        for begun in
            ["", "G", "GET /hello HTTP/1.1\r\nHost: one.local", "PRI * HTTP/2.0\r\n\r\nSM\r\n"]
        {
            all.spawn(async move {
                assert_eq!(after(address, begun).await, "", "{begun}");
            });
        }
        // Nor is one kept for ever after a request, or one of HTTP/2 that asks for nothing.
        all.spawn(async move {
            let kept = "GET /hello HTTP/1.1\r\nHost: one.localhost\r\n\r\n";
            assert!(after(address, kept).await.ends_with("hello\n"));
        });
        all.spawn(async move {
            after(address, "PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n\0\0\0\x04\0\0\0\0\0").await;
        });
        all.join_all().await;
    });
}

#[test]
fn a_line_that_comes_byte_by_byte_is_not_waited_for() {
    run(async {
        let setup = impatient().await;
        let mut stream = TcpStream::connect(setup.endpoint.address()).await.unwrap();
        let mut sent = 0;
        // Each byte comes long before the patience is over, all of them do not.
        while stream.write_all(b"a").await.is_ok() {
            sent += 1;
            assert!(sent < 1000, "the client is waited for");
            tokio::time::sleep(Duration::from_millis(20)).await;
        }
    });
}

#[test]
fn a_body_that_does_not_come_is_not_waited_for() {
    run(async {
        let setup = impatient().await;
        let head =
            "POST /length HTTP/1.1\r\nHost: one.localhost\r\nContent-Length: 100\r\n\r\nhalf";
        let text = after(setup.endpoint.address(), head).await;
        assert!(text.starts_with("HTTP/1.1 408"), "{text}");
        assert!(text.contains("\"stage\":\"request\""), "{text}");
        setup.guest.until_held(0).await;
    });
}

#[test]
fn limits_that_no_clock_reaches_are_none_and_those_that_let_nobody_in_are_refused() {
    run(async {
        let mut limits = EndpointLimits::default();
        limits.header_timeout = Duration::MAX;
        limits.wake_timeout = Duration::MAX;
        limits.connect_timeout = Duration::MAX;
        limits.answer_timeout = Duration::MAX;
        let setup = Setup::new(open().limits(limits.clone())).await;
        let address = setup.endpoint.address();
        assert_eq!(get(address, "one.localhost", "/hello", "").await.status, 200);
        let mut sender = client::h2(address).await;
        let answer = sender.send_request(request("http://one.localhost/hello")).await;
        assert_eq!(client::read(answer.unwrap()).await.0, 200);
        let nothing: [fn(&mut EndpointLimits); 4] = [
            |limits| limits.connections = 0,
            |limits| limits.session_requests = 0,
            |limits| limits.headers = 0,
            |limits| limits.header_timeout = Duration::ZERO,
        ];
        for change in nothing {
            let mut limits = limits.clone();
            change(&mut limits);
            let guests = crate::Guests::default();
            let refused =
                dormouse::Endpoint::bind("127.0.0.1:0", guests, open().limits(limits)).await;
            assert_eq!(refused.unwrap_err().kind(), &dormouse::ErrorKind::Config);
        }
        let taken = dormouse::Endpoint::bind(address, crate::Guests::default(), open()).await;
        let taken = taken.unwrap_err().to_string();
        assert!(taken.contains(&address.to_string()) && taken.contains("another port"), "{taken}");
    });
}

/// An application that says this to whoever asks, and then neither speaks nor listens.
async fn mute(words: &'static str) -> App {
    App::serve(move |mut stream| async move {
        let _ = stream.read(&mut [0; 1024]).await;
        let _ = stream.write_all(words.as_bytes()).await;
        pending::<()>().await;
    })
    .await
}

#[test]
fn a_client_that_is_gone_keeps_no_session_awake_whose_application_is_silent() {
    run(async {
        let events = "HTTP/1.1 200 OK\r\nContent-Type: text/event-stream\r\nTransfer-Encoding: chunked\r\n\r\n";
        let tunnel =
            "HTTP/1.1 101 Switching Protocols\r\nConnection: upgrade\r\nUpgrade: x\r\n\r\n";
        let mut limits = EndpointLimits::default();
        limits.header_timeout = Duration::from_secs(5);
        // The one has begun to say more, so that nobody reads what comes; to the other nobody listens.
        let upgrade = "Connection: upgrade\r\nUpgrade: x\r\n";
        for (words, headers, more) in [(events, "", 2), (tunnel, upgrade, 64 << 20)] {
            let setup = Setup::with_app(mute(words).await, open().limits(limits.clone())).await;
            let mut client = TcpStream::connect(setup.endpoint.address()).await.unwrap();
            let request = format!("GET / HTTP/1.1\r\nHost: one.localhost\r\n{headers}\r\n");
            client.write_all(request.as_bytes()).await.unwrap();
            client.readable().await.unwrap();
            let more = vec![b'\n'; more];
            let _ = timeout(Duration::from_secs(2), client.write_all(&more)).await;
            assert_eq!(*setup.guest.held.borrow(), 1);
            // With something unread, so that it is a reset.
            drop(client);
            setup.guest.until_held(0).await;
        }
    });
}

#[test]
fn no_more_clients_are_served_at_a_time_than_may_be() {
    run(async {
        let mut limits = EndpointLimits::default();
        limits.connections = 2;
        let setup = Setup::new(open().limits(limits)).await;
        let address = setup.endpoint.address();
        let idle = [
            TcpStream::connect(address).await.unwrap(),
            TcpStream::connect(address).await.unwrap(),
        ];
        let third = tokio::spawn(async move { get(address, "one.localhost", "/hello", "").await });
        tokio::time::sleep(Duration::from_millis(200)).await;
        assert!(!third.is_finished());
        drop(idle);
        let answer: Answer = third.await.unwrap();
        assert_eq!(answer.status, 200);

        // What was a request and is a tunnel has its place, too.
        let tunnel =
            "HTTP/1.1 101 Switching Protocols\r\nConnection: upgrade\r\nUpgrade: x\r\n\r\n";
        let mut limits = EndpointLimits::default();
        limits.connections = 1;
        let setup = Setup::with_app(mute(tunnel).await, open().limits(limits)).await;
        let address = setup.endpoint.address();
        let mut tunnel = TcpStream::connect(address).await.unwrap();
        let asked =
            "GET / HTTP/1.1\r\nHost: one.localhost\r\nConnection: upgrade\r\nUpgrade: x\r\n\r\n";
        tunnel.write_all(asked.as_bytes()).await.unwrap();
        tunnel.readable().await.unwrap();
        let second = tokio::spawn(async move { exchange(address, "nonsense\r\n\r\n").await });
        tokio::time::sleep(Duration::from_millis(200)).await;
        assert!(!second.is_finished());
        drop(tunnel);
        assert!(second.await.unwrap().contains("400"));
    });
}

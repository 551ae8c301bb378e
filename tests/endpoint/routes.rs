//! Which session and which port a request reaches, and what the application sees of it.

use std::sync::atomic::Ordering::SeqCst;

use dormouse::{Endpoint, EndpointOptions, ErrorKind};

use crate::app::App;
use crate::client::{get, send};
use crate::{Guests, Setup, open, run};

#[test]
fn a_request_reaches_its_session_by_host_name() {
    run(async {
        let setup = Setup::open().await;
        let address = setup.endpoint.address();
        let answer = get(address, "one.localhost", "/hello", "").await;
        assert_eq!((answer.status, answer.body.as_str()), (200, "hello\n"));
        let url = format!("http://one.localhost:{}/", address.port());
        assert_eq!(setup.endpoint.url("one"), url);
        let answer = get(address, &format!("ONE.LocalHost:{}", address.port()), "/hello", "").await;
        assert_eq!(answer.status, 200);
    });
}

#[test]
fn a_request_reaches_its_session_by_path() {
    run(async {
        let setup = Setup::open().await;
        let address = setup.endpoint.address();
        for host in ["localhost", "127.0.0.1", "[::1]:80"] {
            let answer = get(address, host, "/sessions/one/hello", "").await;
            assert_eq!((answer.status, answer.body.as_str()), (200, "hello\n"), "{host}");
        }
        let answer = get(address, "localhost", "/sessions/one/a/b?c=/sessions/two", "").await;
        assert_eq!(answer.json()["target"], "/a/b?c=/sessions/two");
        assert_eq!(answer.json()["headers"]["x-forwarded-prefix"], "/sessions/one");
        for (path, seen) in [("/sessions/one", "/"), ("/sessions/one?a", "/?a")] {
            assert_eq!(get(address, "localhost", path, "").await.json()["target"], seen);
        }
    });
}

#[test]
fn a_request_chooses_its_port_by_a_header() {
    run(async {
        let setup = Setup::open().await;
        let address = setup.endpoint.address();
        let other = App::saying(b"HTTP/1.1 200 OK\r\nContent-Length: 5\r\n\r\nother").await;
        let port = format!("X-aws-proxy-port: {}\r\n", other.port());
        assert_eq!(get(address, "one.localhost", "/hello", &port).await.body, "other");
        assert_eq!(get(address, "localhost", "/sessions/one/", &port).await.body, "other");
        let twice = format!("{port}{port}");
        for port in
            ["0", "65536", "+80", "-1", "080", "", "80 80", "0x50", "http", "\u{e9}", "8080,8080"]
        {
            let header = format!("X-Aws-Proxy-Port: {port}\r\n");
            let answer = get(address, "one.localhost", "/hello", &header).await;
            assert_eq!((answer.status, answer.stage().as_str()), (400, "request"), "{port:?}");
        }
        assert_eq!(get(address, "one.localhost", "/hello", &twice).await.status, 400);
    });
}

#[test]
fn an_application_sees_what_it_was_asked_and_nothing_of_the_hop_before() {
    run(async {
        let setup = Setup::open().await;
        let headers = "X-Kept: a\r\nX-Kept: b\r\nX-Private: c\r\nConnection: X-Private, keep-alive, Host\r\n\
             Keep-Alive: timeout=5\r\nProxy-Connection: d\r\nProxy-Authorization: e\r\nTE: gzip\r\n\
             X-AWS-Proxy-Whatever: f\r\nX-Forwarded-For: 6.6.6.6\r\nForwarded: for=6.6.6.6\r\n\
             X-Real-IP: 6.6.6.6\r\nX-Forwarded-Prefix: /g\r\nCookie: h=1\r\nAuthorization: Basic aTpq\r\n\
             X-Forwarded-User: admin\r\nX-Forwarded-Ssl: on\r\nX_Forwarded_For: 6.6.6.6\r\nX_Real_IP: 6.6.6.6\r\n\
             Upgrade: h2c\r\nHTTP2-Settings: AAMAAABkAAQAAP__\r\n";
        let answer =
            get(setup.endpoint.address(), "one.localhost:99", "/a%2Fb//c/../d?e=f%20", headers);
        let seen = answer.await.json();
        assert_eq!(seen["target"], "/a%2Fb//c/../d?e=f%20");
        let expected = serde_json::json!({
            "host": "one.localhost:99",
            "x-kept": "a | b",
            "cookie": "h=1",
            "authorization": "Basic aTpq",
            "forwarded": "for=127.0.0.1;proto=http;host=\"one.localhost:99\"",
            "x-forwarded-for": "127.0.0.1",
            "x-forwarded-host": "one.localhost:99",
            "x-forwarded-proto": "http",
            "via": "1.1 dormouse",
        });
        assert_eq!(seen["headers"], expected);
    });
}

#[test]
fn a_client_sees_what_the_application_says_and_nothing_of_the_hop_before() {
    run(async {
        let words = b"HTTP/1.1 203 Whatever\r\nContent-Length: 2\r\nX-Kept: a\r\nX-Private: b\r\n\
            Connection: X-Private, close\r\nKeep-Alive: timeout=5\r\nProxy-Authenticate: Basic\r\n\
            Set-Cookie: a=1\r\nSet-Cookie: b=2\r\nUpgrade: h2c\r\n\r\nab";
        let setup = Setup::with_app(App::saying(words).await, crate::open()).await;
        let answer = get(setup.endpoint.address(), "one.localhost", "/", "").await;
        assert_eq!((answer.status, answer.body.as_str()), (203, "ab"));
        assert_eq!((answer.header("x-kept"), answer.header("x-private")), (Some("a"), None));
        assert_eq!(answer.header("set-cookie"), Some("a=1"));
        for name in ["keep-alive", "proxy-authenticate", "upgrade"] {
            assert_eq!(answer.header(name), None, "{name}");
        }
    });
}

#[test]
fn what_leads_to_no_session_is_not_found() {
    run(async {
        let setup = Setup::open().await;
        let address = setup.endpoint.address();
        let nobodys = [
            ("two.localhost", "/hello"),
            ("a.one.localhost", "/hello"),
            (".localhost", "/hello"),
            ("localhost", "/hello"),
            ("localhost", "/sessions/two/hello"),
            ("localhost", "/sessions/"),
            ("localhost", "/sessions"),
            // Somebody's page whose name was made to mean this machine.
            ("evil.example", "/sessions/one/hello"),
            ("localhost.evil.example", "/sessions/one/hello"),
            ("one.localhost.evil.example", "/hello"),
            ("evillocalhost", "/sessions/one/hello"),
        ];
        for (host, path) in nobodys {
            let answer = get(address, host, path, "").await;
            assert_eq!((answer.status, answer.stage().as_str()), (404, "route"), "{host}{path}");
            assert_eq!(answer.header("content-type"), Some("application/json"));
        }
        assert_eq!(setup.guest.wakes.load(SeqCst), 0);
    });
}

#[test]
fn a_session_that_need_not_be_named_has_what_nobody_else_is_asked_for() {
    run(async {
        let setup = Setup::new(open().default_session("one")).await;
        let address = setup.endpoint.address();
        for (host, path, status) in [
            ("localhost", "/hello", 200),
            ("127.0.0.1", "/hello?a=b", 200),
            ("one.localhost", "/hello", 200),
            ("localhost", "/sessions/one/hello", 200),
            ("localhost", "/sessions/two/hello", 404),
            ("two.localhost", "/hello", 404),
            ("evil.example", "/hello", 404),
        ] {
            assert_eq!(get(address, host, path, "").await.status, status, "{host}{path}");
        }
        let by_path_alone = open().default_session("one").path_prefix("/".to_owned());
        for options in [open().default_session("a.b"), open().default_port(0), by_path_alone] {
            let refused = Endpoint::bind("127.0.0.1:0", Guests::default(), options).await;
            assert_eq!(refused.unwrap_err().kind(), &ErrorKind::Config);
        }
    });
}

#[test]
fn paths_that_could_be_taken_for_those_of_another_session_are_refused() {
    run(async {
        let setup = Setup::open().await;
        let address = setup.endpoint.address();
        let confused = [
            ("/sessions/one/../two/x", 400),
            ("/sessions/one/..", 400),
            ("/sessions/one/./x", 400),
            ("/sessions/one/a/../../../two", 400),
            ("/sessions/one/%2e%2e/two/x", 400),
            ("/sessions/one/.%2E/two/x", 400),
            ("/sessions/one/..%2ftwo/x", 400),
            ("/sessions/one/%2e%2e%5Ctwo/x", 400),
            ("/sessions/one/..\\two\\x", 400),
            ("/sessions//one/x", 404),
            ("//sessions/one/x", 404),
            ("/sessions/./one/x", 404),
            ("/./sessions/one/x", 404),
            ("/sessions/../sessions/one/x", 404),
            ("/Sessions/one/x", 404),
            ("/sessions/ONE/x", 404),
            ("/sessions/%6fne/x", 404),
            ("/sessions/one%2fx", 404),
            ("/sessions/one%2f..%2ftwo", 404),
            ("/sessions/one\\x", 404),
            ("/sessions/one;a=b/x", 404),
            ("/sessions%2fone/x", 404),
        ];
        for (path, status) in confused {
            let answer = get(address, "localhost", path, "").await;
            assert_eq!(answer.status, status, "{path}: {answer:?}");
        }
        assert_eq!(setup.guest.wakes.load(SeqCst), 0);
        // These are the application's to read, and mean no other session to anybody.
        for path in ["//etc/passwd", "/a%2fb", "/a//b", "/...", "/a?b=/../c", "/%252e%252e/"] {
            let answer = get(address, "localhost", &format!("/sessions/one{path}"), "").await;
            assert_eq!(answer.json()["target"], path);
        }
    });
}

#[test]
fn a_target_and_a_host_that_differ_are_refused() {
    run(async {
        let setup = Setup::open().await;
        setup.add("two", setup.app.port());
        let address = setup.endpoint.address();
        let heads = [
            ("GET http://one.localhost/hello HTTP/1.1\r\nHost: one.localhost", 200),
            ("GET http://one.localhost/hello HTTP/1.1\r\nHost: ONE.localhost", 200),
            ("GET http://one.localhost/hello HTTP/1.1", 200),
            ("GET http://two.localhost/hello HTTP/1.1\r\nHost: one.localhost", 400),
            ("GET http://one.localhost/hello HTTP/1.1\r\nHost: one.localhost:80", 400),
            ("GET http://one.localhost@two.localhost/hello HTTP/1.1\r\nHost: one.localhost", 400),
            ("GET http://u@one.localhost/hello HTTP/1.1\r\nHost: u@one.localhost", 400),
            ("GET ftp://one.localhost/hello HTTP/1.1\r\nHost: one.localhost", 400),
            ("GET /hello HTTP/1.1\r\nHost: one.localhost\r\nHost: one.localhost", 400),
            ("GET /hello HTTP/1.1\r\nHost: one.localhost\r\nHost: two.localhost", 400),
            ("GET /hello HTTP/1.1\r\nHost: one.localhost, two.localhost", 400),
            ("GET /hello HTTP/1.1\r\nHost: one.localhost/sessions", 400),
            ("GET /hello HTTP/1.1\r\nHost: one.localhost:x", 400),
            ("GET /hello HTTP/1.1\r\nHost: one.localhost:99999", 400),
            ("GET /hello HTTP/1.1\r\nHost: ", 400),
            ("GET /hello HTTP/1.1", 400),
            ("CONNECT one.localhost:80 HTTP/1.1\r\nHost: one.localhost:80", 400),
            ("GET * HTTP/1.1\r\nHost: one.localhost", 400),
            ("OPTIONS * HTTP/1.1\r\nHost: one.localhost", 200),
            // A host name was not asked for then.
            ("GET /sessions/one/hello HTTP/1.0", 200),
        ];
        for (head, status) in heads {
            let answer = send(address, format!("{head}\r\nConnection: close\r\n\r\n")).await;
            assert_eq!(answer.map(|answer| answer.status), Some(status), "{head}");
        }
    });
}

#[test]
fn an_endpoint_may_have_another_domain_and_other_paths_or_none() {
    run(async {
        let options = crate::open().domain("Vms.Example.").path_prefix("/v1/vm/".to_owned());
        let setup = Setup::new(options).await;
        let address = setup.endpoint.address();
        assert_eq!(get(address, "one.vms.example", "/hello", "").await.status, 200);
        assert_eq!(get(address, "one.localhost", "/hello", "").await.status, 404);
        assert_eq!(get(address, "vms.example", "/v1/vm/one/hello", "").await.status, 200);
        assert_eq!(get(address, "vms.example", "/sessions/one/hello", "").await.status, 404);
        let setup = Setup::new(crate::open().path_prefix(None)).await;
        let address = setup.endpoint.address();
        assert_eq!(get(address, "localhost", "/sessions/one/hello", "").await.status, 404);
        assert_eq!(get(address, "one.localhost", "/sessions/one/hello", "").await.status, 200);

        for prefix in ["sessions/", "/sessions", "/a//", "/a b/", "/%61/"] {
            let options = crate::open().path_prefix(prefix.to_owned());
            assert_eq!(refused(options).await, ErrorKind::Config, "{prefix}");
        }
        for domain in ["", "a..b", "-a", "a_b", "a/b"] {
            assert_eq!(refused(crate::open().domain(domain)).await, ErrorKind::Config, "{domain}");
        }
    });
}

async fn refused(options: EndpointOptions) -> ErrorKind {
    let nobody = |_: &str| None;
    let endpoint = Endpoint::bind("127.0.0.1:0", nobody, options).await;
    endpoint.expect_err("no endpoint").kind().clone()
}

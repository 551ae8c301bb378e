//! Servers and clients that people use, with an endpoint between them: Python's http.server, websockets and grpc, and
//! nginx; curl, tungstenite, and hyper as browsers and gRPC's clients are. Each finds its guest asleep.

#[path = "../endpoint/client.rs"]
#[allow(dead_code, reason = "more is said to servers that are not in a guest")]
mod client;
mod death;

use std::fs;
use std::net::SocketAddr;
use std::time::Duration;

use dormouse::{
    AgentConfig, Cmdline, Endpoint, EndpointOptions, Entrypoint, Hook, HookName, MicroVm, Session,
    SessionOptions, SessionState, Sessions, TlsIdentity, Token, TokenKeys, TokenPorts, VmConfig,
};
use http_body_util::BodyExt;
use hyper::body::{Bytes, Frame};
use hyper::header::HeaderValue;
use hyper::{Request, Version};
use tokio::net::TcpStream;
use tokio::task::{JoinSet, block_in_place};
use tokio_tungstenite::client_async;
use tokio_tungstenite::tungstenite::client::IntoClientRequest;

use crate::agent::block_on;
use crate::{PATIENCE, Release, Scratch, Transcript, debian_image, programs};

/// A guest with all the servers, behind an endpoint without TLS and one with it.
struct Setup {
    session: Session,
    token: Token,
    plain: Endpoint,
    tls: Endpoint,
    trusted: String,
    scratch: Scratch,
}

impl Setup {
    async fn start() -> Self {
        let scratch = Scratch::new("endpoint");
        let sessions = Sessions::open(scratch.0.join("sessions")).await.unwrap();
        let up = Hook::command(["sh", "-c", "until [ -e /run/up ]; do sleep 0.1; done"]);
        let agent = AgentConfig::new()
            .entrypoint(Entrypoint::new(["python3", "-c", include_str!("endpoint/servers.py")]))
            .hook(HookName::Ready, up.timeout(PATIENCE));
        let transcript = Transcript::default();
        let config = VmConfig::new(Release::Linux6_12.kernel())
            .cmdline(Cmdline::default().push("quiet").unwrap())
            .memory_mib(384)
            .console(transcript.clone())
            .agent(agent);
        let vm = MicroVm::create(debian_image::unpacked("python").await.configure(config)).unwrap();
        let started = sessions.start_with_id("one", vm, SessionOptions::new()).await;
        let session = started.unwrap_or_else(|error| panic!("{error:?}\n{}", transcript.text()));

        let keys = TokenKeys::generate().unwrap();
        let token = keys.mint("one", TokenPorts::ALL, Duration::from_secs(3600)).unwrap();
        let options = EndpointOptions::new().tokens(keys);
        let identity = TlsIdentity::self_signed("localhost").unwrap();
        let trusted = identity.certificate_pem().to_owned();
        let with_tls = options.clone().tls(identity);
        let plain = Endpoint::bind("127.0.0.1:0", sessions.clone(), options).await.unwrap();
        let tls = Endpoint::bind("127.0.0.1:0", sessions, with_tls).await.unwrap();
        Self { session, token, plain, tls, trusted, scratch }
    }

    fn address(&self) -> SocketAddr {
        self.plain.address()
    }

    /// Puts the guest to sleep. Who comes next wakes it.
    async fn sleep(&self) {
        self.session.suspend().await.unwrap();
        assert_eq!(self.session.state(), SessionState::Suspended);
    }

    /// The request, for a port of the guest, with the token.
    fn to<B>(&self, port: u16, mut request: Request<B>) -> Request<B> {
        let headers = request.headers_mut();
        headers.insert("x-aws-proxy-port", port.into());
        headers.insert("x-aws-proxy-auth", HeaderValue::from_str(self.token.as_str()).unwrap());
        request
    }

    /// What curl prints of a URL, for a port of the guest. It fails where the status is no good one.
    fn curl(&self, port: u16, url: &str, arguments: &[&str]) -> String {
        let mut curl = programs::command("curl");
        curl.args(["-q", "-sS", "--noproxy", "*", "--fail-with-body"])
            .args(["-H", &format!("X-aws-proxy-port: {port}")])
            .args(["-H", &format!("X-aws-proxy-auth: {}", self.token.as_str())])
            .args(arguments)
            .arg(url);
        let output = block_in_place(|| curl.output().unwrap());
        assert!(output.status.success(), "{url}: {output:?}");
        String::from_utf8(output.stdout).unwrap()
    }
}

#[test]
fn clients_and_servers_that_people_use_meet_and_each_request_finds_the_guest_that_slept() {
    block_on(async {
        let setup = Setup::start().await;
        let server = setup.session.exec("cat", ["/proc/sys/kernel/random/boot_id"]).await.unwrap();
        curl_asks_pythons_server(&setup).await;
        browsers_keep_their_connections(&setup).await;
        http_2_reaches_nginx(&setup).await;
        a_websocket_is_heard(&setup).await;
        grpc_is_answered(&setup).await;
        let same = setup.session.exec("cat", ["/proc/sys/kernel/random/boot_id"]).await.unwrap();
        assert_eq!(same.text(), server.text());
        // However many asked at once, each sleep was ended once.
        let metering = setup.session.metering();
        assert_eq!((metering.suspends, metering.resumes), (15, 15));
        setup.session.terminate().await.unwrap();
    });
}

async fn curl_asks_pythons_server(setup: &Setup) {
    let page = "served by Python\n";
    let url = setup.plain.url("one");
    let version = ["-w", "%{http_version}"];
    setup.sleep().await;
    assert_eq!(setup.curl(8000, &url, &version), format!("{page}1.1"));
    setup.sleep().await;
    let h2c = ["--http2-prior-knowledge", "-w", "%{http_version}"];
    assert_eq!(setup.curl(8000, &url, &h2c), format!("{page}2"));
    // By TLS, where both sides speak HTTP/2.
    let trusted = setup.scratch.0.join("trusted.pem");
    fs::write(&trusted, &setup.trusted).unwrap();
    let trusted = ["--cacert", trusted.to_str().unwrap(), "-w", "%{http_version}"];
    setup.sleep().await;
    assert_eq!(setup.curl(8000, &setup.tls.url("one"), &trusted), format!("{page}2"));
    // By the path, at an address.
    let url = format!("http://{}/sessions/one/index.html", setup.address());
    setup.sleep().await;
    assert_eq!(setup.curl(8000, &url, &[]), page);
    // curl waits for `100 Continue` before it sends this much.
    let large = setup.scratch.0.join("large");
    fs::write(&large, vec![b'x'; 2 << 20]).unwrap();
    let body = format!("@{}", large.display());
    let url = setup.plain.url("one");
    setup.sleep().await;
    assert_eq!(setup.curl(8001, &url, &["--data-binary", &body]), "2097152\n");
    let refused = client::get(setup.address(), "one.localhost", "/", "").await;
    assert_eq!((refused.status, refused.stage().as_str()), (403, "token"));
}

async fn browsers_keep_their_connections(setup: &Setup) {
    let mut senders = Vec::new();
    for _ in 0..6 {
        senders.push(client::h1(setup.address()).await);
    }
    for _ in 0..3 {
        setup.sleep().await;
        let asked = senders.into_iter().map(|mut sender| {
            let request = setup.to(80, client::request("/"));
            async move {
                sender.ready().await.unwrap();
                let answer = sender.send_request(request).await.unwrap();
                assert!(answer.headers()["server"].to_str().unwrap().starts_with("nginx/"));
                let (status, page) = client::read(answer).await;
                assert_eq!(status, 200);
                assert!(String::from_utf8_lossy(&page).contains("<h1>Welcome to nginx!</h1>"));
                sender
            }
        });
        senders = asked.collect::<JoinSet<_>>().join_all().await;
    }
}

async fn http_2_reaches_nginx(setup: &Setup) {
    let sender = client::h2(setup.address()).await;
    for _ in 0..2 {
        setup.sleep().await;
        let mut streams = JoinSet::new();
        for number in 0..20 {
            let mut sender = sender.clone();
            // Half of them are asked for by HTTP/2 in the guest, too.
            let port = 80 + number % 2;
            let mut request = setup.to(port, client::request("http://one.localhost/"));
            if port == 81 {
                let force = HeaderValue::from_static("true");
                request.headers_mut().insert("x-aws-proxy-force-h2", force);
            }
            streams.spawn(async move {
                let answer = sender.send_request(request).await.unwrap();
                assert_eq!(answer.version(), Version::HTTP_2);
                let (status, page) = client::read(answer).await;
                assert_eq!(status, 200, "{port}: {page:?}");
                assert!(String::from_utf8_lossy(&page).contains("<h1>Welcome to nginx!</h1>"));
            });
        }
        streams.join_all().await;
    }
}

async fn a_websocket_is_heard(setup: &Setup) {
    let url = format!("ws://one.localhost:{}/", setup.address().port());
    let own = "lambda-microvms, lambda-microvms.port.8765, lambda-microvms.authentication";
    let own = format!("{own}.{}", setup.token.as_str());
    for _ in 0..2 {
        let mut request = url.as_str().into_client_request().unwrap();
        // As a page in a browser has to say it.
        request.headers_mut().insert("sec-websocket-protocol", own.parse().unwrap());
        setup.sleep().await;
        let stream = TcpStream::connect(setup.address()).await.unwrap();
        let (mut socket, _) = client_async(request, stream).await.unwrap();
        client::talk(&mut socket).await;
        socket.close(None).await.unwrap();
    }
    // Who is in this process needs no token, and no endpoint.
    setup.sleep().await;
    let stream = setup.session.connect(8765).await.unwrap();
    let (mut socket, _) = client_async(url, stream).await.unwrap();
    client::talk(&mut socket).await;
}

/// A message of gRPC that is not compressed.
fn message(bytes: &[u8]) -> Bytes {
    let mut message = vec![0];
    message.extend((bytes.len() as u32).to_be_bytes());
    message.extend(bytes);
    message.into()
}

async fn grpc_is_answered(setup: &Setup) {
    let mut sender = client::h2(setup.address()).await;
    let call = |method: &str| {
        let (sent, request) = client::upload(&format!("http://one.localhost/test.Echo/{method}"));
        let mut request = setup.to(50051, request);
        let headers = request.headers_mut();
        headers.insert("content-type", HeaderValue::from_static("application/grpc"));
        headers.insert("te", HeaderValue::from_static("trailers"));
        (sent, request)
    };
    setup.sleep().await;
    let (sent, request) = call("Once");
    let hello = message(b"hello");
    sent.send(Frame::data(hello.clone())).await.unwrap();
    drop(sent);
    let answer = sender.send_request(request).await.unwrap();
    assert_eq!(answer.headers()["content-type"], "application/grpc");
    let answer = answer.into_body().collect().await.unwrap();
    let trailers = answer.trailers().unwrap().clone();
    assert_eq!(trailers["grpc-status"], "0");
    assert_eq!(trailers["x-length"], "5");
    assert_eq!(answer.to_bytes(), hello);

    // A stream each way: what is said is heard before more is said. The endpoint's connection of before is gone.
    setup.sleep().await;
    let (sent, request) = call("Each");
    sent.send(Frame::data(message(&[0; 100]))).await.unwrap();
    let mut body = sender.send_request(request).await.unwrap().into_body();
    for number in 0..10 {
        let mut heard = Vec::new();
        while heard.len() < 105 {
            heard.extend(body.frame().await.unwrap().unwrap().into_data().unwrap());
        }
        assert_eq!(heard, message(&[number; 100]));
        sent.send(Frame::data(message(&[number + 1; 100]))).await.unwrap();
    }
    drop(sent);
    let rest = body.collect().await.unwrap();
    assert_eq!(rest.trailers().unwrap()["grpc-status"], "0");
    assert_eq!(rest.to_bytes(), message(&[10; 100]));

    let (sent, request) = call("Refuse");
    sent.send(Frame::data(hello)).await.unwrap();
    drop(sent);
    let answer = sender.send_request(request).await.unwrap();
    // It has no body, and so its trailers are headers.
    let headers = answer.headers().clone();
    let body = answer.into_body().collect().await.unwrap();
    let trailers = body.trailers().unwrap_or(&headers);
    assert_eq!(trailers["grpc-status"], "7");
    assert_eq!(trailers["grpc-message"], "not for you");
}

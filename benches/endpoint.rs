//! What the endpoint costs: an answer of 1 KiB from a server of hyper's, asked for directly by TCP, and through an
//! endpoint. The endpoint reaches the server as it reaches one in a guest, by a UNIX socket; for comparison, by TCP too.
//! Clients, endpoint and server share this process and its two threads, as they do with proxies that do less, which say what
//! of the cost is any proxy's.
//!
//! `cargo bench --bench endpoint --features endpoint` prints a table, with `-- --json` one JSON object a line.

#[path = "endpoint/proxies.rs"]
mod proxies;
mod report;

use std::convert::Infallible;
use std::net::SocketAddr;
use std::sync::Arc;
use std::time::{Duration, Instant};

use dormouse::{
    Awake, Endpoint, EndpointOptions, TokenKeys, Upstream, UpstreamFuture, UpstreamStream,
    Upstreams,
};
use http_body_util::{BodyExt, Empty, Full};
use hyper::body::{Bytes, Incoming};
use hyper::client::conn::http1::{SendRequest, handshake};
use hyper::server::conn::http1;
use hyper::service::service_fn;
use hyper::{Request, Response};
use hyper_util::rt::TokioIo;
use report::{Bar, Metric, Unit, micros, report};
use tokio::io::{AsyncRead, AsyncWrite};
use tokio::net::{TcpStream, UnixStream};
use tokio::runtime::Builder;

/// Connections of clients that ask at once.
const CLIENTS: usize = 32;
const WINDOW: Duration = Duration::from_millis(500);
const ROUNDS: usize = 15;
/// Requests of one client, one after the other, in a turn.
const TURN: usize = 500;
const TURNS: usize = 12;
const SIZE: usize = 1024;

fn main() {
    let runtime = Builder::new_multi_thread().worker_threads(2).enable_all().build();
    runtime.expect("a runtime").block_on(async {
        let server = proxies::listen(serve).await;
        let keys = TokenKeys::generate().expect("keys");
        let open = EndpointOptions::new().without_tokens();
        let locked = EndpointOptions::new().tokens(keys.clone());
        let by_unix = endpoint(Guest::Unix, open.clone()).await;
        let with_token = endpoint(Guest::Unix, locked).await;
        let by_tcp = endpoint(Guest::Tcp(server), open).await;
        let token = keys.mint("guest", 8080, Duration::from_secs(3600)).expect("a token");
        let token = Some(token.as_str().to_owned());
        let direct = Target::new(server, None);
        let bytes = Target::new(proxies::copies_bytes().await, None);
        let requests = Target::new(proxies::passes_requests().await, None);
        let ways = [
            Way("an endpoint without tokens", Target::new(by_unix.address(), None), true),
            Way("an endpoint with tokens", Target::new(with_token.address(), token), true),
            Way("an endpoint, and by TCP from there", Target::new(by_tcp.address(), None), false),
            Way("a proxy that copies bytes", bytes, false),
            Way("hyper's server and client alone", requests, false),
        ];
        let mut metrics = throughput(&ways, &direct).await;
        for way in &ways {
            metrics.extend(latency(way, &direct).await);
        }
        metrics.sort_by_key(|metric| metric.unit as u8);
        report(&metrics, "the same server without the endpoint");
    });
}

/// What requests go through, where that is, and whether it has to be quick.
struct Way(&'static str, Target, bool);

/// Where requests go.
#[derive(Clone)]
struct Target {
    address: SocketAddr,
    token: Option<String>,
}

impl Target {
    fn new(address: SocketAddr, token: Option<String>) -> Self {
        Self { address, token }
    }

    async fn connect(&self) -> SendRequest<Empty<Bytes>> {
        let stream = TcpStream::connect(self.address).await.expect("a connection");
        stream.set_nodelay(true).expect("no delay");
        let (sender, connection) = handshake(TokioIo::new(stream)).await.expect("HTTP");
        tokio::spawn(connection);
        sender
    }

    async fn ask(&self, sender: &mut SendRequest<Empty<Bytes>>) {
        let mut request = Request::get("/kilobyte").header("host", "guest.localhost");
        if let Some(token) = &self.token {
            request = request.header("x-aws-proxy-auth", token);
        }
        sender.ready().await.expect("a connection");
        let answer = sender.send_request(request.body(Empty::new()).expect("a request")).await;
        let body = answer.expect("an answer").into_body().collect().await.expect("a body");
        assert_eq!(body.to_bytes().len(), SIZE);
    }

    /// Requests in a second of many clients.
    async fn rate(&self) -> f64 {
        let begin = Instant::now();
        let clients = (0..CLIENTS).map(|_| {
            let target = self.clone();
            tokio::spawn(async move {
                let mut sender = target.connect().await;
                let mut count = 0;
                while begin.elapsed() < WINDOW {
                    target.ask(&mut sender).await;
                    count += 1;
                }
                count
            })
        });
        let mut count = 0;
        for client in clients.collect::<Vec<_>>() {
            count += client.await.expect("a client");
        }
        f64::from(count) / begin.elapsed().as_secs_f64()
    }
}

/// All in turn, so that each is beside the same rounds of the server alone.
async fn throughput(ways: &[Way], direct: &Target) -> Vec<Metric> {
    let metric = |Way(name, _, has_bar): &Way| Metric {
        name: format!("{CLIENTS} clients through {name}"),
        unit: Unit::ThousandsPerSecond,
        ours: Vec::new(),
        floor: Vec::new(),
        bar: has_bar.then_some(Bar::AtLeast(0.5)),
    };
    let mut metrics: Vec<_> = ways.iter().map(metric).collect();
    for round in 0..1 + ROUNDS {
        let floor = direct.rate().await;
        for (Way(_, target, _), metric) in ways.iter().zip(&mut metrics) {
            let ours = target.rate().await;
            if round > 0 {
                metric.ours.push(ours / 1e3);
                metric.floor.push(floor / 1e3);
            }
        }
    }
    metrics
}

/// How long one request takes where no other is under way, and what of that is not the server's.
async fn latency(Way(name, way, has_bar): &Way, direct: &Target) -> [Metric; 2] {
    let (mut through, mut straight) = (way.connect().await, direct.connect().await);
    let mut whole = Metric {
        name: format!("one request through {name}"),
        unit: Unit::Micros,
        ours: Vec::new(),
        floor: Vec::new(),
        bar: None,
    };
    for turn in 0..1 + TURNS {
        let ours = times(way, &mut through).await;
        let floor = times(direct, &mut straight).await;
        if turn > 0 {
            whole.ours.extend(ours);
            whole.floor.extend(floor);
        }
    }
    let median = |samples: &[f64]| whole.percentile(samples, 50).expect("samples");
    let added = Metric {
        name: format!("of that, added by {name}"),
        unit: Unit::Micros,
        ours: vec![median(&whole.ours) - median(&whole.floor)],
        floor: Vec::new(),
        bar: has_bar.then_some(Bar::AtMost(100.0)),
    };
    [whole, added]
}

async fn times(target: &Target, sender: &mut SendRequest<Empty<Bytes>>) -> Vec<f64> {
    let mut times = Vec::with_capacity(TURN);
    for _ in 0..TURN {
        let begin = Instant::now();
        target.ask(sender).await;
        times.push(micros(begin.elapsed()));
    }
    times
}

async fn serve(stream: impl AsyncRead + AsyncWrite + Unpin) {
    let service = service_fn(|_: Request<Incoming>| async {
        Ok::<_, Infallible>(Response::new(Full::new(Bytes::from_static(&[b'k'; SIZE]))))
    });
    let _ = http1::Builder::new().serve_connection(TokioIo::new(stream), service).await;
}

async fn endpoint(guest: Guest, options: EndpointOptions) -> Endpoint {
    Endpoint::bind("127.0.0.1:0", guest, options).await.expect("an endpoint")
}

/// Where the server is.
#[derive(Clone, Copy)]
enum Guest {
    Unix,
    Tcp(SocketAddr),
}

impl Upstreams for Guest {
    fn find(&self, _: &str) -> Option<Arc<dyn Upstream>> {
        Some(Arc::new(*self))
    }
}

impl Upstream for Guest {
    fn wake(&self) -> UpstreamFuture<'_, Awake> {
        Box::pin(async { Ok(Awake::new(())) })
    }

    fn connect(&self, _: u16) -> UpstreamFuture<'_, UpstreamStream> {
        Box::pin(async move {
            match self {
                Self::Unix => {
                    let (ours, theirs) = UnixStream::pair()?;
                    tokio::spawn(serve(theirs));
                    Ok(UpstreamStream::new(ours))
                }
                Self::Tcp(address) => {
                    let stream = TcpStream::connect(address).await?;
                    stream.set_nodelay(true)?;
                    Ok(UpstreamStream::new(stream))
                }
            }
        })
    }
}

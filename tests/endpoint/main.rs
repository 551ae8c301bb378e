//! The endpoint in front of servers on this machine's loopback, which stand where the applications of guests do. What
//! clients send is written by hand, or by the clients that other people use.

mod app;
mod client;
mod faults;
mod h2;
mod hostile;
mod routes;
mod streams;
mod tls;
mod tokens;
mod waking;
mod websocket;

use std::collections::HashMap;
use std::future::Future;
use std::sync::atomic::Ordering::SeqCst;
use std::sync::atomic::{AtomicBool, AtomicUsize};
use std::sync::{Arc, Mutex};
use std::time::Duration;

use dormouse::{
    Awake, Endpoint, EndpointOptions, Upstream, UpstreamFuture, UpstreamStream, Upstreams,
};
use tokio::net::TcpStream;
use tokio::sync::watch;

use app::App;

/// Long enough for a busy machine; only a test that fails waits for it.
const PATIENCE: Duration = Duration::from_secs(60);

/// Runs a test, which has an end.
fn run<T>(test: impl Future<Output = T>) -> T {
    let mut runtime = tokio::runtime::Builder::new_multi_thread();
    let runtime = runtime.worker_threads(2).enable_all().build().unwrap();
    let done = runtime.block_on(async { tokio::time::timeout(PATIENCE, test).await });
    runtime.shutdown_timeout(PATIENCE);
    done.expect("an end")
}

/// What stands where a session does: its ports are those of this machine.
pub struct Guest {
    /// The one behind port 8080.
    default: u16,
    pub wakes: AtomicUsize,
    pub connections: AtomicUsize,
    /// Requests and streams that keep it awake, or wait for that.
    pub held: watch::Sender<usize>,
    pub is_awake: watch::Sender<bool>,
    /// It does not wake.
    pub is_broken: AtomicBool,
    pub is_dead: AtomicBool,
    /// Its ports say nothing to who connects.
    pub is_deaf: AtomicBool,
}

impl Guest {
    fn new(default: u16) -> Self {
        Self {
            default,
            wakes: AtomicUsize::new(0),
            connections: AtomicUsize::new(0),
            held: watch::Sender::new(0),
            is_awake: watch::Sender::new(true),
            is_broken: AtomicBool::new(false),
            is_dead: AtomicBool::new(false),
            is_deaf: AtomicBool::new(false),
        }
    }

    /// Waits until so many keep it awake.
    async fn until_held(&self, count: usize) {
        self.held.subscribe().wait_for(|held| *held == count).await.unwrap();
    }
}

/// Counts one that keeps a guest awake.
struct Held(watch::Sender<usize>);

impl Drop for Held {
    fn drop(&mut self) {
        self.0.send_modify(|held| *held -= 1);
    }
}

impl Upstream for Guest {
    fn wake(&self) -> UpstreamFuture<'_, Awake> {
        Box::pin(async {
            self.wakes.fetch_add(1, SeqCst);
            if self.is_broken.load(SeqCst) {
                return Err("a secret of this host".into());
            }
            self.held.send_modify(|held| *held += 1);
            let held = Held(self.held.clone());
            self.is_awake.subscribe().wait_for(|is_awake| *is_awake).await?;
            Ok(Awake::new(held))
        })
    }

    fn connect(&self, port: u16) -> UpstreamFuture<'_, UpstreamStream> {
        let port = if port == 8080 { self.default } else { port };
        Box::pin(async move {
            self.connections.fetch_add(1, SeqCst);
            if self.is_deaf.load(SeqCst) {
                std::future::pending::<()>().await;
            }
            let stream = TcpStream::connect(("127.0.0.1", port)).await?;
            stream.set_nodelay(true)?;
            Ok(UpstreamStream::new(stream))
        })
    }

    fn is_up(&self) -> bool {
        !self.is_dead.load(SeqCst)
    }
}

/// The guests behind an endpoint, by their names.
#[derive(Clone, Default)]
struct Guests(Arc<Mutex<HashMap<String, Arc<Guest>>>>);

impl Upstreams for Guests {
    fn find(&self, id: &str) -> Option<Arc<dyn Upstream>> {
        let guest = self.0.lock().unwrap().get(id).cloned()?;
        Some(guest)
    }
}

/// Everybody may come in.
fn open() -> EndpointOptions {
    EndpointOptions::new().without_tokens()
}

/// An endpoint, with the application in its guest `one`.
pub struct Setup {
    pub endpoint: Endpoint,
    pub guest: Arc<Guest>,
    guests: Guests,
    pub app: App,
}

impl Setup {
    /// One that lets everybody in.
    async fn open() -> Self {
        Self::new(open()).await
    }

    async fn new(options: EndpointOptions) -> Self {
        Self::with_app(App::start().await, options).await
    }

    async fn with_app(app: App, options: EndpointOptions) -> Self {
        let guests = Guests::default();
        let endpoint = Endpoint::bind("127.0.0.1:0", guests.clone(), options).await.unwrap();
        let guest = Arc::new(Guest::new(app.port()));
        guests.0.lock().unwrap().insert("one".to_owned(), Arc::clone(&guest));
        Self { endpoint, guest, guests, app }
    }

    /// Another guest, whose application this is.
    fn add(&self, id: &str, port: u16) -> Arc<Guest> {
        let guest = Arc::new(Guest::new(port));
        self.guests.0.lock().unwrap().insert(id.to_owned(), Arc::clone(&guest));
        guest
    }
}

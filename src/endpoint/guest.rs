//! What an endpoint knows of each session that it talks to: how much goes on, and the connections that are kept.
//!
//! It is made for a session's first request and forgotten when there was none for a while, so that those that sleep cost
//! nothing.

use std::collections::HashMap;
use std::future::poll_fn;
use std::pin::pin;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::task::Poll;

use hyper::StatusCode;
use tokio::sync::Notify;
use tokio::time::{Instant, sleep, timeout};

use super::connections::{Connections, KEPT_FOR};
use super::fault::{Fault, Stage};
use super::options::EndpointLimits;
use super::tasks::Tasks;
use super::upstream::{Awake, Upstream};

/// The sessions that there was a request for not long ago.
pub(super) struct Guests {
    known: Mutex<HashMap<String, Arc<Guest>>>,
    /// The first has come.
    first: Notify,
    tasks: Tasks,
    limits: Arc<EndpointLimits>,
}

impl Guests {
    pub(super) fn new(tasks: Tasks, limits: Arc<EndpointLimits>) -> Self {
        Self { known: Mutex::default(), first: Notify::new(), tasks, limits }
    }

    pub(super) fn of(&self, id: &str) -> Arc<Guest> {
        let mut known = self.known();
        if let Some(guest) = known.get(id) {
            return Arc::clone(guest);
        }
        if known.is_empty() {
            self.first.notify_one();
        }
        let guest = Arc::new(Guest::new(self.tasks.clone(), Arc::clone(&self.limits)));
        known.insert(id.to_owned(), Arc::clone(&guest));
        guest
    }

    /// Forgets one that is no more.
    pub(super) fn forget(&self, id: &str) {
        self.known().remove(id);
    }

    /// Forgets those that nothing goes on with, and ends connections of others that wait for no request any more. It
    /// sleeps where there are none.
    pub(super) async fn sweep(&self) {
        loop {
            self.first.notified().await;
            while !self.known().is_empty() {
                sleep(KEPT_FOR).await;
                self.known().retain(|_, guest| {
                    guest.connections.sweep();
                    Arc::strong_count(guest) > 1 || guest.used().elapsed() < KEPT_FOR
                });
            }
        }
    }

    fn known(&self) -> MutexGuard<'_, HashMap<String, Arc<Guest>>> {
        self.known.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// A session that is talked to.
pub(super) struct Guest {
    requests: AtomicUsize,
    held: AtomicUsize,
    used: Mutex<Instant>,
    limits: Arc<EndpointLimits>,
    pub(super) connections: Arc<Connections>,
}

impl Guest {
    fn new(tasks: Tasks, limits: Arc<EndpointLimits>) -> Self {
        Self {
            requests: AtomicUsize::new(0),
            held: AtomicUsize::new(0),
            used: Mutex::new(Instant::now()),
            connections: Arc::new(Connections::new(tasks, Arc::clone(&limits))),
            limits,
        }
    }

    fn used(&self) -> Instant {
        *self.used.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Begins a request: its session is awake when this returns, and until the lease is dropped.
    pub(super) async fn lease(
        self: &Arc<Self>,
        upstream: Arc<dyn Upstream>,
    ) -> Result<Lease, Fault> {
        let request = Count::of(self, |guest| &guest.requests, self.limits.session_requests);
        let request = request.ok_or_else(|| {
            let message = "the session has as many requests as it may have";
            Fault::new(StatusCode::TOO_MANY_REQUESTS, Stage::Request, message).retry_after(1)
        })?;
        let awake = self.wake(&*upstream).await?;
        Ok(Lease { upstream, _awake: awake, _request: request, _stream: None })
    }

    async fn wake(self: &Arc<Self>, upstream: &dyn Upstream) -> Result<Awake, Fault> {
        let mut waking = pin!(upstream.wake());
        let at_once = poll_fn(|context| Poll::Ready(waking.as_mut().poll(context))).await;
        let woken = match at_once {
            Poll::Ready(woken) => woken,
            Poll::Pending => {
                let busy = |message| {
                    Fault::new(StatusCode::SERVICE_UNAVAILABLE, Stage::Wake, message).retry_after(1)
                };
                let held = Count::of(self, |guest| &guest.held, self.limits.session_held);
                let _held =
                    held.ok_or_else(|| busy("too many requests wait for the session to wake"))?;
                let woken = timeout(self.limits.wake_timeout, waking).await;
                woken.map_err(|_| busy("the session has not woken in time"))?
            }
        };
        woken.map_err(|error| {
            tracing::warn!(%error, "a session does not wake for a request");
            Fault::bad_gateway(Stage::Wake, "the session does not wake")
        })
    }
}

/// One of a limited number, until it is dropped.
struct Count {
    guest: Arc<Guest>,
    of: fn(&Guest) -> &AtomicUsize,
}

impl Count {
    fn of(guest: &Arc<Guest>, of: fn(&Guest) -> &AtomicUsize, limit: usize) -> Option<Self> {
        let count = of(guest).fetch_add(1, Ordering::Relaxed);
        // It takes its own back again where it is refused.
        let one = Self { guest: Arc::clone(guest), of };
        (count < limit).then_some(one)
    }
}

impl Drop for Count {
    fn drop(&mut self) {
        (self.of)(&self.guest).fetch_sub(1, Ordering::Relaxed);
        *self.guest.used.lock().unwrap_or_else(PoisonError::into_inner) = Instant::now();
    }
}

/// A request or stream that goes on, with its session awake.
pub(super) struct Lease {
    pub(super) upstream: Arc<dyn Upstream>,
    _awake: Awake,
    _request: Count,
    /// Its place on a connection of HTTP/2.
    _stream: Option<Arc<()>>,
}

impl Lease {
    /// The same, which holds that place too.
    pub(super) fn with(self, stream: Arc<()>) -> Self {
        Self { _stream: Some(stream), ..self }
    }

    pub(super) fn is_up(&self) -> bool {
        self.upstream.is_up()
    }
}

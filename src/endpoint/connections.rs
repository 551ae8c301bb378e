//! Connections to the applications of a guest, kept from one request to the next.
//!
//! A connection that waits does not keep its session awake. It ends when the session sleeps, which is seen when it is taken; a
//! request that was given to it and not sent comes back, and goes out on another. One that was sent to an application
//! that closed the connection just then is sent again, where it may be: others get a connection that has not waited.
//!
//! The task of a request moves the bytes of its connection itself. Most answers are all there when their head is; where more is
//! to come, the connection gets a task of its own.
//!
//! Source: RFC 9112 §9.3.1, retrying requests; RFC 9110 §9.2.2, idempotent methods.

use std::collections::{HashMap, VecDeque};
use std::future::poll_fn;
use std::mem::replace;
use std::pin::{Pin, pin};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::task::{Context, Poll, Waker};
use std::time::Duration;

use hyper::body::{Body, Incoming};
use hyper::client::conn::{TrySendError, http1, http2};
use hyper::{Request, Response, StatusCode};
use hyper_util::rt::{TokioIo, TokioTimer};
use tokio::task::AbortHandle;
use tokio::time::{Instant, timeout};

use super::alarm::Alarm;
use super::fault::{Fault, Stage};
use super::options::{CONNECTION_WINDOW, EndpointLimits, STREAM_WINDOW};
use super::tasks::Tasks;
use super::upload::{Progress, Upload};
use super::upstream::{Upstream, UpstreamStream};

/// How long a connection waits for a request: less than servers let one wait, of which most close it after 5 s.
pub(super) const KEPT_FOR: Duration = Duration::from_secs(4);
/// Connections of HTTP/1 to a guest that wait at a time, and ports that are connected to by HTTP/2.
const MAX_KEPT: usize = 64;
/// Requests at a time on a connection of HTTP/2: servers allow 100 and more, and hyper does not say what one does. So many
/// have a window each of the connection's, so that those that are not read stop no other.
const MAX_STREAMS: usize = (CONNECTION_WINDOW / STREAM_WINDOW) as usize;
/// How long the rest of a request may take whose answer is over.
const REST_TIME: Duration = Duration::from_secs(1);

type Http2 = http2::SendRequest<Upload>;

/// Those of one guest, by port.
pub(super) struct Connections {
    waiting: Mutex<HashMap<u16, VecDeque<Waiting>>>,
    /// Each for many requests at a time.
    shared: Mutex<HashMap<u16, Arc<Shared>>>,
    tasks: Tasks,
    limits: Arc<EndpointLimits>,
}

struct Waiting {
    connection: Connection,
    since: Instant,
}

/// The connections of HTTP/2 to a port. Whoever finds none with room makes one, and the others wait for that.
struct Shared {
    senders: tokio::sync::Mutex<Vec<Sender>>,
    used: Mutex<Instant>,
}

/// One of them, with what each of its requests holds until its answer is over.
#[derive(Clone)]
struct Sender {
    sender: Http2,
    open: Arc<()>,
}

impl Sender {
    fn has_room(&self) -> bool {
        Arc::strong_count(&self.open) <= MAX_STREAMS
    }
}

impl Shared {
    fn new() -> Self {
        Self { senders: tokio::sync::Mutex::default(), used: Mutex::new(Instant::now()) }
    }

    fn used(&self) -> MutexGuard<'_, Instant> {
        self.used.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

struct Connection {
    sender: http1::SendRequest<Upload>,
    driver: Driver,
    alarm: Alarm,
}

/// What moves the bytes of a connection.
enum Driver {
    /// Its request does, and nobody while it waits.
    Request(Pin<Box<dyn Future<Output = hyper::Result<()>> + Send>>),
    Task(AbortHandle),
    Over,
}

impl Driver {
    /// Where it is the request's to do.
    fn drive(&mut self, context: &mut Context<'_>) {
        if let Self::Request(connection) = self
            && connection.as_mut().poll(context).is_ready()
        {
            *self = Self::Over;
        }
    }
}

impl Connections {
    pub(super) fn new(tasks: Tasks, limits: Arc<EndpointLimits>) -> Self {
        Self { waiting: Mutex::default(), shared: Mutex::default(), tasks, limits }
    }

    fn waiting(&self) -> MutexGuard<'_, HashMap<u16, VecDeque<Waiting>>> {
        self.waiting.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// The one that has waited the shortest time.
    fn take(&self, port: u16) -> Option<Connection> {
        loop {
            let Waiting { mut connection, since } = self.waiting().get_mut(&port)?.pop_back()?;
            // This sees whether it has ended, and makes it forget the task of its last request.
            connection.driver.drive(&mut Context::from_waker(Waker::noop()));
            if since.elapsed() < KEPT_FOR && connection.sender.is_ready() {
                return Some(connection);
            }
        }
    }

    fn keep(&self, port: u16, connection: Connection) {
        let now = Instant::now();
        let mut waiting = self.waiting();
        forget_old(&mut waiting, now);
        if waiting.values().map(VecDeque::len).sum::<usize>() < MAX_KEPT {
            waiting.entry(port).or_default().push_back(Waiting { connection, since: now });
        }
    }

    /// Ends those that have waited long enough: one of HTTP/2, when what goes on in it is over.
    pub(super) fn sweep(&self) {
        forget_old(&mut self.waiting(), Instant::now());
        self.shared().retain(|_, shared| {
            Arc::strong_count(shared) > 1 || shared.used().elapsed() < KEPT_FOR
        });
    }

    fn shared(&self) -> MutexGuard<'_, HashMap<u16, Arc<Shared>>> {
        self.shared.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// The connection of HTTP/2 to a port. Where there are many, those that nobody waits for make room.
    fn shared_at(&self, port: u16) -> Arc<Shared> {
        let mut all = self.shared();
        if all.len() >= MAX_KEPT && !all.contains_key(&port) {
            all.retain(|_, shared| Arc::strong_count(shared) > 1);
        }
        let shared = all.entry(port).or_insert_with(|| Arc::new(Shared::new()));
        *shared.used() = Instant::now();
        Arc::clone(shared)
    }

    async fn open(&self, upstream: &dyn Upstream, port: u16) -> Result<Connection, Fault> {
        let stream = self.in_time(connect(upstream, port)).await?;
        let handshake = http1::handshake(TokioIo::new(stream)).await;
        let (sender, connection) = handshake.map_err(|error| fault(&error))?;
        let driver = Driver::Request(Box::pin(connection.with_upgrades()));
        let alarm = Alarm::new(Instant::now() + self.limits.answer_timeout);
        Ok(Connection { sender, driver, alarm })
    }

    /// Makes a connection, in as much time as that may take with all that has to be waited for.
    async fn in_time<T>(
        &self,
        connect: impl Future<Output = Result<T, Fault>>,
    ) -> Result<T, Fault> {
        let connected = timeout(self.limits.connect_timeout, connect).await;
        connected.unwrap_or_else(|_| {
            Err(Fault::bad_gateway(Stage::Connect, "the port cannot be reached in time"))
        })
    }
}

async fn connect(upstream: &dyn Upstream, port: u16) -> Result<UpstreamStream, Fault> {
    upstream.connect(port).await.map_err(|error| {
        tracing::debug!(%error, port, "an application cannot be connected to");
        Fault::bad_gateway(Stage::Connect, "nothing can be reached at the port")
    })
}

/// Ends those that have waited long enough, at whatever port.
fn forget_old(waiting: &mut HashMap<u16, VecDeque<Waiting>>, now: Instant) {
    waiting.retain(|_, waiting| {
        while waiting.front().is_some_and(|one| now - one.since >= KEPT_FOR) {
            waiting.pop_front();
        }
        !waiting.is_empty()
    });
}

impl Connection {
    /// Sends a request, and waits for the head of its answer as long as the application takes what it is sent.
    async fn ask(
        &mut self,
        request: Request<Upload>,
        answer_timeout: Duration,
    ) -> Result<Tried, Fault> {
        let patience = Patience::new(&request, answer_timeout);
        let Self { sender, driver, alarm } = self;
        let mut sending = pin!(sender.try_send_request(request));
        poll_fn(|context| {
            driver.drive(context);
            // What the driver has done is seen here: it is not to wake its own task for that.
            let tried = match driver {
                Driver::Task(_) => sending.as_mut().poll(context),
                _ => sending.as_mut().poll(&mut Context::from_waker(Waker::noop())),
            };
            if let Poll::Ready(tried) = tried {
                return Poll::Ready(Ok(tried));
            }
            alarm.poll(patience.until(), context).map(|()| Err(patience.lost()))
        })
        .await
    }

    /// Has what is still to come of a request and its answer move by itself.
    fn release(&mut self, tasks: &Tasks) {
        if !self.sender.is_ready() {
            self.driver = match replace(&mut self.driver, Driver::Over) {
                Driver::Request(connection) => Driver::Task(tasks.spawn(connection)),
                other => other,
            };
        }
    }

    fn end(&self) {
        if let Driver::Task(task) = &self.driver {
            task.abort();
        }
    }
}

/// A connection of HTTP/1.1 that a request has to itself.
pub(super) struct Lent {
    /// None once it is given back.
    connection: Option<Connection>,
    connections: Arc<Connections>,
    port: u16,
}

impl Lent {
    /// For the next request, as soon as this one is all sent.
    pub(super) fn give_back(mut self) {
        let Some(mut connection) = self.connection.take() else { return };
        let (connections, port) = (Arc::clone(&self.connections), self.port);
        if connection.sender.is_ready() {
            connections.keep(port, connection);
        } else if !connection.sender.is_closed() {
            self.connections.tasks.spawn(async move {
                match timeout(REST_TIME, connection.sender.ready()).await {
                    Ok(Ok(())) => connections.keep(port, connection),
                    _ => connection.end(),
                }
            });
        }
    }

    /// It has become a tunnel, and ends when that does.
    pub(super) fn leave(mut self) {
        self.connection = None;
    }
}

impl Drop for Lent {
    fn drop(&mut self) {
        if let Some(connection) = &self.connection {
            connection.end();
        }
    }
}

impl Connections {
    /// Asks the application at a port by HTTP/1.1.
    pub(super) async fn ask(
        self: &Arc<Self>,
        upstream: &dyn Upstream,
        port: u16,
        mut request: Request<Upload>,
    ) -> Result<(Response<Incoming>, Lent), Fault> {
        let is_repeatable = request.method().is_idempotent() && request.body().is_end_stream();
        loop {
            // One that may not be used ends here, so that an application that serves one at a time does not wait for it.
            let kept = self.take(port).filter(|_| is_repeatable);
            let spare = kept.as_ref().map(|_| copy(&request));
            let connection = match kept {
                Some(connection) => connection,
                None => Box::pin(self.open(upstream, port)).await?,
            };
            let mut lent =
                Lent { connection: Some(connection), connections: Arc::clone(self), port };
            let Some(connection) = &mut lent.connection else { continue };
            match connection.ask(request, self.limits.answer_timeout).await? {
                Ok(answer) => {
                    connection.release(&self.tasks);
                    return Ok((answer, lent));
                }
                Err(error) => request = again(error, spare.is_none(), spare)?,
            }
        }
    }

    /// Asks the application at a port by HTTP/2, without an upgrade. Until the answer is over, what comes with it is held.
    pub(super) async fn ask_h2(
        &self,
        upstream: &dyn Upstream,
        port: u16,
        mut request: Request<Upload>,
    ) -> Result<(Response<Incoming>, Arc<()>), Fault> {
        let shared = self.shared_at(port);
        loop {
            let sender = async {
                let mut senders = shared.senders.lock().await;
                senders.retain(|one| !one.sender.is_closed());
                if let Some(one) = senders.iter().find(|one| one.has_room()) {
                    return Ok((one.clone(), false));
                }
                let stream = connect(upstream, port).await?;
                let one = Sender { sender: self.open_h2(stream).await?, open: Arc::new(()) };
                senders.push(one.clone());
                Ok((one, true))
            };
            let (Sender { mut sender, open }, is_new) = self.in_time(sender).await?;
            let patience = Patience::new(&request, self.limits.answer_timeout);
            let mut alarm = Alarm::new(patience.until());
            let mut sending = pin!(sender.try_send_request(request));
            let asked = poll_fn(|context| match sending.as_mut().poll(context) {
                Poll::Ready(tried) => Poll::Ready(Ok(tried)),
                Poll::Pending => {
                    alarm.poll(patience.until(), context).map(|()| Err(patience.lost()))
                }
            });
            match asked.await? {
                Ok(answer) => return Ok((answer, open)),
                Err(error) => request = again(error, is_new, None)?,
            }
        }
    }

    async fn open_h2(&self, stream: UpstreamStream) -> Result<Http2, Fault> {
        let mut builder = http2::Builder::new(self.tasks.clone());
        builder
            .timer(TokioTimer::new())
            .initial_stream_window_size(STREAM_WINDOW)
            .initial_connection_window_size(CONNECTION_WINDOW);
        let handshake = builder.handshake(TokioIo::new(stream)).await;
        let (sender, connection) = handshake.map_err(|error| fault(&error))?;
        self.tasks.spawn(connection);
        Ok(sender)
    }
}

type Tried = Result<Response<Incoming>, TrySendError<Request<Upload>>>;

/// How long an answer is waited for: longer, as long as the application takes what it is sent.
struct Patience {
    begin: Instant,
    progress: Option<Arc<Progress>>,
    answer_timeout: Duration,
}

impl Patience {
    fn new(request: &Request<Upload>, answer_timeout: Duration) -> Self {
        let progress = request.body().progress();
        Self { begin: Instant::now(), progress, answer_timeout }
    }

    fn until(&self) -> Instant {
        let last = self.progress.as_ref().map(|progress| progress.last().max(self.begin));
        last.unwrap_or(self.begin) + self.answer_timeout
    }

    /// Who has let it down.
    fn lost(&self) -> Fault {
        if self.progress.as_ref().is_some_and(|progress| progress.waits_for_client()) {
            let message = "the rest of the request has not come in time";
            Fault::new(StatusCode::REQUEST_TIMEOUT, Stage::Request, message)
        } else {
            let message = "the application has not answered in time";
            Fault::new(StatusCode::GATEWAY_TIMEOUT, Stage::Response, message)
        }
    }
}

/// A request without a body, again.
fn copy(request: &Request<Upload>) -> Request<Upload> {
    let mut copy = Request::new(Upload::empty());
    *copy.method_mut() = request.method().clone();
    *copy.uri_mut() = request.uri().clone();
    *copy.headers_mut() = request.headers().clone();
    copy
}

/// The request again, where the connection had waited and is gone: the one that was not sent, or else its copy.
fn again(
    mut error: TrySendError<Request<Upload>>,
    is_new: bool,
    copy: Option<Request<Upload>>,
) -> Result<Request<Upload>, Fault> {
    let request = error.take_message().or(copy);
    request.filter(|_| !is_new && !error.error().is_parse()).ok_or_else(|| fault(error.error()))
}

fn fault(error: &hyper::Error) -> Fault {
    tracing::debug!(%error, "an application does not answer");
    if error.is_user() {
        // The one thing of ours that can fail there is the client's body.
        return Fault::malformed("the body of the request ends early, or is malformed");
    }
    if error.is_parse() {
        return Fault::bad_gateway(Stage::Response, "the application's answer is not HTTP");
    }
    Fault::bad_gateway(Stage::Response, "the application closed the connection without an answer")
}

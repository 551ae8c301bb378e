//! Connections to the applications of a guest, kept from one request to the next.
//!
//! A connection that waits does not keep its session awake. It ends when the session sleeps, which its task sees at once; a
//! request that was given to it and not sent comes back, and goes out on another. One that was sent to an application
//! that closed the connection just then is sent again, where it may be: others get a connection that has not waited.
//!
//! Source: RFC 9112 §9.3.1, retrying requests; RFC 9110 §9.2.2, idempotent methods.

use std::collections::HashMap;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use hyper::body::{Body, Incoming};
use hyper::client::conn::{TrySendError, http1, http2};
use hyper::{Request, Response, StatusCode};
use hyper_util::rt::{TokioIo, TokioTimer};
use tokio::task::AbortHandle;
use tokio::time::{Instant, timeout, timeout_at};

use super::fault::{Fault, Stage};
use super::guest::Guest;
use super::options::EndpointLimits;
use super::tasks::Tasks;
use super::upload::{Progress, Upload};
use super::upstream::{Upstream, UpstreamStream};

/// How long a connection waits for a request: less than servers let one wait, of which most close it after 5 s.
pub(super) const KEPT_FOR: Duration = Duration::from_secs(4);
/// Connections to a port that wait at a time.
const MAX_KEPT: usize = 64;
/// How long the rest of a request may take whose answer is over.
const REST_TIME: Duration = Duration::from_secs(1);

type Http2 = http2::SendRequest<Upload>;

/// Those of one guest, by port.
pub(super) struct Connections {
    waiting: Mutex<HashMap<u16, Vec<Waiting>>>,
    /// One for all requests at a time. Whoever finds none makes it, and the others wait for that.
    shared: Mutex<HashMap<u16, Arc<tokio::sync::Mutex<Option<Http2>>>>>,
    tasks: Tasks,
}

struct Waiting {
    connection: Connection,
    since: Instant,
}

struct Connection {
    sender: http1::SendRequest<Upload>,
    task: AbortHandle,
}

impl Connections {
    pub(super) fn new(tasks: Tasks) -> Self {
        Self { waiting: Mutex::default(), shared: Mutex::default(), tasks }
    }

    fn waiting(&self) -> MutexGuard<'_, HashMap<u16, Vec<Waiting>>> {
        self.waiting.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// The one that has waited the shortest time.
    fn take(&self, port: u16) -> Option<Connection> {
        let mut waiting = self.waiting();
        let waiting = waiting.get_mut(&port)?;
        while let Some(Waiting { connection, since }) = waiting.pop() {
            if since.elapsed() < KEPT_FOR && connection.sender.is_ready() {
                return Some(connection);
            }
        }
        None
    }

    fn keep(&self, port: u16, connection: Connection) {
        let mut waiting = self.waiting();
        let waiting = waiting.entry(port).or_default();
        waiting.retain(|one| one.since.elapsed() < KEPT_FOR && !one.connection.sender.is_closed());
        if waiting.len() < MAX_KEPT {
            waiting.push(Waiting { connection, since: Instant::now() });
        }
    }

    async fn open(&self, stream: UpstreamStream) -> Result<Connection, Fault> {
        let handshake = http1::handshake(TokioIo::new(stream)).await;
        let (sender, connection) = handshake.map_err(|error| fault(&error))?;
        Ok(Connection { sender, task: self.tasks.spawn(connection.with_upgrades()) })
    }
}

/// A connection of HTTP/1.1 that a request has to itself.
pub(super) struct Lent {
    /// None once it is given back.
    connection: Option<Connection>,
    guest: Arc<Guest>,
    port: u16,
}

impl Lent {
    /// For the next request, as soon as this one is all sent.
    pub(super) fn give_back(mut self) {
        let Some(mut connection) = self.connection.take() else { return };
        let (guest, port) = (Arc::clone(&self.guest), self.port);
        if connection.sender.is_ready() {
            guest.connections.keep(port, connection);
        } else if !connection.sender.is_closed() {
            self.guest.connections.tasks.spawn(async move {
                match timeout(REST_TIME, connection.sender.ready()).await {
                    Ok(Ok(())) => guest.connections.keep(port, connection),
                    _ => connection.task.abort(),
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
            connection.task.abort();
        }
    }
}

impl Guest {
    /// Asks the application at a port by HTTP/1.1.
    pub(super) async fn ask(
        self: &Arc<Self>,
        upstream: &dyn Upstream,
        port: u16,
        mut request: Request<Upload>,
        limits: &EndpointLimits,
    ) -> Result<(Response<Incoming>, Lent), Fault> {
        let is_repeatable = request.method().is_idempotent() && request.body().is_end_stream();
        loop {
            // One that may not be used ends here, so that an application that serves one at a time does not wait for it.
            let kept = self.connections.take(port).filter(|_| is_repeatable);
            let spare = kept.as_ref().map(|_| copy(&request));
            let connection = match kept {
                Some(connection) => connection,
                None => self.connections.open(connect(upstream, port, limits).await?).await?,
            };
            let mut lent = Lent { connection: Some(connection), guest: Arc::clone(self), port };
            let Some(Connection { sender, .. }) = &mut lent.connection else { continue };
            let progress = request.body().progress();
            let sending = sender.try_send_request(request);
            match answer(sending, progress, limits).await? {
                Ok(answer) => return Ok((answer, lent)),
                Err(error) => request = again(error, spare.is_none(), spare)?,
            }
        }
    }

    /// Asks the application at a port by HTTP/2, without an upgrade.
    pub(super) async fn ask_h2(
        self: &Arc<Self>,
        upstream: &dyn Upstream,
        port: u16,
        mut request: Request<Upload>,
        limits: &EndpointLimits,
    ) -> Result<Response<Incoming>, Fault> {
        let slot = {
            let shared = &self.connections.shared;
            let mut shared = shared.lock().unwrap_or_else(PoisonError::into_inner);
            Arc::clone(shared.entry(port).or_default())
        };
        loop {
            let (mut sender, is_new) = {
                let mut slot = slot.lock().await;
                match slot.take().filter(|sender| !sender.is_closed()) {
                    Some(sender) => (slot.insert(sender).clone(), false),
                    None => {
                        let stream = connect(upstream, port, limits).await?;
                        (slot.insert(self.connections.open_h2(stream).await?).clone(), true)
                    }
                }
            };
            let progress = request.body().progress();
            let sending = sender.try_send_request(request);
            match answer(sending, progress, limits).await? {
                Ok(answer) => return Ok(answer),
                Err(error) => request = again(error, is_new, None)?,
            }
        }
    }
}

impl Connections {
    async fn open_h2(&self, stream: UpstreamStream) -> Result<Http2, Fault> {
        let mut builder = http2::Builder::new(self.tasks.clone());
        let handshake = builder.timer(TokioTimer::new()).handshake(TokioIo::new(stream)).await;
        let (sender, connection) = handshake.map_err(|error| fault(&error))?;
        self.tasks.spawn(connection);
        Ok(sender)
    }
}

async fn connect(
    upstream: &dyn Upstream,
    port: u16,
    limits: &EndpointLimits,
) -> Result<UpstreamStream, Fault> {
    match timeout(limits.connect_time, upstream.connect(port)).await {
        Ok(Ok(stream)) => Ok(stream),
        Ok(Err(error)) => {
            tracing::debug!(%error, port, "an application cannot be connected to");
            Err(Fault::bad_gateway(Stage::Connect, "nothing can be reached at the port"))
        }
        Err(_) => Err(Fault::bad_gateway(Stage::Connect, "the port cannot be reached in time")),
    }
}

type Tried = Result<Response<Incoming>, TrySendError<Request<Upload>>>;

/// Waits for the head of an answer, as long as the application takes what it is sent.
async fn answer(
    sending: impl Future<Output = Tried>,
    progress: Option<Arc<Progress>>,
    limits: &EndpointLimits,
) -> Result<Tried, Fault> {
    let mut sending = std::pin::pin!(sending);
    let begin = Instant::now();
    let deadline = |progress: &Option<Arc<Progress>>| {
        progress.as_ref().map_or(begin, |progress| progress.last().max(begin)) + limits.answer_time
    };
    loop {
        let until = deadline(&progress);
        if let Ok(tried) = timeout_at(until, &mut sending).await {
            return Ok(tried);
        }
        if deadline(&progress) > until {
            continue;
        }
        return Err(if progress.is_some_and(|progress| progress.waits_for_client()) {
            let message = "the rest of the request has not come in time";
            Fault::new(StatusCode::REQUEST_TIMEOUT, Stage::Request, message)
        } else {
            let message = "the application has not answered in time";
            Fault::new(StatusCode::GATEWAY_TIMEOUT, Stage::Response, message)
        });
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

//! The body of a request on its way to the guest: as fast as the guest takes it, and not before it wants it.

use std::pin::Pin;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, Mutex, PoisonError};
use std::task::{Context, Poll};
use std::time::Duration;

use hyper::body::{Body, Bytes, Frame, Incoming, SizeHint};
use tokio::sync::oneshot;
use tokio::time::{Instant, Sleep, sleep};

/// How long an application may leave `Expect: 100-continue` unanswered: those that never heard of it would wait for a
/// body that waits for them (RFC 9110 §10.1.1).
const CONTINUE_TIME: Duration = Duration::from_secs(1);

/// The body of a request.
pub(super) struct Upload {
    /// None where there is none to be had.
    body: Option<Incoming>,
    gate: Gate,
    progress: Option<Arc<Progress>>,
}

impl Upload {
    pub(super) fn new(body: Incoming) -> Self {
        let progress = (!body.is_end_stream()).then(|| Arc::new(Progress::new()));
        Self { body: Some(body), gate: Gate::Open, progress }
    }

    pub(super) fn empty() -> Self {
        Self { body: None, gate: Gate::Open, progress: None }
    }

    /// Is not read until the application says that it shall be. Polling it is what lets the client begin to send.
    pub(super) fn until_continue(&mut self) -> Continue {
        let (sender, said) = oneshot::channel();
        self.gate = Gate::Waiting { said, patience: Box::pin(sleep(CONTINUE_TIME)) };
        Continue(Arc::new(Mutex::new(Some(sender))))
    }

    pub(super) fn progress(&self) -> Option<Arc<Progress>> {
        self.progress.clone()
    }
}

impl Body for Upload {
    type Data = Bytes;
    type Error = hyper::Error;

    fn poll_frame(
        mut self: Pin<&mut Self>,
        context: &mut Context<'_>,
    ) -> Poll<Option<Result<Frame<Bytes>, hyper::Error>>> {
        let upload = &mut *self;
        if !upload.gate.is_open(context) {
            return Poll::Pending;
        }
        let Some(body) = &mut upload.body else { return Poll::Ready(None) };
        let frame = Pin::new(body).poll_frame(context);
        if let Some(progress) = &upload.progress {
            progress.note(frame.is_pending());
        }
        frame
    }

    fn is_end_stream(&self) -> bool {
        self.body.as_ref().is_none_or(Incoming::is_end_stream)
    }

    fn size_hint(&self) -> SizeHint {
        self.body.as_ref().map_or_else(|| SizeHint::with_exact(0), Incoming::size_hint)
    }
}

enum Gate {
    Open,
    Waiting {
        said: oneshot::Receiver<bool>,
        patience: Pin<Box<Sleep>>,
    },
    /// The answer came instead: nobody wants the body.
    Shut,
}

impl Gate {
    fn is_open(&mut self, context: &mut Context<'_>) -> bool {
        let Self::Waiting { said, patience } = self else { return matches!(self, Self::Open) };
        let is_open = match Pin::new(said).poll(context) {
            Poll::Ready(Ok(is_open)) => is_open,
            Poll::Ready(Err(_)) => true,
            Poll::Pending if patience.as_mut().poll(context).is_ready() => true,
            Poll::Pending => return false,
        };
        *self = if is_open { Self::Open } else { Self::Shut };
        is_open
    }
}

/// Opens or shuts an upload that waits.
#[derive(Clone)]
pub(super) struct Continue(Arc<Mutex<Option<oneshot::Sender<bool>>>>);

impl Continue {
    pub(super) fn say(&self, is_wanted: bool) {
        let sender = self.0.lock().unwrap_or_else(PoisonError::into_inner).take();
        if let Some(sender) = sender {
            // Where nobody listens, the request is over.
            let _ = sender.send(is_wanted);
        }
    }
}

/// How far a body has come, for whoever waits for the answer.
pub(super) struct Progress {
    begin: Instant,
    /// Milliseconds after the beginning at which the application last took something, or began to wait for more.
    last: AtomicU64,
    waits_for_client: AtomicBool,
}

impl Progress {
    fn new() -> Self {
        Self {
            begin: Instant::now(),
            last: AtomicU64::new(0),
            waits_for_client: AtomicBool::new(false),
        }
    }

    fn note(&self, waits_for_client: bool) {
        let did_wait = self.waits_for_client.swap(waits_for_client, Ordering::Relaxed);
        // Asking again for what has not come is none.
        if !(did_wait && waits_for_client) {
            let passed = u64::try_from(self.begin.elapsed().as_millis()).unwrap_or(u64::MAX);
            self.last.store(passed, Ordering::Relaxed);
        }
    }

    pub(super) fn last(&self) -> Instant {
        self.begin + Duration::from_millis(self.last.load(Ordering::Relaxed))
    }

    /// It is the client that has not sent more.
    pub(super) fn waits_for_client(&self) -> bool {
        self.waits_for_client.load(Ordering::Relaxed)
    }
}

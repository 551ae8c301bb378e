//! The requests of a connection of HTTP/2: how many were begun, and are open.

use std::pin::Pin;
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::task::{Context, Poll};

use hyper::body::{Body, Bytes, Frame, SizeHint};

use super::body::AnswerBody;
use super::upstream::UpstreamError;

#[derive(Default)]
pub(super) struct Streams {
    begun: AtomicUsize,
    open: AtomicUsize,
}

impl Streams {
    pub(super) fn begin(self: &Arc<Self>) -> OpenStream {
        self.begun.fetch_add(1, Ordering::Relaxed);
        self.open.fetch_add(1, Ordering::Relaxed);
        OpenStream(Arc::clone(self))
    }

    pub(super) fn begun(&self) -> usize {
        self.begun.load(Ordering::Relaxed)
    }

    /// Whether none is open, and none was begun since there were so many.
    pub(super) fn is_idle_since(&self, begun: usize) -> bool {
        self.open.load(Ordering::Relaxed) == 0 && self.begun() == begun
    }
}

/// One that is open, until it is dropped: by its body, and by the tunnel that it became.
pub(super) struct OpenStream(Arc<Streams>);

impl Drop for OpenStream {
    fn drop(&mut self) {
        self.0.open.fetch_sub(1, Ordering::Relaxed);
    }
}

/// A body whose stream is open while it is read.
pub(super) struct StreamBody {
    body: AnswerBody,
    _open: Arc<OpenStream>,
}

impl StreamBody {
    pub(super) fn new(body: AnswerBody, open: Arc<OpenStream>) -> Self {
        Self { body, _open: open }
    }
}

impl Body for StreamBody {
    type Data = Bytes;
    type Error = UpstreamError;

    fn poll_frame(
        mut self: Pin<&mut Self>,
        context: &mut Context<'_>,
    ) -> Poll<Option<Result<Frame<Bytes>, UpstreamError>>> {
        Pin::new(&mut self.body).poll_frame(context)
    }

    fn is_end_stream(&self) -> bool {
        self.body.is_end_stream()
    }

    fn size_hint(&self) -> SizeHint {
        self.body.size_hint()
    }
}

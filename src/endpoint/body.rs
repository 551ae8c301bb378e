//! The body of an answer on its way to the client, and what is held until it is over.

use std::io;
use std::pin::Pin;
use std::task::{Context, Poll, ready};

use hyper::body::{Body, Bytes, Frame, Incoming, SizeHint};

use super::connections::Lent;
use super::guest::Lease;
use super::upstream::UpstreamError;

/// What a client gets.
pub(super) enum AnswerBody {
    /// The endpoint's own words.
    Own(Option<Bytes>),
    Guest(Box<GuestBody>),
}

/// What the application says.
pub(super) struct GuestBody {
    body: Incoming,
    /// It has no length: it ends with its connection.
    is_unframed: bool,
    is_over: bool,
    /// None where others share it.
    connection: Option<Lent>,
    lease: Lease,
}

impl AnswerBody {
    pub(super) fn own(text: impl Into<Bytes>) -> Self {
        Self::Own(Some(text.into()))
    }

    pub(super) fn none() -> Self {
        Self::Own(None)
    }

    pub(super) fn guest(
        body: Incoming,
        is_unframed: bool,
        connection: Option<Lent>,
        lease: Lease,
    ) -> Self {
        Self::Guest(Box::new(GuestBody { body, is_unframed, is_over: false, connection, lease }))
    }
}

impl Body for AnswerBody {
    type Data = Bytes;
    type Error = UpstreamError;

    fn poll_frame(
        self: Pin<&mut Self>,
        context: &mut Context<'_>,
    ) -> Poll<Option<Result<Frame<Bytes>, UpstreamError>>> {
        match self.get_mut() {
            Self::Own(bytes) => Poll::Ready(bytes.take().map(|bytes| Ok(Frame::data(bytes)))),
            Self::Guest(body) => body.poll_frame(context),
        }
    }

    fn is_end_stream(&self) -> bool {
        match self {
            Self::Own(bytes) => bytes.is_none(),
            // That of an unframed one is looked at when it is read.
            Self::Guest(body) => !body.is_unframed && body.body.is_end_stream(),
        }
    }

    fn size_hint(&self) -> SizeHint {
        match self {
            Self::Own(bytes) => SizeHint::with_exact(bytes.as_ref().map_or(0, |b| b.len() as u64)),
            Self::Guest(body) => body.body.size_hint(),
        }
    }
}

impl GuestBody {
    fn poll_frame(
        &mut self,
        context: &mut Context<'_>,
    ) -> Poll<Option<Result<Frame<Bytes>, UpstreamError>>> {
        Poll::Ready(match ready!(Pin::new(&mut self.body).poll_frame(context)) {
            Some(Ok(frame)) => Some(Ok(frame)),
            Some(Err(error)) => Some(Err(error.into())),
            // A guest that dies closes its connections, too.
            None if self.is_unframed && !self.is_over && !self.lease.is_up() => {
                Some(Err(io::Error::from(io::ErrorKind::UnexpectedEof).into()))
            }
            None => {
                self.is_over = true;
                None
            }
        })
    }
}

impl Drop for GuestBody {
    fn drop(&mut self) {
        // One that was not read to its end has more to come, which the next request would take for its answer.
        if (self.is_over || self.body.is_end_stream())
            && let Some(connection) = self.connection.take()
        {
            connection.give_back();
        }
    }
}

//! A connection to the agent: frames, each way.

use std::future::poll_fn;
use std::io;
use std::mem;
use std::pin::Pin;
use std::task::{Context, Poll, ready};

use tokio::io::{AsyncRead, AsyncWrite, AsyncWriteExt, ReadBuf};
use tokio::net::UnixStream;
use tokio::net::unix::{OwnedReadHalf, OwnedWriteHalf};

use super::AgentError;
use super::activity::Ongoing;
use super::patience::{PATIENCE, silent, within};
use crate::error::Error;
use crate::protocol::{
    Channel, Frame, HEADER_BYTES, MAX_DATA_BYTES, MAX_MESSAGE_BYTES, MAX_OPENING_BYTES, Malformed,
    Reply, Wire,
};
use crate::vsock::Vsock;

/// A connection that carries frames.
pub(super) struct Connection {
    pub(super) reader: FrameReader,
    pub(super) writer: FrameWriter,
    /// The call that it carries, where that is counted.
    ongoing: Option<Ongoing>,
}

impl Connection {
    pub(super) fn new(socket: UnixStream) -> Self {
        let (reader, writer) = socket.into_split();
        Self { reader: FrameReader::new(reader), writer: FrameWriter(writer), ongoing: None }
    }

    /// One that the guest has opened, on which it says little.
    pub(super) fn opened(socket: UnixStream) -> Self {
        let mut connection = Self::new(socket);
        connection.reader.max_bytes = MAX_OPENING_BYTES;
        connection
    }

    /// The next answer of the agent, within [`PATIENCE`].
    pub(super) async fn reply(&mut self, vsock: &Vsock) -> Result<Reply, Error> {
        match within(PATIENCE, self.reader.message()).await {
            Some(Ok(Some(reply))) => Ok(reply),
            Some(Ok(None)) => Err(lost(vsock)),
            Some(Err(error)) => Err(error.explain(vsock)),
            None => Err(silent()),
        }
    }

    /// The same, which carries a call that is counted.
    pub(super) fn counted(self, ongoing: Option<Ongoing>) -> Self {
        Self { ongoing, ..self }
    }

    /// The call is over, whatever becomes of the connection.
    pub(super) fn end_call(&mut self) {
        self.ongoing = None;
    }

    /// The bytes alone, behind the frames that were read, with what counts the call; none where half a frame
    /// was read.
    pub(super) fn into_stream(self) -> Result<(UnixStream, Option<Ongoing>), Error> {
        if self.reader.header_bytes > 0 {
            return Err(AgentError::Unexpected.into());
        }
        match self.reader.stream.reunite(self.writer.0) {
            Ok(stream) => Ok((stream, self.ongoing)),
            Err(_) => Err(AgentError::NotThere.into()),
        }
    }
}

/// A socket of this process's, for tokio.
pub(super) fn to_async(socket: std::os::unix::net::UnixStream) -> Result<UnixStream, Error> {
    let made = socket.set_nonblocking(true).and_then(|()| UnixStream::from_std(socket));
    made.map_err(|error| AgentError::Socket(error).into())
}

/// Why a connection ended in the middle of a call.
pub(super) fn lost(vsock: &Vsock) -> Error {
    vsock.ended_error().unwrap_or_else(|| AgentError::Lost.into())
}

/// Why a frame was not read.
#[derive(Debug)]
pub(super) enum ReadError {
    /// The connection is over.
    Ended,
    Malformed(Malformed),
}

impl ReadError {
    pub(super) fn explain(self, vsock: &Vsock) -> Error {
        match self {
            Self::Ended => lost(vsock),
            Self::Malformed(malformed) => AgentError::Malformed(malformed).into(),
        }
    }
}

impl From<Malformed> for ReadError {
    fn from(malformed: Malformed) -> Self {
        Self::Malformed(malformed)
    }
}

/// A frame that came.
pub(super) type Piece = (Channel, Vec<u8>);

/// What comes from the agent. Whoever stops waiting for a frame finds it whole at the next try.
pub(super) struct FrameReader<R = OwnedReadHalf> {
    stream: R,
    header: [u8; HEADER_BYTES],
    header_bytes: usize,
    body: Vec<u8>,
    body_bytes: usize,
    /// The longest frame that is read.
    max_bytes: usize,
}

impl<R: AsyncRead + Unpin> FrameReader<R> {
    pub(super) fn new(stream: R) -> Self {
        Self {
            stream,
            header: [0; HEADER_BYTES],
            header_bytes: 0,
            body: Vec::new(),
            body_bytes: 0,
            max_bytes: MAX_MESSAGE_BYTES,
        }
    }

    /// The next frame; none at the end of the connection.
    pub(super) async fn next(&mut self) -> Result<Option<Piece>, ReadError> {
        poll_fn(|context| self.poll_next(context)).await
    }

    pub(super) fn poll_next(
        &mut self,
        context: &mut Context<'_>,
    ) -> Poll<Result<Option<Piece>, ReadError>> {
        while self.header_bytes < HEADER_BYTES {
            let mut rest = ReadBuf::new(&mut self.header[self.header_bytes..]);
            ready!(Pin::new(&mut self.stream).poll_read(context, &mut rest))
                .map_err(|_| ReadError::Ended)?;
            match rest.filled().len() {
                0 if self.header_bytes == 0 => return Poll::Ready(Ok(None)),
                0 => return Poll::Ready(Err(ReadError::Ended)),
                bytes => self.header_bytes += bytes,
            }
        }
        let (channel, length) = Frame::parse_header(self.header)?;
        if length > self.max_bytes {
            return Poll::Ready(Err(Malformed { what: "a short frame", at: 0 }.into()));
        }
        while self.body_bytes < length {
            // Not more than has come by much: a header alone takes no memory.
            if self.body_bytes == self.body.len() {
                self.body.resize(length.min(self.body_bytes + MAX_DATA_BYTES), 0);
            }
            let mut rest = ReadBuf::new(&mut self.body[self.body_bytes..]);
            ready!(Pin::new(&mut self.stream).poll_read(context, &mut rest))
                .map_err(|_| ReadError::Ended)?;
            match rest.filled().len() {
                0 => return Poll::Ready(Err(ReadError::Ended)),
                bytes => self.body_bytes += bytes,
            }
        }
        (self.header_bytes, self.body_bytes) = (0, 0);
        Poll::Ready(Ok(Some((channel, mem::take(&mut self.body)))))
    }

    /// The next frame, which is a message; none at the end of the connection.
    pub(super) async fn message<T: Wire>(&mut self) -> Result<Option<T>, ReadError> {
        match self.next().await? {
            Some((channel, bytes)) => Ok(Some(Frame { channel, bytes: &bytes }.parse()?)),
            None => Ok(None),
        }
    }
}

/// What goes to the agent.
pub(super) struct FrameWriter(OwnedWriteHalf);

impl FrameWriter {
    /// A message.
    pub(super) async fn message(&mut self, message: &impl Wire) -> io::Result<()> {
        self.raw(&Frame::message(message)).await
    }

    /// Writes as much as there is room for.
    pub(super) fn poll_raw(
        &mut self,
        context: &mut Context<'_>,
        bytes: &[u8],
    ) -> Poll<io::Result<usize>> {
        Pin::new(&mut self.0).poll_write(context, bytes)
    }

    /// Frames that are made already.
    pub(super) async fn raw(&mut self, frames: &[u8]) -> io::Result<()> {
        self.0.write_all(frames).await
    }
}

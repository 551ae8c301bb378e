//! Files of the guest that are open: read and written in streams, a piece of 64 KiB at a time.

use std::fmt;
use std::io;
use std::mem;
use std::path::Path;
use std::pin::Pin;
use std::task::{Context, Poll, ready};

use tokio::io::{AsyncRead, AsyncWrite, AsyncWriteExt, ReadBuf};

use super::AgentError;
use super::calls::Calls;
use super::connection::{Connection, lost};
use super::metadata::{Metadata, path_bytes};
use super::patience::Patience;
use crate::error::Error;
use crate::protocol::{Call, Channel, Frame, MAX_DATA_BYTES, Read, Reply, Wire, Write};

/// A file of the guest that is read, for tokio's `AsyncReadExt`. Nothing of it is held but the
/// piece that came last, of 64 KiB at most.
pub struct FileReader {
    /// None when all has come.
    connection: Option<Connection>,
    calls: Calls,
    metadata: Metadata,
    piece: Vec<u8>,
    at: usize,
    patience: Patience,
}

impl FileReader {
    pub(super) async fn begin(calls: &Calls, path: &Path) -> Result<Self, Error> {
        let read = Read { path: path_bytes(path), offset: 0, length: None };
        let mut connection = calls.call(&Call::Read(read)).await?;
        let metadata = match connection.reply(calls.vsock()).await? {
            Reply::Stat(stat) => Metadata(stat),
            other => return Err(AgentError::refused(other).into()),
        };
        let (connection, calls) = (Some(connection), calls.clone());
        let (piece, at) = (Vec::new(), 0);
        let patience = Patience::default();
        Ok(Self { connection, calls, metadata, piece, at, patience })
    }

    /// What the file is.
    pub fn metadata(&self) -> &Metadata {
        &self.metadata
    }

    pub(super) fn explain(&self, error: io::Error) -> Error {
        match error.downcast::<Error>() {
            Ok(error) => error,
            Err(_) => lost(self.calls.vsock()),
        }
    }

    fn fill(&mut self, context: &mut Context<'_>) -> Poll<Result<(), Error>> {
        let Some(connection) = &mut self.connection else { return Poll::Ready(Ok(())) };
        let frame = connection.reader.poll_next(context);
        let frame = ready!(self.patience.poll(context, frame))?;
        let frame = frame.map_err(|error| error.explain(self.calls.vsock()))?;
        Poll::Ready(match frame {
            Some((Channel::Data, piece)) => {
                if piece.is_empty()
                    && let Some(connection) = self.connection.take()
                {
                    self.calls.keep(connection);
                }
                (self.piece, self.at) = (piece, 0);
                Ok(())
            }
            Some((Channel::Message, message)) => Err(Reply::from_bytes(&message)
                .map_or_else(AgentError::Malformed, AgentError::refused)
                .into()),
            Some(_) => Err(AgentError::Unexpected.into()),
            None => Err(lost(self.calls.vsock())),
        })
    }
}

impl AsyncRead for FileReader {
    fn poll_read(
        mut self: Pin<&mut Self>,
        context: &mut Context<'_>,
        buffer: &mut ReadBuf<'_>,
    ) -> Poll<io::Result<()>> {
        while self.at == self.piece.len() && self.connection.is_some() {
            ready!(self.fill(context)).map_err(io::Error::other)?;
        }
        let rest = self.piece.get(self.at..).unwrap_or_default();
        let now = rest.len().min(buffer.remaining());
        buffer.put_slice(&rest[..now]);
        self.at += now;
        Poll::Ready(Ok(()))
    }
}

impl fmt::Debug for FileReader {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("FileReader").field("metadata", &self.metadata).finish_non_exhaustive()
    }
}

/// How a file is written.
#[derive(Clone, Debug, Default)]
pub struct WriteOptions {
    mode: Option<u32>,
    owner: Option<(u32, u32)>,
    sync: bool,
}

impl WriteOptions {
    /// As [`Agent::write`](super::Agent::write) does.
    pub fn new() -> Self {
        Self::default()
    }

    /// Permission bits, whatever those of an old file are.
    #[must_use]
    pub fn mode(mut self, mode: u32) -> Self {
        self.mode = Some(mode & 0o7777);
        self
    }

    /// User and group, by number.
    #[must_use]
    pub fn owner(mut self, uid: u32, gid: u32) -> Self {
        self.owner = Some((uid, gid));
        self
    }

    /// Whether the file is on its disk (fsync) before it takes its place. Off unless set.
    #[must_use]
    pub fn sync(mut self, on: bool) -> Self {
        self.sync = on;
        self
    }
}

/// A file of the guest that is written, for tokio's `AsyncWriteExt`. It is not there before
/// [`finish`](Self::finish), which also says why a write failed: of a full disk the guest tells at once.
#[must_use = "the file appears at `finish`"]
pub struct FileWriter {
    connection: Connection,
    calls: Calls,
    /// What the guest has said before all was written.
    early: Option<Result<Reply, Error>>,
    /// A frame, and how much of it was written.
    pending: Vec<u8>,
    at: usize,
    patience: Patience,
}

impl FileWriter {
    pub(super) async fn begin(
        calls: &Calls,
        path: &Path,
        options: &WriteOptions,
    ) -> Result<Self, Error> {
        let WriteOptions { mode, owner, sync } = *options;
        let write = Write { path: path_bytes(path), mode, owner, sync };
        let mut connection = calls.call(&Call::Write(write)).await?;
        match connection.reply(calls.vsock()).await? {
            Reply::Done => {}
            Reply::Failed(failure) => return Err(AgentError::Create(failure).into()),
            other => return Err(AgentError::refused(other).into()),
        }
        let (calls, patience) = (calls.clone(), Patience::default());
        Ok(Self { connection, calls, early: None, pending: Vec::new(), at: 0, patience })
    }

    /// Puts the file into its place.
    ///
    /// # Errors
    ///
    /// [`ErrorKind::File`](crate::ErrorKind::File), with the guest's reason for this or any write
    /// before it; what was there is there. Else as [every call](crate::Agent#errors-of-every-call).
    pub async fn finish(mut self) -> Result<(), Error> {
        // An error of a write shows in the answer, unless there is none.
        let written = self.flush().await;
        let ended = match written {
            Ok(()) => {
                (self.pending, self.at) = (Frame::header(Channel::Data, 0).to_vec(), 0);
                self.flush().await
            }
            Err(error) => Err(error),
        };
        let answer = match self.early.take() {
            Some(early) => early,
            None => self.connection.reply(self.calls.vsock()).await,
        };
        match (answer, ended) {
            (Ok(Reply::Done), Ok(())) => {
                self.calls.keep(self.connection);
                Ok(())
            }
            (Ok(other), _) => Err(AgentError::refused(other).into()),
            (Err(error), _) => Err(error),
        }
    }

    /// Fails where the guest has said something, which is that it takes no more.
    fn listen(&mut self, context: &mut Context<'_>) -> io::Result<()> {
        if self.early.is_none()
            && let Poll::Ready(frame) = self.connection.reader.poll_next(context)
        {
            let frame = frame.map_err(|error| error.explain(self.calls.vsock()));
            self.early = Some(frame.and_then(|frame| match frame {
                Some((channel, bytes)) => {
                    let reply = Frame { channel, bytes: &bytes }.parse();
                    reply.map_err(|malformed| AgentError::Malformed(malformed).into())
                }
                None => Err(lost(self.calls.vsock())),
            }));
        }
        match self.early {
            Some(_) => Err(io::ErrorKind::BrokenPipe.into()),
            None => Ok(()),
        }
    }

    fn write_pending(&mut self, context: &mut Context<'_>) -> Poll<io::Result<()>> {
        while self.at < self.pending.len() {
            self.listen(context)?;
            let rest = &self.pending[self.at..];
            let wrote = self.connection.writer.poll_raw(context, rest);
            self.at += ready!(self.patience.poll(context, wrote)).map_err(io::Error::other)??;
        }
        Poll::Ready(Ok(()))
    }
}

impl AsyncWrite for FileWriter {
    fn poll_write(
        mut self: Pin<&mut Self>,
        context: &mut Context<'_>,
        bytes: &[u8],
    ) -> Poll<io::Result<usize>> {
        ready!(self.write_pending(context))?;
        let now = bytes.len().min(MAX_DATA_BYTES);
        let mut frame = mem::take(&mut self.pending);
        frame.clear();
        // An empty frame would be the end.
        if now > 0 {
            frame.extend(Frame::header(Channel::Data, now));
            frame.extend_from_slice(&bytes[..now]);
        }
        (self.pending, self.at) = (frame, 0);
        // It is ours now; the next call waits for the rest.
        match self.write_pending(context) {
            Poll::Ready(Err(error)) => Poll::Ready(Err(error)),
            _ => Poll::Ready(Ok(now)),
        }
    }

    fn poll_flush(mut self: Pin<&mut Self>, context: &mut Context<'_>) -> Poll<io::Result<()>> {
        self.write_pending(context)
    }

    fn poll_shutdown(self: Pin<&mut Self>, context: &mut Context<'_>) -> Poll<io::Result<()>> {
        self.poll_flush(context)
    }
}

impl fmt::Debug for FileWriter {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("FileWriter")
    }
}

#[cfg(test)]
mod tests {
    use std::io::Write as _;
    use std::os::unix::net::UnixStream as StdStream;
    use std::time::Duration;

    use tokio::io::AsyncReadExt;

    use super::*;
    use crate::agent::tests::{agent_of, calls, heard, pair};
    use crate::config::AgentConfig;
    use crate::error::ErrorKind;
    use crate::protocol::{Failure, FailureKind, FileKind, Stat};

    /// What sockets and a frame on either side hold: far less than a file may have.
    const FEW_BYTES: usize = 4 << 20;

    /// Time for whatever goes on without waiting for the other side.
    const WHILE: Duration = Duration::from_millis(300);

    fn stat() -> Stat {
        Stat { kind: FileKind::File, mode: 0o644, uid: 0, gid: 0, size: 1 << 30, modified_ns: 0 }
    }

    /// Calls, the first of which is answered by this, and the agent that does so.
    fn agent(answer: Reply) -> (Calls, std::thread::JoinHandle<StdStream>) {
        let calls = calls();
        let (connection, mut agent) = pair();
        calls.keep(connection);
        let thread = std::thread::spawn(move || {
            heard(&mut agent);
            agent.write_all(&Frame::message(&answer)).unwrap();
            agent
        });
        (calls, thread)
    }

    #[tokio::test]
    async fn of_a_file_that_an_agent_takes_slowly_little_is_held() {
        let (calls, thread) = agent(Reply::Done);
        let mut file =
            FileWriter::begin(&calls, Path::new("/f"), &WriteOptions::default()).await.unwrap();
        let mut agent = thread.join().unwrap();
        let (piece, mut taken) = (vec![7; 1 << 20], 0);
        let endless = async {
            loop {
                taken += file.write(&piece).await.unwrap();
            }
        };
        tokio::time::timeout(WHILE, endless).await.unwrap_err();
        assert!((1..FEW_BYTES).contains(&taken), "{taken}");
        // All of it comes when it is taken.
        let reading = std::thread::spawn(move || {
            let mut bytes = 0;
            loop {
                let (channel, piece) = heard(&mut agent);
                assert_eq!(channel, Channel::Data as u8);
                if piece.is_empty() {
                    agent.write_all(&Frame::message(&Reply::Done)).unwrap();
                    return (bytes, agent);
                }
                bytes += piece.len();
            }
        });
        file.finish().await.unwrap();
        let (bytes, _agent) = reading.join().unwrap();
        assert_eq!(bytes, taken);
        // The connection is for the next call.
        assert!(calls.take().is_some());
    }

    #[tokio::test(flavor = "multi_thread")]
    async fn a_guest_whose_disk_is_full_is_sent_no_more() {
        let (agent, mut guests) = agent_of(AgentConfig::new(), 1);
        let mut guest = guests.remove(0);
        let reading = std::thread::spawn(move || {
            heard(&mut guest);
            guest.write_all(&Frame::message(&Reply::Done)).unwrap();
            heard(&mut guest);
            let full = Failure { kind: FailureKind::Full, errno: 28, what: "write /f".into() };
            guest.write_all(&Frame::message(&Reply::Failed(full))).unwrap();
            // As the agent does, which throws it away.
            std::io::copy(&mut guest, &mut std::io::sink())
        });
        let endless = tokio::io::repeat(7);
        let error = agent.write_from("/f", endless, &WriteOptions::new()).await.unwrap_err();
        assert_eq!(error.kind(), &ErrorKind::File(io::ErrorKind::StorageFull), "{error}");
        // The connection has ended.
        reading.join().unwrap().unwrap();
    }

    #[tokio::test]
    async fn a_file_in_a_directory_that_is_not_there_says_what_makes_that() {
        let what = "write /nope/x".into();
        let failure = Failure { kind: FailureKind::NotFound, errno: 2, what };
        let (calls, thread) = agent(Reply::Failed(failure));
        let options = WriteOptions::new();
        let error = FileWriter::begin(&calls, Path::new("/nope/x"), &options).await.unwrap_err();
        assert_eq!(error.kind(), &ErrorKind::File(io::ErrorKind::NotFound), "{error}");
        assert!(error.how_to_fix().unwrap().contains("Agent::create_dir_all"), "{error}");
        drop(thread.join().unwrap());
    }

    #[tokio::test]
    async fn of_a_file_that_is_read_slowly_little_is_held() {
        let (calls, thread) = agent(Reply::Stat(stat()));
        let mut file = FileReader::begin(&calls, Path::new("/f")).await.unwrap();
        let mut agent = thread.join().unwrap();
        let frame =
            [&Frame::header(Channel::Data, MAX_DATA_BYTES)[..], &[7; MAX_DATA_BYTES]].concat();
        agent.set_nonblocking(true).unwrap();
        let mut sent = 0;
        let mut at = 0;
        let mut byte = [0];
        // The reader takes one byte in a while, and the agent all that it can send.
        for _ in 0..30 {
            while let Ok(count) = agent.write(&frame[at..]) {
                sent += count;
                at = (at + count) % frame.len();
            }
            file.read_exact(&mut byte).await.unwrap();
        }
        assert!((frame.len()..FEW_BYTES).contains(&sent), "{sent}");
        let rest = if at == 0 { Vec::new() } else { frame[at..].to_vec() };
        let frames = (sent + rest.len()) / frame.len();
        let writing = std::thread::spawn(move || {
            agent.set_nonblocking(false).unwrap();
            agent.write_all(&rest).unwrap();
            agent.write_all(&Frame::header(Channel::Data, 0)).unwrap();
            agent
        });
        let mut content = Vec::new();
        file.read_to_end(&mut content).await.unwrap();
        assert_eq!(content.len() + 30, frames * MAX_DATA_BYTES);
        assert!(calls.take().is_some());
        drop(writing.join().unwrap());
    }
}

//! The calls to an agent: connections that are over with one and wait for the next, and whether the
//! agent is alive while programs run.

use std::fmt;
use std::os::unix::net::UnixStream;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use rustix::net::{RecvFlags, recv};
use tokio::io::{AsyncReadExt, AsyncWriteExt};

use super::AgentError;
use super::activity::{Activity, Ongoing};
use super::connection::{Connection, lost, to_async};
use super::patience::{PATIENCE, silent, within};
use super::pulse::Pulse;
use crate::error::Error;
use crate::protocol::{AGENT_PORT, Call, Frame, HEADER_BYTES, MAX_MESSAGE_BYTES};
use crate::vsock::{Connecting, Vsock};

/// Connections that wait for a call, at most. Each is a thread in the guest, of some 12 KiB.
const MAX_KEPT: usize = 8;

/// The calls of a handle: what those of all handles of an agent share, and who counts those of this one.
#[derive(Clone)]
pub(super) struct Calls {
    shared: Arc<Shared>,
    activity: Option<Activity>,
}

struct Shared {
    vsock: Vsock,
    pulse: Arc<Pulse>,
    /// The last one is the first to be taken. They belong to no runtime, which may end before them.
    kept: Mutex<Vec<UnixStream>>,
}

impl Calls {
    /// Nobody counts them.
    pub(super) fn new(vsock: Vsock) -> Self {
        let shared = Shared { vsock, pulse: Arc::default(), kept: Mutex::default() };
        Self { shared: Arc::new(shared), activity: None }
    }

    /// To the same agent, and counted.
    pub(super) fn counted(&self, activity: Activity) -> Self {
        Self { shared: Arc::clone(&self.shared), activity: Some(activity) }
    }

    /// Calls the agent, on a connection that waits for that, or on a new one. Nothing has been answered when
    /// it returns.
    pub(super) async fn call(&self, call: &Call) -> Result<Connection, Error> {
        let message = Frame::call(call);
        if message.len() - HEADER_BYTES > MAX_MESSAGE_BYTES {
            return Err(AgentError::TooLong { bytes: message.len() }.into());
        }
        let ongoing = self.begin();
        let called = async {
            match self.call_again(&message).await? {
                Some(connection) => Ok(connection),
                None => call_anew(self.vsock(), &message).await,
            }
        };
        let connection = within(PATIENCE, called).await.unwrap_or_else(|| Err(silent()))?;
        Ok(connection.counted(ongoing))
    }

    /// On a connection that was kept. None where there is none, and where the agent cannot have heard
    /// anything of the call. Where it may have, it is not asked twice.
    async fn call_again(&self, message: &[u8]) -> Result<Option<Connection>, Error> {
        while let Some(socket) = self.take() {
            let mut socket = to_async(socket)?;
            if let Ok(written) = socket.write(message).await {
                let rest = socket.write_all(&message[written..]).await;
                return rest
                    .map(|()| Some(Connection::new(socket)))
                    .map_err(|_| lost(self.vsock()));
            }
        }
        Ok(None)
    }

    /// A call begins.
    fn begin(&self) -> Option<Ongoing> {
        self.activity.as_ref().map(Activity::begin)
    }

    pub(super) fn vsock(&self) -> &Vsock {
        &self.shared.vsock
    }

    pub(super) fn pulse(&self) -> &Arc<Pulse> {
        &self.shared.pulse
    }

    /// Keeps a connection for the next call. The one before has been answered, and nothing was begun to be
    /// written on it that is not whole.
    pub(super) fn keep(&self, connection: Connection) {
        let Ok((stream, ongoing)) = connection.into_stream() else { return };
        // The call is over before its connection can be another's.
        drop(ongoing);
        let Ok(socket) = stream.into_std() else { return };
        let mut kept = self.lock();
        if kept.len() < MAX_KEPT {
            kept.push(socket);
        }
    }

    /// A connection that waits, if one does. One that has ended, as all do with their guest, is thrown away, and
    /// so is one on which the guest says something unasked.
    pub(super) fn take(&self) -> Option<UnixStream> {
        loop {
            let socket = self.lock().pop()?;
            let look = recv(&socket, &mut [0; 1], RecvFlags::PEEK | RecvFlags::DONTWAIT);
            if matches!(look, Err(rustix::io::Errno::AGAIN)) {
                return Some(socket);
            }
        }
    }

    /// Closes those that wait.
    pub(super) fn forget(&self) {
        self.lock().clear();
    }

    fn lock(&self) -> MutexGuard<'_, Vec<UnixStream>> {
        self.shared.kept.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// On a new connection.
async fn call_anew(vsock: &Vsock, message: &[u8]) -> Result<Connection, Error> {
    let mut socket = to_async(vsock.begin_connect(AGENT_PORT)?.into_socket())?;
    // Written before the guest has accepted, which spares a round trip.
    let opened = async {
        socket.write_all(message).await?;
        socket.read_u8().await
    };
    match opened.await {
        Ok(answer) if Connecting::accepted(answer) => Ok(Connection::new(socket)),
        Ok(_) => Err(AgentError::NotThere.into()),
        Err(_) => Err(lost(vsock)),
    }
}

impl fmt::Debug for Calls {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("Calls")
    }
}

#[cfg(test)]
mod tests {
    use std::io::Write;
    use std::net::Shutdown;

    use super::*;
    use crate::agent::tests::{calls, heard, pair};
    use crate::protocol::{Call, Channel, Frame, HEADER_BYTES, Reply};

    #[tokio::test]
    async fn connections_that_have_ended_or_talk_are_not_taken_and_few_are_kept() {
        let calls = calls();
        let mut ends: Vec<_> = (0..MAX_KEPT + 3)
            .map(|_| {
                let (connection, end) = pair();
                calls.keep(connection);
                end
            })
            .collect();
        for (at, end) in ends.iter_mut().enumerate().skip(MAX_KEPT) {
            assert_eq!(std::io::Read::read(end, &mut [0]).unwrap(), 0, "{at} is closed");
        }
        ends.truncate(MAX_KEPT);
        // The last two to be kept.
        ends.pop();
        ends.last_mut().unwrap().write_all(b"unasked").unwrap();
        assert!(calls.take().is_some());
        calls.forget();
        assert!(calls.take().is_none());
        for mut end in ends {
            // Closed, or reset since it was not read.
            let _ = std::io::Read::read(&mut end, &mut [0]);
        }
    }

    #[tokio::test]
    async fn a_connection_in_the_middle_of_a_frame_is_not_kept() {
        let calls = calls();
        let (mut connection, mut end) = pair();
        end.write_all(&Frame::message(&Reply::Done)[..HEADER_BYTES]).unwrap();
        let waiting = std::time::Duration::from_millis(20);
        assert!(tokio::time::timeout(waiting, connection.reader.next()).await.is_err());
        calls.keep(connection);
        assert!(calls.take().is_none());
    }

    #[tokio::test]
    async fn a_call_that_nobody_can_have_heard_goes_to_the_next_connection() {
        let calls = calls();
        let (connection, mut alive) = pair();
        calls.keep(connection);
        let (connection, deaf) = pair();
        calls.keep(connection);
        // It looks alive, and takes nothing.
        deaf.shutdown(Shutdown::Read).unwrap();
        calls.call(&Call::Thaw).await.unwrap();
        assert_eq!(heard(&mut alive).0, Channel::Call as u8);
        // There is none any more, and the VM is gone.
        calls.call(&Call::Thaw).await.err().unwrap();
    }
}

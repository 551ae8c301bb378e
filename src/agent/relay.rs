//! Bytes that are passed on between two connections: a guest and a service, a client and a guest.
//!
//! `tokio::io::copy_bidirectional` ends both directions at the first error, and with it what the other side had said
//! before it closed; and it waits without an end for who goes on to whom nobody listens. A caller who does is read from
//! for a while, in vain: a TCP connection that is closed with something unread is reset, and may lose the end of the
//! answer.

use std::future::Future;
use std::pin::pin;
use std::time::Duration;

use tokio::io::{AsyncRead, AsyncReadExt, AsyncWrite, AsyncWriteExt, split};
use tokio::time::{Instant, timeout, timeout_at};

/// What is read of a connection before it is written to the other.
const BUFFER_BYTES: usize = 16 << 10;
/// How long one may go on to whom nobody listens.
const GOODBYE: Duration = Duration::from_secs(10);

/// What becomes of a caller when who is called has come to its end.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Caller {
    /// It is heard to its own end.
    Heard,
    /// It may say goodbye, but is not to keep awake who has nothing more to say.
    #[cfg_attr(not(feature = "endpoint"), allow(dead_code, reason = "a client of the endpoint"))]
    Dismissed,
}

/// Passes on what both say, until both have ended. Who closes before it has read all is still heard: what it said
/// before is written to the other, for as long as that takes no longer than [`GOODBYE`]. So long a caller may go on to
/// whom nobody listens, which it learns by the end of the answer alone.
pub(crate) async fn pass_on(
    caller: impl AsyncRead + AsyncWrite,
    called: impl AsyncRead + AsyncWrite,
    afterwards: Caller,
) {
    let (from_caller, to_caller) = split(caller);
    let (from_called, to_called) = split(called);
    let mut there = pin!(one_way(from_caller, to_called, GOODBYE));
    // Where the caller has gone, who is called learns it at once.
    let mut back = pin!(one_way(from_called, to_caller, Duration::ZERO));
    tokio::select! {
        end = &mut there => end.and_then(back, Caller::Heard).await,
        end = &mut back => end.and_then(there, afterwards).await,
    }
}

/// How one direction ended.
enum End {
    Said,
    /// Who it goes to takes no more. The other direction has until then.
    Unheard {
        until: Instant,
    },
    /// Who it comes from did not come to its end.
    CutOff,
}

impl End {
    /// What is done of the other direction.
    async fn and_then(self, other: impl Future<Output = Self>, afterwards: Caller) {
        match (self, afterwards) {
            (Self::Said, Caller::Heard) => {
                other.await;
            }
            (Self::Said, Caller::Dismissed) => drop(timeout(GOODBYE, other).await),
            (Self::Unheard { until }, _) => drop(timeout_at(until, other).await),
            (Self::CutOff, _) => {}
        }
    }
}

/// Passes on what one says, and its end. All that was read is written before anything else is asked for. Where nobody
/// listens, it is read for so long `in_vain`.
async fn one_way(
    mut from: impl AsyncRead + Unpin,
    mut to: impl AsyncWrite + Unpin,
    in_vain: Duration,
) -> End {
    let mut buffer = vec![0; BUFFER_BYTES];
    let end = loop {
        match from.read(&mut buffer).await {
            Ok(0) => break End::Said,
            Ok(count) => {
                // What encrypts keeps some of it back until then.
                let written = async {
                    to.write_all(&buffer[..count]).await?;
                    to.flush().await
                };
                if written.await.is_err() {
                    break End::Unheard { until: Instant::now() + GOODBYE };
                }
            }
            Err(_) => break End::CutOff,
        }
    };
    match end {
        // The other may never take an end.
        End::Said => drop(to.shutdown().await),
        End::Unheard { .. } => {
            let reading = async {
                let _ = to.shutdown().await;
                while from.read(&mut buffer).await.is_ok_and(|count| count > 0) {}
            };
            drop(timeout(in_vain, reading).await);
        }
        // It shall not look whole.
        End::CutOff => {}
    }
    end
}

#[cfg(test)]
mod tests {
    use tokio::net::{TcpListener, TcpStream, UnixStream};
    use tokio::sync::oneshot;
    use tokio::time::sleep;

    use super::*;

    /// Both ends of two connections that are passed on.
    fn joined(afterwards: Caller) -> (UnixStream, UnixStream, tokio::task::JoinHandle<()>) {
        let [(caller, here), (called, there)] = [(); 2].map(|()| UnixStream::pair().unwrap());
        (caller, called, tokio::spawn(pass_on(here, there, afterwards)))
    }

    async fn rest_of(stream: &mut UnixStream) -> String {
        let mut text = String::new();
        stream.read_to_string(&mut text).await.unwrap();
        text
    }

    #[tokio::test]
    async fn an_answer_comes_after_the_end_of_the_question_and_both_are_whole() {
        for afterwards in [Caller::Heard, Caller::Dismissed] {
            let (mut caller, mut called, over) = joined(afterwards);
            let question = "why? ".repeat(100_000);
            let asked = question.clone();
            let asks = tokio::spawn(async move {
                caller.write_all(asked.as_bytes()).await.unwrap();
                caller.shutdown().await.unwrap();
                rest_of(&mut caller).await
            });
            assert_eq!(rest_of(&mut called).await, question);
            called.write_all(b"because").await.unwrap();
            drop(called);
            assert_eq!(asks.await.unwrap(), "because");
            over.await.unwrap();
        }
    }

    #[tokio::test]
    async fn who_answers_and_closes_before_it_has_read_all_is_heard() {
        for afterwards in [Caller::Heard, Caller::Dismissed] {
            let (caller, mut called, over) = joined(afterwards);
            let (mut answers, mut asks) = caller.into_split();
            // More than all buffers on the way hold.
            let asks =
                tokio::spawn(async move { while asks.write_all(&[b'x'; 65_536]).await.is_ok() {} });
            called.read_exact(&mut [0; 65_536]).await.unwrap();
            called.write_all(b"too long").await.unwrap();
            drop(called);
            let mut answer = [0; 8];
            answers.read_exact(&mut answer).await.unwrap();
            assert_eq!(&answer, b"too long");
            // What it sends on is lost, of which it is told.
            assert!(!matches!(answers.read(&mut [0]).await, Ok(1)));
            drop(answers);
            over.await.unwrap();
            asks.await.unwrap();
        }
    }

    /// Over TCP, of which much of an answer is still on its way when it was written.
    #[tokio::test]
    async fn who_goes_on_while_it_is_answered_loses_nothing_of_the_answer() {
        for afterwards in [Caller::Heard, Caller::Dismissed] {
            let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
            let caller = TcpStream::connect(listener.local_addr().unwrap()).await.unwrap();
            let (here, _) = listener.accept().await.unwrap();
            let (mut called, there) = UnixStream::pair().unwrap();
            let over = tokio::spawn(pass_on(here, there, afterwards));
            let (mut answers, mut asks) = caller.into_split();
            let (closed, is_closed) = oneshot::channel();
            let (done, mut is_done) = oneshot::channel();
            let asks = tokio::spawn(async move {
                asks.write_all(&[b'x'; 65_536]).await.unwrap();
                is_closed.await.unwrap();
                while is_done.try_recv().is_err() && asks.write_all(&[b'x'; 4096]).await.is_ok() {
                    sleep(Duration::from_millis(1)).await;
                }
            });
            called.read_exact(&mut [0; 65_536]).await.unwrap();
            called.write_all(&vec![b'y'; 1 << 20]).await.unwrap();
            drop(called);
            closed.send(()).unwrap();
            // All of it was taken, and nothing read yet.
            sleep(Duration::from_millis(200)).await;
            let mut answer = Vec::new();
            answers.read_to_end(&mut answer).await.unwrap();
            assert_eq!(answer.len(), 1 << 20);
            let _ = done.send(());
            asks.await.unwrap();
            drop(answers);
            over.await.unwrap();
        }
    }

    #[tokio::test]
    async fn who_is_cut_off_ends_the_other() {
        let (mut caller, mut called, over) = joined(Caller::Heard);
        caller.write_all(b"half a ").await.unwrap();
        called.read_exact(&mut [0; 7]).await.unwrap();
        called.write_all(b"unread").await.unwrap();
        caller.readable().await.unwrap();
        // Unread bytes make an end an error for the other side.
        drop(caller);
        assert_eq!(rest_of(&mut called).await, "");
        over.await.unwrap();
    }
}

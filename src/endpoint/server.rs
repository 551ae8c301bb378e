//! Connections of clients: accepted, told apart, served.

use std::net::SocketAddr;
use std::pin::pin;
use std::sync::Arc;
use std::time::Duration;

use hyper::body::Incoming;
use hyper::server::conn::{http1, http2};
use hyper::service::service_fn;
use hyper::{Method, Request};
use hyper_util::rt::{TokioIo, TokioTimer};
use rustix::net::sockopt;
use tokio::io::{AsyncRead, AsyncWrite};
use tokio::net::{TcpListener, TcpStream};
use tokio::sync::{OwnedSemaphorePermit, Semaphore};
use tokio::time::{sleep, timeout};
use tokio_rustls::TlsAcceptor;

use super::alarm::HeadTimer;
use super::forward::Forward;
use super::headers::Peer;
use super::options::{CONNECTION_WINDOW, STREAM_WINDOW};
use super::shared::Shared;
use super::signal::Signal;
use super::streams::{StreamBody, Streams};
use super::token::Opened;
use super::{place, preface};

/// How long nothing is accepted when the process has no descriptors left.
const PAUSE: Duration = Duration::from_millis(50);
/// After how long without a word a client is asked whether it is there, and how often that is done: one that is
/// gone without a word is not to keep a session awake.
const PULSE: Duration = Duration::from_secs(30);
/// The least that hyper takes for its buffer.
const MIN_BUFFER: usize = 64 << 10;

/// Accepts and serves.
#[derive(Clone)]
pub(super) struct Server {
    pub(super) shared: Arc<Shared>,
    pub(super) tls: Option<TlsAcceptor>,
    /// Nothing new is to begin.
    pub(super) closing: Signal,
}

impl Server {
    /// Until it is closed.
    pub(super) async fn accept(self, listener: TcpListener) {
        let connections =
            Arc::new(Semaphore::new(self.shared.limits.connections.min(Semaphore::MAX_PERMITS)));
        let accept = async {
            loop {
                let Ok(permit) = Arc::clone(&connections).acquire_owned().await else { return };
                match listener.accept().await {
                    Ok((stream, peer)) => {
                        let server = self.clone();
                        self.shared.clients.spawn(server.greet(stream, peer, permit));
                    }
                    Err(error) => {
                        tracing::warn!(%error, "a connection cannot be accepted");
                        sleep(PAUSE).await;
                    }
                }
            }
        };
        tokio::select! {
            () = accept => {}
            () = self.closing.wait() => {}
        }
    }

    /// Learns what the client speaks.
    async fn greet(self, stream: TcpStream, peer: SocketAddr, permit: OwnedSemaphorePermit) {
        // What is written together is sent together already.
        let _ = stream.set_nodelay(true);
        let _ = keep_alive(&stream);
        let (stream, place) = place::of(stream, permit, self.shared.limits.header_timeout);
        let forward = Forward {
            shared: Arc::clone(&self.shared),
            peer: Peer::new(peer, self.tls.is_some()),
            opened: Opened::default(),
            place,
        };
        let patience = self.shared.limits.header_timeout;
        match &self.tls {
            Some(tls) => {
                let Ok(Ok(stream)) = timeout(patience, tls.accept(stream)).await else { return };
                let is_h2 = stream.get_ref().1.alpn_protocol() == Some(b"h2");
                self.serve(stream, is_h2, forward).await;
            }
            None => {
                let preface = timeout(patience, preface::read(stream));
                let closing = self.closing.wait();
                let preface = tokio::select! {
                    preface = preface => preface,
                    () = closing => return,
                };
                let Ok(Ok((stream, is_h2))) = preface else { return };
                self.serve(stream, is_h2, forward).await;
            }
        }
    }

    async fn serve<S>(&self, stream: S, is_h2: bool, forward: Forward)
    where
        S: AsyncRead + AsyncWrite + Unpin + Send + 'static,
    {
        let place = forward.place.clone();
        let forward = Arc::new(forward);
        if is_h2 {
            self.serve_h2(stream, forward).await
        } else {
            let served = self.serve_h1(stream, forward);
            tokio::select! {
                () = served => {}
                // Where an answer is waited for, hyper does not look at what comes from a client that has said more.
                () = place.gone() => {}
            }
        }
    }

    async fn serve_h1<S>(&self, stream: S, forward: Arc<Forward>)
    where
        S: AsyncRead + AsyncWrite + Unpin + Send + 'static,
    {
        let limits = &self.shared.limits;
        let mut builder = http1::Builder::new();
        builder
            .timer(HeadTimer::new(limits.header_timeout))
            .header_read_timeout(limits.header_timeout);
        builder.max_header_size(limits.header_bytes as usize);
        builder.max_buf_size(MIN_BUFFER.max(limits.header_bytes as usize));
        // With another number than its own, hyper takes memory for each request.
        if limits.headers != 100 {
            builder.max_headers(limits.headers);
        }
        let service = service_fn(move |request| {
            let forward = Arc::clone(&forward);
            async move { forward.answer(request).await }
        });
        let connection = builder.serve_connection(TokioIo::new(stream), service).with_upgrades();
        let mut connection = pin!(connection);
        tokio::select! {
            _ = connection.as_mut() => return,
            () = self.closing.wait() => connection.as_mut().graceful_shutdown(),
        }
        // What goes wrong on it is its client's.
        let _ = connection.await;
    }

    async fn serve_h2<S>(&self, stream: S, forward: Arc<Forward>)
    where
        S: AsyncRead + AsyncWrite + Unpin + Send + 'static,
    {
        let limits = &self.shared.limits;
        let mut builder = http2::Builder::new(self.shared.clients.clone());
        builder
            .timer(TokioTimer::new())
            .keep_alive_interval(PULSE)
            .max_concurrent_streams(limits.streams)
            .initial_stream_window_size(STREAM_WINDOW)
            .initial_connection_window_size(CONNECTION_WINDOW)
            .max_header_list_size(limits.header_bytes)
            .enable_connect_protocol();
        let streams = Arc::new(Streams::default());
        let counter = Arc::clone(&streams);
        let service = service_fn(move |mut request: Request<Incoming>| {
            let (forward, stream) = (Arc::clone(&forward), Arc::new(counter.begin()));
            if request.method() == Method::CONNECT {
                request.extensions_mut().insert(Arc::clone(&stream));
            }
            async move {
                let answer = forward.answer(request).await;
                answer.map(|answer| answer.map(|body| StreamBody::new(body, stream)))
            }
        });
        let mut connection = pin!(builder.serve_connection(TokioIo::new(stream), service));
        let mut closing = self.closing.wait();
        loop {
            let seen = streams.begun();
            tokio::select! {
                _ = connection.as_mut() => return,
                () = &mut closing => break,
                () = sleep(limits.header_timeout) => {}
            }
            // hyper closes a connection of HTTP/1 on which nothing goes on, and none of HTTP/2.
            if streams.is_idle_since(seen) {
                break;
            }
        }
        connection.as_mut().graceful_shutdown();
        let last = async {
            sleep(limits.header_timeout).await;
            while !streams.is_idle_since(streams.begun()) {
                sleep(limits.header_timeout).await;
            }
        };
        tokio::select! {
            _ = connection.as_mut() => {}
            () = last => {}
        }
    }
}

fn keep_alive(stream: &TcpStream) -> rustix::io::Result<()> {
    sockopt::set_socket_keepalive(stream, true)?;
    sockopt::set_tcp_keepidle(stream, PULSE)?;
    sockopt::set_tcp_keepintvl(stream, PULSE / 3)
}

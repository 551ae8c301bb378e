//! Clients: one that sends what it is told byte by byte, and those that other people use.

use std::io;
use std::net::SocketAddr;
use std::pin::Pin;
use std::task::{Context, Poll};

use futures_util::{SinkExt, StreamExt};
use http_body_util::{BodyExt, Empty};
use hyper::body::{Body, Bytes, Frame, Incoming};
use hyper::client::conn::{http1, http2};
use hyper::{Request, Response, StatusCode};
use hyper_util::rt::{TokioExecutor, TokioIo};
use serde_json::Value;
use tokio::io::{AsyncRead, AsyncReadExt, AsyncWrite, AsyncWriteExt};
use tokio::net::TcpStream;
use tokio::sync::mpsc;
use tokio_tungstenite::WebSocketStream;
use tokio_tungstenite::tungstenite::Message;

/// What a server answers, in text.
#[derive(Debug)]
pub struct Answer {
    pub status: u16,
    head: String,
    pub body: String,
}

impl Answer {
    fn read(text: &str) -> Option<Self> {
        let (head, body) = text.split_once("\r\n\r\n")?;
        let status = head.split(' ').nth(1)?.parse().ok()?;
        Some(Self { status, head: head.to_owned(), body: body.to_owned() })
    }

    pub fn header(&self, name: &str) -> Option<&str> {
        let mut lines = self.head.lines().skip(1).filter_map(|line| line.split_once(": "));
        lines.find(|(one, _)| one.eq_ignore_ascii_case(name)).map(|(_, value)| value)
    }

    pub fn json(&self) -> Value {
        serde_json::from_str(&self.body).unwrap_or_else(|error| panic!("{error}: {self:?}"))
    }

    /// The stage at which the request failed.
    pub fn stage(&self) -> String {
        self.json()["stage"].as_str().unwrap().to_owned()
    }
}

/// Sends these bytes, and reads until the connection is closed. None where nothing is answered.
pub async fn send(address: SocketAddr, bytes: impl AsRef<[u8]>) -> Option<Answer> {
    let text = exchange(address, bytes).await;
    (!text.is_empty()).then(|| Answer::read(&text).unwrap_or_else(|| panic!("{text:?}")))
}

/// As [`send`]; all that comes.
pub async fn exchange(address: SocketAddr, bytes: impl AsRef<[u8]>) -> String {
    let mut stream = TcpStream::connect(address).await.unwrap();
    // It may be closed before all is sent.
    let _ = stream.write_all(bytes.as_ref()).await;
    let mut answer = Vec::new();
    let _ = stream.read_to_end(&mut answer).await;
    String::from_utf8_lossy(&answer).into_owned()
}

/// Asks for a path, on a connection of its own.
pub async fn get(address: SocketAddr, host: &str, path: &str, headers: &str) -> Answer {
    let request =
        format!("GET {path} HTTP/1.1\r\nHost: {host}\r\n{headers}Connection: close\r\n\r\n");
    send(address, request).await.expect("an answer")
}

/// A client that keeps a connection of HTTP/1.1.
pub async fn h1<B>(address: SocketAddr) -> http1::SendRequest<B>
where
    B: Body<Data = Bytes> + Send + 'static,
    B::Error: Into<Box<dyn std::error::Error + Send + Sync>>,
{
    let stream = TcpStream::connect(address).await.unwrap();
    let (sender, connection) = http1::handshake(TokioIo::new(stream)).await.unwrap();
    tokio::spawn(connection.with_upgrades());
    sender
}

/// One of HTTP/2, without TLS.
pub async fn h2<B>(address: SocketAddr) -> http2::SendRequest<B>
where
    B: Body<Data = Bytes> + Send + Unpin + 'static,
    B::Error: Into<Box<dyn std::error::Error + Send + Sync>>,
{
    let stream = TcpStream::connect(address).await.unwrap();
    let builder = http2::Builder::new(TokioExecutor::new());
    let (sender, connection) = builder.handshake(TokioIo::new(stream)).await.unwrap();
    tokio::spawn(connection);
    sender
}

/// A request without a body.
pub fn request(path: &str) -> Request<Empty<Bytes>> {
    Request::get(path).header("host", "one.localhost").body(Empty::new()).unwrap()
}

pub async fn read(answer: Response<Incoming>) -> (StatusCode, Bytes) {
    let status = answer.status();
    (status, answer.into_body().collect().await.unwrap().to_bytes())
}

/// A request whose body is written while it goes on.
pub fn upload(uri: &str) -> (mpsc::Sender<Frame<Bytes>>, Request<Piped>) {
    let (sender, body) = pipe();
    let request = Request::post(uri).header("host", "one.localhost").body(body).unwrap();
    (sender, request)
}

/// A body that somebody writes to.
pub fn pipe() -> (mpsc::Sender<Frame<Bytes>>, Piped) {
    let (sender, frames) = mpsc::channel(1);
    (sender, Piped(frames))
}

pub struct Piped(mpsc::Receiver<Frame<Bytes>>);

impl Body for Piped {
    type Data = Bytes;
    type Error = io::Error;

    fn poll_frame(
        mut self: Pin<&mut Self>,
        context: &mut Context<'_>,
    ) -> Poll<Option<io::Result<Frame<Bytes>>>> {
        self.0.poll_recv(context).map(|frame| frame.map(Ok))
    }
}

/// Says things of all sizes, and hears them.
pub async fn talk<S: AsyncRead + AsyncWrite + Unpin>(socket: &mut WebSocketStream<S>) {
    for length in [0, 1, 125, 126, 65_536, 4 << 20] {
        let message = Message::binary(vec![b'w'; length]);
        socket.send(message.clone()).await.unwrap();
        assert_eq!(socket.next().await.unwrap().unwrap(), message);
    }
    socket.send(Message::text("wörter")).await.unwrap();
    assert_eq!(socket.next().await.unwrap().unwrap(), Message::text("wörter"));
}

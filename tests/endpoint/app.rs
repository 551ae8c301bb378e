//! An application as guests have them: an HTTP server, of version 1 or 2.

use std::convert::Infallible;
use std::io;
use std::net::SocketAddr;
use std::sync::atomic::AtomicUsize;
use std::sync::atomic::Ordering::SeqCst;

use http_body_util::BodyExt;
use http_body_util::combinators::UnsyncBoxBody;
use hyper::body::{Body, Bytes, Frame, Incoming};
use hyper::header::{HeaderMap, HeaderValue, TRAILER};
use hyper::server::conn::{http1, http2};
use hyper::service::service_fn;
use hyper::{Request, Response, StatusCode, Version};
use hyper_util::rt::{TokioExecutor, TokioIo};
use serde_json::{Value, json};
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::{TcpListener, TcpStream};
use tokio::sync::watch;
use tokio::task::JoinHandle;

use crate::client::pipe;

pub type AppBody = UnsyncBoxBody<Bytes, io::Error>;

/// A server that runs until this is dropped.
pub struct App {
    address: SocketAddr,
    pub is_h2: bool,
    server: JoinHandle<()>,
}

impl Drop for App {
    fn drop(&mut self) {
        self.server.abort();
    }
}

impl App {
    /// The one that answers as [`answer`] says, over HTTP/1.1.
    pub async fn start() -> Self {
        Self::serve(|stream| async move {
            let service = service_fn(answer);
            let _ = http1::Builder::new().serve_connection(TokioIo::new(stream), service).await;
        })
        .await
    }

    /// The same over HTTP/2 without TLS.
    pub async fn start_h2() -> Self {
        let app = Self::serve(|stream| async move {
            let builder = http2::Builder::new(TokioExecutor::new());
            let _ = builder.serve_connection(TokioIo::new(stream), service_fn(answer)).await;
        });
        let mut app = app.await;
        app.is_h2 = true;
        app
    }

    /// Either of them, and how many connections it has.
    pub async fn counted(is_h2: bool) -> (Self, watch::Receiver<usize>) {
        let (open, count) = watch::channel(0);
        let app = Self::serve(move |stream| {
            let open = open.clone();
            async move {
                open.send_modify(|open| *open += 1);
                let (stream, service) = (TokioIo::new(stream), service_fn(answer));
                if is_h2 {
                    let builder = http2::Builder::new(TokioExecutor::new());
                    let _ = builder.serve_connection(stream, service).await;
                } else {
                    let _ = http1::Builder::new().serve_connection(stream, service).await;
                }
                open.send_modify(|open| *open -= 1);
            }
        });
        (app.await, count)
    }

    /// One that reads the head of a request, says this, and closes the connection.
    pub async fn saying(words: &'static [u8]) -> Self {
        Self::serve(move |mut stream| async move {
            let mut head = Vec::new();
            while !head.windows(4).any(|window| window == b"\r\n\r\n") {
                let mut byte = [0];
                if !matches!(stream.read(&mut byte).await, Ok(1)) {
                    return;
                }
                head.push(byte[0]);
            }
            let _ = stream.write_all(words).await;
            let _ = stream.shutdown().await;
            let _ = tokio::io::copy(&mut stream, &mut tokio::io::sink()).await;
        })
        .await
    }

    /// One that does this with each connection.
    pub async fn serve<F>(serve: impl Fn(TcpStream) -> F + Send + 'static) -> Self
    where
        F: Future<Output = ()> + Send + 'static,
    {
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let address = listener.local_addr().unwrap();
        let server = tokio::spawn(async move {
            let mut connections = tokio::task::JoinSet::new();
            while let Ok((stream, _)) = listener.accept().await {
                stream.set_nodelay(true).unwrap();
                connections.spawn(serve(stream));
            }
        });
        Self { address, is_h2: false, server }
    }

    pub fn port(&self) -> u16 {
        self.address.port()
    }
}

/// What the application says.
pub async fn answer(request: Request<Incoming>) -> Result<Response<AppBody>, Infallible> {
    let path = request.uri().path().to_owned();
    Ok(match path.as_str() {
        "/hello" => text("hello\n"),
        "/echo" | "/package.Service/Echo" => echo(request),
        "/length" => length(request).await,
        "/never" => std::future::pending().await,
        "/refuse" => status(StatusCode::PAYLOAD_TOO_LARGE),
        "/counted" => bytes(1_000_000_000, &SENT),
        path if path.starts_with("/bytes/") => {
            static UNCOUNTED: AtomicUsize = AtomicUsize::new(0);
            bytes(path["/bytes/".len()..].parse().unwrap(), &UNCOUNTED)
        }
        _ => text(seen(&request).to_string()),
    })
}

/// All that the application sees of a request.
fn seen(request: &Request<Incoming>) -> Value {
    let mut headers = serde_json::Map::new();
    for name in request.headers().keys() {
        let values = request.headers().get_all(name).into_iter();
        let values: Vec<_> = values.map(|value| value.to_str().unwrap()).collect();
        headers.insert(name.as_str().to_owned(), json!(values.join(" | ")));
    }
    json!({
        "method": request.method().as_str(),
        "target": request.uri().to_string(),
        "version": format!("{:?}", request.version()),
        "headers": headers,
    })
}

fn body(body: impl Body<Data = Bytes, Error = io::Error> + Send + 'static) -> AppBody {
    body.boxed_unsync()
}

fn text(text: impl Into<Bytes>) -> Response<AppBody> {
    let full = http_body_util::Full::new(text.into());
    Response::new(body(full.map_err(|never| match never {})))
}

fn status(status: StatusCode) -> Response<AppBody> {
    let mut answer = text("");
    *answer.status_mut() = status;
    answer
}

/// Gives back the body as it comes, and its trailers. Trailers of the server's own say how it ended, as gRPC's do.
fn echo(request: Request<Incoming>) -> Response<AppBody> {
    let is_h2 = request.version() == Version::HTTP_2;
    let announced = request.headers().get(TRAILER).cloned();
    let (sender, echoed) = pipe();
    let mut incoming = request.into_body();
    tokio::spawn(async move {
        let mut trailers = HeaderMap::new();
        while let Some(frame) = incoming.frame().await {
            match frame.map(Frame::into_data) {
                Ok(Ok(data)) => {
                    if sender.send(Frame::data(data)).await.is_err() {
                        return;
                    }
                }
                Ok(Err(last)) => trailers.extend(last.into_trailers().unwrap()),
                Err(_) => return,
            }
        }
        if is_h2 {
            trailers.insert("grpc-status", HeaderValue::from_static("0"));
        }
        if !trailers.is_empty() {
            let _ = sender.send(Frame::trailers(trailers)).await;
        }
    });
    let mut answer = Response::new(body(echoed));
    if let Some(names) = announced {
        answer.headers_mut().insert(TRAILER, names);
    }
    answer
}

/// How long the body is, when it is over.
async fn length(request: Request<Incoming>) -> Response<AppBody> {
    let mut incoming = request.into_body();
    let mut length = 0;
    while let Some(frame) = incoming.frame().await {
        let Ok(frame) = frame else { return status(StatusCode::BAD_REQUEST) };
        length += frame.data_ref().map_or(0, Bytes::len);
    }
    text(length.to_string())
}

/// What was given to clients that asked for `/counted`, of which there is one.
pub static SENT: AtomicUsize = AtomicUsize::new(0);

/// So many bytes, without saying so.
fn bytes(mut left: usize, count: &'static AtomicUsize) -> Response<AppBody> {
    let (sender, sent) = pipe();
    tokio::spawn(async move {
        while left > 0 {
            let piece = Bytes::from_static(&[b'x'; 16 << 10]);
            let piece = piece.slice(..left.min(piece.len()));
            left -= piece.len();
            count.fetch_add(piece.len(), SeqCst);
            if sender.send(Frame::data(piece)).await.is_err() {
                return;
            }
        }
    });
    Response::new(body(sent))
}

//! Proxies that do less than an endpoint, on the same threads and to the same server: what no proxy can be quicker than.

use std::net::SocketAddr;
use std::sync::Arc;

use hyper::body::Incoming;
use hyper::client::conn::http1::handshake;
use hyper::server::conn::http1;
use hyper::service::service_fn;
use hyper::{Request, Response};
use hyper_util::rt::TokioIo;
use tokio::io::copy_bidirectional;
use tokio::net::{TcpListener, TcpStream, UnixStream};
use tokio::sync::Mutex;

use crate::serve;

/// Moves bytes, and knows nothing of HTTP.
pub async fn copies_bytes() -> SocketAddr {
    listen(|mut client| async move {
        let mut server = connect();
        let _ = copy_bidirectional(&mut client, &mut server).await;
    })
    .await
}

/// hyper's server and hyper's client, with a connection to the server for each of a client's, and nothing between them: no
/// limits, routes or headers.
pub async fn passes_requests() -> SocketAddr {
    listen(|client| async move {
        let (sender, connection) = handshake(TokioIo::new(connect())).await.expect("HTTP");
        tokio::spawn(connection);
        let sender = Arc::new(Mutex::new(sender));
        let service = service_fn(move |request: Request<Incoming>| {
            let sender = Arc::clone(&sender);
            async move {
                let mut sender = sender.lock().await;
                sender.ready().await?;
                let answer: Response<Incoming> = sender.send_request(request).await?;
                Ok::<_, hyper::Error>(answer)
            }
        });
        let _ = http1::Builder::new().serve_connection(TokioIo::new(client), service).await;
    })
    .await
}

fn connect() -> UnixStream {
    let (ours, theirs) = UnixStream::pair().expect("sockets");
    tokio::spawn(serve(theirs));
    ours
}

/// Has each connection of a new address served.
pub(super) async fn listen<F>(serve: impl Fn(TcpStream) -> F + Send + 'static) -> SocketAddr
where
    F: Future<Output = ()> + Send + 'static,
{
    let listener = TcpListener::bind("127.0.0.1:0").await.expect("a socket");
    let address = listener.local_addr().expect("an address");
    tokio::spawn(async move {
        loop {
            let (client, _) = listener.accept().await.expect("a client");
            client.set_nodelay(true).expect("no delay");
            tokio::spawn(serve(client));
        }
    });
    address
}

//! HTTP to a program in a session's guest, from this process and without a socket of the host's.

use std::error::Error as StdError;
use std::fmt;
use std::pin::Pin;
use std::task::{Context, Poll};

use hyper::body::{Body, Bytes, Frame, Incoming, SizeHint};
use hyper::client::conn::http1;
use hyper::header::{HOST, HeaderValue};
use hyper::{Request, Response, Uri};
use hyper_util::rt::TokioIo;

use super::error::SessionError;
use super::stream::KeepAwake;
use super::{Session, SessionStream};
use crate::error::Error;

/// The body of an answer, as it comes. It keeps the session awake until it is dropped.
pub struct SessionBody {
    body: Incoming,
    _awake: KeepAwake,
}

impl Body for SessionBody {
    type Data = Bytes;
    type Error = hyper::Error;

    fn poll_frame(
        mut self: Pin<&mut Self>,
        context: &mut Context<'_>,
    ) -> Poll<Option<Result<Frame<Bytes>, hyper::Error>>> {
        Pin::new(&mut self.body).poll_frame(context)
    }

    fn is_end_stream(&self) -> bool {
        self.body.is_end_stream()
    }

    fn size_hint(&self) -> SizeHint {
        self.body.size_hint()
    }
}

impl fmt::Debug for SessionBody {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("SessionBody")
    }
}

impl Session {
    /// Asks an HTTP/1.1 server at a TCP port of the guest: wakes the session, if it sleeps, and keeps it awake until the
    /// answer's body is dropped. Both bodies stream, with back-pressure. A request without `Host` gets `localhost`.
    /// Each call has a connection of its own.
    ///
    /// # Errors
    ///
    /// As [`connect`](Self::connect), and [`ErrorKind::Http`](crate::ErrorKind::Http) where what answers there
    /// closes early, or is no HTTP server.
    ///
    /// ```no_run
    /// use http_body_util::{BodyExt, Empty};
    /// use hyper::{Request, body::Bytes};
    ///
    /// # async fn example(session: dormouse::Session) -> Result<(), Box<dyn std::error::Error>> {
    /// let request = Request::get("/index.html").body(Empty::<Bytes>::new())?;
    /// let answer = session.request(8080, request).await?;
    /// println!("{}", answer.status());
    /// let page = answer.into_body().collect().await?.to_bytes();
    /// # Ok(())
    /// # }
    /// ```
    pub async fn request<B>(
        &self,
        port: u16,
        mut request: Request<B>,
    ) -> Result<Response<SessionBody>, Error>
    where
        B: Body + Send + 'static,
        B::Data: Send,
        B::Error: Into<Box<dyn StdError + Send + Sync>>,
    {
        let stream = self.connect(port).await?;
        let awake = self.keep_awake();
        to_server(&mut request);
        let answer = ask(stream, request).await;
        let answer = answer.map_err(|source| SessionError::Http { port, source })?;
        Ok(answer.map(|body| SessionBody { body, _awake: awake }))
    }
}

async fn ask<B>(stream: SessionStream, request: Request<B>) -> hyper::Result<Response<Incoming>>
where
    B: Body + Send + 'static,
    B::Data: Send,
    B::Error: Into<Box<dyn StdError + Send + Sync>>,
{
    let (mut sender, connection) = http1::handshake(TokioIo::new(stream)).await?;
    // It ends with the answer's body.
    tokio::spawn(connection.with_upgrades());
    sender.send_request(request).await
}

/// What a client says to the server itself: a path, and whose.
fn to_server<B>(request: &mut Request<B>) {
    let host = request.uri().authority().map(|authority| authority.as_str().to_owned());
    let host = host.and_then(|host| HeaderValue::from_str(&host).ok());
    let host = host.unwrap_or(HeaderValue::from_static("localhost"));
    request.headers_mut().entry(HOST).or_insert(host);
    if let Some(path) = request.uri().path_and_query().cloned() {
        *request.uri_mut() = Uri::from(path);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_server_is_asked_for_a_path_and_told_its_host() {
        let mut request = Request::get("http://a.example:81/b?c=d").body(()).unwrap();
        to_server(&mut request);
        assert_eq!(
            (request.uri().to_string(), &request.headers()[HOST]),
            ("/b?c=d".into(), &"a.example:81".parse().unwrap())
        );
        let mut request = Request::get("/").header(HOST, "own").body(()).unwrap();
        to_server(&mut request);
        assert_eq!(request.headers()[HOST], "own");
        let mut request = Request::get("/x").body(()).unwrap();
        to_server(&mut request);
        assert_eq!(
            (request.uri().path(), &request.headers()[HOST]),
            ("/x", &"localhost".parse().unwrap())
        );
    }
}

//! The path of a request: route, port, token, session, wake, ask, answer.

use std::convert::Infallible;
use std::sync::Arc;

use hyper::body::{Body, Incoming};
use hyper::header::{CONNECTION, CONTENT_LENGTH, EXPECT, HOST, HeaderValue, TE, TRANSFER_ENCODING};
use hyper::http::request::Parts;
use hyper::http::uri::{Authority, Scheme};
use hyper::{Request, Response, StatusCode, Uri, Version};

use super::body::AnswerBody;
use super::connections::Lent;
use super::fault::{Fault, Stage};
use super::guest::{Guest, Lease};
use super::headers::{self, Peer};
use super::place::Place;
use super::port::{self, Asked};
use super::route::Target;
use super::shared::Shared;
use super::token::Opened;
use super::tunnel::Upgrade;
use super::upload::Upload;

/// The requests of one client's connection.
pub(super) struct Forward {
    pub(super) shared: Arc<Shared>,
    pub(super) peer: Peer,
    pub(super) opened: Opened,
    pub(super) place: Place,
}

impl Forward {
    /// The answer, whoever gives it.
    pub(super) async fn answer(
        &self,
        request: Request<Incoming>,
    ) -> Result<Response<AnswerBody>, Infallible> {
        let is_h2 = request.version() == Version::HTTP_2;
        let answer = self.forward(request).await.unwrap_or_else(|fault| {
            tracing::debug!(?fault, "a request fails");
            fault.into_answer().map(AnswerBody::own)
        });
        Ok(if is_h2 { without_connection(answer) } else { answer })
    }

    async fn forward(&self, mut request: Request<Incoming>) -> Result<Response<AnswerBody>, Fault> {
        let (method, uri) = (request.method(), request.uri());
        let routes = &self.shared.routes;
        let target = routes.target(method, uri, request.version(), request.headers())?;
        let upgrade = Upgrade::of(&mut request)?;
        let id = target.id.clone();
        let served = self.serve(request, target, upgrade).await;
        served.map_err(|fault| fault.of_session(&id))
    }

    async fn serve(
        &self,
        request: Request<Incoming>,
        target: Target,
        mut upgrade: Option<Upgrade>,
    ) -> Result<Response<AnswerBody>, Fault> {
        let is_websocket = upgrade.as_ref().is_some_and(Upgrade::is_websocket);
        let Asked { port, token, subprotocol } =
            port::asked(request.headers(), is_websocket, self.shared.routes.port)?;
        self.admit(token, &target.id, port)?;
        let shared = &self.shared;
        let Some(upstream) = shared.upstreams.find(&target.id) else {
            shared.guests.forget(&target.id);
            return Err(Fault::no_route("there is no session of this name"));
        };
        let guest = shared.guests.of(&target.id);
        let lease = guest.lease(upstream).await?;

        let (mut parts, body) = request.into_parts();
        let wants_h2 = port::wants_h2(&parts.headers) && upgrade.is_none();
        join_cookies(&mut parts);
        headers::to_guest(&mut parts.headers, parts.version, &target, &self.peer);
        if is_websocket {
            port::strip_subprotocols(&mut parts.headers);
        }
        let upload = match &mut upgrade {
            Some(upgrade) => {
                upgrade.ask(&mut parts)?;
                upgrade.subprotocol = subprotocol;
                if upgrade.is_connect() { Upload::empty() } else { Upload::new(body) }
            }
            None => Upload::new(body),
        };
        parts.extensions.clear();
        if wants_h2 {
            let request = to_h2(parts, target, upload)?;
            let asked = guest.connections.ask_h2(&*lease.upstream, port, request);
            let (answer, stream) = Box::pin(asked).await?;
            return to_client(answer, None, lease.with(stream));
        }
        let request = to_h1(parts, target, upload);
        let (answer, lent) = self.ask(&guest, port, request, &lease).await?;
        match upgrade {
            Some(upgrade) if answer.status() == StatusCode::SWITCHING_PROTOCOLS => {
                lent.leave();
                Ok(upgrade.join(answer, lease, self.place.clone(), &shared.clients))
            }
            // To the client of a CONNECT that would say that the tunnel is there (RFC 9110 §9.3.6).
            Some(upgrade) if upgrade.is_connect() && answer.status().is_success() => {
                let message = "the application does not take the WebSocket";
                Err(Fault::bad_gateway(Stage::Response, message))
            }
            _ => to_client(answer, Some(lent), lease),
        }
    }

    /// Whether who asks may reach this port of this session. It is seen before whether there is such a session.
    fn admit(&self, token: Option<&str>, id: &str, port: u16) -> Result<(), Fault> {
        let Some(keys) = &self.shared.keys else { return Ok(()) };
        let token = token.ok_or(Fault::forbidden("there is no token"))?;
        keys.check(token, id, port, &self.opened)
    }

    /// By HTTP/1.1, with what the application says to `Expect: 100-continue`.
    async fn ask(
        &self,
        guest: &Arc<Guest>,
        port: u16,
        mut request: Request<Upload>,
        lease: &Lease,
    ) -> Result<(Response<Incoming>, Lent), Fault> {
        let expects = request.headers().get(EXPECT).map(HeaderValue::as_bytes);
        let expects = expects.is_some_and(|value| value.eq_ignore_ascii_case(b"100-continue"));
        let gate = (expects && !request.body().is_end_stream())
            .then(|| request.body_mut().until_continue());
        if let Some(gate) = gate.clone() {
            hyper::ext::on_informational(&mut request, move |answer| {
                if answer.status() == StatusCode::CONTINUE {
                    gate.say(true);
                }
            });
        }
        let asked = guest.connections.ask(&*lease.upstream, port, request).await;
        if let Some(gate) = gate {
            gate.say(false);
        }
        asked
    }
}

/// HTTP/2 may send cookies one by one, which HTTP/1.1 does not know (RFC 9113 §8.2.3).
fn join_cookies(parts: &mut Parts) {
    const COOKIE: hyper::header::HeaderName = hyper::header::COOKIE;
    let cookies: Vec<_> = parts.headers.get_all(COOKIE).iter().map(HeaderValue::as_bytes).collect();
    if cookies.len() > 1
        && let Ok(joined) = HeaderValue::from_bytes(&cookies.join(&b"; "[..]))
    {
        parts.headers.insert(COOKIE, joined);
    }
}

fn to_h1(mut parts: Parts, target: Target, upload: Upload) -> Request<Upload> {
    parts.version = Version::HTTP_11;
    parts.uri = Uri::from(target.path);
    parts.headers.entry(HOST).or_insert(HeaderValue::from_static("localhost"));
    // hyper leaves out the body of a GET whose length nobody has said.
    if !upload.is_end_stream() && !parts.headers.contains_key(CONTENT_LENGTH) {
        parts.headers.insert(TRANSFER_ENCODING, HeaderValue::from_static("chunked"));
    }
    if parts.headers.contains_key(TE) {
        parts.headers.append(CONNECTION, HeaderValue::from_static("te"));
    }
    Request::from_parts(parts, upload)
}

fn to_h2(mut parts: Parts, target: Target, upload: Upload) -> Result<Request<Upload>, Fault> {
    let mut uri = hyper::http::uri::Parts::default();
    uri.scheme = Some(Scheme::HTTP);
    uri.authority = Some(target.authority.unwrap_or(Authority::from_static("localhost")));
    uri.path_and_query = Some(target.path);
    parts.uri =
        Uri::from_parts(uri).map_err(|_| Fault::malformed("the target cannot be asked for"))?;
    parts.version = Version::HTTP_2;
    parts.headers.remove(HOST);
    parts.headers.remove(EXPECT);
    Ok(Request::from_parts(parts, upload))
}

fn to_client(
    answer: Response<Incoming>,
    connection: Option<Lent>,
    lease: Lease,
) -> Result<Response<AnswerBody>, Fault> {
    let (mut parts, body) = answer.into_parts();
    if parts.status.is_informational() {
        let message = "the application switched to what it was not asked for";
        return Err(Fault::bad_gateway(Stage::Response, message));
    }
    let is_framed = parts.headers.contains_key(CONTENT_LENGTH)
        || parts.headers.contains_key(TRANSFER_ENCODING)
        || parts.version == Version::HTTP_2
        || body.is_end_stream();
    headers::strip_hop_by_hop(&mut parts.headers);
    // That of HTTP/1.0 would have the client's connection closed, too.
    parts.version = Version::HTTP_11;
    let body = AnswerBody::guest(body, !is_framed, connection, lease);
    Ok(Response::from_parts(parts, body))
}

fn without_connection(mut answer: Response<AnswerBody>) -> Response<AnswerBody> {
    answer.headers_mut().remove(CONNECTION);
    answer
}

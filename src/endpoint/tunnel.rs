//! Connections that have become something other than HTTP, WebSockets above all: bytes both ways.
//!
//! Source: RFC 9110 §7.8, `Upgrade`; RFC 8441, WebSockets over HTTP/2.

use std::sync::Arc;

use base64::Engine;
use base64::engine::general_purpose::STANDARD;
use hyper::header::{
    CONNECTION, HeaderValue, SEC_WEBSOCKET_ACCEPT, SEC_WEBSOCKET_KEY, SEC_WEBSOCKET_PROTOCOL,
    SEC_WEBSOCKET_VERSION, UPGRADE,
};
use hyper::http::request::Parts;
use hyper::upgrade::OnUpgrade;
use hyper::{Method, Request, Response, StatusCode, Version};
use hyper_util::rt::TokioIo;

use super::body::AnswerBody;
use super::fault::{Fault, Stage};
use super::guest::Lease;
use super::headers;
use super::place::Place;
use super::streams::OpenStream;
use super::tasks::Tasks;
use crate::agent::{Caller, pass_on};
use crate::random::random;

/// What a client wants its connection, or its stream of HTTP/2, to become.
pub(super) struct Upgrade {
    protocol: HeaderValue,
    client: OnUpgrade,
    /// It is asked for as HTTP/2 does it.
    is_connect: bool,
    /// A subprotocol that is the endpoint's own: browsers want one of theirs to be chosen.
    pub(super) subprotocol: Option<HeaderValue>,
    /// The stream of HTTP/2 that it is, which is open while it is.
    stream: Option<Arc<OpenStream>>,
}

impl Upgrade {
    /// None where the request is a plain one.
    pub(super) fn of<B>(request: &mut Request<B>) -> Result<Option<Self>, Fault> {
        let is_connect =
            request.method() == Method::CONNECT && request.version() == Version::HTTP_2;
        let protocol = if is_connect {
            let protocol = request.extensions().get::<hyper::ext::Protocol>();
            match protocol.map(hyper::ext::Protocol::as_str) {
                Some("websocket") => Some(HeaderValue::from_static("websocket")),
                _ => return Err(Fault::malformed("CONNECT is for WebSockets alone")),
            }
        } else if request.version() == Version::HTTP_11 {
            headers::upgrade(request.headers())
        } else {
            None
        };
        Ok(protocol.map(|protocol| {
            let client = hyper::upgrade::on(&mut *request);
            let stream = request.extensions_mut().remove();
            Self { protocol, client, is_connect, subprotocol: None, stream }
        }))
    }

    pub(super) fn is_websocket(&self) -> bool {
        self.protocol.as_bytes().eq_ignore_ascii_case(b"websocket")
    }

    /// Whether the client sends no body: what follows is the tunnel's.
    pub(super) fn is_connect(&self) -> bool {
        self.is_connect
    }

    /// Has the application asked for it, as HTTP/1.1 does it.
    pub(super) fn ask(&self, parts: &mut Parts) -> Result<(), Fault> {
        parts.headers.insert(CONNECTION, HeaderValue::from_static("upgrade"));
        parts.headers.insert(UPGRADE, self.protocol.clone());
        if self.is_connect {
            parts.method = Method::GET;
            parts.headers.insert(SEC_WEBSOCKET_KEY, websocket_key()?);
            let version = HeaderValue::from_static("13");
            parts.headers.entry(SEC_WEBSOCKET_VERSION).or_insert(version);
        }
        Ok(())
    }

    /// Joins both sides, when the application has agreed. The client has its place among all until that is over.
    pub(super) fn join(
        self,
        mut answer: Response<hyper::body::Incoming>,
        lease: Lease,
        place: Place,
        tasks: &Tasks,
    ) -> Response<AnswerBody> {
        let guest = hyper::upgrade::on(&mut answer);
        let (mut parts, _) = answer.into_parts();
        headers::strip_hop_by_hop(&mut parts.headers);
        if let Some(name) = self.subprotocol {
            parts.headers.entry(SEC_WEBSOCKET_PROTOCOL).or_insert(name);
        }
        if self.is_connect {
            parts.status = StatusCode::OK;
            parts.headers.remove(SEC_WEBSOCKET_ACCEPT);
        } else {
            parts.headers.insert(CONNECTION, HeaderValue::from_static("upgrade"));
            parts.headers.insert(UPGRADE, self.protocol);
        }
        parts.version = Version::HTTP_11;
        let (client, stream) = (self.client, self.stream);
        tasks.spawn(async move {
            let _held = (lease, stream);
            let joined = async {
                if let (Ok(client), Ok(guest)) = tokio::join!(client, guest) {
                    let (client, guest) = (TokioIo::new(client), TokioIo::new(guest));
                    pass_on(client, guest, Caller::Dismissed).await;
                }
            };
            tokio::select! {
                () = joined => {}
                // Who waits for the guest, to read or to speak, does not look at the client.
                () = place.gone() => {}
            }
        });
        Response::from_parts(parts, AnswerBody::none())
    }
}

fn websocket_key() -> Result<HeaderValue, Fault> {
    let key = random::<16>().ok();
    let key = key.and_then(|bytes| HeaderValue::try_from(STANDARD.encode(bytes)).ok());
    key.ok_or_else(|| Fault::bad_gateway(Stage::Request, "the host gives no random bytes"))
}

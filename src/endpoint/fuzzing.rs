//! The way in for the fuzz target `endpoint_request`: what the endpoint reads of a client itself, behind hyper's parser.

#![allow(clippy::expect_used, clippy::panic, reason = "what a fuzz target finds is a panic")]

use std::io;
use std::net::SocketAddr;
use std::pin::{Pin, pin};
use std::task::{Context, Poll, Waker};

use hyper::header::{CONNECTION, HeaderMap, HeaderName, HeaderValue, TRANSFER_ENCODING};
use hyper::{Method, Uri, Version};
use tokio::io::{AsyncRead, AsyncReadExt, ReadBuf};

use super::headers::{self, Peer};
use super::port::{self, OWN_HEADERS};
use super::route::Routes;
use super::token::Opened;
use super::{TokenKeys, preface};
use crate::session::is_label;

/// Lines: a method and a target, a token, then headers; and the same bytes as the beginning of a connection.
pub fn endpoint_request(bytes: &[u8]) {
    connection(bytes);
    let mut lines = bytes.split(|byte| *byte == b'\n');
    let (Some(first), Some(token)) = (lines.next(), lines.next()) else { return };
    let mut words = first.split(|byte| *byte == b' ');
    let method = words.next().and_then(|word| Method::from_bytes(word).ok());
    let uri = words.next().and_then(|word| Uri::try_from(word).ok());
    let (Some(method), Some(uri)) = (method, uri) else { return };
    let version = [Version::HTTP_11, Version::HTTP_2, Version::HTTP_10][bytes.len() % 3];
    let mut headers = HeaderMap::new();
    for line in lines.take(100) {
        let colon = line.iter().position(|byte| *byte == b':').unwrap_or(line.len());
        let (name, value) = (HeaderName::from_bytes(&line[..colon]), line.get(colon + 1..));
        let value = value.and_then(|value| HeaderValue::from_bytes(value).ok());
        if let (Ok(name), Some(value)) = (name, value) {
            headers.append(name, value);
        }
    }
    request(&method, &uri, version, headers);
    if let Ok(token) = std::str::from_utf8(token) {
        let keys = TokenKeys::new("fuzz", &[7; 32]).expect("keys");
        assert!(keys.check(token, "one", 8080, &Opened::default()).is_err(), "a token is forged");
    }
}

fn request(method: &Method, uri: &Uri, version: Version, mut headers: HeaderMap) {
    let session = (headers.len() % 2 == 1).then(|| "default".to_owned());
    let (domain, prefix) = ("localhost".to_owned(), Some("/sessions/".to_owned()));
    let routes = Routes { domain, prefix, session, port: 8080 };
    let _ = headers::upgrade(&headers);
    for is_websocket in [false, true] {
        if let Ok(asked) = port::asked(&headers, is_websocket, 8080) {
            assert_ne!(asked.port, 0);
        }
    }
    let Ok(target) = routes.target(method, uri, version, &headers) else { return };
    assert!(is_label(&target.id), "{target:?}");
    let path = target.path.as_str();
    assert!(path.starts_with('/') || path == "*", "{target:?}");
    if target.prefix.is_some() {
        let path = path.split('?').next().unwrap_or_default();
        assert!(path.split('/').all(|segment| segment != "." && segment != ".."), "{target:?}");
    }
    let peer = Peer::new(SocketAddr::from(([127, 0, 0, 1], 1)), false);
    headers::to_guest(&mut headers, version, &target, &peer);
    port::strip_subprotocols(&mut headers);
    assert!(!headers.contains_key(CONNECTION) && !headers.contains_key(TRANSFER_ENCODING));
    assert!(headers.keys().all(|name| !name.as_str().starts_with(OWN_HEADERS)));
    let names = headers.get("sec-websocket-protocol").map(|names| names.to_str().expect("text"));
    let mut names = names.unwrap_or_default().split(',').map(str::trim);
    let is_own = |name: &str| name == "lambda-microvms" || name.starts_with("lambda-microvms.");
    assert!(!names.any(is_own), "the application sees what is the endpoint's");
}

/// Bytes that come in pieces are the same when it is known what they begin.
fn connection(bytes: &[u8]) {
    let piece = bytes.first().map_or(1, |first| usize::from(*first % 32) + 1);
    let all = async {
        let (mut stream, is_h2) = preface::read(Pieces { bytes, piece }).await?;
        let mut read = Vec::new();
        stream.read_to_end(&mut read).await?;
        Ok::<_, io::Error>((read, is_h2))
    };
    let Poll::Ready(Ok((read, is_h2))) = pin!(all).poll(&mut Context::from_waker(Waker::noop()))
    else {
        panic!("bytes that are there are waited for");
    };
    assert_eq!(read, bytes);
    assert_eq!(is_h2, bytes.starts_with(b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n"));
}

struct Pieces<'b> {
    bytes: &'b [u8],
    piece: usize,
}

impl AsyncRead for Pieces<'_> {
    fn poll_read(
        mut self: Pin<&mut Self>,
        _: &mut Context<'_>,
        buffer: &mut ReadBuf<'_>,
    ) -> Poll<io::Result<()>> {
        let count = self.piece.min(self.bytes.len()).min(buffer.remaining());
        let (now, later) = self.bytes.split_at(count);
        buffer.put_slice(now);
        self.bytes = later;
        Poll::Ready(Ok(()))
    }
}

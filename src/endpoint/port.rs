//! Which port of the guest a request is for, by which token, and how it wants to be spoken to there.
//!
//! Source: AWS Lambda's MicroVMs (2026): the header `X-aws-proxy-port`, then the WebSocket subprotocol
//! `lambda-microvms.port.N`, then 8080. Its token likewise: `X-aws-proxy-auth`, `lambda-microvms.authentication.TOKEN`.

use hyper::HeaderMap;
use hyper::header::{CONTENT_TYPE, HeaderName, HeaderValue, SEC_WEBSOCKET_PROTOCOL};

use super::fault::Fault;

pub(super) const DEFAULT_PORT: u16 = 8080;
const PORT: HeaderName = HeaderName::from_static("x-aws-proxy-port");
const FORCE_H2: HeaderName = HeaderName::from_static("x-aws-proxy-force-h2");
const AUTH: HeaderName = HeaderName::from_static("x-aws-proxy-auth");
/// Headers that are the endpoint's, and that no application sees.
pub(super) const OWN_HEADERS: &str = "x-aws-proxy-";
/// The subprotocols likewise. By itself it says that there are more of them, and is what is chosen.
const OWN_SUBPROTOCOL: &str = "lambda-microvms";
const PORT_SUBPROTOCOL: &str = "port.";
const AUTH_SUBPROTOCOL: &str = "authentication.";

/// What a request says to the endpoint alone.
#[derive(Debug, PartialEq, Eq)]
pub(super) struct Asked<'h> {
    pub(super) port: u16,
    pub(super) token: Option<&'h str>,
    /// Of a WebSocket, what is chosen where the application chooses no subprotocol: browsers want one of theirs.
    pub(super) subprotocol: Option<HeaderValue>,
}

/// The value of a header that may be there once.
fn once<'h>(
    headers: &'h HeaderMap,
    name: &HeaderName,
    twice: &'static str,
) -> Result<Option<&'h HeaderValue>, Fault> {
    let mut values = headers.get_all(name).into_iter();
    let first = values.next();
    if values.next().is_some() { Err(Fault::malformed(twice)) } else { Ok(first) }
}

/// The port and the token, by headers, or else by subprotocols: browsers let no page give a WebSocket any other header.
/// Where no port is said, it is `default`.
pub(super) fn asked(
    headers: &HeaderMap,
    is_websocket: bool,
    default: u16,
) -> Result<Asked<'_>, Fault> {
    let (mut port, mut token, mut marker, mut port_name) = (None, None, None, None);
    for name in subprotocols(headers).filter(|_| is_websocket) {
        let Some(own) = own_subprotocol(name) else { continue };
        if own.is_empty() {
            marker = Some(name);
        } else if let Some(text) = own.strip_prefix(PORT_SUBPROTOCOL) {
            port_name = Some(name);
            if port.replace(text).is_some() {
                return Err(Fault::malformed("there are several ports"));
            }
        } else if let Some(text) = own.strip_prefix(AUTH_SUBPROTOCOL)
            && token.replace(text).is_some()
        {
            return Err(Fault::malformed("there are several tokens"));
        }
    }
    if let Some(value) = once(headers, &PORT, "there are several ports")? {
        port = Some(value.to_str().unwrap_or_default());
    }
    if let Some(value) = once(headers, &AUTH, "there are several tokens")? {
        token = Some(value.to_str().unwrap_or_default());
    }
    let no_port = || Fault::malformed("the port is no number from 1 to 65535");
    let port = port.map_or(Ok(default), |text| number(text).ok_or_else(no_port))?;
    let subprotocol = marker.or(port_name).and_then(|name| HeaderValue::from_str(name).ok());
    Ok(Asked { port, token, subprotocol })
}

/// What follows the endpoint's own word, where a subprotocol begins with that.
fn own_subprotocol(name: &str) -> Option<&str> {
    let rest = name.strip_prefix(OWN_SUBPROTOCOL)?;
    if rest.is_empty() { Some(rest) } else { rest.strip_prefix('.') }
}

fn subprotocols(headers: &HeaderMap) -> impl Iterator<Item = &str> {
    let values = headers.get_all(SEC_WEBSOCKET_PROTOCOL).into_iter();
    values.filter_map(|value| value.to_str().ok()).flat_map(|value| value.split(',')).map(str::trim)
}

/// Digits alone: what `parse` takes beside them (`+80`) is no port.
fn number(text: &str) -> Option<u16> {
    let digits = text.bytes().all(|byte| byte.is_ascii_digit()) && !text.starts_with('0');
    digits.then(|| text.parse().ok()).flatten()
}

/// Takes the endpoint's own subprotocols from those that the application may choose from.
pub(super) fn strip_subprotocols(headers: &mut HeaderMap) {
    if !headers.contains_key(SEC_WEBSOCKET_PROTOCOL) {
        return;
    }
    let left: Vec<_> =
        subprotocols(headers).filter(|name| own_subprotocol(name).is_none()).collect();
    let left = HeaderValue::from_str(&left.join(", ")).ok().filter(|left| !left.is_empty());
    headers.remove(SEC_WEBSOCKET_PROTOCOL);
    if let Some(left) = left {
        headers.insert(SEC_WEBSOCKET_PROTOCOL, left);
    }
}

/// Whether the application is to be spoken to by HTTP/2: gRPC knows nothing else.
pub(super) fn wants_h2(headers: &HeaderMap) -> bool {
    let forced = headers.get(FORCE_H2).is_some_and(|value| {
        !value.as_bytes().eq_ignore_ascii_case(b"false") && value.as_bytes() != b"0"
    });
    let content_type = headers.get(CONTENT_TYPE).map_or(&b""[..], HeaderValue::as_bytes);
    forced
        || content_type
            .strip_prefix(b"application/grpc")
            .is_some_and(|rest| matches!(rest.first(), None | Some(b'+' | b';')))
}

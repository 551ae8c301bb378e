//! Headers that are of one hop, and those that say where a request came from.
//!
//! Source: RFC 9110 §7.6, forwarding; RFC 7239, `Forwarded`.

use std::net::{IpAddr, SocketAddr};

use hyper::HeaderMap;
use hyper::Version;
use hyper::header::{
    CONNECTION, EXPECT, FORWARDED, HOST, HeaderName, HeaderValue, PROXY_AUTHENTICATE,
    PROXY_AUTHORIZATION, TE, TRANSFER_ENCODING, UPGRADE, VIA,
};
use smallvec::SmallVec;

use super::port::OWN_HEADERS;
use super::route::Target;

const KEEP_ALIVE: HeaderName = HeaderName::from_static("keep-alive");
const PROXY_CONNECTION: HeaderName = HeaderName::from_static("proxy-connection");
const HTTP2_SETTINGS: HeaderName = HeaderName::from_static("http2-settings");
const FORWARDED_FOR: HeaderName = HeaderName::from_static("x-forwarded-for");
const FORWARDED_HOST: HeaderName = HeaderName::from_static("x-forwarded-host");
const FORWARDED_PROTO: HeaderName = HeaderName::from_static("x-forwarded-proto");
const FORWARDED_PORT: HeaderName = HeaderName::from_static("x-forwarded-port");
const FORWARDED_PREFIX: HeaderName = HeaderName::from_static("x-forwarded-prefix");
const REAL_IP: HeaderName = HeaderName::from_static("x-real-ip");

/// What is of one hop whether `Connection` names it or not.
const HOP_BY_HOP: [HeaderName; 9] = [
    CONNECTION,
    KEEP_ALIVE,
    PROXY_CONNECTION,
    PROXY_AUTHENTICATE,
    PROXY_AUTHORIZATION,
    HTTP2_SETTINGS,
    TE,
    TRANSFER_ENCODING,
    UPGRADE,
];
/// What an application may trust, since no client has said it.
const ORIGIN: [HeaderName; 7] = [
    FORWARDED,
    FORWARDED_FOR,
    FORWARDED_HOST,
    FORWARDED_PROTO,
    FORWARDED_PORT,
    FORWARDED_PREFIX,
    REAL_IP,
];

/// Where a request came from.
#[derive(Clone, Copy, Debug)]
pub(super) struct Origin {
    pub(super) peer: SocketAddr,
    pub(super) is_tls: bool,
}

/// The one protocol that the client wants to go on with on its connection.
///
/// Not h2c: what is said by it would go past all that is done here for each request.
pub(super) fn upgrade(headers: &HeaderMap) -> Option<HeaderValue> {
    let mut values = headers.get_all(UPGRADE).into_iter();
    let protocol = values.next().filter(|_| values.next().is_none())?;
    let name = protocol.as_bytes();
    let is_one = !name.is_empty() && !name.contains(&b',');
    let is_http = name.len() >= 3 && name[..3].eq_ignore_ascii_case(b"h2c")
        || name.len() >= 4 && name[..4].eq_ignore_ascii_case(b"http");
    (is_one && !is_http && lists(headers, &CONNECTION, "upgrade")).then(|| protocol.clone())
}

/// Whether a header's list has this word.
fn lists(headers: &HeaderMap, name: &HeaderName, word: &str) -> bool {
    let values = headers.get_all(name).into_iter().filter_map(|value| value.to_str().ok());
    values.flat_map(|value| value.split(',')).any(|item| item.trim().eq_ignore_ascii_case(word))
}

/// Takes what was said to this hop alone.
pub(super) fn strip_hop_by_hop(headers: &mut HeaderMap) {
    let named: SmallVec<[HeaderName; 4]> = headers
        .get_all(CONNECTION)
        .into_iter()
        .filter_map(|value| value.to_str().ok())
        .flat_map(|value| value.split(','))
        .filter_map(|name| HeaderName::from_bytes(name.trim().as_bytes()).ok())
        // Naming these would take from the application what it needs to read the message.
        .filter(|name| name != HOST && name != hyper::header::CONTENT_LENGTH)
        .collect();
    for name in named.iter().chain(&HOP_BY_HOP) {
        headers.remove(name);
    }
}

/// Makes what the client said what the guest's application is told.
pub(super) fn to_guest(headers: &mut HeaderMap, version: Version, target: &Target, origin: Origin) {
    let takes_trailers = lists(headers, &TE, "trailers");
    strip_hop_by_hop(headers);
    let own: SmallVec<[HeaderName; 4]> =
        headers.keys().filter(|name| name.as_str().starts_with(OWN_HEADERS)).cloned().collect();
    for name in own.iter().chain(&ORIGIN) {
        headers.remove(name);
    }
    if takes_trailers {
        headers.insert(TE, HeaderValue::from_static("trailers"));
    }
    if version != Version::HTTP_11 {
        headers.remove(EXPECT);
    }
    say_origin(headers, target, origin);
    headers.append(VIA, via(version));
}

fn say_origin(headers: &mut HeaderMap, target: &Target, origin: Origin) {
    let scheme = if origin.is_tls { "https" } else { "http" };
    let address = origin.peer.ip();
    let node = match address {
        IpAddr::V4(address) => address.to_string(),
        IpAddr::V6(address) => format!("\"[{address}]\""),
    };
    let mut forwarded = format!("for={node};proto={scheme}");
    if let Some(authority) = &target.authority {
        forwarded.push_str(&format!(";host=\"{authority}\""));
        if let Ok(host) = HeaderValue::from_str(authority.as_str()) {
            headers.insert(FORWARDED_HOST, host.clone());
            headers.insert(HOST, host);
        }
    }
    for (name, value) in [(FORWARDED, forwarded), (FORWARDED_FOR, address.to_string())] {
        if let Ok(value) = HeaderValue::try_from(value) {
            headers.insert(name, value);
        }
    }
    headers.insert(FORWARDED_PROTO, HeaderValue::from_static(scheme));
    if let Some(prefix) = &target.prefix {
        headers.insert(FORWARDED_PREFIX, prefix.clone());
    }
}

fn via(version: Version) -> HeaderValue {
    HeaderValue::from_static(match version {
        Version::HTTP_2 => "2.0 dormouse",
        Version::HTTP_10 => "1.0 dormouse",
        _ => "1.1 dormouse",
    })
}

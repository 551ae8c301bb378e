//! Headers that are of one hop, and those that say where a request came from.
//!
//! Source: RFC 9110 §7.6, forwarding; RFC 7239, `Forwarded`.

use std::net::{IpAddr, SocketAddr};

use hyper::HeaderMap;
use hyper::Version;
use hyper::header::{
    CONNECTION, CONTENT_LENGTH, EXPECT, FORWARDED, HOST, HeaderName, HeaderValue, TE, UPGRADE, VIA,
};
use smallvec::SmallVec;

use super::port::OWN_HEADERS;
use super::route::Target;

const FORWARDED_FOR: HeaderName = HeaderName::from_static("x-forwarded-for");
const FORWARDED_HOST: HeaderName = HeaderName::from_static("x-forwarded-host");
const FORWARDED_PROTO: HeaderName = HeaderName::from_static("x-forwarded-proto");
const FORWARDED_PREFIX: HeaderName = HeaderName::from_static("x-forwarded-prefix");

/// What is of one hop whether `Connection` names it or not.
fn is_of_one_hop(name: &HeaderName) -> bool {
    matches!(
        name.as_str(),
        "connection"
            | "keep-alive"
            | "proxy-connection"
            | "proxy-authenticate"
            | "proxy-authorization"
            | "http2-settings"
            | "te"
            | "transfer-encoding"
            | "upgrade"
    )
}

/// What an application may trust, since no client has said it. To some, as CGI, an underscore is a hyphen.
fn is_of_origin(name: &HeaderName) -> bool {
    let is_one =
        |name: &str| name.starts_with("x-forwarded-") || matches!(name, "forwarded" | "x-real-ip");
    let name = name.as_str();
    if name.contains('_') { is_one(&name.replace('_', "-")) } else { is_one(name) }
}

/// Where the requests of a connection come from, as it is written in each.
#[derive(Debug)]
pub(super) struct Peer {
    scheme: HeaderValue,
    address: HeaderValue,
    /// What `Forwarded` begins with.
    forwarded: String,
}

impl Peer {
    pub(super) fn new(peer: SocketAddr, is_tls: bool) -> Self {
        let scheme = if is_tls { "https" } else { "http" };
        let address = peer.ip().to_string();
        let forwarded = match peer.ip() {
            IpAddr::V4(_) => format!("for={address};proto={scheme}"),
            IpAddr::V6(_) => format!("for=\"[{address}]\";proto={scheme}"),
        };
        // An address has no characters that a header cannot have.
        let address = HeaderValue::try_from(address).unwrap_or(HeaderValue::from_static("unknown"));
        Self { scheme: HeaderValue::from_static(scheme), address, forwarded }
    }
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
    strip(headers, is_of_one_hop);
}

/// Takes what `Connection` names, and what else is not to go on. They are looked at once: most messages have few, and none of those.
fn strip(headers: &mut HeaderMap, ends_here: impl Fn(&HeaderName) -> bool) {
    let named = headers
        .get_all(CONNECTION)
        .into_iter()
        .filter_map(|value| value.to_str().ok())
        .flat_map(|value| value.split(','))
        .filter_map(|name| HeaderName::from_bytes(name.trim().as_bytes()).ok())
        // Naming these would take from the application what it needs to read the message.
        .filter(|name| name != HOST && name != CONTENT_LENGTH);
    let listed = headers.keys().filter(|name| ends_here(name)).cloned();
    let names: SmallVec<[HeaderName; 4]> = named.chain(listed).collect();
    for name in names {
        headers.remove(name);
    }
}

/// Makes what the client said what the guest's application is told.
pub(super) fn to_guest(headers: &mut HeaderMap, version: Version, target: &Target, peer: &Peer) {
    let takes_trailers = lists(headers, &TE, "trailers");
    let is_own = |name: &HeaderName| name.as_str().starts_with(OWN_HEADERS);
    strip(headers, |name| is_of_one_hop(name) || is_of_origin(name) || is_own(name));
    // For all that is put in, so that it grows once.
    headers.reserve(5);
    if takes_trailers {
        headers.insert(TE, HeaderValue::from_static("trailers"));
    }
    if version != Version::HTTP_11 {
        headers.remove(EXPECT);
    }
    say_peer(headers, target, peer);
    headers.append(VIA, via(version));
}

fn say_peer(headers: &mut HeaderMap, target: &Target, peer: &Peer) {
    let mut forwarded = String::with_capacity(128);
    forwarded.push_str(&peer.forwarded);
    if let Some(authority) = &target.authority {
        for part in [";host=\"", authority.as_str(), "\""] {
            forwarded.push_str(part);
        }
        if let Ok(host) = HeaderValue::from_str(authority.as_str()) {
            headers.insert(FORWARDED_HOST, host.clone());
            headers.insert(HOST, host);
        }
    }
    if let Ok(forwarded) = HeaderValue::try_from(forwarded) {
        headers.insert(FORWARDED, forwarded);
    }
    headers.insert(FORWARDED_FOR, peer.address.clone());
    headers.insert(FORWARDED_PROTO, peer.scheme.clone());
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

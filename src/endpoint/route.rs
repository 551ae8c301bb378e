//! Which session a request is for, and what of its path is the application's.
//!
//! Source: RFC 9112 §3.2, request targets and `Host`; RFC 9113 §8.3.1, `:authority`.
//!
//! A session has an origin of its own, `<id>.<domain>`, or a path below the domain itself. What two readers could
//! understand differently is refused.

use std::net::IpAddr;

use hyper::header::{HOST, HeaderMap, HeaderValue};
use hyper::http::uri::{Authority, PathAndQuery};
use hyper::{Method, Uri, Version};

use super::fault::Fault;
use crate::session::is_label;

/// How requests are told apart.
#[derive(Clone, Debug)]
pub(super) struct Routes {
    /// In lower case, without a dot at its end.
    pub(super) domain: String,
    /// `/sessions/`, where sessions are reached by paths.
    pub(super) prefix: Option<String>,
    /// The session and the port that are meant where none is named.
    pub(super) session: Option<String>,
    pub(super) port: u16,
}

/// Where a request goes.
#[derive(Debug, PartialEq, Eq)]
pub(super) struct Target {
    pub(super) id: String,
    /// Whom the client thinks that it talks to.
    pub(super) authority: Option<Authority>,
    /// What the application is asked for.
    pub(super) path: PathAndQuery,
    /// What was taken from the path.
    pub(super) prefix: Option<HeaderValue>,
}

impl Routes {
    pub(super) fn target(
        &self,
        method: &Method,
        uri: &Uri,
        version: Version,
        headers: &HeaderMap,
    ) -> Result<Target, Fault> {
        let authority = authority(uri, version, headers)?;
        if method == Method::CONNECT && version < Version::HTTP_2 {
            return Err(Fault::malformed("this is no forward proxy"));
        }
        if uri.scheme_str().is_some_and(|scheme| scheme != "http" && scheme != "https") {
            return Err(Fault::malformed("the scheme is not http or https"));
        }
        let path = uri.path_and_query().cloned().unwrap_or(PathAndQuery::from_static("/"));
        let is_of_server = method == Method::OPTIONS && path.as_str() == "*";
        if !is_of_server && !path.as_str().starts_with('/') {
            return Err(Fault::malformed("the path does not begin with a slash"));
        }
        let host = authority.as_ref().map(|authority| authority.host().to_ascii_lowercase());
        let host = host.as_deref().map(|host| host.strip_suffix('.').unwrap_or(host));
        if let Some(id) = host.and_then(|host| self.id_of(host)) {
            let id = is_label(id).then(|| id.to_owned()).ok_or_else(nobody)?;
            return Ok(Target { id, authority, path, prefix: None });
        }
        // Any other name may be one that a stranger's page was made to mean this machine by.
        if !host.is_none_or(|host| host == self.domain || is_address(host)) {
            return Err(unnamed());
        }
        if let Some(prefix) = &self.prefix
            && let Some(rest) = path.as_str().strip_prefix(prefix)
        {
            return by_path(prefix, rest, authority);
        }
        let id = self.session.clone().ok_or_else(unnamed)?;
        Ok(Target { id, authority, path, prefix: None })
    }

    /// What stands before the domain.
    fn id_of<'h>(&self, host: &'h str) -> Option<&'h str> {
        host.strip_suffix(&self.domain)?.strip_suffix('.')
    }
}

fn nobody() -> Fault {
    Fault::no_route("there is no session of this name")
}

fn unnamed() -> Fault {
    Fault::no_route(
        "the request names no session, neither by its host, <session>.<domain>, nor by its path",
    )
}

fn is_address(host: &str) -> bool {
    let host = host.strip_prefix('[').and_then(|host| host.strip_suffix(']')).unwrap_or(host);
    host.parse::<IpAddr>().is_ok()
}

/// Whom the request is for. It has to say so once, and what it says twice has to be the same.
fn authority(uri: &Uri, version: Version, headers: &HeaderMap) -> Result<Option<Authority>, Fault> {
    let mut hosts = headers.get_all(HOST).into_iter();
    let host = hosts.next();
    if hosts.next().is_some() {
        return Err(Fault::malformed("there are several Host headers"));
    }
    let host = match host {
        Some(host) => {
            let host = Authority::try_from(host.as_bytes()).ok();
            Some(host.ok_or_else(|| Fault::malformed("the Host header names no host"))?)
        }
        None => None,
    };
    let authority = match (uri.authority().cloned(), host) {
        (Some(target), Some(host)) if !same(&target, &host) => {
            return Err(Fault::malformed("the target and the Host header name different hosts"));
        }
        (Some(authority), _) | (None, Some(authority)) => authority,
        (None, None) if version >= Version::HTTP_11 => {
            return Err(Fault::malformed("there is no Host header"));
        }
        (None, None) => return Ok(None),
    };
    if authority.as_str().contains('@') {
        return Err(Fault::malformed("the host has a user"));
    }
    let host = authority.host();
    let port = authority.as_str().strip_prefix(host).unwrap_or_default();
    if host.is_empty() || !port.is_empty() && port != ":" && authority.port_u16().is_none() {
        return Err(Fault::malformed("the host is empty, or its port no number"));
    }
    Ok(Some(authority))
}

fn same(one: &Authority, other: &Authority) -> bool {
    one.as_str().eq_ignore_ascii_case(other.as_str())
}

/// `/sessions/<id>/path?query`
fn by_path(prefix: &str, rest: &str, authority: Option<Authority>) -> Result<Target, Fault> {
    let end = rest.find(['/', '?']).unwrap_or(rest.len());
    let (id, rest) = rest.split_at(end);
    // An id that is written with escapes is none.
    if !is_label(id) {
        return Err(nobody());
    }
    let (below, query) =
        rest.split_once('?').map_or((rest, None), |(below, query)| (below, Some(query)));
    if has_dot_segments(below) {
        return Err(Fault::malformed("the path has dot segments"));
    }
    let below = if below.is_empty() { "/" } else { below };
    let text = query.map_or_else(|| below.to_owned(), |query| format!("{below}?{query}"));
    let path = PathAndQuery::try_from(text).map_err(|_| Fault::malformed("the path is no path"))?;
    let taken = HeaderValue::try_from(format!("{prefix}{id}"));
    let taken = taken.map_err(|_| Fault::malformed("the path is no path"))?;
    Ok(Target { id: id.to_owned(), authority, path, prefix: Some(taken) })
}

/// Whether somebody on the way could take `..` for a step to another session, escaped or not.
fn has_dot_segments(path: &str) -> bool {
    let path = path.to_ascii_lowercase();
    let path = path.replace("%2e", ".").replace("%2f", "/").replace("%5c", "/").replace('\\', "/");
    path.split('/').any(|segment| segment == "." || segment == "..")
}

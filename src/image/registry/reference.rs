//! `registry.example:5000/team/app:1.2@sha256:…`
//!
//! Source: the crate of rules in distribution/reference: what Docker and everyone after it take. A name without a
//! host is of Docker Hub, and there, without a `/`, of `library`.

use std::fmt;
use std::net::IpAddr;

use super::RegistryError;
use crate::image::digest::Digest;

const MAX_NAME_BYTES: usize = 255;
const MAX_TAG_BYTES: usize = 128;
const HUB: &str = "docker.io";
/// Where Docker Hub answers.
const HUB_HOST: &str = "registry-1.docker.io";

#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Reference {
    /// As it was written, or `docker.io`.
    pub(super) host: String,
    pub(super) repository: String,
    pub(super) tag: String,
    pub(super) digest: Option<Digest>,
}

impl Reference {
    pub(super) fn parse(text: &str) -> Result<Self, RegistryError> {
        let fault = |what| RegistryError::Reference { text: text.to_owned(), what };
        let (name, digest) = match text.split_once('@') {
            Some((name, digest)) => {
                let digest = Digest::parse(digest).ok_or_else(|| fault("no SHA-256 digest"))?;
                (name, Some(digest))
            }
            None => (text, None),
        };
        let (host, rest) = match name.split_once('/') {
            Some((host, rest)) if host.contains(['.', ':']) || host == "localhost" => (host, rest),
            _ => (HUB, name),
        };
        let host = if host == "index.docker.io" { HUB } else { host };
        let (path, tag) = rest.rsplit_once(':').unwrap_or((rest, "latest"));
        let repository = match path.contains('/') || host != HUB {
            true => path.to_owned(),
            false => format!("library/{path}"),
        };
        if repository.len() > MAX_NAME_BYTES || !repository.split('/').all(is_part) {
            return Err(fault(
                "a name is lower-case letters, digits, and `.`, `_`, `-` between them",
            ));
        }
        if !is_tag(tag) {
            return Err(fault("a tag is up to 128 letters, digits, `_`, `.` and `-`"));
        }
        if !is_host(host) {
            return Err(fault("the registry's host is none"));
        }
        let (host, tag) = (host.to_owned(), tag.to_owned());
        Ok(Self { host, repository, tag, digest })
    }

    /// Where the registry answers: a host, and perhaps a port.
    pub(super) fn authority(&self) -> &str {
        if self.host == HUB { HUB_HOST } else { &self.host }
    }
}

impl fmt::Display for Reference {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}/{}:{}", self.host, self.repository, self.tag)
    }
}

/// Whether this leads to this machine itself: there a registry may speak without TLS.
pub(super) fn is_loopback(host: &str) -> bool {
    let host = host.trim_start_matches('[').trim_end_matches(']');
    host == "localhost" || host.parse::<IpAddr>().is_ok_and(|address| address.is_loopback())
}

fn is_part(part: &str) -> bool {
    let known = |byte: u8| byte.is_ascii_lowercase() || byte.is_ascii_digit();
    let inside = |byte: u8| known(byte) || matches!(byte, b'.' | b'_' | b'-');
    let bytes = part.as_bytes();
    bytes.first().is_some_and(|&byte| known(byte))
        && bytes.last().is_some_and(|&byte| known(byte))
        && bytes.iter().all(|&byte| inside(byte))
        && !part.contains("..")
}

fn is_tag(tag: &str) -> bool {
    let bytes = tag.as_bytes();
    let word = |byte: u8| byte.is_ascii_alphanumeric() || byte == b'_';
    bytes.len() <= MAX_TAG_BYTES
        && bytes.first().is_some_and(|&byte| word(byte))
        && bytes.iter().all(|&byte| word(byte) || matches!(byte, b'.' | b'-'))
}

fn is_host(host: &str) -> bool {
    let allowed =
        |byte: u8| byte.is_ascii_alphanumeric() || matches!(byte, b'.' | b'-' | b':' | b'[' | b']');
    let bytes = host.as_bytes();
    let begins = bytes.first().is_some_and(|&byte| byte.is_ascii_alphanumeric() || byte == b'[');
    let ends = bytes.last().is_some_and(|&byte| byte.is_ascii_alphanumeric() || byte == b']');
    begins && ends && host.len() <= 260 && host.bytes().all(allowed)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn references_are_read_as_docker_reads_them() {
        let cases = [
            ("busybox", "registry-1.docker.io", "library/busybox", "latest"),
            ("team/app:1.2", "registry-1.docker.io", "team/app", "1.2"),
            ("docker.io/python:3", "registry-1.docker.io", "library/python", "3"),
            ("localhost/app", "localhost", "app", "latest"),
            ("127.0.0.1:5000/a/b/c:x", "127.0.0.1:5000", "a/b/c", "x"),
            ("ghcr.io/a/b", "ghcr.io", "a/b", "latest"),
        ];
        for (text, authority, repository, tag) in cases {
            let found = Reference::parse(text).unwrap();
            let found = (found.authority(), found.repository.as_str(), found.tag.as_str());
            assert_eq!(found, (authority, repository, tag), "{text}");
        }
        let digest = Digest::of(b"");
        let pinned = Reference::parse(&format!("ghcr.io/a/b:1@{digest}")).unwrap();
        assert_eq!(pinned.digest, Some(digest));
    }

    #[test]
    fn what_is_no_reference_is_refused() {
        for bad in [
            "",
            "/",
            ":",
            "UPPER",
            "a//b",
            "../x",
            "a/../b",
            "app:",
            "app:ta g",
            "app@sha256:1",
            "a.b/",
            "app:x\r\nHost: y",
            "ex ample.org/app",
            "h.t/a?b",
            "h.t/a%2e",
            "h.t/-a",
            "user@h.t/app",
        ] {
            assert!(Reference::parse(bad).is_err(), "{bad}");
        }
    }

    #[test]
    fn only_this_machine_is_this_machine() {
        for host in ["localhost", "127.0.0.1", "127.9.9.9", "[::1]", "::1"] {
            assert!(is_loopback(host), "{host}");
        }
        for host in ["localhost.example.org", "127.0.0.1.example.org", "10.0.0.1", "0.0.0.0", ""] {
            assert!(!is_loopback(host), "{host}");
        }
    }
}

//! Who asks: logins, and the tokens that registries give for them.
//!
//! Source: RFC 7235, the challenge; RFC 7617, Basic; Docker's token authentication specification; Docker's
//! config.json. Programs that keep logins (credsStore, credHelpers) are not run.

use std::collections::BTreeMap;
use std::fmt;
use std::path::{Path, PathBuf};

use base64::Engine;
use base64::engine::general_purpose::STANDARD;
use serde::Deserialize;

use super::RegistryError;
use super::reference::Reference;
use crate::input_file;

/// A file with logins is smaller.
const MAX_CONFIG_BYTES: u64 = 1 << 20;
/// What Docker Hub is called among logins.
const HUB_LOGIN: &str = "https://index.docker.io/v1/";

/// A name and a password, or nobody.
#[derive(Clone, Default, PartialEq, Eq)]
pub(super) struct Credentials {
    /// As Basic has them.
    basic: Option<String>,
}

impl fmt::Debug for Credentials {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(if self.basic.is_some() { "a login" } else { "nobody" })
    }
}

#[derive(Deserialize)]
struct DockerConfig {
    #[serde(default)]
    auths: BTreeMap<String, DockerAuth>,
}

#[derive(Default, Deserialize)]
struct DockerAuth {
    #[serde(default)]
    auth: String,
}

impl Credentials {
    pub(super) fn login(name: &str, password: &str) -> Self {
        Self { basic: Some(STANDARD.encode(format!("{name}:{password}"))) }
    }

    /// What `docker login` left for the registry in this file, or in the user's own.
    pub(super) fn of_docker(
        reference: &Reference,
        path: Option<&Path>,
    ) -> Result<Self, RegistryError> {
        let Some(path) = path.map(Path::to_owned).or_else(own_path) else {
            return Ok(Self::default());
        };
        let fault = |what: String| {
            let path = path.display().to_string();
            RegistryError::Logins { path, what }
        };
        let file = match input_file::open(&path) {
            Err(error) if error.kind() == std::io::ErrorKind::NotFound => {
                return Ok(Self::default());
            }
            file => file.map_err(|error| fault(error.to_string()))?,
        };
        let bytes = input_file::read_bounded(file, MAX_CONFIG_BYTES);
        let bytes = bytes.map_err(|error| fault(error.to_string()))?;
        let bytes = bytes.ok_or_else(|| fault("it is too large".to_owned()))?;
        let config: DockerConfig =
            serde_json::from_slice(&bytes).map_err(|error| fault(error.to_string()))?;
        let names = match reference.host.as_str() {
            "docker.io" => vec![HUB_LOGIN.to_owned(), "docker.io".to_owned()],
            host => vec![host.to_owned(), format!("https://{host}"), format!("https://{host}/")],
        };
        let found = names.iter().find_map(|name| config.auths.get(name));
        let auth = found.map(|found| found.auth.trim().to_owned()).filter(|auth| !auth.is_empty());
        if auth.as_ref().is_some_and(|auth| STANDARD.decode(auth).is_err()) {
            return Err(fault("a login in it is not in base64".to_owned()));
        }
        Ok(Self { basic: auth })
    }

    /// The header's value.
    pub(super) fn basic(&self) -> Option<String> {
        self.basic.as_ref().map(|basic| format!("Basic {basic}"))
    }
}

fn own_path() -> Option<PathBuf> {
    let folder = std::env::var_os("DOCKER_CONFIG").map(PathBuf::from);
    let folder = folder.or_else(|| Some(PathBuf::from(std::env::var_os("HOME")?).join(".docker")));
    folder.map(|folder| folder.join("config.json"))
}

/// How a registry wants to know who asks.
#[derive(Debug, PartialEq, Eq)]
pub(super) enum Challenge {
    Basic,
    /// A token of another server.
    Bearer {
        realm: String,
        service: Option<String>,
        scope: Option<String>,
    },
}

impl Challenge {
    /// Reads a header `WWW-Authenticate`, which may name one way.
    pub(super) fn parse(header: &str) -> Option<Self> {
        let (scheme, rest) = header.trim().split_once(' ').unwrap_or((header.trim(), ""));
        if scheme.eq_ignore_ascii_case("basic") {
            return Some(Self::Basic);
        }
        if !scheme.eq_ignore_ascii_case("bearer") {
            return None;
        }
        let mut parameters = parameters(rest)?;
        let realm = parameters.remove("realm")?;
        let (service, scope) = (parameters.remove("service"), parameters.remove("scope"));
        Some(Self::Bearer { realm, service, scope })
    }
}

/// `name="value",name=value`
fn parameters(mut text: &str) -> Option<BTreeMap<String, String>> {
    let mut parameters = BTreeMap::new();
    loop {
        text = text.trim_start_matches([' ', ',', '\t']);
        if text.is_empty() {
            return Some(parameters);
        }
        let (name, rest) = text.split_once('=')?;
        let mut value = String::new();
        text = match rest.strip_prefix('"') {
            Some(rest) => {
                let mut chars = rest.char_indices();
                let end = loop {
                    match chars.next()? {
                        (at, '"') => break at,
                        (_, '\\') => value.push(chars.next()?.1),
                        (_, other) => value.push(other),
                    }
                };
                &rest[end + 1..]
            }
            None => {
                let end = rest.find(',').unwrap_or(rest.len());
                value.push_str(rest[..end].trim());
                &rest[end..]
            }
        };
        parameters.insert(name.trim().to_ascii_lowercase(), value);
    }
}

#[derive(Deserialize)]
struct TokenAnswer {
    #[serde(default)]
    token: Option<String>,
    #[serde(default)]
    access_token: Option<String>,
}

/// The token in a server's answer.
pub(super) fn token(bytes: &[u8]) -> Option<String> {
    let answer: TokenAnswer = serde_json::from_slice(bytes).ok()?;
    answer.token.or(answer.access_token).filter(|token| !token.is_empty())
}

/// A value in a query: everything but letters and digits by its bytes.
pub(super) fn escaped(value: &str) -> String {
    let escape = |byte: u8| match byte {
        b'a'..=b'z' | b'A'..=b'Z' | b'0'..=b'9' | b'-' | b'.' | b'_' => {
            char::from(byte).to_string()
        }
        _ => format!("%{byte:02X}"),
    };
    value.bytes().map(escape).collect()
}

#[cfg(test)]
mod tests {
    use vmm_sys_util::tempfile::TempFile;

    use super::*;

    #[test]
    fn challenges_are_read_however_they_are_written() {
        let hub = r#"Bearer realm="https://auth.docker.io/token",service="registry.docker.io",scope="repository:a/b:pull,push""#;
        let Some(Challenge::Bearer { realm, service, scope }) = Challenge::parse(hub) else {
            panic!()
        };
        assert_eq!(realm, "https://auth.docker.io/token");
        assert_eq!(service.as_deref(), Some("registry.docker.io"));
        assert_eq!(scope.as_deref(), Some("repository:a/b:pull,push"));
        assert_eq!(Challenge::parse("basic realm=\"x\""), Some(Challenge::Basic));
        for bad in [
            "",
            "Bearer",
            "Bearer realm",
            "Bearer realm=\"x",
            "Negotiate",
            "Bearer service=\"x\"",
            "Bearer realm=\"x\\",
        ] {
            assert_eq!(Challenge::parse(bad), None, "{bad}");
        }
    }

    #[test]
    fn logins_of_docker_are_found_by_host() {
        let file = TempFile::new().unwrap();
        let path = file.as_path();
        let login = STANDARD.encode("me:secret");
        let text = format!(
            r#"{{"auths": {{"https://index.docker.io/v1/": {{"auth": "{login}"}}, "r.example:5000": {{"auth": "{login}"}},
                "bad.example": {{"auth": "%%"}}}}, "credsStore": "desktop"}}"#
        );
        std::fs::write(path, text).unwrap();
        let of = |text: &str| Credentials::of_docker(&Reference::parse(text).unwrap(), Some(path));
        for known in ["busybox", "r.example:5000/app"] {
            assert_eq!(of(known).unwrap(), Credentials::login("me", "secret"), "{known}");
        }
        assert_eq!(of("r.example/app").unwrap(), Credentials::default());
        assert!(of("bad.example/app").is_err());
        assert!(!format!("{:?}", of("busybox").unwrap()).contains(&login));
    }
}

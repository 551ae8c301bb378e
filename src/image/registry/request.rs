//! A request to a registry, up to the answer that it is about: through redirects and proofs of identity.

use std::time::{Duration, Instant};

use http_body_util::{BodyExt, Empty};
use hyper::body::{Bytes, Incoming};
use hyper::client::conn::http1;
use hyper::header::{
    AUTHORIZATION, CONTENT_LENGTH, CONTENT_TYPE, HeaderName, LOCATION, WWW_AUTHENTICATE,
};
use hyper::{Request, Response, StatusCode, Uri};
use hyper_util::rt::TokioIo;
use serde::Deserialize;
use tokio::task::JoinHandle;
use tokio::time::timeout;

use super::RegistryError;
use super::auth::{Challenge, Credentials, escaped, token};
use super::connection::{Place, Tls};
use super::reference::{Reference, is_loopback};
use crate::image::digest::Digest;

/// What has to come while one is patient: less is as good as nothing.
const MIN_BYTES: usize = 16 << 10;
const MAX_REDIRECTS: usize = 5;
const MAX_TOKEN_BYTES: u64 = 1 << 20;
/// As much of an error's text as is looked at.
const MAX_ERROR_BYTES: u64 = 8 << 10;

/// What is asked for.
#[derive(Clone, Copy)]
pub(super) struct What {
    pub(super) name: &'static str,
    pub(super) accept: &'static str,
}

/// Asks one registry about one repository.
#[derive(Clone)]
pub(super) struct Client {
    pub(super) reference: Reference,
    credentials: Credentials,
    /// What proved who asks, the last time.
    authorization: Option<String>,
    tls: Tls,
    home: Place,
    patience: Duration,
}

/// An answer that was read whole.
pub(super) struct Answer {
    pub(super) bytes: Vec<u8>,
    pub(super) media_type: Option<String>,
}

/// An answer whose body comes yet.
pub(super) struct Open {
    pub(super) response: Response<Incoming>,
    pub(super) host: String,
    driver: JoinHandle<()>,
    patience: Duration,
    /// What was waited since so many bytes came.
    waited: Duration,
    came: usize,
}

impl Drop for Open {
    fn drop(&mut self) {
        self.driver.abort();
    }
}

impl Client {
    pub(super) fn new(
        reference: Reference,
        credentials: Credentials,
        patience: Duration,
    ) -> Result<Self, RegistryError> {
        let home = reference.authority().parse().ok();
        let home = home.map(|authority: hyper::http::uri::Authority| {
            let is_tls = !is_loopback(authority.host());
            place(is_tls, authority.host(), authority.port_u16())
        });
        let text = reference.to_string();
        let what = "the registry's host is none";
        let home = home.ok_or(RegistryError::Reference { text, what })?;
        let (authorization, tls) = (None, Tls::default());
        Ok(Self { reference, credentials, authorization, tls, home, patience })
    }

    pub(super) fn manifest_path(&self, digest: Option<&Digest>) -> String {
        let version = digest.map_or_else(|| self.reference.tag.clone(), Digest::to_string);
        format!("/v2/{}/manifests/{version}", self.reference.repository)
    }

    pub(super) fn blob_path(&self, digest: &Digest) -> String {
        format!("/v2/{}/blobs/{digest}", self.reference.repository)
    }

    /// What a path leads to, all of it.
    pub(super) async fn small(
        &mut self,
        path: &str,
        what: What,
        limit: u64,
    ) -> Result<Answer, RegistryError> {
        let mut open = self.get(path, what).await?;
        let header = open.response.headers().get(CONTENT_TYPE);
        let header = header.and_then(|value| value.to_str().ok());
        // Without its parameters.
        let media_type = header.and_then(|text| text.split(';').next()).map(str::trim);
        let media_type = media_type.map(str::to_owned);
        if media_type.as_deref().is_some_and(|media_type| media_type.starts_with("text/")) {
            let media_type = media_type.unwrap_or_default();
            let (host, what) = (open.host.clone(), what.name.to_owned());
            return Err(RegistryError::NotWhatWasAsked { host, what, media_type });
        }
        let bytes = open.whole(what.name, limit).await?;
        Ok(Answer { bytes, media_type })
    }

    /// Asks for a path of the registry.
    pub(super) async fn get(&mut self, path: &str, what: What) -> Result<Open, RegistryError> {
        let open = self.follow(path, what).await?;
        if open.response.status() != StatusCode::UNAUTHORIZED || open.host != self.home.name() {
            return open.succeeded(self.describe(what)).await;
        }
        let header = open.response.headers().get(WWW_AUTHENTICATE);
        let challenge = header.and_then(|value| value.to_str().ok()).unwrap_or_default().to_owned();
        let known = Challenge::parse(&challenge);
        let authorization = match known {
            None => {
                let host = open.host.clone();
                return Err(RegistryError::Challenge { host, challenge });
            }
            Some(Challenge::Basic) => self.credentials.basic(),
            Some(Challenge::Bearer { realm, service, scope }) => {
                drop(open);
                let token = self.token(&realm, service.as_deref(), scope.as_deref()).await?;
                let open = self.again(Some(format!("Bearer {token}")), path, what).await?;
                return open.succeeded(self.describe(what)).await;
            }
        };
        if authorization.is_none() {
            return open.succeeded(self.describe(what)).await;
        }
        drop(open);
        self.again(authorization, path, what).await?.succeeded(self.describe(what)).await
    }

    async fn again(
        &mut self,
        authorization: Option<String>,
        path: &str,
        what: What,
    ) -> Result<Open, RegistryError> {
        self.authorization = authorization;
        self.follow(path, what).await
    }

    fn describe(&self, what: What) -> String {
        format!("{} of {}", what.name, self.reference)
    }

    /// Asks, and goes where the answer says that it is. Who asks is told to the registry alone.
    async fn follow(&self, path: &str, what: What) -> Result<Open, RegistryError> {
        let (mut place, mut path) = (self.home.clone(), path.to_owned());
        for _ in 0..=MAX_REDIRECTS {
            let authorization = self.authorization.as_deref().filter(|_| place == self.home);
            let open = self.ask(&place, &path, what.accept, authorization).await?;
            if !open.response.status().is_redirection() {
                return Ok(open);
            }
            let to = open.response.headers().get(LOCATION).map(|value| value.as_bytes().to_vec());
            let to = String::from_utf8_lossy(&to.unwrap_or_default()).into_owned();
            let Some((next, next_path)) = redirected(&place, &path, &to) else {
                let (host, what) = (open.host.clone(), self.describe(what));
                return Err(RegistryError::Redirect { host, what, to });
            };
            (place, path) = (next, next_path);
        }
        let (host, what) = (self.home.name(), self.describe(what));
        Err(RegistryError::Redirects { host, what, limit: MAX_REDIRECTS })
    }

    /// A token for this repository, of the server that the registry names.
    async fn token(
        &self,
        realm: &str,
        service: Option<&str>,
        scope: Option<&str>,
    ) -> Result<String, RegistryError> {
        let challenge = || {
            let (host, challenge) = (self.home.name(), realm.to_owned());
            RegistryError::Challenge { host, challenge }
        };
        let (place, path) = redirected(&self.home, "/", realm).ok_or_else(challenge)?;
        let scope = scope.map_or_else(
            || format!("repository:{}:pull", self.reference.repository),
            str::to_owned,
        );
        let separator = if path.contains('?') { '&' } else { '?' };
        let mut path = format!("{path}{separator}scope={}", escaped(&scope));
        if let Some(service) = service {
            path.push_str(&format!("&service={}", escaped(service)));
        }
        let basic = self.credentials.basic();
        let open = self.ask(&place, &path, "application/json", basic.as_deref()).await?;
        let what = format!("a token for {}", self.reference);
        let mut open = open.succeeded(what.clone()).await?;
        let bytes = open.whole(&what, MAX_TOKEN_BYTES).await?;
        token(&bytes).ok_or_else(|| {
            let (host, media_type) = (open.host.clone(), "no token".to_owned());
            RegistryError::NotWhatWasAsked { host, what, media_type }
        })
    }

    /// One request, and the begin of its answer.
    async fn ask(
        &self,
        place: &Place,
        path: &str,
        accept: &str,
        authorization: Option<&str>,
    ) -> Result<Open, RegistryError> {
        let host = place.name();
        let fault = |what: String| RegistryError::Exchange { host: host.clone(), what };
        let connection = place.connect(&self.tls, self.patience).await?;
        let mut request = Request::get(path)
            .header("host", authority(place))
            .header("user-agent", concat!("dormouse/", env!("CARGO_PKG_VERSION")))
            .header("accept", accept);
        if let Some(authorization) = authorization {
            request = request.header(AUTHORIZATION, authorization);
        }
        let request =
            request.body(Empty::<Bytes>::new()).map_err(|error| fault(error.to_string()))?;
        let answered = async {
            let (mut sender, connection) = http1::handshake(TokioIo::new(connection)).await?;
            let driver = tokio::spawn(async move {
                // What goes wrong is an error of the request or of its body, too.
                let _ = connection.await;
            });
            let response = sender.send_request(request).await;
            match response {
                Ok(response) => Ok(Open::new(response, host.clone(), driver, self.patience)),
                Err(error) => {
                    driver.abort();
                    Err(error)
                }
            }
        };
        let silent = || silent(&host, "answer", self.patience);
        let answered = timeout(self.patience, answered).await.map_err(|_| silent())?;
        answered.map_err(|error: hyper::Error| fault(chain(&error)))
    }
}

impl Open {
    fn new(
        response: Response<Incoming>,
        host: String,
        driver: JoinHandle<()>,
        patience: Duration,
    ) -> Self {
        Self { response, host, driver, patience, waited: Duration::ZERO, came: 0 }
    }

    /// The next bytes of the body; none at its end. One that comes byte by byte is not waited for for ever.
    pub(super) async fn bytes(&mut self) -> Result<Option<Bytes>, RegistryError> {
        loop {
            let (begin, left) = (Instant::now(), self.patience.saturating_sub(self.waited));
            let frame = timeout(left, self.response.body_mut().frame()).await;
            let stalls = || silent(&self.host, "go on with its answer", self.patience);
            let frame = frame.map_err(|_| stalls())?;
            // What the caller does between two calls is not the registry's.
            self.waited += begin.elapsed();
            match frame {
                None => return Ok(None),
                Some(Ok(frame)) => {
                    if let Ok(bytes) = frame.into_data() {
                        self.came += bytes.len();
                        if self.came >= MIN_BYTES {
                            (self.waited, self.came) = (Duration::ZERO, 0);
                        }
                        return Ok(Some(bytes));
                    }
                }
                Some(Err(error)) => {
                    let (host, what) = (self.host.clone(), chain(&error));
                    return Err(RegistryError::Exchange { host, what });
                }
            }
        }
    }

    /// What the answer says of its length.
    pub(super) fn length(&self) -> Option<u64> {
        header(&self.response, &CONTENT_LENGTH)?.parse().ok()
    }

    async fn whole(&mut self, what: &str, limit: u64) -> Result<Vec<u8>, RegistryError> {
        let mut whole = Vec::new();
        while let Some(bytes) = self.bytes().await? {
            if (whole.len() + bytes.len()) as u64 > limit {
                let (host, what) = (self.host.clone(), what.to_owned());
                return Err(RegistryError::TooLong { host, what, limit });
            }
            whole.extend_from_slice(&bytes);
        }
        Ok(whole)
    }

    /// The answer, if it is one.
    async fn succeeded(mut self, what: String) -> Result<Self, RegistryError> {
        let status = self.response.status();
        if status == StatusCode::OK {
            return Ok(self);
        }
        let host = self.host.clone();
        if status == StatusCode::NOT_FOUND {
            return Err(RegistryError::NotFound { host, what });
        }
        let message = self.whole("an error", MAX_ERROR_BYTES).await.unwrap_or_default();
        let (message, status) = (error_message(&message), status.as_u16());
        Err(match status {
            401 | 403 => RegistryError::Denied { host, what, status, message },
            _ => RegistryError::Status { host, what, status, message },
        })
    }
}

/// `{"errors": [{"code": …, "message": …}]}`
fn error_message(bytes: &[u8]) -> String {
    #[derive(Deserialize)]
    struct Errors {
        errors: Vec<One>,
    }
    #[derive(Deserialize)]
    struct One {
        #[serde(default)]
        code: String,
        #[serde(default)]
        message: String,
    }
    let errors =
        serde_json::from_slice::<Errors>(bytes).ok().and_then(|all| all.errors.into_iter().next());
    let text = errors.map(|one| format!("{} {}", one.code, one.message)).unwrap_or_default();
    text.trim().chars().take(256).collect()
}

fn silent(host: &str, what: &'static str, patience: Duration) -> RegistryError {
    RegistryError::Silent { host: host.to_owned(), what, patience }
}

fn header<'r>(response: &'r Response<Incoming>, name: &HeaderName) -> Option<&'r str> {
    response.headers().get(name)?.to_str().ok()
}

fn chain(error: &(dyn std::error::Error + 'static)) -> String {
    let mut text = error.to_string();
    let mut cause = error.source();
    while let Some(next) = cause {
        text = format!("{text}: {next}");
        cause = next.source();
    }
    text
}

fn place(is_tls: bool, host: &str, port: Option<u16>) -> Place {
    let host = host.trim_start_matches('[').trim_end_matches(']').to_owned();
    Place { is_tls, host, port: port.unwrap_or(if is_tls { 443 } else { 80 }) }
}

/// As it is in a URL, where a port that goes without saying is not said: some who sign URLs sign this too.
fn authority(place: &Place) -> String {
    let host = match place.host.contains(':') {
        true => format!("[{}]", place.host),
        false => place.host.clone(),
    };
    match (place.is_tls, place.port) {
        (true, 443) | (false, 80) => host,
        (_, port) => format!("{host}:{port}"),
    }
}

/// Where a URL leads, seen from an answer of this place. Nobody is led from TLS to where there is none, nor from
/// elsewhere to this machine's own services.
fn redirected(from: &Place, path: &str, to: &str) -> Option<(Place, String)> {
    if !to.contains("://") {
        // Relative to the path that was asked for; the parser would take it for a host.
        let base = path.split('?').next().unwrap_or(path).rsplit_once('/');
        let base = base.map_or("", |(base, _)| base);
        let next_path = match to.as_bytes() {
            [] | [b'/', b'/', ..] => return None,
            [b'/', ..] => to.to_owned(),
            _ => format!("{base}/{to}"),
        };
        let uri: Uri = next_path.parse().ok()?;
        return uri.authority().is_none().then_some((from.clone(), next_path));
    }
    let uri: Uri = to.parse().ok()?;
    let next_path = uri.path_and_query().map_or("/", |path| path.as_str()).to_owned();
    let authority = uri.authority()?;
    // A name or a password in a URL is nobody's here.
    if authority.as_str().contains('@') {
        return None;
    }
    let is_tls = match uri.scheme_str() {
        Some("https") => true,
        Some("http") => false,
        _ => return None,
    };
    let next = place(is_tls, authority.host(), authority.port_u16());
    let to_loopback = is_loopback(&next.host);
    let is_allowed = if to_loopback { is_loopback(&from.host) } else { is_tls };
    is_allowed.then_some((next, next_path))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_port_that_goes_without_saying_is_not_said() {
        let said = |is_tls, host, port| authority(&place(is_tls, host, port));
        assert_eq!(said(true, "r.example", None), "r.example");
        assert_eq!(said(true, "r.example", Some(80)), "r.example:80");
        assert_eq!(said(false, "localhost", Some(80)), "localhost");
        assert_eq!(said(false, "[::1]", Some(5000)), "[::1]:5000");
        assert_eq!(said(true, "[2001:db8::1]", None), "[2001:db8::1]");
    }

    #[test]
    fn redirects_lead_only_where_they_may() {
        let far = place(true, "r.example", None);
        let here = place(false, "127.0.0.1", Some(5000));
        let cases = [
            (&far, "https://cdn.example/x?y=1", Some(("cdn.example", 443, "/x?y=1"))),
            (&far, "/other", Some(("r.example", 443, "/other"))),
            (&far, "b", Some(("r.example", 443, "/v2/b"))),
            (&far, "http://cdn.example/x", None),
            (&far, "http://127.0.0.1/latest/meta-data", None),
            (&far, "https://localhost/x", None),
            (&far, "https://me:secret@cdn.example/", None),
            (&far, "ftp://cdn.example/", None),
            (&far, "", None),
            (&here, "http://127.0.0.1:6000/x", Some(("127.0.0.1", 6000, "/x"))),
            (&here, "http://r.example/x", None),
            (&here, "https://r.example/x", Some(("r.example", 443, "/x"))),
        ];
        for (from, to, expected) in cases {
            let found = redirected(from, "/v2/a?q", to);
            let found = found
                .as_ref()
                .map(|(place, path)| (place.host.as_str(), place.port, path.as_str()));
            assert_eq!(found, expected, "{to}");
        }
    }
}

//! Tokens: who may reach which ports of which session, until when.
//!
//! Source: PASETO, version 4, purpose `local`: encrypted with XChaCha20 and authenticated with keyed BLAKE2b, whose tag is
//! compared in constant time. The footer, which is authenticated and not encrypted, names the key.

use std::collections::BTreeMap;
use std::fmt;
use std::ops::RangeInclusive;
use std::sync::{Arc, Mutex, PoisonError, RwLock};
use std::time::{Duration, SystemTime, UNIX_EPOCH};

use pasetors::Local;
use pasetors::claims::{Claims, ClaimsValidationRules};
use pasetors::keys::SymmetricKey;
use pasetors::token::UntrustedToken;
use pasetors::version4::{LocalToken, V4};
use serde::{Deserialize, Serialize};

use super::error::EndpointError;
use super::fault::Fault;
use crate::error::Error;
use crate::session::is_label;

/// Whom tokens are for: a key that is used for something else too makes none that count here.
const AUDIENCE: &str = "dormouse-endpoint";
/// The last day of the year 9999, behind which RFC 3339 writes no time.
const YEAR_9999: Duration = Duration::from_secs(253_402_214_400);
/// A footer is shorter.
const MAX_FOOTER_BYTES: usize = 128;

/// The ports that a token opens: one (`8080.into()`), a range (`(3000..=3010).into()`), or all.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct TokenPorts {
    first: u16,
    last: u16,
}

impl TokenPorts {
    /// Every port.
    pub const ALL: Self = Self { first: 1, last: u16::MAX };

    /// Whether this port is among them.
    pub fn contains(&self, port: u16) -> bool {
        (self.first..=self.last).contains(&port)
    }
}

impl From<u16> for TokenPorts {
    fn from(port: u16) -> Self {
        Self { first: port, last: port }
    }
}

impl From<RangeInclusive<u16>> for TokenPorts {
    fn from(ports: RangeInclusive<u16>) -> Self {
        Self { first: *ports.start(), last: *ports.end() }
    }
}

/// A token, to be sent as the header `X-aws-proxy-auth`. `Debug` does not show it.
#[derive(Clone, PartialEq, Eq)]
pub struct Token {
    text: String,
    expires: SystemTime,
}

impl Token {
    /// One that somebody else has made.
    pub fn new(text: impl Into<String>, expires: SystemTime) -> Self {
        Self { text: text.into(), expires }
    }

    /// The header's value.
    pub fn as_str(&self) -> &str {
        &self.text
    }

    /// When it is of no more use, to the second.
    pub fn expires(&self) -> SystemTime {
        self.expires
    }
}

impl fmt::Debug for Token {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Token").field("expires", &self.expires).finish_non_exhaustive()
    }
}

/// The keys that make tokens, and that an endpoint knows them by: a handle that clones.
///
/// Each key has a name. New tokens are made with the current one; those of the others count until their
/// key is removed, so that a key is replaced without a token being refused: [`rotate`](Self::rotate), wait for the longest
/// lifetime of a token, [`remove`](Self::remove). Keys are overwritten in memory when they go.
///
/// Source: PASETO, `v4.local`.
///
/// ```
/// use std::time::Duration;
/// use dormouse::{TokenKeys, TokenPorts};
///
/// let keys = TokenKeys::generate()?;
/// let token = keys.mint("my-session", TokenPorts::ALL, Duration::from_secs(600))?;
/// assert!(token.as_str().starts_with("v4.local."));
/// # Ok::<(), dormouse::Error>(())
/// ```
#[derive(Clone)]
pub struct TokenKeys(Arc<RwLock<Keys>>);

struct Keys {
    /// How often they were changed.
    changes: u64,
    current: String,
    all: BTreeMap<String, SymmetricKey<V4>>,
}

/// The token that was opened last on a connection: clients send the same one with each request.
#[derive(Default)]
pub(super) struct Opened(Mutex<Option<Last>>);

struct Last {
    token: String,
    claims: Arc<Claims>,
    /// Those of the keys until then: when they have changed again, it says nothing.
    changes: u64,
}

#[derive(Serialize, Deserialize)]
struct Footer<'a> {
    kid: &'a str,
}

impl TokenKeys {
    /// A key of random bytes, which is nowhere but in this process: its tokens end with it.
    ///
    /// # Errors
    ///
    /// [`ErrorKind::Token`](crate::ErrorKind::Token) where the host gives no random bytes.
    pub fn generate() -> Result<Self, Error> {
        let (id, secret) = (random_id()?, random::<32>()?);
        Self::new(id, &secret)
    }

    /// A key of 32 bytes, which have to be random and secret, and its name: 1 to 64 ASCII letters, digits, `-`
    /// and `_`.
    ///
    /// # Errors
    ///
    /// [`ErrorKind::Config`](crate::ErrorKind::Config) where the name is none.
    pub fn new(id: impl Into<String>, secret: &[u8; 32]) -> Result<Self, Error> {
        let (id, key) = key(id.into(), secret)?;
        let keys = Keys { changes: 0, current: id.clone(), all: BTreeMap::from([(id, key)]) };
        Ok(Self(Arc::new(RwLock::new(keys))))
    }

    /// Makes tokens with a new key of random bytes from now on. Gives its name.
    ///
    /// # Errors
    ///
    /// As [`generate`](Self::generate).
    pub fn rotate(&self) -> Result<String, Error> {
        let (id, secret) = (random_id()?, random::<32>()?);
        self.rotate_to(id.clone(), &secret)?;
        Ok(id)
    }

    /// Makes tokens with this key from now on, which replaces one of the same name.
    ///
    /// # Errors
    ///
    /// As [`new`](Self::new).
    pub fn rotate_to(&self, id: impl Into<String>, secret: &[u8; 32]) -> Result<(), Error> {
        let (id, key) = key(id.into(), secret)?;
        let mut keys = self.0.write().unwrap_or_else(PoisonError::into_inner);
        keys.changes += 1;
        keys.all.insert(id.clone(), key);
        keys.current = id;
        Ok(())
    }

    /// Knows tokens of this key, too, and makes none with it: one that another process uses, or is about to use.
    ///
    /// # Errors
    ///
    /// As [`new`](Self::new).
    pub fn add(&self, id: impl Into<String>, secret: &[u8; 32]) -> Result<(), Error> {
        let (id, key) = key(id.into(), secret)?;
        let mut keys = self.0.write().unwrap_or_else(PoisonError::into_inner);
        keys.changes += 1;
        keys.all.insert(id, key);
        Ok(())
    }

    /// Refuses the tokens of this key from now on. Whether there was one.
    ///
    /// # Errors
    ///
    /// [`ErrorKind::Config`](crate::ErrorKind::Config) for the current one.
    pub fn remove(&self, id: &str) -> Result<bool, Error> {
        let mut keys = self.0.write().unwrap_or_else(PoisonError::into_inner);
        if keys.current == id {
            return Err(EndpointError::CurrentKey { id: id.to_owned() }.into());
        }
        keys.changes += 1;
        Ok(keys.all.remove(id).is_some())
    }

    /// The name of the key that tokens are made with.
    pub fn current(&self) -> String {
        self.0.read().unwrap_or_else(PoisonError::into_inner).current.clone()
    }

    /// Makes a token for ports of a session. It takes some µs.
    ///
    /// # Errors
    ///
    /// [`ErrorKind::Config`](crate::ErrorKind::Config) where `session` is no name of one, or `ports` are none;
    /// [`ErrorKind::Token`](crate::ErrorKind::Token) where it would live beyond the year 9999.
    pub fn mint(
        &self,
        session: &str,
        ports: impl Into<TokenPorts>,
        lifetime: Duration,
    ) -> Result<Token, Error> {
        if !is_label(session) {
            return Err(EndpointError::SessionId { id: session.to_owned() }.into());
        }
        let ports = ports.into();
        if ports.first.max(1) > ports.last {
            return Err(EndpointError::NoPorts.into());
        }
        let expires = SystemTime::now().checked_add(lifetime);
        let expires = expires.filter(|time| *time < UNIX_EPOCH + YEAR_9999);
        let expires = expires.ok_or(EndpointError::Lifetime { lifetime })?;
        let text = self.encrypt(session, ports, lifetime).map_err(EndpointError::Mint)?;
        Ok(Token { text, expires })
    }

    fn encrypt(
        &self,
        session: &str,
        ports: TokenPorts,
        lifetime: Duration,
    ) -> Result<String, pasetors::errors::Error> {
        let invalid = || pasetors::errors::Error::InvalidClaim;
        let mut claims = Claims::new_expires_in(&lifetime)?;
        claims.audience(AUDIENCE)?;
        claims.subject(session)?;
        claims.add_additional("ports", serde_json::to_value(ports).map_err(|_| invalid())?)?;
        let keys = self.0.read().unwrap_or_else(PoisonError::into_inner);
        let key = keys.all.get(&keys.current).ok_or_else(invalid)?;
        let footer = serde_json::to_vec(&Footer { kid: &keys.current }).map_err(|_| invalid())?;
        LocalToken::encrypt(key, claims.to_string()?.as_bytes(), Some(&footer), None)
    }

    /// Whether a token opens this port of this session now.
    pub(super) fn check(
        &self,
        token: &str,
        session: &str,
        port: u16,
        opened: &Opened,
    ) -> Result<(), Fault> {
        let claims = self.open(token, opened);
        let claims = claims.ok_or(Fault::forbidden("the token is none of this endpoint's"))?;
        let mut rules = ClaimsValidationRules::new();
        // A clock that was set back makes no token invalid.
        rules.disable_valid_at();
        rules.validate_audience_with(AUDIENCE);
        rules.validate_claims(&claims).map_err(|_| Fault::forbidden("the token has expired"))?;
        if claims.get_claim("sub").and_then(|sub| sub.as_str()) != Some(session) {
            return Err(Fault::forbidden("the token is for another session"));
        }
        let ports = claims.get_claim("ports").and_then(|ports| TokenPorts::deserialize(ports).ok());
        if !ports.is_some_and(|ports| ports.contains(port)) {
            return Err(Fault::forbidden("the token is for other ports"));
        }
        Ok(())
    }

    fn open(&self, token: &str, opened: &Opened) -> Option<Arc<Claims>> {
        let changes = self.0.read().unwrap_or_else(PoisonError::into_inner).changes;
        let mut opened = opened.0.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some(last) = &*opened
            && last.changes == changes
            && is_same(last.token.as_bytes(), token.as_bytes())
        {
            return Some(Arc::clone(&last.claims));
        }
        let claims = Arc::new(self.decrypt(token)?);
        let token = token.to_owned();
        *opened = Some(Last { token, claims: Arc::clone(&claims), changes });
        Some(claims)
    }

    fn decrypt(&self, token: &str) -> Option<Claims> {
        let token = UntrustedToken::<Local, V4>::try_from(token).ok()?;
        let footer = token.untrusted_footer();
        if footer.len() > MAX_FOOTER_BYTES {
            return None;
        }
        let footer: Footer<'_> = serde_json::from_slice(footer).ok()?;
        let keys = self.0.read().unwrap_or_else(PoisonError::into_inner);
        let trusted = LocalToken::decrypt(keys.all.get(footer.kid)?, &token, None, None).ok()?;
        Claims::from_string(trusted.payload()).ok()
    }
}

impl fmt::Debug for TokenKeys {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let keys = self.0.read().unwrap_or_else(PoisonError::into_inner);
        f.debug_set().entries(keys.all.keys()).finish()
    }
}

fn key(id: String, secret: &[u8; 32]) -> Result<(String, SymmetricKey<V4>), Error> {
    let is_known = |byte: u8| byte.is_ascii_alphanumeric() || matches!(byte, b'-' | b'_');
    if !(1..=64).contains(&id.len()) || !id.bytes().all(is_known) {
        return Err(EndpointError::KeyId { id }.into());
    }
    let key = SymmetricKey::from(secret).map_err(EndpointError::Mint)?;
    Ok((id, key))
}

/// Takes as long wherever they differ.
fn is_same(one: &[u8], other: &[u8]) -> bool {
    let differences = one.iter().zip(other).fold(0, |all, (one, other)| all | (one ^ other));
    one.len() == other.len() && std::hint::black_box(differences) == 0
}

fn random_id() -> Result<String, Error> {
    Ok(random::<8>()?.iter().map(|byte| format!("{byte:02x}")).collect())
}

fn random<const N: usize>() -> Result<[u8; N], Error> {
    let bytes = crate::random::random();
    bytes.map_err(|_| EndpointError::Mint(pasetors::errors::Error::Key).into())
}

//! A client's token, which is renewed before it expires.

use std::fmt;
use std::pin::Pin;
use std::sync::Arc;
use std::time::{Duration, SystemTime};

use tokio::sync::Mutex;

use super::error::EndpointError;
use super::token::{Token, TokenKeys, TokenPorts};
use super::upstream::UpstreamError;
use crate::error::Error;

type Renewal = Pin<Box<dyn Future<Output = Result<Token, UpstreamError>> + Send>>;

/// Always has a token that is good for a while: a handle that clones.
///
/// ```
/// use std::time::Duration;
/// use dormouse::{TokenClient, TokenKeys};
///
/// # async fn example() -> Result<(), dormouse::Error> {
/// let keys = TokenKeys::generate()?;
/// let client = TokenClient::minting(keys, "my-session", 8080, Duration::from_secs(600));
/// let _header = ("X-aws-proxy-auth", client.token().await?.as_str()); // for each request
/// # Ok(())
/// # }
/// ```
#[derive(Clone)]
pub struct TokenClient(Arc<Inner>);

struct Inner {
    renew: Box<dyn Fn() -> Renewal + Send + Sync>,
    current: Mutex<Option<Current>>,
}

struct Current {
    token: Token,
    /// From when on another is asked for.
    renew_from: SystemTime,
    since: SystemTime,
}

impl TokenClient {
    /// One that gets tokens by `renew`: from whoever has the keys.
    pub fn new<F, R, E>(renew: F) -> Self
    where
        F: Fn() -> R + Send + Sync + 'static,
        R: Future<Output = Result<Token, E>> + Send + 'static,
        E: Into<UpstreamError>,
    {
        let renew = move || {
            let renewal = renew();
            Box::pin(async move { renewal.await.map_err(Into::into) }) as Renewal
        };
        Self(Arc::new(Inner { renew: Box::new(renew), current: Mutex::new(None) }))
    }

    /// One that has the keys itself.
    pub fn minting(
        keys: TokenKeys,
        session: impl Into<String>,
        ports: impl Into<TokenPorts>,
        lifetime: Duration,
    ) -> Self {
        let (session, ports) = (session.into(), ports.into());
        Self::new(move || {
            let minted = keys.mint(&session, ports, lifetime);
            async move { minted }
        })
    }

    /// The token. When a fifth of its lifetime is left, one caller gets another, and the others wait for that;
    /// where there is none, the old one does as long as it lasts, and the next caller tries again.
    ///
    /// # Errors
    ///
    /// [`ErrorKind::Token`](crate::ErrorKind::Token) where there is no new one, and no old one that lasts.
    pub async fn token(&self) -> Result<Token, Error> {
        let mut current = self.0.current.lock().await;
        let now = SystemTime::now();
        // Where the clock was set back, nobody knows how long it has been.
        if let Some(kept) = &*current
            && (kept.since..kept.renew_from).contains(&now)
        {
            return Ok(kept.token.clone());
        }
        match (self.0.renew)().await {
            Ok(token) => {
                let lifetime = token.expires().duration_since(now).unwrap_or_default();
                let kept = Current {
                    token: token.clone(),
                    renew_from: now + lifetime / 5 * 4,
                    since: now,
                };
                *current = Some(kept);
                Ok(token)
            }
            Err(error) => match &*current {
                Some(kept) if now < kept.token.expires() => Ok(kept.token.clone()),
                _ => Err(EndpointError::Renew(error).into()),
            },
        }
    }
}

impl fmt::Debug for TokenClient {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("TokenClient")
    }
}

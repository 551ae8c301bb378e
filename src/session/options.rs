//! How a VM becomes a session.

use std::time::Duration;

use super::error::SessionError;
use super::policy::SessionPolicy;

/// What the hook `run` is given at most.
const MAX_PAYLOAD_BYTES: usize = 1 << 20;

/// How a VM becomes a session: its name, its policy, what its hook `run` is given.
///
/// ```
/// use std::time::Duration;
/// use dormouse::{SessionOptions, SessionPolicy};
///
/// let policy = SessionPolicy::new().idle_after(Duration::from_secs(60));
/// let options = SessionOptions::new().id("alice").policy(policy).run_payload(r#"{"user": "alice"}"#);
/// ```
#[derive(Clone, Debug)]
pub struct SessionOptions {
    pub(super) id: Option<String>,
    pub(super) policy: SessionPolicy,
    pub(super) payload: String,
    pub(super) within: Option<Duration>,
    pub(super) grace: Duration,
}

impl Default for SessionOptions {
    fn default() -> Self {
        let (policy, grace) = (SessionPolicy::default(), Duration::from_secs(10));
        Self { id: None, policy, payload: String::new(), within: None, grace }
    }
}

impl SessionOptions {
    /// A name that is random, no policy, nothing for the hook `run`.
    pub fn new() -> Self {
        Self::default()
    }

    /// The session's name, 1 to 63 of `a-z`, `0-9` and `-`, but not `-` at an end: it becomes a part of a host's
    /// name. 24 random hexadecimal digits unless set.
    #[must_use]
    pub fn id(mut self, id: impl Into<String>) -> Self {
        self.id = Some(id.into());
        self
    }

    /// What the session does by itself. It can be changed at any time.
    #[must_use]
    pub fn policy(mut self, policy: SessionPolicy) -> Self {
        self.policy = policy;
        self
    }

    /// What the hook `run` is given as `runHookPayload`, up to 1 MiB; its whole body is
    /// `{"microvmId": …, "runHookPayload": …}`.
    #[must_use]
    pub fn run_payload(mut self, payload: impl Into<String>) -> Self {
        self.payload = payload.into();
        self
    }

    /// How long the guest may take until its agent is ready, before the hook `run`; for as long as it lives unless set.
    #[must_use]
    pub fn ready_timeout(mut self, timeout: Duration) -> Self {
        self.within = Some(timeout);
        self
    }

    /// What the guest's processes get at the session's end, between SIGTERM and SIGKILL; 10 s unless set.
    #[must_use]
    pub fn grace(mut self, grace: Duration) -> Self {
        self.grace = grace;
        self
    }

    /// The body of the hook `run`.
    pub(super) fn run_body(&self, id: &str) -> Result<String, SessionError> {
        let (bytes, limit) = (self.payload.len(), MAX_PAYLOAD_BYTES);
        if bytes > limit {
            return Err(SessionError::Payload { bytes, limit });
        }
        let body = serde_json::json!({ "microvmId": id, "runHookPayload": self.payload });
        Ok(body.to_string())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_hook_run_is_given_the_name_and_the_payload_as_a_string() {
        let options = SessionOptions::new().run_payload("{\"a\": \"\n\"}");
        let body = options.run_body("alice").unwrap();
        assert_eq!(body, r#"{"microvmId":"alice","runHookPayload":"{\"a\": \"\n\"}"}"#);
        let long = SessionOptions::new().run_payload("x".repeat(MAX_PAYLOAD_BYTES + 1));
        long.run_body("alice").unwrap_err();
    }
}

//! Answers that the endpoint gives itself: which stage of a request failed, for programs to act on.
//!
//! The statuses are those of AWS Lambda's MicroVMs (2026): 400 malformed, 403 token or port, 429 too many, 502 the
//! application is down or the resume failed. What is known of the cause beyond the stage stays on the host.

use hyper::header::{CACHE_CONTROL, CONNECTION, CONTENT_TYPE, HeaderValue, RETRY_AFTER};
use hyper::{Response, StatusCode};

/// How far a request came.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Stage {
    Request,
    Route,
    Token,
    Wake,
    Connect,
    Response,
}

impl Stage {
    pub(super) fn as_str(self) -> &'static str {
        match self {
            Self::Request => "request",
            Self::Route => "route",
            Self::Token => "token",
            Self::Wake => "wake",
            Self::Connect => "connect",
            Self::Response => "response",
        }
    }
}

/// Why a request is not answered by who it was for.
#[derive(Debug)]
pub(super) struct Fault {
    pub(super) status: StatusCode,
    pub(super) stage: Stage,
    message: &'static str,
    session: Option<String>,
    /// Seconds after which it may be tried again.
    retry_after: Option<u32>,
}

impl Fault {
    pub(super) fn new(status: StatusCode, stage: Stage, message: &'static str) -> Self {
        Self { status, stage, message, session: None, retry_after: None }
    }

    /// A request that is none.
    pub(super) fn malformed(message: &'static str) -> Self {
        Self::new(StatusCode::BAD_REQUEST, Stage::Request, message)
    }

    pub(super) fn no_route(message: &'static str) -> Self {
        Self::new(StatusCode::NOT_FOUND, Stage::Route, message)
    }

    pub(super) fn forbidden(message: &'static str) -> Self {
        Self::new(StatusCode::FORBIDDEN, Stage::Token, message)
    }

    pub(super) fn bad_gateway(stage: Stage, message: &'static str) -> Self {
        Self::new(StatusCode::BAD_GATEWAY, stage, message)
    }

    pub(super) fn retry_after(mut self, seconds: u32) -> Self {
        self.retry_after = Some(seconds);
        self
    }

    pub(super) fn of_session(mut self, id: &str) -> Self {
        self.session = Some(id.to_owned());
        self
    }

    /// The answer to the client.
    pub(super) fn into_answer(self) -> Response<String> {
        let text = serde_json::json!({
            "error": self.message,
            "stage": self.stage.as_str(),
            "session": self.session,
        });
        let mut answer = Response::new(text.to_string());
        *answer.status_mut() = self.status;
        let headers = answer.headers_mut();
        headers.insert(CONTENT_TYPE, HeaderValue::from_static("application/json"));
        headers.insert(CACHE_CONTROL, HeaderValue::from_static("no-store"));
        if let Some(seconds) = self.retry_after {
            headers.insert(RETRY_AFTER, HeaderValue::from(seconds));
        }
        // Where it is not clear what a client means, nothing that it says afterwards is either.
        if self.status == StatusCode::BAD_REQUEST {
            headers.insert(CONNECTION, HeaderValue::from_static("close"));
        }
        answer
    }
}

//! What is done in the guest at moments of its life.

use std::time::Duration;

use serde::{Deserialize, Serialize};

use crate::bounded;

/// Where the hooks of a program that serves them by HTTP are, unless it says otherwise.
const PATH_PREFIX: &str = "/aws/lambda-microvms/runtime/v1/";

/// How long a hook may take, unless set.
const DEADLINE: Duration = Duration::from_secs(30);

/// The moments at which a hook is called. [`Agent::run_hook`](crate::Agent::run_hook) calls any of them besides.
///
/// Source: the hooks of AWS Lambda's MicroVMs (2026).
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
#[non_exhaustive]
pub enum HookName {
    /// The guest has booted: the program has done what has to be done once, and may be saved. Called by
    /// `Template::build` with `Ready::Hook`, also in the VM that it tries, and by `Sessions::start` for a VM that
    /// is [`Created`](crate::Created) and so boots; not by [`MicroVm::agent`](crate::MicroVm::agent).
    Ready,
    /// After that: whether the guest does what it is there for. Called by `Template::build`, in the VM that
    /// it tries.
    Validate,
    /// A clone begins to work. Called by `Sessions::start` alone.
    Run,
    /// The guest is about to be suspended. Called by [`Agent::freeze`](crate::Agent::freeze), and by a session
    /// that goes to sleep; not by [`MicroVm::suspend`](crate::MicroVm::<crate::Running>::suspend).
    Suspend,
    /// The guest goes on after it was suspended. Called by [`MicroVm::agent`](crate::MicroVm::agent) of a VM that
    /// woke, once, and by a session that wakes, or that could not be suspended.
    Resume,
    /// The guest is about to end. Called by [`MicroVm::shutdown`](crate::MicroVm::shutdown), and by a session
    /// that is terminated; one that sleeps is woken for it.
    Terminate,
}

impl HookName {
    /// Whether it may say "not yet": a program that begins is waited for.
    pub(crate) fn may_wait(self) -> bool {
        matches!(self, Self::Ready | Self::Validate)
    }

    /// The name, as in the path of a request.
    pub fn as_str(self) -> &'static str {
        match self {
            Self::Ready => "ready",
            Self::Validate => "validate",
            Self::Run => "run",
            Self::Suspend => "suspend",
            Self::Resume => "resume",
            Self::Terminate => "terminate",
        }
    }
}

/// What is done at such a moment: a program of the guest is run, or a program that runs there is told.
///
/// ```
/// use std::time::Duration;
/// use dormouse::{AgentConfig, Hook, HookName};
///
/// let sync = Hook::command(["/bin/sync"]).timeout(Duration::from_secs(5));
/// let agent = AgentConfig::new()
///     .hook(HookName::Ready, Hook::http(9000))
///     .hook(HookName::Suspend, sync);
/// ```
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Hook {
    pub(crate) action: HookAction,
    pub(crate) deadline: Duration,
}

#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case", deny_unknown_fields)]
pub(crate) enum HookAction {
    /// A program and its arguments.
    Command(#[serde(deserialize_with = "bounded::words")] Vec<String>),
    /// A POST to a port of the guest's loopback.
    Http { port: u16, path: Option<String> },
}

impl Hook {
    /// Runs a program with its arguments, as root; without a `/` it is looked for in PATH. It succeeds
    /// when the program ends with 0.
    pub fn command<S: Into<String>>(argv: impl IntoIterator<Item = S>) -> Self {
        Self::with(HookAction::Command(argv.into_iter().map(Into::into).collect()))
    }

    /// Sends POST to a TCP port of the guest's loopback, for `/aws/lambda-microvms/runtime/v1/` with the
    /// hook's name behind it. It succeeds when the answer is 200.
    pub fn http(port: u16) -> Self {
        Self::with(HookAction::Http { port, path: None })
    }

    /// As [`http`](Self::http), for another path, which begins with `/`.
    pub fn http_at(port: u16, path: impl Into<String>) -> Self {
        Self::with(HookAction::Http { port, path: Some(path.into()) })
    }

    /// How long it may take: 1 s to a day; 30 s unless set. Then it has failed.
    #[must_use]
    pub fn timeout(mut self, timeout: Duration) -> Self {
        self.deadline = timeout;
        self
    }

    fn with(action: HookAction) -> Self {
        Self { action, deadline: DEADLINE }
    }
}

impl HookAction {
    /// The path of the request, for one that is a request.
    pub(crate) fn http_path(&self, name: HookName) -> Option<String> {
        match self {
            Self::Command(_) => None,
            Self::Http { path: Some(path), .. } => Some(path.clone()),
            Self::Http { path: None, .. } => Some(format!("{PATH_PREFIX}{}", name.as_str())),
        }
    }
}

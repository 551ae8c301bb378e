//! Why a session does not do what is asked.

use std::io;
use std::path::{Path, PathBuf};

use thiserror::Error as ThisError;

use super::state::SessionReason;
use crate::error::{Error, ErrorKind};

#[derive(Debug, ThisError)]
pub(crate) enum SessionError {
    #[error("{id:?} is no name for a session: it takes 1 to 63 of a-z, 0-9 and -, not - at an end")]
    Id { id: String },
    #[error("there is a session {id:?} already")]
    Exists { id: String },
    #[error("there is no session {id:?}")]
    Unknown { id: String },
    #[error("the session {id:?} is not over")]
    NotOver { id: String },
    #[error("the sessions in {} are open already, in this process or another", path.display())]
    InUse { path: PathBuf },
    #[error("cannot {attempt} {}", path.display())]
    Io { attempt: &'static str, path: PathBuf, source: io::Error },
    #[error("cannot read random bytes from the host")]
    Random(#[source] io::Error),
    #[error("a share of {share} of a vCPU cannot be used")]
    BusyCpu { share: f64 },
    #[error("{} MiB to run with: up to {} MiB are passed on", bytes >> 20, limit >> 20)]
    Payload { bytes: usize, limit: usize },
    #[error("a VM that is over cannot be a session")]
    VmOver,
    #[error("cannot watch for the guest's end")]
    Watch(#[source] io::Error),
    #[error("the session {id:?} was to be ended meanwhile")]
    Interrupted { id: String },
    #[error("the session {id:?} is over: {reason}{}", detail(.message))]
    Ended { id: String, reason: SessionReason, message: Option<String> },
    #[error("the session {id:?} is {state}")]
    NotRunning { id: String, state: &'static str },
    #[error("the session {id:?} is suspended, and its policy lets no request wake it")]
    StaysSuspended { id: String },
    #[error("the session {id:?} has no agent in its guest")]
    NoAgent { id: String },
    #[error("there is no tokio runtime here")]
    NoRuntime,
    #[error("the runtime that the session {id:?} ran on has ended")]
    RuntimeOver { id: String },
    #[error("what is written down of the session cannot be read: {what}")]
    Record { what: String },
    #[error("the program at port {port} of the guest does not answer as HTTP asks")]
    Http { port: u16, source: hyper::Error },
}

fn detail(message: &Option<String>) -> String {
    message.as_ref().map_or_else(String::new, |message| format!(": {message}"))
}

impl SessionError {
    pub(super) fn io(attempt: &'static str, path: &Path) -> impl FnOnce(io::Error) -> Self {
        let path = path.to_owned();
        move |source| Self::Io { attempt, path, source }
    }
}

impl From<SessionError> for Error {
    fn from(error: SessionError) -> Self {
        use SessionError as E;
        let kind = match &error {
            E::Id { .. }
            | E::BusyCpu { .. }
            | E::Payload { .. }
            | E::VmOver
            | E::NoAgent { .. }
            | E::NoRuntime => ErrorKind::Config,
            E::Io { source, .. } => ErrorKind::File(source.kind()),
            E::Random(_) | E::Watch(_) => ErrorKind::Resources,
            E::Ended { .. } | E::Interrupted { .. } => ErrorKind::SessionEnded,
            E::StaysSuspended { .. } | E::NotRunning { .. } => ErrorKind::SessionSuspended,
            E::Http { .. } => ErrorKind::Http,
            E::Exists { .. }
            | E::Unknown { .. }
            | E::NotOver { .. }
            | E::InUse { .. }
            | E::RuntimeOver { .. }
            | E::Record { .. } => ErrorKind::Session,
        };
        let fix = match &error {
            E::Exists { .. } => "choose another name, or remove that one with `Sessions::remove`",
            E::NotOver { .. } => "end it first, with `Session::terminate`",
            E::InUse { .. } => {
                "in this process use a clone of those `Sessions`, or drop them and each `Session` first; \
                 else end the other process, or give each a directory of its own"
            }
            E::StaysSuspended { .. } => {
                "wake it with `Session::resume`, or let requests do so with `SessionPolicy::auto_resume`"
            }
            E::NoAgent { .. } => "add `.agent(AgentConfig::default())` to the VM's configuration",
            E::NoRuntime => "call it in `#[tokio::main]`, or in a task of a runtime",
            E::RuntimeOver { .. } => "open the sessions on a runtime that lives as long as they do",
            E::Watch(_) => "raise the limit of open files (ulimit -n)",
            _ => "",
        };
        let error = Self::new(kind, error);
        if fix.is_empty() { error } else { error.fix(fix) }
    }
}

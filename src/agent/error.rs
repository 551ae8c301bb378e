//! What goes wrong between the host and the agent.

use std::io;
use std::path::PathBuf;
use std::time::Duration;

use thiserror::Error as ThisError;

use crate::error::{Error, ErrorKind, printable};
use crate::exit::{ExecFailure, ProcessStatus};
use crate::protocol::{Failure, FailureKind, Malformed, Reply, VERSION};

#[derive(Debug, ThisError)]
pub(crate) enum AgentError {
    #[error("the VM has no agent")]
    NotConfigured,
    #[error("the agent has not called within {seconds} s; the guest is alive")]
    NotReady { seconds: f64 },
    #[error(
        "the guest's agent speaks version {theirs} of the protocol, this crate version {VERSION}"
    )]
    Version { theirs: u32 },
    #[error("the guest is not ready: {}", text(.0))]
    Setup(Failure),
    #[error("{}", text(.0))]
    Guest(Failure),
    #[error("{}", text(.0))]
    Create(Failure),
    #[error("cannot run {program} in the guest: {}", text(.failure))]
    Exec { program: String, failure: Failure },
    #[error("{program} failed: {status}{}{stderr}", if stderr.is_empty() { "" } else { ": " })]
    Process { program: String, status: ProcessStatus, stderr: String },
    #[error("more than {limit} bytes of output")]
    Output { limit: usize },
    #[error("a message of {bytes} bytes: arguments and environment take up to 1 MiB")]
    TooLong { bytes: usize },
    #[error("nobody listens at the agent's port")]
    NotThere,
    #[error("the connection to the agent ended in the middle of a call")]
    Lost,
    #[error("the agent has not answered for {seconds} s: it hangs, or the VM is paused")]
    Silent { seconds: u64 },
    #[error(
        "the agent has not answered for {} s while the program runs: it hangs, and the guest is alive",
        .silent.as_secs()
    )]
    Hangs { silent: Duration },
    #[error("the agent says what is no message: {0}")]
    Malformed(Malformed),
    #[error("the agent's answer belongs to another question")]
    Unexpected,
    #[error("the agent sends more than there is room for")]
    Window,
    #[error("the guest sends a tree with {what}")]
    Tree { what: &'static str },
    #[error("there is no tokio runtime here")]
    NoRuntime,
    #[error("cannot make a socket")]
    Socket(#[source] io::Error),
    #[error("{}", path.display())]
    Host { path: PathBuf, source: io::Error },
    #[error("cannot read what is to be written")]
    Source(#[source] io::Error),
    #[error("more than {limit} bytes of names in the directory")]
    List { limit: usize },
    #[error("more than {limit} files, directories and links in the tree")]
    Entries { limit: u64 },
    #[error("more than {limit} bytes in the files of the tree")]
    TreeSize { limit: u64 },
    #[error("{} is a directory below {limit} others, which are as many as can be copied", path.display())]
    Deep { path: PathBuf, limit: usize },
    #[error("more than {limit} bytes in the file")]
    FileSize { limit: u64 },
    #[error("the hook `{name}` {how}")]
    Hook { name: &'static str, how: String },
}

impl AgentError {
    /// What an answer means that is none of those that were hoped for.
    pub(super) fn refused(reply: Reply) -> Self {
        match reply {
            Reply::Failed(failure) => Self::Guest(failure),
            _ => Self::Unexpected,
        }
    }

    pub(super) fn exec(program: &[u8], mut failure: Failure) -> Error {
        // Which the error says already.
        if failure.what == format!("run {}", program.escape_ascii()) {
            failure.what.clear();
        }
        let program = printable(&String::from_utf8_lossy(program));
        Self::Exec { program, failure }.into()
    }
}

/// A failure in the guest's words, which may be anything.
fn text(failure: &Failure) -> String {
    let what: String = printable(&failure.what).chars().take(512).collect();
    match failure.errno {
        0 => what,
        errno if what.is_empty() => io::Error::from_raw_os_error(errno).to_string(),
        errno => format!("{what}: {}", io::Error::from_raw_os_error(errno)),
    }
}

impl From<AgentError> for Error {
    fn from(error: AgentError) -> Self {
        use AgentError as E;
        let kind = match &error {
            E::NotConfigured | E::NoRuntime => ErrorKind::Config,
            E::NotReady { .. } | E::Silent { .. } | E::Hangs { .. } => ErrorKind::Timeout,
            E::Guest(failure) | E::Create(failure) => file_kind(failure),
            E::Exec { failure, .. } => ErrorKind::ExecFailed(exec_failure(failure)),
            E::Process { status, .. } => ErrorKind::ProcessFailed(*status),
            E::List { .. }
            | E::Entries { .. }
            | E::TreeSize { .. }
            | E::Deep { .. }
            | E::Output { .. }
            | E::TooLong { .. }
            | E::FileSize { .. }
            | E::Socket(_) => ErrorKind::Resources,
            E::Host { source, .. } | E::Source(source) => ErrorKind::File(source.kind()),
            E::Hook { .. } => ErrorKind::Hook,
            _ => ErrorKind::Agent,
        };
        let fix = match &error {
            E::NotConfigured => "add `.agent(AgentConfig::default())` to the VM's configuration",
            E::Version { .. } => {
                "make the snapshot again with this version, or open it with the one that made it"
            }
            E::Exec { failure, .. }
                if failure.kind == FailureKind::NotFound && failure.what.is_empty() =>
            {
                "put it into the guest, or say where it is there: by its path, or PATH by `Command::env`"
            }
            E::Exec { failure, .. } if failure.kind == FailureKind::Frozen => {
                "ask again when the VM has been saved, or its session sleeps; `Agent::thaw` ends a `freeze` of one's own"
            }
            E::Create(failure) if failure.errno == libc::ENOENT => {
                "where its directory is missing, make that by `Agent::create_dir_all`"
            }
            E::Output { .. } => {
                "raise `Command::output_limit`, cut by `Command::truncate_output`, or read the streams of `spawn`"
            }
            E::FileSize { .. } => "read it in pieces, by `Agent::open`",
            E::List { .. } => "list it by a program in the guest, whose output is read as it comes",
            E::Entries { .. } | E::TreeSize { .. } => "raise the `CopyLimits`, or copy less of it",
            E::Deep { .. } => "copy an archive of it, and unpack that in the guest",
            E::TooLong { .. } => "pass what is long by a file, or by the standard input",
            E::NotReady { .. } => {
                "look at the guest's console, and wait for longer or without a limit"
            }
            E::Silent { .. } => {
                "resume the VM where it is paused; else look at the guest's console"
            }
            E::NotThere => {
                "look at the guest's console: its agent has not come so far, or could not go on"
            }
            E::Hangs { .. } => "look at the guest's console; what is left to do is to end the VM",
            E::Lost => "get the agent again from the VM, and look what of the call was done",
            E::NoRuntime => "call it in `#[tokio::main]`, or in a task of a runtime",
            E::Socket(_) => "raise the limit of open files (ulimit -n), and call within tokio",
            _ => "",
        };
        let error = Self::new(kind, error);
        if fix.is_empty() { error } else { error.fix(fix) }
    }
}

fn exec_failure(failure: &Failure) -> ExecFailure {
    match failure.kind {
        FailureKind::NotFound => ExecFailure::NotFound,
        FailureKind::NotExecutable | FailureKind::Permission => ExecFailure::NotExecutable,
        FailureKind::BadDirectory => ExecFailure::BadDirectory,
        FailureKind::Frozen => ExecFailure::Frozen,
        _ => ExecFailure::Other,
    }
}

/// What kind of error a file, or a port, is refused with.
fn file_kind(failure: &Failure) -> ErrorKind {
    // The system's own word says more than the agent's.
    if failure.errno != 0 && failure.kind != FailureKind::Refused {
        return ErrorKind::File(io::Error::from_raw_os_error(failure.errno).kind());
    }
    ErrorKind::File(match failure.kind {
        FailureKind::NotFound => io::ErrorKind::NotFound,
        FailureKind::Exists => io::ErrorKind::AlreadyExists,
        FailureKind::Permission | FailureKind::NotAllowed => io::ErrorKind::PermissionDenied,
        FailureKind::Full => io::ErrorKind::StorageFull,
        FailureKind::Invalid => io::ErrorKind::InvalidInput,
        FailureKind::Refused => return ErrorKind::Refused,
        _ => io::ErrorKind::Other,
    })
}

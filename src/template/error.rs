//! Why there is no template.

use std::io;
use std::path::PathBuf;

use thiserror::Error as ThisError;

use crate::error::{Error, ErrorKind};

#[derive(Debug, ThisError)]
pub(super) enum TemplateError {
    #[error("a template needs a guest with an agent")]
    NoAgent,
    #[error(
        "disk {index} is written to a file that stays, and would be another for each VM of the template"
    )]
    WrittenDisk { index: usize },
    #[error("network interface {index} has a descriptor, which VMs of the template do not have")]
    Descriptor { index: usize },
    #[error("a template that is ready by {what}")]
    Ready { what: &'static str },
    #[error("the template {id} was deactivated")]
    Inactive { id: String },
    #[error("{text:?} is no name of a template: 64 hexadecimal digits")]
    Name { text: String },
    #[error("the application was not up within {seconds} s: {waiting}; the guest is alive")]
    NotReady { seconds: f64, waiting: String },
    #[error("the VM of the new template is not as it was")]
    Invalid(#[source] Error),
    #[error("cannot {attempt} {}", path.display())]
    Io { attempt: &'static str, path: PathBuf, source: io::Error },
    #[error("the configuration cannot be written down")]
    Config(#[source] rmp_serde::encode::Error),
    #[error("a thread of the build ended early")]
    Thread,
}

impl TemplateError {
    pub(super) fn io(
        attempt: &'static str,
        path: &std::path::Path,
    ) -> impl FnOnce(io::Error) -> Self {
        let path = path.to_owned();
        move |source| Self::Io { attempt, path, source }
    }
}

impl From<TemplateError> for Error {
    fn from(error: TemplateError) -> Self {
        use TemplateError as E;
        let kind = match &error {
            E::NotReady { .. } => ErrorKind::Timeout,
            E::Io { source, .. } => ErrorKind::File(source.kind()),
            E::Thread => ErrorKind::Resources,
            E::Config(_) | E::Ready { .. } => ErrorKind::Config,
            E::NoAgent
            | E::Descriptor { .. }
            | E::WrittenDisk { .. }
            | E::Inactive { .. }
            | E::Name { .. }
            | E::Invalid(_) => ErrorKind::Template,
        };
        let fix = match &error {
            E::NoAgent => "add `.agent(AgentConfig::new())` to the VM's configuration",
            E::WrittenDisk { .. } => {
                "make it `.read_only()`, with an overlay in the guest, or `.discard_writes()`"
            }
            E::Descriptor { .. } => {
                "name a tap with `NetConfig::tap`, or use `NetConfig::user`; each VM may have another by `RestoreOptions::network`"
            }
            E::Inactive { .. } => "activate it, or build another: any change makes one",
            E::NotReady { .. } => {
                "look at the console's last lines, or give it more time with `TemplateOptions::timeout`"
            }
            _ => "",
        };
        let error = Self::new(kind, error);
        if fix.is_empty() { error } else { error.fix(fix) }
    }
}

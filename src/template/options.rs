//! How a template is built.

use std::fmt;
use std::path::PathBuf;
use std::sync::Arc;
use std::time::Duration;

use super::OnProgress;
use super::ready::Ready;

/// Where templates are kept, and when a guest is ready to become one.
#[derive(Clone)]
pub struct TemplateOptions {
    pub(super) directory: PathBuf,
    pub(super) ready: Ready,
    pub(super) timeout: Duration,
    progress: Option<OnProgress>,
}

/// How far a build is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub struct TemplateProgress {
    /// What is being done.
    pub stage: TemplateStage,
    /// Bytes of this stage that are done, where it has any.
    pub bytes: u64,
    /// Bytes that there are, where that is known before.
    pub total_bytes: Option<u64>,
}

/// What a build does, one after the other.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
#[non_exhaustive]
pub enum TemplateStage {
    /// Another task or process builds the same template.
    Waiting,
    /// The guest boots, up to its agent.
    Boot,
    /// The application comes up.
    Ready,
    /// Memory and disks are saved.
    Save,
    /// A VM of the template is tried.
    Validate,
}

impl TemplateOptions {
    /// Templates in this directory, which is made where it is not there, for this user alone. The hook
    /// `ready` is waited for, if the configuration has one, up to 5 minutes after the boot began.
    pub fn new(directory: impl Into<PathBuf>) -> Self {
        Self {
            directory: directory.into(),
            ready: Ready::default(),
            timeout: Duration::from_secs(300),
            progress: None,
        }
    }

    /// What shows that the application is up.
    #[must_use]
    pub fn ready(mut self, ready: Ready) -> Self {
        self.ready = ready;
        self
    }

    /// How long the boot and the application's start may take, and then the VM that is tried, each.
    #[must_use]
    pub fn timeout(mut self, timeout: Duration) -> Self {
        self.timeout = timeout;
        self
    }

    /// Calls `progress` at the beginning of each stage, and every few MiB of a save, from any thread.
    #[must_use]
    pub fn progress(mut self, progress: impl Fn(TemplateProgress) + Send + Sync + 'static) -> Self {
        self.progress = Some(Arc::new(progress));
        self
    }

    pub(super) fn begin(&self, stage: TemplateStage) {
        self.report(TemplateProgress { stage, bytes: 0, total_bytes: None });
    }

    pub(super) fn report(&self, progress: TemplateProgress) {
        if let Some(report) = &self.progress {
            report(progress);
        }
    }
}

impl fmt::Debug for TemplateOptions {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Self { directory, ready, timeout, progress } = self;
        f.debug_struct("TemplateOptions")
            .field("directory", directory)
            .field("ready", ready)
            .field("timeout", timeout)
            .field("progress", &progress.is_some())
            .finish()
    }
}

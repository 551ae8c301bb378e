//! The tasks of an endpoint: none outlives it.

use hyper::rt::Executor;
use tokio::task::AbortHandle;
use tokio_util::sync::CancellationToken;
use tokio_util::task::TaskTracker;

/// Tasks that are waited for together, and end together.
#[derive(Clone)]
pub(super) struct Tasks {
    tracker: TaskTracker,
    end: CancellationToken,
}

impl Tasks {
    pub(super) fn new(end: CancellationToken) -> Self {
        Self { tracker: TaskTracker::new(), end }
    }

    pub(super) fn spawn(&self, task: impl Future + Send + 'static) -> AbortHandle {
        let end = self.end.clone();
        let until_end = async move {
            tokio::select! {
                _ = task => {}
                () = end.cancelled() => {}
            }
        };
        self.tracker.spawn(until_end).abort_handle()
    }

    /// Waits until all have ended.
    pub(super) async fn over(&self) {
        self.tracker.close();
        self.tracker.wait().await;
    }
}

impl<F: Future + Send + 'static> Executor<F> for Tasks {
    fn execute(&self, task: F) {
        self.spawn(task);
    }
}

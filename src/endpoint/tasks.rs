//! The tasks of an endpoint: none outlives it.

use hyper::rt::Executor;
use tokio::task::AbortHandle;
use tokio_util::task::TaskTracker;

use super::signal::Signal;

/// Tasks that are waited for together, and end together.
#[derive(Clone)]
pub(super) struct Tasks {
    tracker: TaskTracker,
    end: Signal,
}

impl Tasks {
    pub(super) fn new(end: Signal) -> Self {
        Self { tracker: TaskTracker::new(), end }
    }

    pub(super) fn spawn(&self, task: impl Future + Send + 'static) -> AbortHandle {
        let end = self.end.wait();
        let until_end = async move {
            // The end first: a task would tell its client of the end of another.
            tokio::select! {
                biased;
                () = end => {}
                _ = task => {}
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

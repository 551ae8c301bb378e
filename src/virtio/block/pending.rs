//! Requests of a disk that wait for the host: what each still has to do, and where its status
//! goes.

use std::collections::{HashMap, VecDeque};

use super::request::Range;
use crate::disk::{Disk, Flush};
use crate::memory::{GuestBuffers, Transfer};

/// Where a request is given back to that waits.
#[derive(Debug)]
pub(super) struct Reply {
    pub(super) queue: usize,
    pub(super) head: u16,
    pub(super) written: u32,
    pub(super) status: GuestBuffers,
}

/// What is to be done when its operations have ended.
#[derive(Debug)]
pub(super) enum Job {
    Read { len: u64 },
    Write { offset: u64, len: u64 },
    Clear { ranges: Vec<Range> },
    Flush(Flush),
}

/// A request whose operations have ended.
#[derive(Debug)]
pub(super) struct Ended {
    pub(super) reply: Reply,
    pub(super) job: Job,
    pub(super) failed: bool,
}

/// All requests of a disk that wait, by the token of their operations.
#[derive(Debug, Default)]
pub(super) struct PendingRequests {
    next_token: u64,
    waiting: HashMap<u64, Waiting>,
    /// Flushes run one at a time: what one takes on, the next must not think done.
    flushing: bool,
    flushes: VecDeque<Reply>,
    /// Of all that wait.
    operations: usize,
}

#[derive(Debug)]
struct Waiting {
    reply: Reply,
    job: Job,
    operations: usize,
    failed: bool,
}

impl PendingRequests {
    pub(super) fn len(&self) -> usize {
        self.waiting.len() + self.flushes.len()
    }

    /// The operations that have not ended. A request has many where its disk lies in many pieces.
    pub(super) fn operations(&self) -> usize {
        self.operations
    }

    /// Takes on a request with its operations; returns them under its token.
    pub(super) fn add(
        &mut self,
        reply: Reply,
        job: Job,
        transfers: Vec<Transfer>,
    ) -> Vec<(u64, Transfer)> {
        let token = self.next_token;
        self.next_token = token.wrapping_add(1);
        self.operations += transfers.len();
        let waiting = Waiting { reply, job, operations: transfers.len(), failed: false };
        self.waiting.insert(token, waiting);
        transfers.into_iter().map(|transfer| (token, transfer)).collect()
    }

    /// Takes on a flush. Its turn comes with [`next_flush`](Self::next_flush).
    pub(super) fn add_flush(&mut self, reply: Reply) {
        self.flushes.push_back(reply);
    }

    /// Begins the next flush, if none is under way.
    pub(super) fn next_flush(&mut self, disk: &mut Disk) -> Vec<(u64, Transfer)> {
        if self.flushing {
            return Vec::new();
        }
        let Some(reply) = self.flushes.pop_front() else { return Vec::new() };
        self.flushing = true;
        let mut flush = disk.flush();
        let stage = flush.next_stage().unwrap_or_default();
        self.add(reply, Job::Flush(flush), stage)
    }

    /// One operation has ended. Returns the request if that was its last one, and otherwise the
    /// operations that are next.
    pub(super) fn ended(
        &mut self,
        token: u64,
        failed: bool,
    ) -> (Option<Ended>, Vec<(u64, Transfer)>) {
        let Some(waiting) = self.waiting.get_mut(&token) else { return (None, Vec::new()) };
        waiting.operations -= 1;
        self.operations -= 1;
        waiting.failed |= failed;
        if waiting.operations > 0 {
            return (None, Vec::new());
        }
        if let (Job::Flush(flush), false) = (&mut waiting.job, waiting.failed)
            && let Some(stage) = flush.next_stage()
        {
            waiting.operations = stage.len();
            self.operations += stage.len();
            let stage = stage.into_iter().map(|transfer| (token, transfer));
            return (None, stage.collect());
        }
        let ended = self.waiting.remove(&token).map(|Waiting { reply, job, failed, .. }| {
            // The next flush may begin.
            self.flushing &= !matches!(job, Job::Flush(_));
            Ended { reply, job, failed }
        });
        (ended, Vec::new())
    }
}

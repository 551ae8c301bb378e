//! How a session goes to sleep, and wakes.

use std::collections::BTreeSet;
use std::fs;
use std::io;
use std::os::unix::fs::MetadataExt;
use std::path::Path;
use std::sync::Arc;
use std::time::{Duration, Instant};

use super::error::SessionError;
use super::keeper::{Body, Keeper, blocking};
use super::metering::Counts;
use super::shared::Shared;
use super::state::{SessionReason, SessionState};
use crate::agent::Agent;
use crate::config::HookName;
use crate::error::Error;
use crate::microvm::{MicroVm, Paused, Running, Suspended, TransitionError};
use crate::snapshot::SnapshotOptions;

/// How long a guest that wakes may take until its agent has answered, beside its hook `resume`. It takes
/// milliseconds.
const WAKING: Duration = Duration::from_secs(60);

type Sleeper = MicroVm<Suspended>;
/// A VM that sleeps in its files, with what this process knows of it beyond them.
type Asleep = Option<Box<Sleeper>>;
/// Why a session is over.
type Failure = (SessionReason, String);

impl Keeper {
    /// Puts the session to sleep. One that is idle since a time is left alone where something went on after that.
    ///
    /// # Errors
    ///
    /// It runs on, or has ended.
    pub(super) async fn suspend(
        &mut self,
        reason: SessionReason,
        idle_since: Option<Instant>,
    ) -> Result<(), Error> {
        let begin = Instant::now();
        let agent = match &self.body {
            Body::Awake { agent, .. } => agent.clone(),
            Body::Asleep(_) | Body::Over => return Ok(()),
        };
        let event = self.shared.event(SessionState::Suspending, reason, None, None);
        self.shared.publish(event, None);
        // From here on whoever wants something sees that it goes to sleep, and waits; who came before is seen here.
        let (open, last) = (self.shared.activity.open(), self.shared.activity.last());
        if idle_since.is_some_and(|since| open > 0 || last > since) {
            self.not_idle();
            self.publish(SessionState::Running, SessionReason::Traffic, None, None);
            return Ok(());
        }
        match self.try_suspend(agent.as_ref()).await {
            Ok(asleep) => {
                self.body = Body::Asleep(Some(Box::new(asleep)));
                let took = Some(begin.elapsed());
                self.publish(SessionState::Suspended, reason, None, took);
                Ok(())
            }
            Err(error) => {
                if self.has_guest_ended() {
                    self.guest_ended().await;
                    return Err(error);
                }
                let message = Some(error.to_string());
                self.not_idle();
                let shared = Arc::clone(&self.shared);
                // It may not be possible yet, on a disk that is full. What is written, that it was about to sleep, says
                // the same to whoever finds it.
                blocking(move || shared.has_become(SessionState::Running)).await;
                let took = Some(begin.elapsed());
                let reason = SessionReason::SuspendFailed;
                self.publish(SessionState::Running, reason, message, took);
                Err(error)
            }
        }
    }

    /// Has the guest made ready, and saves it. Where that fails it runs on as before.
    async fn try_suspend(&mut self, agent: Option<&Agent>) -> Result<MicroVm<Suspended>, Error> {
        let Some(agent) = agent else { return self.save().await };
        agent.run_hook(HookName::Suspend, "").await?;
        let saved = match agent.stop_processes().await {
            Ok(()) => self.save().await,
            Err(error) => Err(error),
        };
        if saved.is_err() && !self.has_guest_ended() {
            // Its programs were told that they would sleep.
            let _ = agent.thaw().await;
            let _ = agent.run_hook(HookName::Resume, "").await;
        }
        saved
    }

    async fn save(&mut self) -> Result<MicroVm<Suspended>, Error> {
        let shared = Arc::clone(&self.shared);
        blocking(move || save(&shared)).await
    }

    /// Wakes the session.
    ///
    /// # Errors
    ///
    /// It sleeps on.
    pub(super) async fn resume(&mut self, reason: SessionReason) -> Result<(), Error> {
        let begin = Instant::now();
        let asleep = match &mut self.body {
            Body::Asleep(asleep) => asleep.take(),
            Body::Awake { .. } | Body::Over => return Ok(()),
        };
        let shared = Arc::clone(&self.shared);
        let woken = match blocking(move || wake(&shared, asleep)).await {
            Ok(vm) => self.has_waked_up(vm).await,
            Err((asleep, error)) => {
                self.body = Body::Asleep(asleep);
                Err(error)
            }
        };
        let took = Some(begin.elapsed());
        match &woken {
            Ok(()) => {
                let mut meter = self.shared.meter();
                meter.totals.resumes = meter.totals.resumes.saturating_add(1);
                drop(meter);
                self.publish(SessionState::Running, reason, None, took);
            }
            // It woke in vain, and cannot sleep again.
            Err(_) if matches!(self.body, Body::Over) => {}
            Err(error) => {
                let shared = Arc::clone(&self.shared);
                blocking(move || shared.has_become(SessionState::Suspended)).await;
                let message = Some(error.to_string());
                let reason = SessionReason::ResumeFailed;
                self.publish(SessionState::Suspended, reason, message, took);
            }
        }
        woken
    }

    /// Waits until the guest is who it was. One that does not become that sleeps again.
    async fn has_waked_up(&mut self, vm: MicroVm<Running>) -> Result<(), Error> {
        let id = self.shared.id.clone();
        let agent = tokio::select! {
            agent = awake(&vm) => agent,
            () = self.calls.until_terminate() => Err(SessionError::Interrupted { id }.into()),
        };
        let agent = match agent {
            Ok(agent) => self.has_woken(vm, agent).map_err(|(vm, error)| (vm, error.into())),
            Err(error) => Err((Box::new(vm), error)),
        };
        let Err((vm, error)) = agent else { return Ok(()) };
        let shared = Arc::clone(&self.shared);
        match blocking(move || back_to_sleep(&shared, *vm)).await {
            Ok(asleep) => self.body = Body::Asleep(Some(asleep)),
            Err((reason, why)) => self.over(reason, Some(format!("{error}; {why}")), None).await,
        }
        Err(error)
    }

    fn has_guest_ended(&self) -> bool {
        self.shared.vm().as_ref().is_some_and(|vm| vm.exit_status().is_some())
    }
}

/// The agent of a guest that woke, whose hook `resume` is done.
async fn awake(vm: &MicroVm<Running>) -> Result<Option<Agent>, Error> {
    let Some(config) = vm.agent_config() else { return Ok(None) };
    let hook = config.hooks.get(&HookName::Resume).map_or(Duration::ZERO, |hook| hook.deadline);
    vm.agent_timeout(WAKING.saturating_add(hook)).await.map(Some)
}

/// Writes the VM to its files, and leaves it running where that fails.
fn save(shared: &Shared) -> Result<MicroVm<Suspended>, Error> {
    // Whoever finds this written, and other files than before, knows that they were finished.
    shared.write(SessionState::Suspending)?;
    let place = shared.asleep();
    let before = files(&place).unwrap_or_default();
    let sync = shared.policy().sync;
    let taken = shared.vm().take();
    let Some(vm) = taken else { return Err(shared.ended()) };
    let cpu = vm.cpu_time();
    match vm.suspend_with(&place, &SnapshotOptions::new().sync(sync)) {
        Ok(asleep) => {
            has_been_saved(shared, &asleep, cpu, &before);
            Ok(asleep)
        }
        Err(TransitionError { vm, error }) => {
            *shared.vm() = Some(vm);
            Err(error)
        }
    }
}

/// Has a VM sleep again that woke in vain. Where it has written nothing to its disks it sleeps as before, and has all its
/// chances the next time; else the memory of before is no more of use, and it sleeps as it is now.
///
/// # Errors
///
/// Why it cannot: nothing is left that knows of its disks.
fn back_to_sleep(shared: &Shared, vm: MicroVm<Running>) -> Result<Box<Sleeper>, Failure> {
    let cpu = vm.cpu_time();
    shared.meter().settle(Some(cpu));
    // From here on it writes nothing any more.
    let (vm, ended) = vm.stop();
    let back = if vm.has_written() { Err(vm) } else { vm.back_to_sleep() };
    let asleep = match (back, ended) {
        (Ok(asleep), _) => Ok(asleep),
        (Err(vm), None) => save_again(shared, vm, cpu).map_err(|TransitionError { vm, error }| {
            drop(vm.terminate());
            (SessionReason::ResumeFailed, error.to_string())
        }),
        (Err(vm), Some(status)) => {
            drop(vm.terminate());
            Err((SessionReason::GuestEnded, status.to_string()))
        }
    };
    shared.meter().begin(Counts::Suspended, Duration::ZERO);
    asleep.map(Box::new)
}

fn save_again(
    shared: &Shared,
    vm: MicroVm<Paused>,
    cpu: Duration,
) -> Result<Sleeper, TransitionError<Paused>> {
    let place = shared.asleep();
    let before = files(&place).unwrap_or_default();
    // As in `save`; on a disk that is full it is written that it ran.
    let _ = shared.write(SessionState::Suspending);
    let sync = shared.policy().sync;
    let asleep = vm.suspend_with(&place, &SnapshotOptions::new().sync(sync))?;
    has_been_saved(shared, &asleep, cpu, &before);
    Ok(asleep)
}

/// Counts what it took, and writes down that it sleeps, and in which files. There were those `before`.
fn has_been_saved(
    shared: &Shared,
    asleep: &MicroVm<Suspended>,
    cpu: Duration,
    before: &BTreeSet<(u64, u64)>,
) {
    let place = shared.asleep();
    let mut meter = shared.meter();
    meter.settle(Some(cpu));
    meter.begin(Counts::Suspended, Duration::ZERO);
    meter.totals.suspends = meter.totals.suspends.saturating_add(1);
    let bytes = meter.totals.snapshot_bytes;
    meter.totals.snapshot_bytes = bytes.saturating_add(written(&place, before));
    drop(meter);
    shared.has_gone_to_sleep(asleep.snapshot_id());
}

/// Wakes the VM in its files, which is written down before it runs.
pub(super) fn wake(shared: &Shared, asleep: Asleep) -> Result<MicroVm<Running>, (Asleep, Error)> {
    let asleep = match asleep {
        Some(asleep) => asleep,
        None => match shared.home.sleeper(&shared.id) {
            Ok(asleep) => Box::new(asleep),
            Err(error) => return Err((None, error)),
        },
    };
    if let Err(error) = shared.write(SessionState::Running) {
        return Err((Some(asleep), error.into()));
    }
    match asleep.resume() {
        Ok(vm) => {
            shared.meter().begin(Counts::Running, vm.cpu_time());
            Ok(vm)
        }
        Err(TransitionError { vm, error }) => Err((Some(Box::new(vm)), error)),
    }
}

/// The files in a directory, by what tells them apart whatever their names.
fn files(directory: &Path) -> io::Result<BTreeSet<(u64, u64)>> {
    let entries = fs::read_dir(directory)?;
    entries.map(|entry| entry?.metadata().map(|file| (file.dev(), file.ino()))).collect()
}

/// What was written to the disk of files that were not there before: neither here nor, by another name, elsewhere, as
/// the layers of a template. Holes take nothing.
fn written(directory: &Path, before: &BTreeSet<(u64, u64)>) -> u64 {
    let Ok(entries) = fs::read_dir(directory) else { return 0 };
    let files = entries.filter_map(|entry| entry.ok()?.metadata().ok());
    let new = files.filter(|file| file.nlink() == 1 && !before.contains(&(file.dev(), file.ino())));
    new.map(|file| file.blocks() * 512).sum()
}

#[cfg(test)]
mod tests {
    use vmm_sys_util::tempdir::TempDir;

    use super::*;

    #[test]
    fn a_layer_that_a_template_has_too_was_not_written_for_the_session() {
        let dir = TempDir::new().unwrap();
        let [template, asleep] = ["template", "asleep"].map(|name| dir.as_path().join(name));
        fs::create_dir(&template).unwrap();
        fs::create_dir(&asleep).unwrap();
        fs::write(template.join("memory-0"), [7; 1 << 16]).unwrap();
        fs::hard_link(template.join("memory-0"), asleep.join("memory-0")).unwrap();
        assert_eq!(written(&asleep, &BTreeSet::new()), 0);
        fs::write(asleep.join("memory-1"), [7; 8192]).unwrap();
        assert_eq!(written(&asleep, &BTreeSet::new()), 8192);
        assert_eq!(written(&asleep, &files(&asleep).unwrap()), 0);
    }
}

//! From a configuration to a snapshot that was tried.

use std::ops::ControlFlow;
use std::path::Path;
use std::sync::Arc;

use tokio::runtime::Handle;

use super::Template;
use super::error::TemplateError;
use super::options::{TemplateOptions, TemplateProgress, TemplateStage};
use super::store::{Building, Entry};
use crate::agent::{AgentError, within};
use crate::config::{HookName, RestoreOptions, VmConfig};
use crate::error::{Error, ErrorKind};
use crate::microvm::{MicroVm, Running};
use crate::phase::Phase;
use crate::snapshot::{Snapshot, SnapshotOptions};

pub(super) async fn find_or_build(
    config: VmConfig,
    options: &TemplateOptions,
    entry: Entry,
) -> Result<Template, Error> {
    if let Some(found) = find(&entry)? {
        return Ok(found);
    }
    let building = entry.building(|| options.begin(TemplateStage::Waiting)).await?;
    // Whoever had the lock has built it, or has failed, or deactivated it.
    if let Some(found) = find(&entry)? {
        return Ok(found);
    }
    entry.sweep();
    let kvm_device = config.parts().3.kvm_device.clone();
    let vm = up(config, options).await?;
    let (building, snapshot) = save(vm, building, options).await?;
    options.begin(TemplateStage::Validate);
    validate(&snapshot, &kvm_device, options).await?;
    drop(snapshot);
    let snapshot = building.commit()?;
    Ok(Template { entry, snapshot, was_built: true })
}

/// The template, where it is there and whole.
fn find(entry: &Entry) -> Result<Option<Template>, Error> {
    if !entry.is_active() {
        return Err(TemplateError::Inactive { id: entry.id() }.into());
    }
    match Template::found(entry.clone()) {
        Ok(template) => Ok(Some(template)),
        Err(error) if error.kind() == &ErrorKind::Snapshot => Ok(None),
        Err(error) => Err(error),
    }
}

/// A guest whose application is up, and whose processes stand still.
async fn up(config: VmConfig, options: &TemplateOptions) -> Result<MicroVm<Running>, Error> {
    options.begin(TemplateStage::Boot);
    let watch = options.ready.watch();
    let config = match &watch {
        Some(watch) => {
            let next = config.parts().3.console_writer.clone();
            config.console(watch.writer(next))
        }
        None => config,
    };
    // The file that the template is named for, whatever the handle has read before.
    let config = config.with_kernel_unread();
    let vm = blocking(move || Ok(MicroVm::create(config)?.start()?)).await?;
    let ready = within(options.timeout, async {
        let agent = vm.agent().await?;
        options.begin(TemplateStage::Ready);
        options.ready.wait(&agent, watch.as_ref()).await?;
        agent.stop_processes().await
    });
    match ready.await {
        Some(Ok(())) => Ok(vm),
        Some(Err(error)) => Err(vm.error(Phase::Agent, error)),
        None => Err(vm.error(Phase::Agent, not_ready(options))),
    }
}

fn not_ready(options: &TemplateOptions) -> TemplateError {
    let seconds = options.timeout.as_secs_f64();
    TemplateError::NotReady { seconds, waiting: options.ready.text() }
}

/// Saves the guest, which is over then. It goes on to its end, or is broken off soon, where nobody waits for it any more:
/// it has the place until then.
async fn save(
    vm: MicroVm<Running>,
    mut building: Building,
    options: &TemplateOptions,
) -> Result<(Building, Snapshot), Error> {
    options.begin(TemplateStage::Save);
    let options = options.clone();
    let waits = Arc::new(());
    let still_waits = Arc::downgrade(&waits);
    let saving = SnapshotOptions::new().sync(true).progress(move |progress| {
        let (bytes, total_bytes) = (progress.bytes, progress.total_bytes);
        options.report(TemplateProgress { stage: TemplateStage::Save, bytes, total_bytes });
        match still_waits.strong_count() {
            0 => ControlFlow::Break(()),
            _ => ControlFlow::Continue(()),
        }
    });
    let saved = blocking(move || {
        let vm = vm.pause()?;
        let snapshot = vm.snapshot_with(&building.path, &saving);
        drop(vm.terminate());
        let snapshot = snapshot?;
        building.id = Some(snapshot.id());
        Ok((building, snapshot))
    });
    let saved = saved.await;
    drop(waits);
    saved
}

/// Tries a VM of the snapshot: it has to be up, and what it writes first is noted when it is paused.
async fn validate(
    snapshot: &Snapshot,
    kvm_device: &Path,
    options: &TemplateOptions,
) -> Result<(), Error> {
    let given = RestoreOptions::new().outside_paths(true).kvm_device(kvm_device);
    let vm = resumed(snapshot, given).await;
    let vm = vm.map_err(TemplateError::Invalid)?;
    let tried = within(options.timeout, async {
        let agent = vm.agent().await?;
        options.ready.wait(&agent, None).await?;
        agent.run_hook(HookName::Validate, "").await
    });
    let error = match tried.await {
        Some(Ok(())) => {
            let ended = blocking(move || Ok(vm.pause()?.terminate())).await;
            return ended.map(drop).map_err(|error| TemplateError::Invalid(error).into());
        }
        Some(Err(error)) => error,
        None => not_ready(options).into(),
    };
    Err(TemplateError::Invalid(vm.error(Phase::Agent, error)).into())
}

/// A VM of the snapshot, whose agent may not have called yet.
async fn resumed(snapshot: &Snapshot, options: RestoreOptions) -> Result<MicroVm<Running>, Error> {
    let snapshot = snapshot.clone();
    blocking(move || Ok(snapshot.restore_with(&options)?.resume()?)).await
}

/// A VM of the snapshot, with its programs running.
pub(super) async fn restored(
    snapshot: &Snapshot,
    options: RestoreOptions,
) -> Result<MicroVm<Running>, Error> {
    let vm = resumed(snapshot, options).await?;
    vm.agent().await?;
    Ok(vm)
}

/// Does what takes milliseconds, or much longer, where it holds up no task.
async fn blocking<T: Send + 'static>(
    work: impl FnOnce() -> Result<T, Error> + Send + 'static,
) -> Result<T, Error> {
    let runtime = Handle::try_current().map_err(|_| AgentError::NoRuntime)?;
    runtime.spawn_blocking(work).await.map_err(|_| TemplateError::Thread)?
}

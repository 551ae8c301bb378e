//! Templates: a guest that was booted once, and whose application is up in every VM that comes
//! of it.
//!
//! `Template::build` boots a guest, waits until its application is ready, saves it, tries a
//! clone, and keeps the snapshot in a directory under a name made of everything that went in.

mod build;
mod error;
mod image;
mod key;
mod options;
mod ready;
mod store;

use std::path::Path;
use std::sync::Arc;

use self::error::TemplateError;
pub use self::options::{TemplateOptions, TemplateProgress, TemplateStage};
pub use self::ready::Ready;
use self::store::{Entry, Store};
use crate::config::{RestoreOptions, VmConfig};
use crate::error::Error;
use crate::microvm::{MicroVm, Running};
use crate::snapshot::Snapshot;

/// A guest whose application is up, to start any number of VMs from: a snapshot in a directory of
/// templates, named by the hash of everything that it was made of.
///
/// ```no_run
/// use dormouse::{AgentConfig, BlockConfig, Entrypoint, Kernel, Ready, RootDisk, Template, TemplateOptions, VmConfig};
///
/// # async fn example() -> Result<(), dormouse::Error> {
/// let server = Entrypoint::new(["/usr/bin/python3", "-m", "http.server", "8080"]);
/// let agent = AgentConfig::new().root(RootDisk::new(0).overlay_memory(0)).entrypoint(server);
/// let config = VmConfig::new(Kernel::installed()?)
///     .block(BlockConfig::new("rootfs.erofs").read_only())
///     .agent(agent);
/// // The first time it takes a boot, and then nothing but a look.
/// let options = TemplateOptions::new("templates").ready(Ready::Port(8080));
/// let template = Template::build(config, &options).await?;
/// let vm = template.start().await?;
/// let _http = vm.agent().await?.connect_tcp(8080).await?;
/// # Ok(())
/// # }
/// ```
#[derive(Clone, Debug)]
pub struct Template {
    entry: Entry,
    snapshot: Snapshot,
    was_built: bool,
}

impl Template {
    /// The template of this configuration, which needs an [agent](VmConfig::agent): found in the
    /// directory, or booted, awaited and saved.
    ///
    /// What went in is the configuration, the files that it names (by path, size, time of
    /// modification and inode), what is in memory of it, the agent, this crate's version, the
    /// host's CPU and kernel, and what is waited for. So a change of any makes another template; the
    /// old one stays until it is [removed](Self::remove).
    ///
    /// When the guest is ready, its file systems are written to their disks and its processes are
    /// stopped, and it is saved; no hook `suspend` runs. A VM that comes of it is awaited likewise, the
    /// hook `validate` runs in it, and the pages that it wrote are noted, to be had ahead from then on.
    /// Of several who want the same template at once, in this process or in others, one builds it.
    /// Dropping the future gives it up; what is being saved then is broken off and removed.
    ///
    /// # Errors
    ///
    /// [`ErrorKind::Template`](crate::ErrorKind::Template) where it was deactivated, or where the
    /// configuration cannot be one: it has no agent, a disk whose file, or delta with a path, the guest would write, or
    /// a network with a descriptor; [`ErrorKind::Config`](crate::ErrorKind::Config) where what it is to wait for is
    /// nothing; [`ErrorKind::File`](crate::ErrorKind::File) where a file that it is made of is not there;
    /// [`ErrorKind::Timeout`](crate::ErrorKind::Timeout), with the console's last lines, where the
    /// application is not up in time; else as [`MicroVm::create`], [`MicroVm::agent`], what [`Ready`] waits for,
    /// and [`MicroVm::snapshot`](MicroVm::<crate::Paused>::snapshot). Where the VM that is tried fails, it is
    /// `ErrorKind::Template`, whatever the reason: a time that is over and a hook too. Nothing is kept then.
    pub async fn build(config: VmConfig, options: &TemplateOptions) -> Result<Self, Error> {
        options.ready.check()?;
        let store = Store::create(&options.directory)?;
        let key = key::of(&config, &options.ready)?;
        build::find_or_build(config, options, store.entry(key)).await
    }

    /// A template by its name, as [`id`](Self::id) gives it.
    ///
    /// # Errors
    ///
    /// [`ErrorKind::Snapshot`](crate::ErrorKind::Snapshot) where there is none, and
    /// [`ErrorKind::Template`](crate::ErrorKind::Template) where it was deactivated or the name is none.
    pub fn open(directory: impl AsRef<Path>, id: &str) -> Result<Self, Error> {
        let entry = Store::at(directory.as_ref())?.entry(id.parse()?);
        if !entry.is_active() {
            return Err(TemplateError::Inactive { id: entry.id() }.into());
        }
        Self::found(entry)
    }

    /// The names of all templates in a directory, those that were deactivated too; of one that is not there, none.
    ///
    /// # Errors
    ///
    /// [`ErrorKind::File`](crate::ErrorKind::File) where it cannot be read.
    pub fn list(directory: impl AsRef<Path>) -> Result<Vec<String>, Error> {
        Store::at(directory.as_ref())?.list()
    }

    fn found(entry: Entry) -> Result<Self, Error> {
        let snapshot = Snapshot::open(entry.path())?;
        Ok(Self { entry, snapshot, was_built: false })
    }

    /// A VM with the application up, as it was when the template was saved: another hostname,
    /// machine-id, random numbers and clock, the same processes and files.
    ///
    /// # Errors
    ///
    /// As [`start_with`](Self::start_with).
    pub async fn start(&self) -> Result<MicroVm<Running>, Error> {
        self.start_with(RestoreOptions::new()).await
    }

    /// As [`start`](Self::start), with something else of the host: two VMs cannot have the same tap,
    /// or path of a UNIX socket. What the template's configuration named besides is used as it is.
    ///
    /// # Errors
    ///
    /// [`ErrorKind::Template`](crate::ErrorKind::Template) where the template was deactivated; else as
    /// [`Snapshot::restore_with`] and [`MicroVm::agent`].
    pub async fn start_with(&self, options: RestoreOptions) -> Result<MicroVm<Running>, Error> {
        if !self.is_active() {
            return Err(TemplateError::Inactive { id: self.id() }.into());
        }
        // The directory is this user's alone, and its snapshots are of configurations given here.
        build::restored(&self.snapshot, options.outside_paths(true)).await
    }

    /// Its name: 64 hexadecimal digits, a SHA-256 of everything that went in.
    pub fn id(&self) -> String {
        self.entry.id()
    }

    /// Whether the call that returned this had to build it.
    pub fn was_built(&self) -> bool {
        self.was_built
    }

    /// The snapshot behind it: for a [`Pool`](crate::Pool), say. VMs that are restored from it need
    /// [`RestoreOptions::outside_paths`] or [`RestoreOptions::disk_base`] for disks that are not in it, and
    /// their programs go on when [`MicroVm::agent`] has found the agent.
    pub fn snapshot(&self) -> &Snapshot {
        &self.snapshot
    }

    /// Whether VMs may be started from it.
    pub fn is_active(&self) -> bool {
        self.entry.is_active()
    }

    /// From now on nobody starts a VM from it, in any process, or builds it again; those that run go on.
    ///
    /// # Errors
    ///
    /// [`ErrorKind::File`](crate::ErrorKind::File) where that cannot be written down.
    pub fn deactivate(&self) -> Result<(), Error> {
        self.entry.deactivate()
    }

    /// Takes back [`deactivate`](Self::deactivate).
    ///
    /// # Errors
    ///
    /// As that one.
    pub fn activate(&self) -> Result<(), Error> {
        self.entry.activate()
    }

    /// Removes its files, as far as that can be done. VMs that run go on, and this handle starts no others.
    pub fn remove(self) {
        self.entry.remove(&self.snapshot);
    }
}

/// What is called with the progress of a build.
type OnProgress = Arc<dyn Fn(TemplateProgress) + Send + Sync>;

#[cfg(test)]
mod tests;

//! Container images: from where they are to a root file system that a VM has as its disk.
//!
//! Everything blocks but the network: files are read on a thread that tokio keeps for those.

mod blob;
mod cache;
mod config;
mod configure;
mod digest;
mod error;
#[cfg(fuzzing)]
pub(crate) mod fuzzing;
mod layer;
mod manifest;
mod overlay;
mod progress;
#[cfg(feature = "registry")]
mod registry;
mod rootfs;
mod skip;
mod source;
mod unpack;

use std::ops::ControlFlow;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use tokio::runtime::Handle;

use self::cache::Cached;
pub use self::cache::ImageCache;
pub use self::config::{ExposedPort, ImageConfig};
use self::digest::Digest;
pub(crate) use self::error::ImageError;
use self::manifest::Platform;
pub use self::overlay::OverlayDisk;
pub use self::progress::{ImageProgress, ImageStage};
use self::progress::{OnProgress, Reporter};
use self::rootfs::Limits;
use self::source::Wanted;
use self::unpack::Work;
use crate::config::{BlockConfig, RootDisk};
use crate::error::Error;

/// A container image that is ready to be the root of any number of VMs.
///
/// [`configure`](Self::configure) has its own program run. For commands alone, its root is enough:
///
/// ```no_run
/// use dormouse::{Image, ImageCache, Kernel, MicroVm, VmConfig};
///
/// # async fn run() -> Result<(), dormouse::Error> {
/// let cache = ImageCache::open("images")?;
/// let image = Image::open("python.tar").unpack(&cache).await?;
/// let config = image.configure_root(VmConfig::new(Kernel::installed()?));
/// let vm = MicroVm::create(config)?.start()?;
///
/// let command = image.command(&vm.agent().await?, "python3").args(["-c", "print(6 * 7)"]);
/// print!("{}", command.output().await?.check()?.text());
/// # Ok(())
/// # }
/// ```
///
/// Its root file system is a file of the cache, which stays there as long as the image is held, or a VM has it.
/// A clone is the same image.
#[derive(Clone, Debug)]
pub struct Image {
    inner: Arc<Inner>,
}

#[derive(Debug)]
struct Inner {
    config: ImageConfig,
    digest: Option<Digest>,
    root: Cached,
}

impl Image {
    /// An image in a file or a directory: an OCI layout, an archive of one, or what `docker save` or
    /// `podman save` writes. Of a directory with a root file system [`directory`](Self::directory) makes one.
    pub fn open(path: impl Into<PathBuf>) -> ImageSource {
        ImageSource::new(Location::Path(path.into()))
    }

    /// A directory whose content becomes the root file system, as an image without a configuration. Its owner's
    /// files are root's there; sockets are left out.
    ///
    /// It is copied again when something in it has changed, by the times of change that its file system keeps.
    pub fn directory(path: impl Into<PathBuf>) -> ImageSource {
        ImageSource::new(Location::Directory(path.into()))
    }

    /// An image of a registry, by its reference: `[HOST[:PORT]/]NAME[:TAG][@DIGEST]`, of Docker Hub where no host
    /// is named. Over TLS, but on this machine itself (loopback), where there is none. Logins are those that
    /// `docker login` wrote to its config.json, unless [`ImageSource::login`] gives one; programs that keep
    /// logins are not run. It needs a runtime with I/O and time.
    #[cfg(feature = "registry")]
    pub fn pull(reference: impl Into<String>) -> ImageSource {
        ImageSource::new(Location::Registry(registry::Registry::new(reference.into())))
    }

    fn new(config: ImageConfig, digest: Option<Digest>, root: Cached) -> Self {
        Self { inner: Arc::new(Inner { config, digest, root }) }
    }

    /// How it wants to be run.
    pub fn config(&self) -> &ImageConfig {
        &self.inner.config
    }

    /// The digest of its manifest, `sha256:…`, where it has one.
    pub fn digest(&self) -> Option<String> {
        self.inner.digest.map(|digest| digest.to_string())
    }

    /// Its root file system: a file with an EROFS, of whole pages, that nothing may be written to. The file's
    /// name is the same for the same layers.
    pub fn path(&self) -> &Path {
        &self.inner.root.path
    }

    /// The disk with its root file system, which any number of VMs may have at once.
    pub fn disk(&self) -> BlockConfig {
        BlockConfig::new(self.path()).read_only()
    }

    /// The guest's root, where [`disk`](Self::disk) is the disk of this number. What the guest writes stays in
    /// its memory, up to half of that: see [`RootDisk::overlay_memory`] and [`RootDisk::overlay_disk`] for
    /// others.
    pub fn root(&self, disk: usize) -> RootDisk {
        RootDisk::new(disk).fs_type("erofs").overlay_memory(0)
    }
}

/// Where an image comes from, and what is wanted of it.
#[derive(Clone)]
#[must_use = "it does nothing before `unpack`"]
pub struct ImageSource {
    location: Location,
    name: Option<String>,
    platform: Platform,
    limits: ImageLimits,
    listener: Option<Arc<OnProgress>>,
}

#[derive(Clone, Debug)]
enum Location {
    Path(PathBuf),
    Directory(PathBuf),
    #[cfg(feature = "registry")]
    Registry(registry::Registry),
}

impl ImageSource {
    fn new(location: Location) -> Self {
        let (name, platform) = (None, Platform::guest());
        Self { location, name, platform, limits: ImageLimits::default(), listener: None }
    }

    /// Which image of several in a file or a directory, by its name there or by the end of it: `3.12`, `python:3.12`. A
    /// registry's is named by its reference, and a root directory has no name: there it is without effect.
    pub fn name(mut self, name: impl Into<String>) -> Self {
        self.name = Some(name.into());
        self
    }

    /// For which platform, as Go names them: `linux/amd64` unless set, which is what guests are. A root directory is taken as
    /// it is.
    pub fn platform(mut self, platform: impl AsRef<str>) -> Self {
        self.platform = Platform::parse(platform.as_ref());
        self
    }

    /// Who asks a registry. Another source needs none.
    #[cfg(feature = "registry")]
    pub fn login(mut self, name: impl Into<String>, password: impl Into<String>) -> Self {
        if let Location::Registry(registry) = &mut self.location {
            registry.login = Some((name.into(), password.into()));
        }
        self
    }

    /// The file with Docker's logins; `$DOCKER_CONFIG/config.json` or `~/.docker/config.json` unless set.
    #[cfg(feature = "registry")]
    pub fn docker_config(mut self, path: impl Into<PathBuf>) -> Self {
        if let Location::Registry(registry) = &mut self.location {
            registry.docker_config = Some(path.into());
        }
        self
    }

    /// How much it may be.
    pub fn limits(mut self, limits: ImageLimits) -> Self {
        self.limits = limits;
        self
    }

    /// Calls `progress` at every step, and within one as it goes on, from threads of the work: for each MiB that a layer
    /// unpacks to, which is less of the layer as it is packed; for each 256 KiB of a directory's files, and at each file;
    /// for each piece that comes from a registry. When it answers `Break`, the work ends with
    /// [`ErrorKind::Interrupted`](crate::ErrorKind::Interrupted), and nothing of it is kept but layers of a registry that
    /// have come whole.
    pub fn progress(
        mut self,
        progress: impl Fn(ImageProgress) -> ControlFlow<()> + Send + Sync + 'static,
    ) -> Self {
        self.listener = Some(Arc::new(progress));
        self
    }

    /// Makes the image's root file system, unless the cache has it: then it takes a few milliseconds, and no
    /// layer is read. If another process makes the same one, it is waited for. A dropped future ends the work.
    ///
    /// Digests are checked while layers are read. Memory is bounded by [`ImageLimits`].
    ///
    /// # Errors
    ///
    /// [`ErrorKind::Image`](crate::ErrorKind::Image) where it is damaged, refused or over a limit;
    /// [`ErrorKind::File`](crate::ErrorKind::File) where files cannot be read, or the cache not written;
    /// [`ErrorKind::Timeout`](crate::ErrorKind::Timeout) where a registry says nothing for 30 s, or next to nothing;
    /// [`ErrorKind::Config`](crate::ErrorKind::Config) for a reference that is none, or outside of a tokio runtime;
    /// [`ErrorKind::Resources`](crate::ErrorKind::Resources) where no thread can be started;
    /// [`ErrorKind::Interrupted`](crate::ErrorKind::Interrupted).
    pub async fn unpack(self, cache: &ImageCache) -> Result<Image, Error> {
        let runtime = Handle::try_current().map_err(|_| ImageError::NoRuntime)?;
        let (reporter, _guard) = Reporter::new(self.listener);
        let work = Work {
            cache: cache.clone(),
            wanted: Wanted { name: self.name, platform: self.platform },
            limits: self.limits.0,
            reporter,
        };
        let location = self.location;
        #[cfg(feature = "registry")]
        let inner = runtime.clone();
        let done = runtime.spawn_blocking(move || match location {
            Location::Path(path) => work.open(&path),
            Location::Directory(path) => work.directory(&path),
            #[cfg(feature = "registry")]
            Location::Registry(registry) => work.pull(&registry, &inner),
        });
        Ok(done.await.map_err(|_| ImageError::Lost)??)
    }
}

/// How much an image may be. What is more is refused, and nothing of it is kept but layers of a registry that unpack to
/// more than they said: those have come, at most [`bytes`](Self::bytes) of them, and stay in the cache until
/// [`ImageCache::evict`] removes them.
#[derive(Clone, Debug)]
pub struct ImageLimits(Limits);

impl Default for ImageLimits {
    /// 32 GiB, a million entries, 64 MiB of names and attributes, and 200 bytes out of each byte.
    fn default() -> Self {
        Self(Limits { bytes: 32 << 30, entries: 1 << 20, memory: 64 << 20, ratio: 200 })
    }
}

impl ImageLimits {
    /// The default ones.
    pub fn new() -> Self {
        Self::default()
    }

    /// Bytes of all layers, unpacked, and of the root file system; 32 GiB unless set.
    #[must_use]
    pub fn bytes(mut self, bytes: u64) -> Self {
        self.0.bytes = bytes;
        self
    }

    /// Entries of all layers together; 1,048,576 unless set.
    #[must_use]
    pub fn entries(mut self, entries: u64) -> Self {
        self.0.entries = entries;
        self
    }

    /// Memory for the names and attributes of files, in bytes; 64 MiB unless set, which is enough for some
    /// 300,000 files.
    #[must_use]
    pub fn memory(mut self, bytes: u64) -> Self {
        self.0.memory = bytes;
        self
    }

    /// Unpacked bytes for each packed one, where a layer unpacks to more than 256 MiB; 200 unless set.
    #[must_use]
    pub fn ratio(mut self, ratio: u64) -> Self {
        self.0.ratio = ratio;
        self
    }
}

#[cfg(test)]
mod tests;

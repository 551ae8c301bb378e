//! Kernels: where they come from, and what they become, a checked ELF image.
//!
//! Whatever the source (a file, a package, the running distribution's /boot), the result is a
//! [`Vmlinux`]: an ELF image whose segments lie inside its bytes. A bzImage is unpacked on the
//! host, which spares the guest the decompression and the host nothing but milliseconds once.
//! Source: Linux Documentation/arch/x86/boot.rst, boot protocol 2.15; ELF-64, version 1.5.

mod bzimage;
mod deb;
mod installed;
mod vmlinux;

pub use self::installed::InstalledKernel;
pub(crate) use self::vmlinux::Vmlinux;

use std::fmt;
use std::io::{self, Read};
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, PoisonError};

use serde::{Deserialize, Serialize};
use thiserror::Error as ThisError;

use crate::error::{Error, ErrorKind};
use crate::input_file;
use crate::modules::{Module, ModuleError, Modules};

/// The largest kernel file, package member or unpacked image that is read: 1 GiB.
const MAX_IMAGE_BYTES: u64 = 1 << 30;

/// Why a kernel cannot be used.
#[derive(Debug, ThisError)]
pub(crate) enum KernelError {
    #[error("cannot read the kernel {}", path.display())]
    Read { path: PathBuf, source: io::Error },
    #[error("the kernel is larger than {MAX_IMAGE_BYTES} bytes")]
    TooLarge,
    #[error("the kernel is empty")]
    Empty,
    #[error("neither an ELF image nor a bzImage: it begins with {start:02x?}")]
    UnknownFormat { start: Vec<u8> },
    #[error("the kernel is truncated: {what} ends at byte {end}, the image has {len}")]
    Truncated { what: &'static str, end: u64, len: u64 },
    #[error(
        "a kernel for another machine: ELF class {class}, machine {machine}; x86-64 is class 2, machine 62"
    )]
    Architecture { class: u8, machine: u16 },
    #[error("not a bootable ELF image: {0}")]
    Elf(&'static str),
    #[error(
        "bzImage of boot protocol {major}.{minor}, which has no payload to unpack (2.8 and later have)"
    )]
    OldProtocol { major: u8, minor: u8 },
    #[error("the bzImage is not 64-bit (no XLF_KERNEL_64 flag)")]
    Not64Bit,
    #[error("the bzImage's payload is compressed in an unknown way: it begins with {start:02x?}")]
    UnknownCompression { start: Vec<u8> },
    #[error("cannot unpack the bzImage's {format} payload")]
    Unpack { format: &'static str, source: io::Error },
    #[error("no kernel under {} (vmlinuz-* in boot, or vmlinuz in lib/modules/*)", root.display())]
    NoneInstalled { root: PathBuf },
    #[error("{} is not a Debian package with a kernel: {reason}", path.display())]
    Package { path: PathBuf, reason: String },
}

impl From<KernelError> for Error {
    fn from(error: KernelError) -> Self {
        let fix = match &error {
            KernelError::Read { path, source }
                if source.kind() == io::ErrorKind::PermissionDenied =>
            {
                Some(format!("make it readable: sudo chmod a+r {}", path.display()))
            }
            KernelError::NoneInstalled { .. } => Some(
                "install one (Debian: apt-get install linux-image-cloud-amd64), or name one with \
                 Kernel::installed_in, Kernel::file or Kernel::deb"
                    .to_owned(),
            ),
            KernelError::Truncated { .. } | KernelError::Unpack { .. } | KernelError::Empty => {
                Some("copy or download it again".to_owned())
            }
            KernelError::UnknownFormat { .. } => {
                Some("name a vmlinux (ELF) or a vmlinuz (bzImage) for x86-64".to_owned())
            }
            _ => None,
        };
        let error = Error::new(ErrorKind::Kernel, error);
        match fix {
            Some(fix) => error.fix(fix),
            None => error,
        }
    }
}

/// How a kernel is entered.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
#[non_exhaustive]
pub enum BootProtocol {
    /// PVH where the image has an entry point for it, else the 64-bit Linux protocol.
    #[default]
    Auto,
    /// PVH: 32-bit protected mode, `hvm_start_info` in EBX (Xen docs/misc/pvh.pandoc).
    Pvh,
    /// The 64-bit Linux boot protocol: long mode, `boot_params` in RSI (boot.rst, "64-bit boot
    /// protocol").
    Linux64,
}

/// A kernel to boot: an ELF vmlinux or a bzImage, from a file, a package or memory.
///
/// Making one reads nothing. The first VM that uses it reads, unpacks and checks it (for a
/// distribution's kernel some 60-150 ms, 50-70 MiB); clones of the handle share the result, so
/// keep one handle for many VMs. It serializes as its source.
///
/// ```no_run
/// use dormouse::Kernel;
///
/// let newest = Kernel::installed()?;
/// let built = Kernel::file("linux/vmlinux");
/// let packaged = Kernel::deb("linux-image-6.12.9+bpo-cloud-amd64_6.12.9-1_amd64.deb");
/// # Ok::<(), dormouse::Error>(())
/// ```
#[derive(Clone, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Kernel {
    source: Source,
    #[serde(default)]
    protocol: BootProtocol,
    #[serde(skip)]
    loaded: Arc<Mutex<Option<Arc<Vmlinux>>>>,
    #[serde(skip)]
    modules: Arc<Mutex<Option<KnownModules>>>,
}

/// The modules that were read last.
#[derive(Debug)]
struct KnownModules {
    /// The directory that was named for them.
    dir: Option<PathBuf>,
    modules: Modules,
}

#[derive(Clone, Debug, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
enum Source {
    File(PathBuf),
    Deb(PathBuf),
    Installed(InstalledKernel),
    #[serde(skip)]
    Bytes(Arc<[u8]>),
}

impl Kernel {
    /// The newest kernel under `/boot`, with its modules under `/lib/modules`.
    ///
    /// # Errors
    ///
    /// [`ErrorKind::Kernel`] where there is none.
    pub fn installed() -> Result<Self, Error> {
        Self::installed_in("/")
    }

    /// The newest kernel of a system whose root directory is `root`, such as a mounted disk or
    /// an unpacked package: `root/boot/vmlinuz-*` or `root/lib/modules/*/vmlinuz`.
    ///
    /// # Errors
    ///
    /// [`ErrorKind::Kernel`] where there is none.
    pub fn installed_in(root: impl AsRef<Path>) -> Result<Self, Error> {
        let root = root.as_ref();
        let newest = InstalledKernel::find(root).into_iter().next();
        let kernel = newest.ok_or_else(|| KernelError::NoneInstalled { root: root.into() })?;
        Ok(kernel.into())
    }

    /// A vmlinux or bzImage file.
    pub fn file(path: impl Into<PathBuf>) -> Self {
        Source::File(path.into()).into()
    }

    /// The kernel in a Debian package (`linux-image-*.deb`), which need not be installed.
    pub fn deb(path: impl Into<PathBuf>) -> Self {
        Source::Deb(path.into()).into()
    }

    /// A vmlinux or bzImage in memory. Such a kernel has no path and does not serialize.
    pub fn bytes(image: impl Into<Arc<[u8]>>) -> Self {
        Source::Bytes(image.into()).into()
    }

    /// Chooses how the kernel is entered; [`BootProtocol::Auto`] unless set.
    #[must_use]
    pub fn protocol(mut self, protocol: BootProtocol) -> Self {
        self.protocol = protocol;
        self
    }

    /// The directory of the kernel's modules, where it is an installed one and has modules.
    pub fn modules_dir(&self) -> Option<&Path> {
        match &self.source {
            Source::Installed(kernel) => kernel.modules_dir(),
            _ => None,
        }
    }

    /// Reads, unpacks and checks the kernel now rather than at the first VM.
    ///
    /// # Errors
    ///
    /// [`ErrorKind::Kernel`]: unreadable, empty, truncated, for another architecture, or in an
    /// unknown format or compression.
    pub fn check(&self) -> Result<(), Error> {
        self.load()?;
        Ok(())
    }

    /// The kernel as the ELF image that it is, or that its bzImage holds. Reads the kernel where
    /// that has not been done.
    ///
    /// # Errors
    ///
    /// As [`check`](Self::check).
    pub fn vmlinux(&self) -> Result<Vec<u8>, Error> {
        Ok(self.load()?.image().to_vec())
    }

    /// The same kernel, to be read anew: what this handle has read may not be what its file is by now.
    #[cfg(feature = "image")]
    pub(crate) fn unread(&self) -> Self {
        Self::from(self.source.clone()).protocol(self.protocol)
    }

    /// Where it comes from.
    #[cfg(feature = "image")]
    pub(crate) fn input_file(&self) -> input_file::InputFile<'_> {
        match &self.source {
            Source::File(path) | Source::Deb(path) => input_file::InputFile::File(path),
            Source::Installed(kernel) => input_file::InputFile::File(kernel.path()),
            Source::Bytes(bytes) => input_file::InputFile::Bytes(bytes),
        }
    }

    pub(crate) fn boot_protocol(&self) -> BootProtocol {
        self.protocol
    }

    /// The checked image, read at the first call. Callers that come meanwhile wait for it.
    pub(crate) fn load(&self) -> Result<Arc<Vmlinux>, KernelError> {
        let mut loaded = self.loaded.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some(vmlinux) = &*loaded {
            return Ok(Arc::clone(vmlinux));
        }
        let vmlinux = Arc::new(parse(self.source.read()?)?);
        *loaded = Some(Arc::clone(&vmlinux));
        Ok(vmlinux)
    }

    /// Modules of the kernel, in the order in which they are loaded: from `dir`, where it is given, or
    /// where the kernel comes from; none, where that has none. See [`Modules::load`]. They are read once
    /// for a handle and its clones: out of a directory in some 10 ms, out of a package as fast as that
    /// is unpacked, one or two seconds.
    pub(crate) fn modules(
        &self,
        dir: Option<&Path>,
        required: &[String],
        optional: &[String],
    ) -> Result<Vec<Arc<Module>>, ModuleError> {
        let mut known = self.modules.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some(known) = known.as_mut().filter(|known| known.dir.as_deref() == dir) {
            return known.modules.load(required, optional);
        }
        let Some(modules) = dir.map(Modules::in_directory).or_else(|| self.source.modules()) else {
            return Ok(Vec::new());
        };
        let dir = dir.map(Path::to_owned);
        known.insert(KnownModules { dir, modules }).modules.load(required, optional)
    }
}

impl Source {
    fn read(&self) -> Result<Vec<u8>, KernelError> {
        match self {
            Self::File(path) => read_file(path),
            Self::Installed(kernel) => read_file(kernel.path()),
            Self::Deb(path) => deb::kernel_image(path),
            Self::Bytes(bytes) => Ok(bytes.to_vec()),
        }
    }

    /// Where its modules are, where it has some.
    fn modules(&self) -> Option<Modules> {
        match self {
            Self::Installed(kernel) => kernel.modules_dir().map(Modules::in_directory),
            Self::Deb(path) => Some(Modules::in_package(path)),
            Self::File(_) | Self::Bytes(_) => None,
        }
    }
}

impl From<Source> for Kernel {
    fn from(source: Source) -> Self {
        let (loaded, modules) = (Arc::default(), Arc::default());
        Self { source, protocol: BootProtocol::default(), loaded, modules }
    }
}

impl From<InstalledKernel> for Kernel {
    fn from(kernel: InstalledKernel) -> Self {
        Source::Installed(kernel).into()
    }
}

impl fmt::Debug for Kernel {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "Kernel({self}, {:?})", self.protocol)
    }
}

impl fmt::Display for Kernel {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match &self.source {
            Source::File(path) => path.display().fmt(f),
            Source::Deb(path) => path.display().fmt(f),
            Source::Installed(kernel) => kernel.path().display().fmt(f),
            Source::Bytes(bytes) => write!(f, "{} bytes in memory", bytes.len()),
        }
    }
}

/// From whatever was read to a checked ELF image.
fn parse(image: Vec<u8>) -> Result<Vmlinux, KernelError> {
    if image.is_empty() {
        return Err(KernelError::Empty);
    }
    if vmlinux::is_elf(&image) {
        return Vmlinux::parse(image);
    }
    if bzimage::is_bzimage(&image) {
        return Vmlinux::parse(bzimage::unpack(&image)?);
    }
    Err(KernelError::UnknownFormat { start: start_of(&image) })
}

/// The first bytes, to name in an error.
fn start_of(bytes: &[u8]) -> Vec<u8> {
    bytes.iter().copied().take(4).collect()
}

fn read_file(path: &Path) -> Result<Vec<u8>, KernelError> {
    let failed = |source| KernelError::Read { path: path.into(), source };
    let file = input_file::open(path).map_err(failed)?;
    let bytes = read_bounded(file).map_err(failed)?;
    bytes.ok_or(KernelError::TooLarge)
}

/// Reads to the end; `None` where that is further than [`MAX_IMAGE_BYTES`].
fn read_bounded(reader: impl Read) -> io::Result<Option<Vec<u8>>> {
    input_file::read_bounded(reader, MAX_IMAGE_BYTES)
}

#[cfg(test)]
mod tests;

//! Modules in a Debian package, which can only be read from its beginning to its end.

use std::collections::{BTreeSet, HashMap, HashSet};
use std::io;
use std::ops::ControlFlow;
use std::path::{Path, PathBuf};

use super::{MAX_BYTES, MAX_MODULE_BYTES, ModuleError, Packed, builtin_names, module_name};
use crate::deb::{DebError, visit_files};
use crate::input_file::read_bounded;

/// The longest modules.builtin that is read. Real ones are of some 30 KiB.
const MAX_LIST_BYTES: u64 = 1 << 20;
/// The most modules that a package is believed to have. Real ones have some 4,500.
const MAX_FILES: usize = 1 << 16;
/// MODULE_NAME_LEN of Linux, 56 with the terminating NUL: a file of a longer name is no module.
const MAX_NAME_BYTES: usize = 55;

/// What such modules mostly turn out to depend on: taken along, they spare another reading of the package.
const COMPANIONS: &[&str] = &[
    "crc16",
    "crc32c_generic",
    "failover",
    "jbd2",
    "libcrc32c",
    "mbcache",
    "net_failover",
    "rng_core",
    "virtio",
    "virtio_ring",
    "vmw_vsock_virtio_transport_common",
    "vsock",
];

/// A package such as linux-image-6.12.9-cloud-amd64.
#[derive(Debug)]
pub(super) struct Package {
    path: PathBuf,
    /// The directory of its modules, once it was read and where it has one.
    release: Option<String>,
    builtin: HashSet<String>,
    /// All modules, once it was read.
    names: HashSet<String>,
    /// Modules that were taken along.
    companions: HashMap<String, Vec<u8>>,
}

impl Package {
    pub(super) fn new(path: PathBuf) -> Self {
        let (builtin, names, companions) = (HashSet::new(), HashSet::new(), HashMap::new());
        Self { path, release: None, builtin, names, companions }
    }

    pub(super) fn path(&self) -> &Path {
        &self.path
    }

    pub(super) fn builtin(&self) -> &HashSet<String> {
        &self.builtin
    }

    /// Whether it has no modules at all.
    pub(super) fn has_none(&self) -> bool {
        self.release.is_none()
    }

    /// Those of the named modules that are there.
    pub(super) fn read(&mut self, names: &BTreeSet<String>) -> Result<Vec<Packed>, ModuleError> {
        let mut packed = Vec::new();
        let mut missing = names.clone();
        for name in names {
            if let Some(content) = self.companions.remove(name) {
                packed.push(self.packed(name, content));
                missing.remove(name);
            }
        }
        // Each reading takes as long as unpacking all of it.
        if self.release.is_some() {
            missing.retain(|name| self.names.contains(name));
        }
        if !missing.is_empty() {
            for (name, content) in self.take(&missing)? {
                packed.push(self.packed(&name, content));
            }
        }
        Ok(packed)
    }

    fn packed(&self, name: &str, content: Vec<u8>) -> Packed {
        Packed { name: name.to_owned(), path: self.path.join(format!("{name}.ko")), content }
    }

    /// Reads the package once.
    fn take(&mut self, names: &BTreeSet<String>) -> Result<HashMap<String, Vec<u8>>, ModuleError> {
        let first = self.release.is_none();
        let mut taken: HashMap<String, Vec<u8>> = HashMap::new();
        let mut bytes = 0;
        let mut fault = None;
        // Of one that could not be read whole nothing is known.
        let mut known = Self { release: self.release.clone(), ..Self::new(self.path.clone()) };
        let Self { path: package, release, builtin, names: all, companions } = &mut known;
        let package = &*package;
        const PROCEED: io::Result<ControlFlow<()>> = Ok(ControlFlow::Continue(()));
        let visited = visit_files(package, |path, content| {
            let Some((of, file)) = module_path(path) else { return PROCEED };
            if release.get_or_insert_with(|| of.to_owned()) != of {
                return PROCEED;
            }
            if first && file == Path::new("modules.builtin") {
                let list = read_bounded(content, MAX_LIST_BYTES)?.unwrap_or_default();
                *builtin = builtin_names(&list);
                return PROCEED;
            }
            let file = file.file_name().unwrap_or_default().to_string_lossy();
            let Some(name) = module_name(&file).filter(|name| name.len() <= MAX_NAME_BYTES) else {
                return PROCEED;
            };
            if first {
                all.insert(name.clone());
            }
            let wanted = names.contains(&name);
            if wanted || first && COMPANIONS.contains(&name.as_str()) {
                let content = read_bounded(content, MAX_MODULE_BYTES)?.unwrap_or_default();
                bytes += content.len();
                let into = if wanted { &mut taken } else { &mut *companions };
                into.insert(name, content);
            }
            if bytes > MAX_BYTES || all.len() > MAX_FILES {
                fault = Some(ModuleError::TooMany { place: package.clone() });
                return Ok(ControlFlow::Break(()));
            }
            PROCEED
        });
        visited.map_err(|error| match error {
            DebError::Open(source) => ModuleError::Read { path: package.clone(), source },
            error => ModuleError::Package { path: package.clone(), reason: error.to_string() },
        })?;
        if let Some(fault) = fault {
            return Err(fault);
        }
        if first {
            *self = known;
        }
        Ok(taken)
    }
}

/// The release that a file under lib/modules belongs to, and its path from there.
fn module_path(path: &Path) -> Option<(&str, &Path)> {
    let path = path.strip_prefix("usr").unwrap_or(path).strip_prefix("lib/modules").ok()?;
    let mut parts = path.components();
    let release = parts.next()?.as_os_str().to_str()?;
    Some((release, parts.as_path()))
}

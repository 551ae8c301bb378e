//! Modules of a guest's kernel: found by name, with what they depend on, unpacked.
//!
//! Source: Linux Documentation/kbuild/modules.rst; modules.builtin and a module's own `.modinfo`
//! section. modules.dep is not asked: a package that is unpacked but not installed has none.

mod directory;
mod module;
mod package;

use std::collections::{BTreeSet, HashMap, HashSet};
use std::io;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use thiserror::Error as ThisError;

use self::directory::Directory;
pub(crate) use self::module::Module;
use self::package::Package;
use crate::error::{Error, ErrorKind};

/// The largest module, and list of built-in ones, that is read or unpacked. Real ones are smaller
/// than 20 MiB.
const MAX_MODULE_BYTES: u64 = 256 << 20;
/// What is unpacked of one release.
const MAX_BYTES: usize = 512 << 20;
/// What one guest gets: more than any needs, and numbers of two digits.
const MAX_MODULES: usize = 100;
/// How often a release is asked for what the modules so far depend on. Real chains are of up to six.
const MAX_ROUNDS: usize = 16;

/// Why modules cannot be had.
#[derive(Debug, ThisError)]
pub(crate) enum ModuleError {
    #[error("cannot read {}", path.display())]
    Read { path: PathBuf, source: io::Error },
    #[error("{} is not a Debian package: {reason}", path.display())]
    Package { path: PathBuf, reason: String },
    #[error("there is no module {name} in {}", place.display())]
    Missing { name: String, place: PathBuf },
    #[error("{} is no kernel module, or in an unknown compression", path.display())]
    Damaged { path: PathBuf },
    #[error("there are more modules in {} than a guest takes: up to {MAX_MODULES}, of {MAX_BYTES} bytes", place.display())]
    TooMany { place: PathBuf },
}

impl From<ModuleError> for Error {
    fn from(error: ModuleError) -> Self {
        let missing = matches!(error, ModuleError::Missing { .. });
        let error = Error::new(ErrorKind::Initramfs, error);
        if missing {
            return error.fix(
                "name a directory like /lib/modules/<release> of the guest's kernel, and modules \
                 as modprobe knows them",
            );
        }
        error
    }
}

/// The modules of one release of a kernel. What was read once is kept.
#[derive(Debug)]
pub(crate) struct Modules {
    place: Place,
    /// What was looked for; `None` where there is no such module.
    known: HashMap<String, Option<Arc<Module>>>,
    bytes: usize,
}

/// Where they are.
#[derive(Debug)]
enum Place {
    Directory(Directory),
    Package(Package),
}

/// A module as it lies there.
struct Packed {
    name: String,
    path: PathBuf,
    content: Vec<u8>,
}

impl Modules {
    /// Those in a release's directory, such as /lib/modules/6.12.9.
    pub(crate) fn in_directory(path: impl Into<PathBuf>) -> Self {
        Self::at(Place::Directory(Directory::new(path.into())))
    }

    /// Those in a Debian package of a kernel, which may have none.
    pub(crate) fn in_package(path: impl Into<PathBuf>) -> Self {
        Self::at(Place::Package(Package::new(path.into())))
    }

    fn at(place: Place) -> Self {
        Self { place, known: HashMap::new(), bytes: 0 }
    }

    /// Modules by their names, each after those that it depends on. What is built into the kernel is
    /// left out, and of `optional` what is not there; the rest has to be. A package without any
    /// module is of a kernel that needs none.
    pub(crate) fn load(
        &mut self,
        required: &[String],
        optional: &[String],
    ) -> Result<Vec<Arc<Module>>, ModuleError> {
        self.read_all(required.iter().chain(optional))?;
        if self.place.has_none() {
            return Ok(Vec::new());
        }
        let mut order = Order { release: self, modules: Vec::new(), above: Vec::new() };
        for name in required {
            order.visit(name, true)?;
        }
        for name in optional {
            order.visit(name, false)?;
        }
        Ok(order.modules)
    }

    /// Gets to know these, and all that they depend on.
    fn read_all<'a>(&mut self, names: impl Iterator<Item = &'a String>) -> Result<(), ModuleError> {
        let mut wanted: BTreeSet<String> = names.map(|name| canonical(name)).collect();
        let mut asked = HashSet::new();
        for _ in 0..MAX_ROUNDS {
            asked.extend(wanted.iter().cloned());
            if asked.len() > 2 * MAX_MODULES {
                break;
            }
            let unknown: BTreeSet<String> =
                wanted.iter().filter(|name| !self.known.contains_key(*name)).cloned().collect();
            if !unknown.is_empty() {
                self.read(unknown)?;
            }
            let modules = wanted.iter().filter_map(|name| self.known.get(name)?.as_ref());
            let needs = modules.flat_map(|module| module.depends.iter().chain(&module.wishes));
            wanted = needs.filter(|name| !asked.contains(*name)).cloned().collect();
            if wanted.is_empty() {
                return Ok(());
            }
        }
        Err(ModuleError::TooMany { place: self.place.path().to_owned() })
    }

    fn read(&mut self, names: BTreeSet<String>) -> Result<(), ModuleError> {
        for packed in self.place.read(&names)? {
            let module = Module::unpack(packed)?;
            self.bytes += module.content.len();
            if self.bytes > MAX_BYTES {
                return Err(ModuleError::TooMany { place: self.place.path().to_owned() });
            }
            self.known.insert(module.name.clone(), Some(Arc::new(module)));
        }
        for name in names {
            self.known.entry(name).or_default();
        }
        Ok(())
    }
}

/// Modules in an order in which they can be loaded, so far.
struct Order<'a> {
    release: &'a Modules,
    modules: Vec<Arc<Module>>,
    /// Those that want what is visited. A module that depends on itself could not be loaded by anybody.
    above: Vec<String>,
}

impl Order<'_> {
    /// Takes a module after its dependencies.
    fn visit(&mut self, name: &str, required: bool) -> Result<(), ModuleError> {
        let name = canonical(name);
        let there = self.modules.iter().any(|module| module.name == name);
        if there || self.above.contains(&name) || self.release.place.is_builtin(&name) {
            return Ok(());
        }
        let Some(module) = self.release.known.get(&name).and_then(Option::as_ref) else {
            let place = self.release.place.path().to_owned();
            return if required { Err(ModuleError::Missing { name, place }) } else { Ok(()) };
        };
        self.above.push(name);
        for dependency in &module.depends {
            self.visit(dependency, true)?;
        }
        for wish in &module.wishes {
            self.visit(wish, false)?;
        }
        self.above.pop();
        if self.modules.len() >= MAX_MODULES {
            return Err(ModuleError::TooMany { place: self.release.place.path().to_owned() });
        }
        self.modules.push(Arc::clone(module));
        Ok(())
    }
}

impl Place {
    fn read(&mut self, names: &BTreeSet<String>) -> Result<Vec<Packed>, ModuleError> {
        match self {
            Self::Directory(directory) => directory.read(names),
            Self::Package(package) => package.read(names),
        }
    }

    fn is_builtin(&self, name: &str) -> bool {
        match self {
            Self::Directory(directory) => directory.builtin().contains(name),
            Self::Package(package) => package.builtin().contains(name),
        }
    }

    fn has_none(&self) -> bool {
        match self {
            Self::Directory(_) => false,
            Self::Package(package) => package.has_none(),
        }
    }

    fn path(&self) -> &Path {
        match self {
            Self::Directory(directory) => directory.path(),
            Self::Package(package) => package.path(),
        }
    }
}

/// Modules have `-` and `_` in their names as it comes; the kernel takes them for the same.
fn canonical(name: &str) -> String {
    name.replace('-', "_")
}

/// The name of the module in a file of this name.
fn module_name(file: &str) -> Option<String> {
    match file.split_once(".ko") {
        Some((name, "" | ".xz" | ".zst" | ".gz")) => Some(canonical(name)),
        _ => None,
    }
}

/// The names in modules.builtin, one path a line.
fn builtin_names(list: &[u8]) -> HashSet<String> {
    let list = String::from_utf8_lossy(list);
    let names = list.lines().filter_map(|line| line.rsplit('/').next()?.strip_suffix(".ko"));
    names.map(canonical).collect()
}

#[cfg(test)]
mod tests;

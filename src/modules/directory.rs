//! Modules in a release's directory.

use std::collections::{BTreeSet, HashMap, HashSet};
use std::fs;
use std::path::{Path, PathBuf};

use super::{MAX_MODULE_BYTES, ModuleError, Packed, builtin_names, module_name};
use crate::input_file;

/// A directory such as /lib/modules/6.12.9, looked through when the first module is wanted.
#[derive(Debug)]
pub(super) struct Directory {
    path: PathBuf,
    /// Every module file, by its name.
    files: Option<HashMap<String, PathBuf>>,
    builtin: HashSet<String>,
}

impl Directory {
    pub(super) fn new(path: PathBuf) -> Self {
        Self { path, files: None, builtin: HashSet::new() }
    }

    pub(super) fn path(&self) -> &Path {
        &self.path
    }

    pub(super) fn builtin(&self) -> &HashSet<String> {
        &self.builtin
    }

    /// Those of the named modules that are there.
    pub(super) fn read(&mut self, names: &BTreeSet<String>) -> Result<Vec<Packed>, ModuleError> {
        let Self { path, files, builtin } = self;
        let files = files.get_or_insert_with(|| {
            *builtin = read(&path.join("modules.builtin"))
                .map_or_else(|_| HashSet::new(), |list| builtin_names(&list));
            files_below(path)
        });
        let found = names.iter().filter_map(|name| Some((name, files.get(name)?)));
        let packed = found.map(|(name, path)| {
            Ok(Packed { name: name.clone(), path: path.clone(), content: read(path)? })
        });
        packed.collect()
    }
}

fn read(path: &Path) -> Result<Vec<u8>, ModuleError> {
    let failed = |source| ModuleError::Read { path: path.into(), source };
    let file = input_file::open(path).map_err(failed)?;
    let content = input_file::read_bounded(file, MAX_MODULE_BYTES).map_err(failed)?;
    content.ok_or_else(|| ModuleError::Damaged { path: path.into() })
}

/// Directories that cannot be read, and links to directories, count as empty.
fn files_below(dir: &Path) -> HashMap<String, PathBuf> {
    let mut found = HashMap::new();
    let mut folders = vec![dir.to_owned()];
    while let Some(folder) = folders.pop() {
        for entry in fs::read_dir(folder).into_iter().flatten().flatten() {
            if entry.file_type().is_ok_and(|kind| kind.is_dir()) {
                folders.push(entry.path());
            } else if let Some(name) = module_name(&entry.file_name().to_string_lossy()) {
                found.insert(name, entry.path());
            }
        }
    }
    found
}

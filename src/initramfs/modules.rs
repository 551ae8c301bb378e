//! Kernel modules for an initramfs: found by name, with what they depend on, unpacked.
//!
//! Source: Linux Documentation/kbuild/modules.rst; modules.builtin and a module's own `.modinfo`
//! section. modules.dep is not asked: a package that is unpacked but not installed has none.

use std::collections::HashMap;
use std::fs;
use std::path::{Path, PathBuf};

use super::{InitramfsError, read_bounded};
use crate::compression;

/// The largest module that is unpacked. Real ones are smaller than 20 MiB.
const MAX_MODULE_BYTES: u64 = 256 << 20;

/// A module, unpacked.
pub(super) struct Module {
    pub(super) name: String,
    pub(super) content: Vec<u8>,
}

/// The modules `names` of a release's directory, each after those that it depends on. What is
/// built into the kernel is left out.
pub(super) fn load(dir: &Path, names: &[String]) -> Result<Vec<Module>, InitramfsError> {
    let mut search = Search { dir, files: files(dir), builtin: builtin(dir), modules: Vec::new() };
    for name in names {
        search.visit(name, &mut Vec::new())?;
    }
    Ok(search.modules)
}

struct Search<'a> {
    dir: &'a Path,
    files: HashMap<String, PathBuf>,
    builtin: Vec<String>,
    modules: Vec<Module>,
}

impl Search<'_> {
    /// Takes a module after its dependencies; `above` are those that want it.
    fn visit(&mut self, name: &str, above: &mut Vec<String>) -> Result<(), InitramfsError> {
        let name = canonical(name);
        let there = self.modules.iter().any(|module| module.name == name);
        // A module that depends on itself could not be loaded by anybody.
        if there || above.contains(&name) || self.builtin.contains(&name) {
            return Ok(());
        }
        let Some(path) = self.files.get(&name).cloned() else {
            return Err(InitramfsError::NoModule { name, dir: self.dir.to_owned() });
        };
        let failed = || InitramfsError::Module { path: path.clone() };
        let content = compression::unpack(&read_bounded(&path)?, MAX_MODULE_BYTES);
        let content = content.map_err(|_| failed())?;
        above.push(name.clone());
        for dependency in dependencies(&content).ok_or_else(failed)? {
            self.visit(&dependency, above)?;
        }
        above.pop();
        self.modules.push(Module { name, content });
        Ok(())
    }
}

/// Modules have `-` and `_` in their names as it comes; the kernel takes them for the same.
fn canonical(name: &str) -> String {
    name.replace('-', "_")
}

/// Every module file under a directory, by its name. Directories that cannot be read, and links
/// to directories, count as empty.
fn files(dir: &Path) -> HashMap<String, PathBuf> {
    let mut found = HashMap::new();
    let mut folders = vec![dir.to_owned()];
    while let Some(folder) = folders.pop() {
        for entry in fs::read_dir(folder).into_iter().flatten().flatten() {
            let name = entry.file_name().to_string_lossy().into_owned();
            if entry.file_type().is_ok_and(|kind| kind.is_dir()) {
                folders.push(entry.path());
            } else if let Some((module, "" | ".xz" | ".zst" | ".gz")) = name.split_once(".ko") {
                found.insert(canonical(module), entry.path());
            }
        }
    }
    found
}

/// The names in modules.builtin, one path a line.
fn builtin(dir: &Path) -> Vec<String> {
    let list = read_bounded(&dir.join("modules.builtin")).unwrap_or_default();
    let list = String::from_utf8_lossy(&list);
    let names = list.lines().filter_map(|line| line.rsplit('/').next()?.strip_suffix(".ko"));
    names.map(canonical).collect()
}

/// The names after `depends=` in a module's `.modinfo`, whose strings end with NUL.
fn dependencies(module: &[u8]) -> Option<Vec<String>> {
    const KEY: &[u8] = b"\0depends=";
    let at = module.windows(KEY.len()).position(|window| window == KEY)?;
    let value = module[at + KEY.len()..].split(|byte| *byte == 0).next()?;
    let names = std::str::from_utf8(value).ok()?.split(',');
    Some(names.filter(|name| !name.is_empty()).map(str::to_owned).collect())
}

#[cfg(test)]
mod tests {
    use super::*;

    /// A directory of modules that goes with it.
    struct Modules(PathBuf);

    impl Modules {
        fn new(name: &str, modules: &[(&str, &[u8])]) -> Self {
            let id = std::process::id();
            let dir = std::env::temp_dir().join(format!("dormouse-modules-{name}-{id}"));
            fs::create_dir_all(dir.join("kernel/drivers")).unwrap();
            fs::write(dir.join("modules.builtin"), "kernel/drivers/built-in.ko\n").unwrap();
            for (file, content) in modules {
                fs::write(dir.join("kernel/drivers").join(file), content).unwrap();
            }
            Self(dir)
        }

        fn load(&self, names: &[&str]) -> Result<Vec<String>, String> {
            let names: Vec<String> = names.iter().map(|name| (*name).to_owned()).collect();
            let modules = load(&self.0, &names).map_err(|error| error.to_string())?;
            Ok(modules.into_iter().map(|module| module.name).collect())
        }
    }

    impl Drop for Modules {
        fn drop(&mut self) {
            let _ = fs::remove_dir_all(&self.0);
        }
    }

    #[test]
    fn modules_come_after_those_that_they_depend_on() {
        let modules = Modules::new(
            "order",
            &[
                ("a.ko", b"\x7fELF\0depends=b-c,built_in\0license=GPL\0"),
                ("b-c.ko", b"\x7fELF\0depends=d\0"),
                ("d.ko", b"\x7fELF\0depends=\0"),
                ("loop.ko", b"\x7fELF\0depends=loop,d\0"),
            ],
        );
        assert_eq!(modules.load(&["a", "d"]).unwrap(), ["d", "b_c", "a"]);
        assert_eq!(modules.load(&["built-in"]).unwrap(), [""; 0]);
        assert_eq!(modules.load(&["loop"]).unwrap(), ["d", "loop"]);
    }

    #[test]
    fn modules_that_are_missing_or_damaged_are_named() {
        let modules = Modules::new(
            "bad",
            &[("a.ko", b"\x7fELF\0depends=gone\0"), ("b.ko.xz", b"\xfd7zXZ\0rest"), ("c.ko", b"x")],
        );
        assert!(modules.load(&["nothing"]).unwrap_err().contains("nothing"));
        assert!(modules.load(&["a"]).unwrap_err().contains("gone"));
        assert!(modules.load(&["b"]).unwrap_err().contains("b.ko.xz"));
        assert!(modules.load(&["c"]).unwrap_err().contains("c.ko"));
    }
}

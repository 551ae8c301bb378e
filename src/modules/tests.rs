//! Releases of a few bytes, in a directory and in packages.

use super::*;
use std::fs;

/// A directory of modules that goes with it.
struct Release(PathBuf);

impl Release {
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
        load(&mut Modules::in_directory(&self.0), names, &[])
    }
}

impl Drop for Release {
    fn drop(&mut self) {
        let _ = fs::remove_dir_all(&self.0);
    }
}

fn load(modules: &mut Modules, names: &[&str], optional: &[&str]) -> Result<Vec<String>, String> {
    let owned = |names: &[&str]| names.iter().map(|name| (*name).to_owned()).collect::<Vec<_>>();
    let loaded = modules.load(&owned(names), &owned(optional));
    let loaded = loaded.map_err(|error| error.to_string())?;
    Ok(loaded.iter().map(|module| module.name.clone()).collect())
}

const TREE: &[(&str, &[u8])] = &[
    ("a.ko", b"\x7fELF\0depends=b-c,built_in\0license=GPL\0"),
    ("b-c.ko", b"\x7fELF\0depends=d\0"),
    ("d.ko", b"\x7fELF\0depends=\0"),
    ("loop.ko", b"\x7fELF\0depends=loop,d\0"),
    ("soft.ko", b"\x7fELF\0softdep=pre: sum gone post: a\0depends=\0"),
    ("sum_generic.ko", b"\x7fELF\0depends=d\0"),
];

#[test]
fn modules_come_after_those_that_they_depend_on() {
    let release = Release::new("order", TREE);
    assert_eq!(release.load(&["a", "d"]).unwrap(), ["d", "b_c", "a"]);
    assert_eq!(release.load(&["built-in"]).unwrap(), [""; 0]);
    assert_eq!(release.load(&["loop"]).unwrap(), ["d", "loop"]);
    assert_eq!(release.load(&["soft"]).unwrap(), ["d", "sum_generic", "soft"]);
}

#[test]
fn modules_that_are_missing_or_damaged_are_named() {
    let modules: &[(&str, &[u8])] =
        &[("a.ko", b"\x7fELF\0depends=gone\0"), ("b.ko.xz", b"\xfd7zXZ\0rest"), ("c.ko", b"x")];
    let release = Release::new("bad", modules);
    assert!(release.load(&["nothing"]).unwrap_err().contains("nothing"));
    assert!(release.load(&["a"]).unwrap_err().contains("gone"));
    assert!(release.load(&["b"]).unwrap_err().contains("b.ko.xz"));
    assert!(release.load(&["c"]).unwrap_err().contains("c.ko"));
}

#[test]
fn what_is_optional_may_be_missing_but_not_what_it_depends_on() {
    let modules: &[(&str, &[u8])] =
        &[("a.ko", b"\x7fELF\0depends=gone\0"), ("d.ko", b"\x7fELF\0depends=\0")];
    let release = Release::new("optional", modules);
    let mut modules = Modules::in_directory(&release.0);
    assert_eq!(load(&mut modules, &[], &["nothing", "d", "built-in"]).unwrap(), ["d"]);
    assert!(load(&mut modules, &[], &["a"]).unwrap_err().contains("gone"));
}

#[test]
fn what_was_read_once_is_not_read_again() {
    let release = Release::new("cache", TREE);
    let mut modules = Modules::in_directory(&release.0);
    assert_eq!(load(&mut modules, &["a"], &["nothing"]).unwrap(), ["d", "b_c", "a"]);
    fs::remove_dir_all(&release.0).unwrap();
    assert_eq!(load(&mut modules, &["b_c"], &["nothing"]).unwrap(), ["d", "b_c"]);
}

#[test]
fn a_chain_that_does_not_end_is_refused() {
    let chain: Vec<(String, Vec<u8>)> = (0..400)
        .map(|at| (format!("m{at}.ko"), format!("\x7fELF\0depends=m{}\0", at + 1).into_bytes()))
        .collect();
    let chain: Vec<(&str, &[u8])> =
        chain.iter().map(|(name, content)| (name.as_str(), content.as_slice())).collect();
    let release = Release::new("chain", &chain);
    assert!(release.load(&["m0"]).unwrap_err().contains("more modules"));
}

#[test]
fn a_module_that_wants_more_than_there_can_be_is_refused() {
    let wants = |key: &str, separator: &str| {
        let names: Vec<String> = (0..101).map(|at| format!("m{at}")).collect();
        format!("\x7fELF\0{key}{}\0depends=\0", names.join(separator)).into_bytes()
    };
    let (hard, soft) = (wants("depends=", ","), wants("softdep=pre: ", " "));
    let release = Release::new("greedy", &[("hard.ko", &hard), ("soft.ko", &soft)]);
    assert!(release.load(&["hard"]).unwrap_err().contains("hard.ko"));
    assert!(release.load(&["soft"]).unwrap_err().contains("soft.ko"));
}

mod package {
    use super::*;
    use crate::deb::tests::package;
    use std::io::Write;
    use vmm_sys_util::tempfile::TempFile;

    fn xz(bytes: &[u8]) -> Vec<u8> {
        let mut encoder = liblzma::write::XzEncoder::new(Vec::new(), 1);
        encoder.write_all(bytes).unwrap();
        encoder.finish().unwrap()
    }

    fn built(name: &str, dir: &str, modules: &[(&str, &[u8])]) -> TempFile {
        let packed: Vec<_> = modules
            .iter()
            .map(|(file, content)| (format!("{dir}/kernel/{file}.xz"), xz(content)))
            .collect();
        let list = format!("{dir}/modules.builtin");
        let mut files: Vec<(&str, &[u8])> = vec![("./boot/vmlinuz-6.1", b"\x7fELF")];
        files.extend(packed.iter().map(|(path, content)| (path.as_str(), content.as_slice())));
        // Behind the modules, as in real packages.
        files.push((&list, b"kernel/drivers/built-in.ko\n"));
        package(name, "data.tar.xz", &files, |tar| xz(&tar))
    }

    #[test]
    fn modules_are_found_in_packages_as_in_directories() {
        let long = format!("./usr/lib/modules/{}", "6.12".repeat(25));
        for (name, dir) in [("old", "./lib/modules/6.1"), ("new", &long)] {
            let file = built(&format!("package-{name}"), dir, TREE);
            let mut modules = Modules::in_package(file.as_path());
            let order = ["d", "b_c", "a", "sum_generic", "soft"];
            let loaded = load(&mut modules, &["a", "soft", "built_in"], &["nothing"]);
            assert_eq!(loaded.unwrap(), order, "{dir}");
            assert!(load(&mut modules, &["nothing"], &[]).unwrap_err().contains("nothing"));
            drop(file);
            // Kept, and not looked for.
            assert_eq!(
                load(&mut modules, &["soft"], &["other"]).unwrap(),
                ["d", "sum_generic", "soft"]
            );
        }
    }

    #[test]
    fn what_is_often_needed_is_taken_along() {
        let modules: &[(&str, &[u8])] = &[
            ("virtio_net.ko", b"\x7fELF\0depends=net_failover\0"),
            ("net_failover.ko", b"\x7fELF\0depends=failover\0"),
            ("failover.ko", b"\x7fELF\0depends=\0"),
        ];
        let file = built("package-companions", "./lib/modules/6.1", modules);
        let mut modules = Modules::in_package(file.as_path());
        let net = ["failover", "net_failover", "virtio_net"];
        assert_eq!(load(&mut modules, &["virtio_net"], &[]).unwrap(), net);
    }

    #[test]
    fn a_package_without_modules_has_a_kernel_that_needs_none() {
        let kernel: &[(&str, &[u8])] = &[("./boot/vmlinuz-6.1", b"\x7fELF")];
        let file = package("package-none", "data.tar", kernel, |tar| tar);
        let mut modules = Modules::in_package(file.as_path());
        assert_eq!(load(&mut modules, &["a"], &["b"]).unwrap(), [""; 0]);
    }

    #[test]
    fn packages_cut_short_are_refused() {
        let file = built("package-cut", "./lib/modules/6.1", TREE);
        let path = file.as_path();
        let whole = fs::read(path).unwrap();
        for len in (0..whole.len() - 64).step_by(7) {
            fs::write(path, &whole[..len]).unwrap();
            let mut modules = Modules::in_package(path);
            load(&mut modules, &["a"], &[]).unwrap_err();
            // It was not all there yet.
            fs::write(path, &whole).unwrap();
            load(&mut modules, &["a"], &[]).unwrap();
        }
    }

    #[test]
    fn a_module_that_unpacks_to_something_else_is_named() {
        let modules: &[(&str, &[u8])] = &[("a.ko", b"\x7fELF\0license=GPL\0")];
        let file = built("package-damaged", "./lib/modules/6.1", modules);
        let error = load(&mut Modules::in_package(file.as_path()), &["a"], &[]).unwrap_err();
        assert!(error.contains("a.ko is no kernel module"), "{error}");
    }
}

//! Kernels that are installed on a system: the image, its release, its modules.

use std::cmp::Ordering;
use std::fs;
use std::path::{Path, PathBuf};

use serde::{Deserialize, Serialize};

/// A kernel found on a system.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct InstalledKernel {
    release: String,
    path: PathBuf,
    modules_dir: Option<PathBuf>,
}

impl InstalledKernel {
    /// Every kernel under `root` (`boot/vmlinuz-*`, `lib/modules/*/vmlinuz`), the newest release
    /// first. Directories that cannot be read count as empty.
    pub fn find(root: impl AsRef<Path>) -> Vec<Self> {
        let root = root.as_ref();
        let modules = root.join("lib/modules");
        let in_boot = names(&root.join("boot")).into_iter().filter_map(|name| {
            let release = name.strip_prefix("vmlinuz-")?.to_owned();
            let path = root.join("boot").join(&name);
            Some((release, path))
        });
        let in_modules = names(&modules).into_iter().filter_map(|release| {
            let path = modules.join(&release).join("vmlinuz");
            path.is_file().then_some((release, path))
        });

        let mut kernels: Vec<Self> = Vec::new();
        for (release, path) in in_boot.chain(in_modules) {
            if kernels.iter().any(|kernel| kernel.release == release) {
                continue;
            }
            let modules_dir = Some(modules.join(&release)).filter(|dir| dir.is_dir());
            kernels.push(Self { release, path, modules_dir });
        }
        kernels.sort_by(|a, b| compare_releases(&b.release, &a.release));
        kernels
    }

    /// The release, as `uname -r` prints it.
    pub fn release(&self) -> &str {
        &self.release
    }

    /// The bzImage.
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// The directory of its modules, where there is one.
    pub fn modules_dir(&self) -> Option<&Path> {
        self.modules_dir.as_deref()
    }
}

fn names(dir: &Path) -> Vec<String> {
    let Ok(entries) = fs::read_dir(dir) else {
        return Vec::new();
    };
    entries.filter_map(|entry| entry.ok()?.file_name().into_string().ok()).collect()
}

/// Compares releases with their numbers as numbers, so that 6.12 comes after 6.1.
fn compare_releases(a: &str, b: &str) -> Ordering {
    let (a, b) = (parts(a), parts(b));
    a.cmp(&b)
}

/// A release as numbers and the text between them; a number is greater than any text.
fn parts(release: &str) -> Vec<(u64, &str)> {
    let mut parts = Vec::new();
    let mut rest = release;
    while !rest.is_empty() {
        let digits = rest.bytes().take_while(u8::is_ascii_digit).count();
        let (number, after) = rest.split_at(digits);
        let text = after.find(|c: char| c.is_ascii_digit()).unwrap_or(after.len());
        let (text, after) = after.split_at(text);
        parts.push((number.parse().unwrap_or(0), text));
        rest = after;
    }
    parts
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn newest_release_comes_first() {
        let mut releases =
            ["6.1.0-9-amd64", "6.12.9+bpo-cloud-amd64", "6.1.0-13-amd64", "5.10.0-8-amd64", ""];
        releases.sort_by(|a, b| compare_releases(b, a));
        assert_eq!(
            releases,
            ["6.12.9+bpo-cloud-amd64", "6.1.0-13-amd64", "6.1.0-9-amd64", "5.10.0-8-amd64", ""]
        );
    }
}

//! What the examples `container` and `endpoint` run, the server in a container image or one of busybox, and bars for what
//! takes a while.

use std::collections::HashMap;
use std::error::Error;
use std::fmt::Debug;
use std::fs;
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, PoisonError};

use dormouse::{AgentConfig, Cmdline, Entrypoint, Image, ImageSource, Kernel, VmConfig};
use indicatif::{MultiProgress, ProgressBar, ProgressStyle};

/// An image that is not unpacked yet, the VM for it, and its server's port.
pub(super) struct Source {
    pub(super) image: ImageSource,
    pub(super) config: VmConfig,
    pub(super) port: u16,
}

impl Source {
    /// The one that is named by `[IMAGE [PORT]]`: a file, a directory or, with `--features registry`, a reference.
    /// What has to be made for it goes to `cache`.
    pub(super) fn of(
        mut args: impl Iterator<Item = String>,
        cache: &Path,
    ) -> Result<Self, Box<dyn Error>> {
        let image = args.next();
        let port: u16 = args.next().map_or(Ok(8080), |port| port.parse())?;
        // Where a kernel and a static busybox are installed: here, or where the environment says.
        let root = std::env::var_os("DORMOUSE_GUEST_ROOT").map_or("/".into(), PathBuf::from);
        fs::create_dir_all(cache)?;
        let (image, agent) = match image {
            // What looks like a file is none that a registry has: where it is missing, that is said.
            Some(file) if Path::new(&file).exists() || file.ends_with(".tar") => {
                (Image::open(file), AgentConfig::new())
            }
            Some(reference) => (registry::pull(reference)?, AgentConfig::new()),
            None => {
                let server = ["/bin/busybox", "httpd", "-f", "-p", "8080", "-h", "/www"];
                let agent = AgentConfig::new().entrypoint(Entrypoint::new(server));
                (small_server(&root, cache)?, agent)
            }
        };
        let config = VmConfig::new(Kernel::installed_in(&root)?)
            .cmdline(Cmdline::default().push("quiet")?)
            .memory_mib(512)
            .agent(agent);
        Ok(Self { image, config, port })
    }
}

/// A directory with a web server, in place of an image.
fn small_server(root: &Path, cache: &Path) -> Result<ImageSource, Box<dyn Error>> {
    let directory = cache.join("busybox");
    for folder in ["bin", "www", "tmp", "proc", "sys", "dev", "run", "etc"] {
        fs::create_dir_all(directory.join(folder))?;
    }
    if !directory.join("bin/busybox").exists() {
        fs::copy(root.join("bin/busybox"), directory.join("bin/busybox"))?;
        fs::write(directory.join("www/index.html"), "hello from a container\n")?;
    }
    Ok(Image::directory(directory))
}

/// A bar for each stage, in the order in which they begin: layers are brought several at once.
#[derive(Clone, Default)]
pub(super) struct Bars {
    all: MultiProgress,
    stages: Arc<Mutex<HashMap<String, ProgressBar>>>,
}

impl Bars {
    pub(super) fn show(&self, stage: impl Debug, bytes: u64, total: Option<u64>) {
        let name = format!("{stage:?}");
        let mut stages = self.stages.lock().unwrap_or_else(PoisonError::into_inner);
        let bar = stages.entry(name.clone()).or_insert_with(|| {
            let style = ProgressStyle::with_template("{msg:14} {bar:40} {bytes:>10} {elapsed}");
            let bar = ProgressBar::no_length().with_message(name);
            self.all.add(bar.with_style(style.unwrap_or_else(|_| ProgressStyle::default_bar())))
        });
        if let Some(total) = total {
            bar.set_length(total);
        }
        bar.set_position(bytes);
    }

    pub(super) fn clear(&self) {
        let mut stages = self.stages.lock().unwrap_or_else(PoisonError::into_inner);
        for (_, bar) in stages.drain() {
            bar.finish_and_clear();
        }
    }
}

/// Images by reference.
#[cfg(feature = "registry")]
mod registry {
    use dormouse::{Image, ImageSource};

    pub(super) fn pull(reference: String) -> Result<ImageSource, String> {
        Ok(Image::pull(reference))
    }
}

#[cfg(not(feature = "registry"))]
mod registry {
    use dormouse::ImageSource;

    pub(super) fn pull(name: String) -> Result<ImageSource, String> {
        Err(format!("there is no file {name}, and references need `--features registry`"))
    }
}

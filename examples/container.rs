//! Runs the server in a container image, in a VM of its own: once booted, and once from a template of it.
//!
//! ```sh
//! docker save nginx -o nginx.tar
//! cargo run --example container -- nginx.tar 80
//! cargo run --features registry --example container -- docker.io/library/nginx:latest 80
//! ```
//!
//! Without arguments it is a web server of busybox, and no image is needed.

use std::collections::HashMap;
use std::error::Error;
use std::fmt::Debug;
use std::fs;
use std::ops::ControlFlow;
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, Instant};

use dormouse::{
    AgentConfig, Cmdline, Entrypoint, Image, ImageCache, ImageSource, Kernel, MicroVm, Ready,
    Running, TemplateOptions, VmConfig,
};
use indicatif::{MultiProgress, ProgressBar, ProgressStyle};
use tokio::io::{AsyncReadExt, AsyncWriteExt};

/// What was made once is found here the next time.
const CACHE: &str = "target/container";

#[tokio::main]
async fn main() -> Result<(), Box<dyn Error>> {
    let mut args = std::env::args().skip(1);
    let image = args.next();
    let port: u16 = args.next().map_or(Ok(8080), |port| port.parse())?;
    // Where a kernel and a static busybox are installed: here, or where the environment says.
    let root = std::env::var_os("DORMOUSE_GUEST_ROOT").map_or("/".into(), PathBuf::from);
    fs::create_dir_all(CACHE)?;
    let (source, agent) = match image {
        Some(file) if Path::new(&file).exists() => (Image::open(file), AgentConfig::new()),
        Some(reference) => (registry::pull(reference)?, AgentConfig::new()),
        None => {
            let server = ["/bin/busybox", "httpd", "-f", "-p", "8080", "-h", "/www"];
            let agent = AgentConfig::new().entrypoint(Entrypoint::new(server));
            (small_server(&root)?, agent)
        }
    };

    let bars = Bars::default();
    let shown = bars.clone();
    let source = source.progress(move |progress| {
        shown.show(progress.stage, progress.bytes, progress.total_bytes);
        ControlFlow::Continue(())
    });
    let image = source.unpack(&ImageCache::open(Path::new(CACHE).join("images"))?).await?;
    bars.clear();
    println!("root file system: {}", image.path().display());

    let config = VmConfig::new(Kernel::installed_in(&root)?)
        .cmdline(Cmdline::default().push("quiet")?)
        .memory_mib(512)
        .agent(agent);
    let begin = Instant::now();
    let vm = MicroVm::create(image.configure(config.clone()))?.start()?;
    let answer = ask(&vm, port).await?;
    let cold = begin.elapsed();
    println!("{}", answer.lines().next().unwrap_or_default());
    let _off = vm.shutdown(Duration::from_secs(1)).await;

    let shown = bars.clone();
    let options = TemplateOptions::new(Path::new(CACHE).join("templates"))
        .ready(Ready::Port(port))
        .progress(move |progress| {
            shown.show(progress.stage, progress.bytes, progress.total_bytes);
        });
    let template = image.template(config, &options).await?;
    bars.clear();
    let begin = Instant::now();
    let vm = template.start().await?;
    let again = ask(&vm, port).await?;
    let warm = begin.elapsed();
    println!("{}", again.lines().next().unwrap_or_default());
    println!("booted: first answer after {:.0} ms", cold.as_secs_f64() * 1e3);
    println!("from the template: {:.0} ms", warm.as_secs_f64() * 1e3);
    drop(vm.terminate());
    Ok(())
}

/// A directory with a web server, in place of an image.
fn small_server(root: &Path) -> Result<ImageSource, Box<dyn Error>> {
    let directory = Path::new(CACHE).join("busybox");
    for folder in ["bin", "www", "tmp", "proc", "sys", "dev", "run", "etc"] {
        fs::create_dir_all(directory.join(folder))?;
    }
    if !directory.join("bin/busybox").exists() {
        fs::copy(root.join("bin/busybox"), directory.join("bin/busybox"))?;
        fs::write(directory.join("www/index.html"), "hello from a container\n")?;
    }
    Ok(Image::directory(directory))
}

/// The server's answer, as soon as there is one.
async fn ask(vm: &MicroVm<Running>, port: u16) -> Result<String, Box<dyn Error>> {
    let agent = vm.agent().await?;
    let end = Instant::now() + Duration::from_secs(120);
    let mut stream = loop {
        match agent.connect_tcp(port).await {
            Ok(stream) => break stream,
            Err(error) if Instant::now() > end => return Err(error.into()),
            Err(_) => tokio::time::sleep(Duration::from_millis(5)).await,
        }
    };
    stream.write_all(b"GET / HTTP/1.0\r\nHost: localhost\r\n\r\n").await?;
    let mut answer = Vec::new();
    stream.read_to_end(&mut answer).await?;
    let answer = String::from_utf8_lossy(&answer).into_owned();
    let body = answer.split_once("\r\n\r\n").map(|(_, body)| body.to_owned());
    Ok(body.ok_or("an answer that is not HTTP")?)
}

/// A bar for each stage, in the order in which they begin: layers are brought several at once.
#[derive(Clone, Default)]
struct Bars {
    all: MultiProgress,
    stages: Arc<Mutex<HashMap<String, ProgressBar>>>,
}

impl Bars {
    fn show(&self, stage: impl Debug, bytes: u64, total: Option<u64>) {
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

    fn clear(&self) {
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

    pub(super) fn pull(reference: String) -> Result<ImageSource, &'static str> {
        Ok(Image::pull(reference))
    }
}

#[cfg(not(feature = "registry"))]
mod registry {
    use dormouse::ImageSource;

    pub(super) fn pull(_: String) -> Result<ImageSource, &'static str> {
        Err("there is no such file, and references need `--features registry`")
    }
}

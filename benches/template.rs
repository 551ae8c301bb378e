//! How long it takes until the server in a container image answers: in a VM that is started from a template of it,
//! beside one that is booted. Linux guests, so it runs where the tests of those do.
//!
//! `cargo bench --bench template` prints a table, with `-- --json` one JSON object a line; with
//! `-- --svg FILE` it draws the distributions.

mod report;

use std::env;
use std::fs;
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use dormouse::{
    Cmdline, Error, ErrorKind, GuestStream, Image, ImageCache, Kernel, MicroVm, Ready, Running,
    TemplateOptions, VmConfig,
};
use report::{Metric, Unit, micros, report};
use tokio::io::{AsyncReadExt, AsyncWriteExt};

const STARTS: usize = 10;
/// Under an emulated processor a boot takes some 20 s.
const STARTS_A_BOOT: usize = 4;
/// The images of the testbed that have a server, and its port.
const SERVERS: [(&str, u16); 2] = [("nginx", 80), ("python", 8000)];
/// How long a server is left alone that does not listen yet.
const AGAIN: Duration = Duration::from_millis(5);

#[tokio::main]
async fn main() -> Result<(), Error> {
    let scratch = Scratch::new();
    let mut metrics = Vec::new();
    for (tag, port) in SERVERS {
        metrics.push(server(&scratch.0, tag, port).await?);
    }
    report(&metrics, "after a boot");
    Ok(())
}

async fn server(scratch: &Path, tag: &str, port: u16) -> Result<Metric, Error> {
    let cache = ImageCache::open(scratch.join("images"))?;
    let image = Image::open(root().join("images")).name(tag).unpack(&cache).await?;
    let config = VmConfig::new(Kernel::installed_in(root())?)
        .cmdline(Cmdline::default().push("quiet")?)
        .memory_mib(256);
    let mut metric = Metric {
        name: format!("start → first answer of {tag}"),
        unit: Unit::Micros,
        ours: Vec::new(),
        floor: Vec::new(),
        bar: None,
    };
    let boots = 1 + STARTS.div_ceil(STARTS_A_BOOT);
    eprintln!("{tag}: {boots} boots, a template, {STARTS} starts from it");
    let boot = async || {
        let begin = Instant::now();
        let vm = MicroVm::create(image.configure(config.clone()))?.start()?;
        answered(vm, port, begin).await
    };
    // The first one opens and unpacks the kernel, which is read when it is needed.
    boot().await?;
    let options = TemplateOptions::new(scratch.join("templates")).ready(Ready::Port(port));
    let template = image.template(config.clone(), &options).await?;
    for round in 0..STARTS {
        if round % STARTS_A_BOOT == 0 {
            metric.floor.push(boot().await?);
        }
        let begin = Instant::now();
        let vm = template.start().await?;
        metric.ours.push(answered(vm, port, begin).await?);
    }
    template.remove();
    Ok(metric)
}

/// How long it has been when the server answers. The VM ends then.
async fn answered(vm: MicroVm<Running>, port: u16, begin: Instant) -> Result<f64, Error> {
    answer(&vm, port).await?;
    let took = micros(begin.elapsed());
    drop(vm.terminate());
    Ok(took)
}

/// Asks the server for its page until it is there.
async fn answer(vm: &MicroVm<Running>, port: u16) -> Result<(), Error> {
    let agent = vm.agent().await?;
    let stream = loop {
        match agent.connect_tcp(port).await {
            Err(error) if error.kind() == &ErrorKind::Refused => tokio::time::sleep(AGAIN).await,
            connected => break connected?,
        }
    };
    let text = ask(stream).await.expect("an answer");
    assert!(text.contains(" 200 OK\r\n"), "{text}");
    Ok(())
}

async fn ask(mut stream: GuestStream) -> std::io::Result<String> {
    stream.write_all(b"GET / HTTP/1.0\r\nHost: localhost\r\n\r\n").await?;
    let mut text = String::new();
    stream.read_to_string(&mut text).await?;
    Ok(text)
}

fn root() -> PathBuf {
    env::var_os("DORMOUSE_GUEST_ROOT").expect("start it by `cargo bench`").into()
}

/// A directory that goes with the benchmark.
struct Scratch(PathBuf);

impl Scratch {
    fn new() -> Self {
        let path = env::temp_dir().join(format!("dormouse-bench-template-{}", std::process::id()));
        fs::create_dir(&path).expect("a directory");
        Self(path)
    }
}

impl Drop for Scratch {
    fn drop(&mut self) {
        let _ = fs::remove_dir_all(&self.0);
    }
}

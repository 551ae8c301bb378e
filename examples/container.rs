//! Runs the server in a container image, in a VM of its own: once booted, and once from a template of it.
//!
//! ```sh
//! docker save nginx -o nginx.tar
//! cargo run --example container -- nginx.tar 80
//! cargo run --features registry --example container -- docker.io/library/nginx:latest 80
//! ```
//!
//! Without arguments it is a web server of busybox, and no image is needed.

mod image;

use std::error::Error;
use std::ops::ControlFlow;
use std::path::Path;
use std::time::{Duration, Instant};

use dormouse::{ErrorKind, ImageCache, MicroVm, Ready, Running, TemplateOptions};
use tokio::io::{AsyncReadExt, AsyncWriteExt};

use image::{Bars, Source};

/// What was made once is found here the next time.
const CACHE: &str = "target/container";

#[tokio::main]
async fn main() -> Result<(), Box<dyn Error>> {
    let cache = Path::new(CACHE);
    let Source { image, config, port } = Source::of(std::env::args().skip(1), cache)?;

    let bars = Bars::default();
    let shown = bars.clone();
    let image = image.progress(move |progress| {
        shown.show(progress.stage, progress.bytes, progress.total_bytes);
        ControlFlow::Continue(())
    });
    let image = image.unpack(&ImageCache::open(cache.join("images"))?).await?;
    bars.clear();
    println!("root file system: {}", image.path().display());

    let begin = Instant::now();
    let vm = MicroVm::create(image.configure(config.clone()))?.start()?;
    let answer = ask(&vm, port).await?;
    let cold = begin.elapsed();
    println!("{}", answer.lines().next().unwrap_or_default());
    let _off = vm.shutdown(Duration::from_secs(1)).await;

    let shown = bars.clone();
    let options = TemplateOptions::new(cache.join("templates")).ready(Ready::Port(port)).progress(
        move |progress| {
            shown.show(progress.stage, progress.bytes, progress.total_bytes);
        },
    );
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

/// The server's answer, as soon as there is one.
async fn ask(vm: &MicroVm<Running>, port: u16) -> Result<String, Box<dyn Error>> {
    let agent = vm.agent().await?;
    let end = Instant::now() + Duration::from_secs(120);
    let mut stream = loop {
        match agent.connect_tcp(port).await {
            Ok(stream) => break stream,
            // Its server does not listen yet.
            Err(error) if error.kind() == &ErrorKind::Refused && Instant::now() < end => {
                tokio::time::sleep(Duration::from_millis(5)).await;
            }
            Err(error) => return Err(error.into()),
        }
    };
    stream.write_all(b"GET / HTTP/1.0\r\nHost: localhost\r\n\r\n").await?;
    let mut answer = Vec::new();
    stream.read_to_end(&mut answer).await?;
    let answer = String::from_utf8_lossy(&answer).into_owned();
    let body = answer.split_once("\r\n\r\n").map(|(_, body)| body.to_owned());
    Ok(body.ok_or("an answer that is not HTTP")?)
}

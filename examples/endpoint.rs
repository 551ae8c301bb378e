//! Serves a container image at a URL. Its VM sleeps when nobody asks, and the next request wakes it.
//!
//! ```sh
//! docker save nginx -o nginx.tar
//! cargo run --features endpoint --example endpoint -- nginx.tar 80
//! cargo run --features endpoint,registry --example endpoint -- docker.io/library/nginx:latest 80
//! ```
//!
//! Without arguments it is a web server of busybox, and no image is needed. It asks itself once, waits until its VM sleeps,
//! and asks again; then it serves until ^C, or, with `--once` as the last argument, ends.

mod image;

use std::error::Error;
use std::net::SocketAddr;
use std::ops::ControlFlow;
use std::path::Path;
use std::time::{Duration, Instant};

use dormouse::{
    Endpoint, EndpointOptions, ImageCache, Ready, SessionOptions, SessionPolicy, SessionState,
    Sessions, TemplateOptions, Token, TokenKeys,
};
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::TcpStream;

use image::{Bars, Source};

/// What was made once is found here the next time.
const CACHE: &str = "target/endpoint";
/// The session's name, which becomes a part of its URL.
const ID: &str = "web";
const HOUR: Duration = Duration::from_secs(3600);

#[tokio::main]
async fn main() -> Result<(), Box<dyn Error>> {
    let begin = Instant::now();
    let cache = Path::new(CACHE);
    let mut args: Vec<_> = std::env::args().skip(1).collect();
    let is_once = args.pop_if(|last| last == "--once").is_some();
    let Source { image, config, port } = Source::of(args.into_iter(), cache)?;

    let bars = Bars::default();
    let shown = bars.clone();
    let image = image.progress(move |progress| {
        shown.show(progress.stage, progress.bytes, progress.total_bytes);
        ControlFlow::Continue(())
    });
    let image = image.unpack(&ImageCache::open(cache.join("images"))?).await?;
    let shown = bars.clone();
    let options = TemplateOptions::new(cache.join("templates"));
    let options = options.ready(Ready::Port(port)).progress(move |progress| {
        shown.show(progress.stage, progress.bytes, progress.total_bytes);
    });
    let template = image.template(config, &options).await?;
    bars.clear();

    let sessions = Sessions::open(cache.join("sessions")).await?;
    end(&sessions).await?; // that of a run that was killed
    let mut events = sessions.events();
    let telling = tokio::spawn(async move {
        while let Some(event) = events.next().await {
            println!("{} {event}", at(begin));
            if event.state == SessionState::Terminated {
                return;
            }
        }
    });
    // By what is asked alone: in an emulated machine, a guest in which nothing goes on takes processor time, too.
    let policy = SessionPolicy::new().idle_after(Duration::from_secs(3)).busy_cpu(None);
    let options = SessionOptions::new().id(ID).policy(policy).grace(Duration::from_secs(1));
    let session = sessions.start(template.start().await?, options).await?;

    let keys = TokenKeys::generate()?;
    let options = EndpointOptions::new().tokens(keys.clone()).default_port(port);
    let endpoint = Endpoint::bind("127.0.0.1:0", sessions.clone(), options).await?;
    let token = keys.mint(ID, port, 24 * HOUR)?;
    let url = endpoint.url(ID);
    println!("{} serving {url}", at(begin));
    println!("\n    curl -H 'X-aws-proxy-auth: {}' {url}\n", token.as_str());

    ask(endpoint.address(), &token, begin).await?;
    session.watch().wait_for(SessionState::Suspended).await;
    ask(endpoint.address(), &token, begin).await?;
    if !is_once {
        println!("{} it sleeps after 3 s without a request; ^C ends it", at(begin));
        tokio::signal::ctrl_c().await?;
    }
    endpoint.close(Duration::from_secs(1)).await;
    end(&sessions).await?;
    telling.await?;
    println!("{:?}", session.metering());
    Ok(())
}

/// The time since the example began.
fn at(begin: Instant) -> String {
    format!("[{:7.3} s]", begin.elapsed().as_secs_f64())
}

/// Asks as anybody would, and says what came of it.
async fn ask(address: SocketAddr, token: &Token, begin: Instant) -> Result<(), Box<dyn Error>> {
    println!("{} GET /", at(begin));
    let asked = Instant::now();
    let mut stream = TcpStream::connect(address).await?;
    let request = format!(
        "GET / HTTP/1.1\r\nHost: {ID}.localhost\r\nX-aws-proxy-auth: {}\r\nConnection: close\r\n\r\n",
        token.as_str()
    );
    stream.write_all(request.as_bytes()).await?;
    let mut answer = Vec::new();
    stream.read_to_end(&mut answer).await?;
    let took = asked.elapsed().as_secs_f64() * 1e3;
    let answer = String::from_utf8_lossy(&answer);
    println!("{} {} after {took:.1} ms", at(begin), answer.lines().next().unwrap_or_default());
    Ok(())
}

/// Ends the session and forgets it, if there is one.
async fn end(sessions: &Sessions) -> Result<(), Box<dyn Error>> {
    if let Some(session) = sessions.get(ID) {
        session.terminate().await?;
        sessions.remove(ID).await?;
    }
    Ok(())
}

//! What the agent costs: in time beside a bare init, fork and exec in the guest, and raw vsock; in
//! bytes; and what the first command after a restore takes. Linux guests, so it runs where the
//! tests of those do.
//!
//! `cargo bench --bench agent` prints a table, with `-- --json` one JSON object a line; with
//! `-- --svg FILE` it draws the distributions.

mod report;

use std::env;
use std::io::{self, Read, Write};
use std::path::PathBuf;
use std::sync::mpsc::{Receiver, Sender, channel};
use std::time::{Duration, Instant};

use dormouse::{
    Agent, AgentConfig, Cmdline, Initramfs, InitramfsBuilder, Kernel, MicroVm, Running, VmConfig,
    VsockConfig, VsockListener,
};
use report::{Bar, Metric, Unit, micros, report};

const ROUNDS: usize = 10;
/// How many programs a round starts.
const PROGRAMS: u32 = 20;
/// What is copied in a round.
const COPY_MIB: usize = 4;
/// A bare init. It stays: what one says that ends may be lost in the kernel's panic.
const INIT: &str = "#!/bin/busybox sh\necho up\nexec /bin/busybox sleep 1000\n";
/// The port of the host that the floor's program in the guest connects to.
const PORT: u32 = 5000;

fn main() {
    let runtime = tokio::runtime::Builder::new_multi_thread().enable_all().build().expect("tokio");
    eprintln!("booting {} guests", 2 * (ROUNDS + 1));
    let mut metrics = vec![boot(&runtime)];
    runtime.block_on(async {
        let guest = Guest::boot().await;
        metrics.extend(size(&guest.agent).await);
        eprintln!("running programs");
        metrics.push(exec(&guest).await);
        eprintln!("copying files");
        metrics.extend(copy(&guest).await);
        eprintln!("making clones");
        metrics.extend(wake(guest.vm).await);
    });
    report(&metrics, "without the agent");
}

fn root() -> PathBuf {
    env::var_os("DORMOUSE_GUEST_ROOT").map_or("/".into(), PathBuf::from)
}

fn files() -> InitramfsBuilder {
    let tool = env::var_os("DORMOUSE_GUEST_TOOL").expect("start it by `cargo bench`");
    Initramfs::builder()
        .host_file("bin/busybox", root().join("bin/busybox"))
        .host_file("bin/guest-tool", tool)
        .symlink("bin/sh", "busybox")
        .symlink("bin/true", "busybox")
        .symlink("bin/cat", "busybox")
        .directory("tmp", 0o1777)
}

fn config(kernel: &Kernel, files: InitramfsBuilder) -> VmConfig {
    VmConfig::new(kernel.clone())
        .initramfs(files.build().expect("an initramfs"))
        .cmdline(Cmdline::default().push("quiet").expect("a word"))
        .memory_mib(256)
}

fn kernel() -> Kernel {
    Kernel::installed_in(root()).expect("a kernel")
}

/// From the start of the kernel to an agent that is ready, and to the first byte of a bare init.
fn boot(runtime: &tokio::runtime::Runtime) -> Metric {
    let mut metric = metric("start → agent ready", Unit::Micros, Some(Bar::AtMost(1.15)));
    let kernel = kernel();
    let with_agent = config(&kernel, files()).agent(AgentConfig::new());
    let bare = config(&kernel, files().file("init", 0o755, INIT));
    for round in 0..=ROUNDS {
        let vm = MicroVm::create(with_agent.clone()).expect("create");
        let begin = Instant::now();
        let vm = vm.start().expect("start");
        runtime.block_on(vm.agent_timeout(Duration::from_secs(60))).expect("an agent");
        let ours = begin.elapsed();
        drop(vm);
        let (writer, wrote) = lines();
        let vm = MicroVm::create(bare.clone().console(writer)).expect("create");
        let begin = Instant::now();
        let vm = vm.start().expect("start");
        let at = loop {
            let (line, at) = wrote.recv_timeout(Duration::from_secs(60)).expect("init's word");
            if line.starts_with("up") {
                break at;
            }
        };
        drop(vm);
        eprint!(".");
        // The first of each warms the host up.
        if round > 0 {
            metric.ours.push(micros(ours));
            metric.floor.push(micros(at - begin));
        }
    }
    metric
}

async fn size(agent: &Agent) -> [Metric; 2] {
    let bytes = agent.metadata("/init").await.expect("the agent's file").len();
    let resident = agent.memory_bytes().await.expect("memory");
    let kib = |bytes: u64| bytes as f64 / 1024.0;
    let of = |name: &str, value, bar| Metric {
        ours: vec![kib(value)],
        ..metric(name, Unit::Kib, Some(Bar::AtMost(bar)))
    };
    [
        of("the agent's program", bytes, 1536.0),
        of("memory of the guest that it takes", resident, 4096.0),
    ]
}

/// Running `true`, beside a shell's fork and exec of it in the guest and two round trips of vsock.
async fn exec(guest: &Guest) -> Metric {
    let mut metric = metric(
        "exec of `true` (floor: fork and exec in the guest, and two round trips)",
        Unit::Micros,
        Some(Bar::AtMost(1.5)),
    );
    let mut echo = guest.tool(&["vsock-run", "5000", "/bin/cat"]).await;
    let loops = format!("i=0; while [ $i -lt {PROGRAMS} ]; do /bin/true; i=$((i+1)); done");
    for round in 0..=ROUNDS {
        let begin = Instant::now();
        for _ in 0..PROGRAMS {
            guest.agent.exec("/bin/true", [""; 0]).await.expect("true");
        }
        let ours = begin.elapsed() / PROGRAMS;
        // The shell alone, and with the programs: the difference is theirs.
        let shell = time(guest.agent.exec("/bin/sh", ["-c", "true"])).await;
        let with_programs = time(guest.agent.exec("/bin/sh", ["-c", &loops])).await;
        let fork_and_exec = with_programs.saturating_sub(shell) / PROGRAMS;
        let trip = tokio::task::block_in_place(|| {
            let begin = Instant::now();
            for _ in 0..PROGRAMS {
                echo.write_all(b"x").expect("written");
                echo.read_exact(&mut [0]).expect("echoed");
            }
            begin.elapsed() / PROGRAMS
        });
        if round > 0 {
            metric.ours.push(micros(ours));
            metric.floor.push(micros(fork_and_exec + 2 * trip));
        }
    }
    metric
}

/// A file of zeros to the guest's memory and back, beside raw vsock to and from programs there.
async fn copy(guest: &Guest) -> [Metric; 2] {
    let bar = Some(Bar::AtLeast(0.6));
    let mut to = metric("a file to the guest (floor: raw vsock)", Unit::MibPerSecond, bar);
    let mut from = metric("a file from the guest (floor: raw vsock)", Unit::MibPerSecond, bar);
    let content = vec![7; COPY_MIB << 20];
    for round in 0..=ROUNDS {
        let wrote = time(guest.agent.write("/tmp/file", &content)).await;
        let mut read = Vec::with_capacity(content.len());
        let took = time(async {
            use tokio::io::AsyncReadExt;
            let mut file = guest.agent.open("/tmp/file").await?;
            file.read_to_end(&mut read).await.expect("read");
            Ok(())
        })
        .await;
        assert!(read == content);
        let raw_to = raw_to(guest, &content).await;
        let raw_from = raw_from(guest, &content).await;
        if round > 0 {
            let speed = |time: Duration| COPY_MIB as f64 / time.as_secs_f64();
            to.ours.push(speed(wrote));
            to.floor.push(speed(raw_to));
            from.ours.push(speed(took));
            from.floor.push(speed(raw_from));
        }
    }
    [to, from]
}

/// A program there writes what comes to a file of memory, and then says that it is whole.
async fn raw_to(guest: &Guest, content: &[u8]) -> Duration {
    let mut sink = guest.tool(&["vsock-sink", "5000", "/tmp/raw"]).await;
    tokio::task::block_in_place(|| {
        let begin = Instant::now();
        sink.write_all(content).expect("written");
        sink.shutdown(std::net::Shutdown::Write).expect("shut down");
        sink.read_to_end(&mut Vec::new()).expect("its end");
        begin.elapsed()
    })
}

/// A program there sends the file back. It waits for a byte: what it has sent before the clock runs would count as nothing.
async fn raw_from(guest: &Guest, content: &[u8]) -> Duration {
    let mut source = guest.tool(&["vsock-source", "5000", "/tmp/raw"]).await;
    tokio::task::block_in_place(|| {
        let mut read = Vec::with_capacity(content.len());
        let begin = Instant::now();
        source.write_all(b"x").expect("told");
        source.shutdown(std::net::Shutdown::Write).expect("shut down");
        source.read_to_end(&mut read).expect("read");
        let took = begin.elapsed();
        assert!(read == content);
        took
    })
}

/// The first command of a VM that was restored, beside the restore.
async fn wake(vm: MicroVm<Running>) -> [Metric; 2] {
    let mut restore = metric("restore and resume", Unit::Micros, None);
    let mut first = metric("restore → the first command is done", Unit::Micros, None);
    let agent = vm.agent().await.expect("an agent");
    agent.freeze().await.expect("frozen");
    let mut paused = vm.pause().expect("paused");
    for round in 0..=ROUNDS {
        let begin = Instant::now();
        let clone = paused.fork(1).expect("fork").remove(0).resume().expect("resume");
        let restored = begin.elapsed();
        let agent = clone.agent().await.expect("an agent");
        agent.exec("/bin/true", [""; 0]).await.expect("true");
        let done = begin.elapsed();
        if round > 0 {
            restore.ours.push(micros(restored));
            first.ours.push(micros(done));
        }
    }
    [restore, first]
}

struct Guest {
    vm: MicroVm<Running>,
    agent: Agent,
    listener: VsockListener,
}

impl Guest {
    async fn boot() -> Self {
        let config = config(&kernel(), files()).vsock(VsockConfig::default());
        let vm = MicroVm::create(config.agent(AgentConfig::new())).expect("create");
        let listener = vm.listen(PORT).expect("listen");
        let vm = vm.start().expect("start");
        let agent = vm.agent().await.expect("an agent");
        Self { vm, agent, listener }
    }

    /// A connection to the guest's tool, which has just been started.
    async fn tool(&self, args: &[&str]) -> dormouse::VsockStream {
        let script = format!("(guest-tool {}) >/dev/null 2>&1 &", args.join(" "));
        let started = self.agent.exec("/bin/sh", ["-c", &script]).await;
        started.and_then(dormouse::Output::check).expect("the tool");
        tokio::task::block_in_place(|| self.listener.accept().expect("its connection"))
    }
}

async fn time<T>(work: impl Future<Output = Result<T, dormouse::Error>>) -> Duration {
    let begin = Instant::now();
    work.await.expect("done");
    begin.elapsed()
}

fn metric(name: &str, unit: Unit, bar: Option<Bar>) -> Metric {
    Metric { name: name.to_owned(), unit, ours: Vec::new(), floor: Vec::new(), bar }
}

/// A console writer, and the lines that it gets with their times.
fn lines() -> (impl Write + Send + 'static, Receiver<(String, Instant)>) {
    let (sender, receiver) = channel();
    (Lines { sender, line: Vec::new() }, receiver)
}

struct Lines {
    sender: Sender<(String, Instant)>,
    line: Vec<u8>,
}

impl Write for Lines {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        for &byte in bytes {
            if byte == b'\n' {
                let line = String::from_utf8_lossy(&self.line).into_owned();
                let _ = self.sender.send((line, Instant::now()));
                self.line.clear();
            } else {
                self.line.push(byte);
            }
        }
        Ok(bytes.len())
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

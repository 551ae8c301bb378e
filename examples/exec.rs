//! Runs a program in a guest: its own kernel, memory and files, and nothing of the host's.
//!
//! `cargo run --example exec -- sh -c 'uname -a; id; echo $((6 * 7))'`
//!
//! What it writes is shown as it comes, its exit code is that of this program, and after a minute it is killed.

use std::path::PathBuf;
use std::process::ExitCode;
use std::time::Duration;

use dormouse::{AgentConfig, Cmdline, Initramfs, Kernel, MicroVm, ProcessStatus, VmConfig};
use tokio::io::{copy, stderr, stdout};

#[tokio::main]
async fn main() -> Result<ExitCode, Box<dyn std::error::Error>> {
    let mut argv: Vec<String> = std::env::args().skip(1).collect();
    if argv.is_empty() {
        argv = ["sh", "-c", "uname -sr; echo $((6 * 7))"].map(String::from).to_vec();
    }
    // Where a kernel and a static busybox are installed: here, or where the environment says.
    let root = std::env::var_os("DORMOUSE_GUEST_ROOT").map_or("/".into(), PathBuf::from);
    let files = Initramfs::builder()
        .host_file("bin/busybox", root.join("bin/busybox"))
        .symlink("bin/sh", "busybox")
        .directory("tmp", 0o1777);
    let config = VmConfig::new(Kernel::installed_in(&root)?)
        .initramfs(files.build()?)
        .cmdline(Cmdline::default().push("quiet")?)
        .memory_mib(256)
        .agent(AgentConfig::new());

    let vm = MicroVm::create(config)?.start()?;
    let agent = vm.agent().await?;
    // All that busybox does under its own name: ls, uname, wget, …
    agent.exec("busybox", ["--install", "-s", "/bin"]).await?.check()?;
    let command = agent.command(&argv[0]).args(&argv[1..]).timeout(Duration::from_secs(60));
    let mut process = command.spawn().await?;
    let mut output = process.stdout.take().ok_or("no output")?;
    let mut errors = process.stderr.take().ok_or("no errors")?;
    // Where nobody takes them any more they are closed, as a pipe would be.
    let show_output = async move { copy(&mut output, &mut stdout()).await };
    let show_errors = async move { copy(&mut errors, &mut stderr()).await };
    let _ = tokio::join!(show_output, show_errors);
    let status = process.wait().await?;
    let _ended = vm.shutdown(Duration::from_secs(1)).await;
    let code = match status {
        ProcessStatus::Code(code) => code,
        ProcessStatus::Signal(signal) => 128 + signal,
        ProcessStatus::TimedOut => 124,
    };
    if status.code().is_none() {
        eprintln!("{}: {status}", argv[0]);
    }
    Ok(ExitCode::from(u8::try_from(code).unwrap_or(1)))
}

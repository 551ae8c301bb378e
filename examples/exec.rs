//! Runs a program in a guest: its own kernel, memory and files, and nothing of the host's.
//!
//! `cargo run --example exec -- sh -c 'uname -a; id; echo $((6 * 7))'`

use std::io::{Write, stderr, stdout};
use std::path::PathBuf;
use std::process::ExitCode;
use std::time::Duration;

use dormouse::{AgentConfig, Cmdline, Error, Initramfs, Kernel, MicroVm, VmConfig};

#[tokio::main]
async fn main() -> Result<ExitCode, Error> {
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
    let output =
        agent.command(&argv[0]).args(&argv[1..]).timeout(Duration::from_secs(60)).output().await?;
    // What a terminal does not take is not this program's to say.
    let _ = stdout().write_all(&output.stdout);
    let _ = stderr().write_all(&output.stderr);
    let _ended = vm.shutdown(Duration::from_secs(1)).await;
    let code = output.status.code().unwrap_or(1);
    Ok(ExitCode::from(u8::try_from(code).unwrap_or(1)))
}

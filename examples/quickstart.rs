//! Boots a stock Linux kernel in this process, runs a command in it, and switches it off.

use std::path::PathBuf;
use std::process::ExitCode;
use std::time::{Duration, Instant};

use dormouse::{AgentConfig, Cmdline, Error, Initramfs, Kernel, MicroVm, VmConfig};

/// What the guest is asked.
const SCRIPT: &str = r#"
echo "hello from the guest: Linux $(busybox uname -r), $(busybox nproc) vCPUs,"
echo "$(busybox awk '/MemTotal/ { print int($2 / 1024) }' /proc/meminfo) MiB of memory, up for $(busybox cut -d' ' -f1 /proc/uptime) s"
"#;

#[tokio::main]
async fn main() -> Result<ExitCode, Error> {
    // Where a kernel and a static busybox are installed: here, or where the environment says.
    let root = std::env::var_os("DORMOUSE_GUEST_ROOT").map_or("/".into(), PathBuf::from);
    let kernel = Kernel::installed_in(&root)?;
    println!("booting {kernel}");

    let files = Initramfs::builder()
        .host_file("bin/busybox", root.join("bin/busybox"))
        .symlink("bin/sh", "busybox");
    let config = VmConfig::new(kernel)
        .initramfs(files.build()?)
        .cmdline(Cmdline::default().push("quiet")?)
        .memory_mib(256)
        .vcpus(2)
        .agent(AgentConfig::new());

    let began = Instant::now();
    let vm = MicroVm::create(config)?.start()?;
    let agent = vm.agent().await?;
    println!("ready after {:.2} s", began.elapsed().as_secs_f64());
    let output = agent.exec("sh", ["-c", SCRIPT]).await?.check()?;
    print!("{}", output.text());

    let vm = vm.shutdown(Duration::from_secs(1)).await;
    for timing in vm.timings().iter() {
        println!("{:>12} {:>8.2} ms", timing.phase.as_str(), timing.duration_ns as f64 / 1e6);
    }
    println!("{}", vm.exit_status());
    Ok(if vm.exit_status().is_clean() { ExitCode::SUCCESS } else { ExitCode::FAILURE })
}

//! Boots a stock Linux kernel in this process, and ends with how the guest ended.

use std::io;
use std::path::PathBuf;
use std::process::ExitCode;

use dormouse::{Cmdline, Error, Initramfs, Kernel, MicroVm, VmConfig};

/// The guest's first and only program.
const INIT: &str = r#"#!/bin/busybox sh
/bin/busybox mkdir -p /proc && /bin/busybox mount -t proc proc /proc
echo "hello from the guest: Linux $(/bin/busybox uname -r), $(/bin/busybox nproc) vCPUs,"
echo "$(/bin/busybox awk '/MemTotal/ { print int($2 / 1024) }' /proc/meminfo) MiB of memory, up for $(/bin/busybox cut -d' ' -f1 /proc/uptime) s"
/bin/busybox poweroff -f
"#;

fn main() -> Result<ExitCode, Error> {
    // Where a kernel and a static busybox are installed: here, or where the environment says.
    let root = std::env::var_os("DORMOUSE_GUEST_ROOT").map_or("/".into(), PathBuf::from);
    let kernel = Kernel::installed_in(&root)?;
    println!("booting {kernel}");

    let initramfs = Initramfs::builder()
        .host_file("bin/busybox", root.join("bin/busybox"))
        .file("init", 0o755, INIT)
        .build()?;
    let config = VmConfig::new(kernel)
        .initramfs(initramfs)
        .cmdline(Cmdline::default().push("quiet")?)
        .memory_mib(256)
        .vcpus(2)
        .console(io::stdout());

    let vm = MicroVm::create(config)?.start()?.wait();
    for timing in vm.timings().iter() {
        println!("{:>12} {:>8.2} ms", timing.phase.name(), timing.duration_ns as f64 / 1e6);
    }
    println!("{}", vm.exit_status());
    Ok(if vm.exit_status().is_clean() { ExitCode::SUCCESS } else { ExitCode::FAILURE })
}

//! Boots one guest, makes ten of it, and gives each its own work: nobody waits for a boot again.

use std::path::PathBuf;
use std::time::{Duration, Instant};
use std::{env, thread};

use dormouse::{Cmdline, Initramfs, Kernel, MicroVm, VmConfig};

/// Waits for a number once everything is ready; each clone reads one of its own.
const INIT: &str = r#"#!/bin/busybox sh
/bin/busybox mkdir -p /proc && /bin/busybox mount -t proc proc /proc
echo ready
read n
echo "result: $((n * n)), from $(/bin/busybox cat /proc/sys/kernel/random/uuid)"
/bin/busybox poweroff -f
"#;

fn main() -> Result<(), Box<dyn std::error::Error>> {
    let root = env::var_os("DORMOUSE_GUEST_ROOT").map_or("/".into(), PathBuf::from);
    let initramfs = Initramfs::builder()
        .host_file("bin/busybox", root.join("bin/busybox"))
        .file("init", 0o755, INIT)
        .build()?;
    let config = VmConfig::new(Kernel::installed_in(&root)?)
        .initramfs(initramfs)
        .cmdline(Cmdline::default().push("quiet")?);

    let begin = Instant::now();
    let vm = MicroVm::create(config)?.start()?;
    while !vm.console().tail().contains("ready") {
        if let Some(status) = vm.exit_status() {
            return Err(format!("{status}\n{}", vm.console().tail()).into());
        }
        thread::sleep(Duration::from_millis(10));
    }
    println!("one guest booted in {:.1?}", begin.elapsed());

    let mut original = vm.pause()?;
    let begin = Instant::now();
    let clones = original.fork(10)?;
    println!("ten clones were made in {:.1?}", begin.elapsed());

    let mut running = Vec::new();
    for (number, clone) in clones.into_iter().enumerate() {
        let clone = clone.resume()?;
        clone.console_input(format!("{number}\n"))?;
        running.push(clone);
    }
    for (number, clone) in running.into_iter().enumerate() {
        let ended = clone.wait();
        let tail = ended.console().tail();
        let result = tail.lines().find(|line| line.starts_with("result: "));
        let result = result.ok_or_else(|| format!("clone {number} said nothing:\n{tail}"))?;
        println!("clone {number}: {result}");
    }
    Ok(())
}

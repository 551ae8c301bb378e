//! Suspends a guest that counts, ends the process, and goes on counting in another one.

use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::{Duration, Instant};
use std::{env, io, thread};

use dormouse::{Cmdline, Initramfs, Kernel, MicroVm, RestoreOptions, Suspended, VmConfig};
use vmm_sys_util::tempdir::TempDir;

const INIT: &str = r#"#!/bin/busybox sh
n=0
while [ $n -lt 8 ]; do n=$((n + 1)); echo "guest: $n"; /bin/busybox sleep 0.5; done
/bin/busybox poweroff -f
"#;

type Result = std::result::Result<(), Box<dyn std::error::Error>>;

fn main() -> Result {
    if let Some(directory) = env::args_os().nth(1) {
        return go_on(Path::new(&directory));
    }
    // Nobody else's, and removed at the end.
    let scratch = TempDir::new_with_prefix(env::temp_dir().join("dormouse-"))?;
    let directory = scratch.as_path().join("asleep");
    fall_asleep(&directory)?;
    // This very program again, which knows of the guest what the directory says.
    let status = Command::new(env::current_exe()?).arg(&directory).status()?;
    if status.success() { Ok(()) } else { Err("the second process failed".into()) }
}

fn fall_asleep(directory: &Path) -> Result {
    let root = env::var_os("DORMOUSE_GUEST_ROOT").map_or("/".into(), PathBuf::from);
    let initramfs = Initramfs::builder()
        .host_file("bin/busybox", root.join("bin/busybox"))
        .file("init", 0o755, INIT)
        .build()?;
    let config = VmConfig::new(Kernel::installed_in(&root)?)
        .initramfs(initramfs)
        .cmdline(Cmdline::default().push("quiet")?)
        .console(io::stdout());
    let vm = MicroVm::create(config)?.start()?;
    while vm.exit_status().is_none() && !vm.console().tail().contains("guest: 3") {
        thread::sleep(Duration::from_millis(10));
    }
    let begin = Instant::now();
    drop(vm.suspend(directory)?); // the files stay
    println!("process {}: suspended in {:.1?}", std::process::id(), begin.elapsed());
    Ok(())
}

fn go_on(directory: &Path) -> Result {
    let begin = Instant::now();
    let options = RestoreOptions::new().console(io::stdout());
    let vm = MicroVm::<Suspended>::open_with(directory, &options)?.resume()?;
    println!("process {}: resumed in {:.1?}", std::process::id(), begin.elapsed());
    println!("{}", vm.wait().exit_status());
    Ok(())
}

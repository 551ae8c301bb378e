//! Runs commands in a guest, through a shell that the guest connects to a port of the host.
//!
//! In the guest of this example it is `guest-tool` of tests/testbed that connects; in an image of
//! your own, `socat VSOCK-CONNECT:2:1024 EXEC:/bin/sh` does the same.

use std::error::Error;
use std::io::{BufRead, BufReader, Write};
use std::path::PathBuf;
use std::time::Duration;

use dormouse::{Cmdline, Initramfs, Kernel, MicroVm, VmConfig, VsockConfig};

const INIT: &str = r#"#!/bin/busybox sh
/bin/busybox --install -s /bin
for module in /lib/modules/*.ko; do insmod "$module"; done
guest-tool vsock-run 1024 /bin/sh
poweroff -f
"#;

fn main() -> Result<(), Box<dyn Error>> {
    let root = std::env::var_os("DORMOUSE_GUEST_ROOT").map_or("/".into(), PathBuf::from);
    let tool = std::env::var_os("DORMOUSE_GUEST_TOOL").ok_or("start it by `cargo run`")?;
    let kernel = Kernel::installed_in(&root)?;
    let modules = kernel.modules_dir().ok_or("the kernel has no modules")?;
    let initramfs = Initramfs::builder()
        .host_file("bin/busybox", root.join("bin/busybox"))
        .host_file("bin/guest-tool", tool)
        .file("init", 0o755, INIT)
        .modules(modules, ["virtio_mmio", "vmw_vsock_virtio_transport"])
        .build()?;
    let config = VmConfig::new(kernel)
        .initramfs(initramfs)
        .cmdline(Cmdline::default().push("quiet")?)
        .vsock(VsockConfig::default());

    let vm = MicroVm::create(config)?;
    let listener = vm.listen(1024)?; // before the guest runs, so that it finds somebody
    let vm = vm.start()?;
    let shell = listener.accept_timeout(Duration::from_secs(60))?; // booting takes seconds
    let mut answers = BufReader::new(&shell).lines();
    for command in ["uname -sr", "nproc", "echo $((6 * 7))"] {
        writeln!(&shell, "{command}")?;
        println!("{command:16} {}", answers.next().ok_or("the shell has ended")??);
    }
    drop(shell); // it reads the end of its input, and exits
    println!("{}", vm.wait().exit_status());
    Ok(())
}

//! A guest fetches a page from a server on the host's loopback, through passt, with no rights.

use std::error::Error;
use std::io::{self, Read, Write};
use std::net::TcpListener;
use std::path::PathBuf;

use dormouse::{Cmdline, Initramfs, Kernel, MicroVm, NetConfig, UserNetwork, VmConfig};

/// The guest's first and only program.
const INIT: &str = "#!/bin/busybox sh
/bin/busybox --install -s /bin
for module in /lib/modules/*.ko; do insmod $module; done
ip addr add 10.0.2.15/24 dev eth0; ip link set eth0 up; ip route add default via 10.0.2.2
wget -q -O - http://10.0.2.2:$port/
poweroff -f
";

fn main() -> Result<(), Box<dyn Error>> {
    let listener = TcpListener::bind("127.0.0.1:0")?;
    let port = listener.local_addr()?.port();
    std::thread::spawn(move || {
        for mut guest in listener.incoming().flatten() {
            let _ = guest.read(&mut [0; 1024]);
            let _ = guest.write_all(b"HTTP/1.0 200 OK\r\n\r\nhello from the host\n");
        }
    });

    // Where a kernel and busybox are installed: here, or where the environment says.
    let root = std::env::var_os("DORMOUSE_GUEST_ROOT").map_or("/".into(), PathBuf::from);
    let kernel = Kernel::installed_in(&root)?;
    let modules = kernel.modules_dir().ok_or("the kernel has no modules")?;
    let initramfs = Initramfs::builder()
        .host_file("bin/busybox", root.join("bin/busybox"))
        .file("init", 0o755, INIT)
        .modules(modules, ["virtio_mmio", "virtio_net"])
        .build()?;

    let network = UserNetwork::new().program(root.join("usr/bin/passt"));
    let network = network.address([10, 0, 2, 15]).gateway([10, 0, 2, 2]).host_loopback(true);
    let config = VmConfig::new(kernel)
        .initramfs(initramfs)
        .cmdline(Cmdline::default().push("quiet")?.push(&format!("port={port}"))?)
        .network(NetConfig::user(network))
        .memory_mib(256)
        .console(io::stdout());
    println!("{}", MicroVm::create(config)?.start()?.wait().exit_status());
    Ok(())
}

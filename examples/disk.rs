//! Many VMs on one disk: each keeps what it wrote in a delta of its own, and finds it again.

use std::path::{Path, PathBuf};
use std::{env, fs, io};

use dormouse::{BlockConfig, Cmdline, Initramfs, Kernel, MicroVm, VmConfig};
use vmm_sys_util::tempdir::TempDir;

/// The guest notes each of its starts on its disk.
const INIT: &str = r#"#!/bin/busybox sh
/bin/busybox --install -s /bin; export PATH=/bin
for module in /lib/modules/*.ko; do insmod "$module"; done
mount -t devtmpfs dev /dev
mount -t ext4 /dev/vda /mnt 2> /dev/null || {
    echo "a new disk"; mke2fs /dev/vda > /dev/null; mount -t ext4 /dev/vda /mnt
}
touch /mnt/starts
echo "start $(($(wc -l < /mnt/starts) + 1))" >> /mnt/starts
cat /mnt/starts
umount /mnt; poweroff -f
"#;

fn main() -> Result<(), Box<dyn std::error::Error>> {
    let root = env::var_os("DORMOUSE_GUEST_ROOT").map_or("/".into(), PathBuf::from);
    let kernel = Kernel::installed_in(&root)?;
    let modules = kernel.modules_dir().ok_or("the kernel has no modules")?;
    let initramfs = Initramfs::builder()
        .host_file("bin/busybox", root.join("bin/busybox"))
        .file("init", 0o755, INIT)
        .directory("dev", 0o755)
        .directory("mnt", 0o755)
        .modules(modules, ["virtio_mmio", "virtio_blk", "ext4"])
        .build()?;
    let config = VmConfig::new(kernel)
        .initramfs(initramfs)
        .cmdline(Cmdline::default().push("quiet")?)
        .console(io::stdout());

    // Nobody else's, and removed at the end.
    let dir = TempDir::new_with_prefix(env::temp_dir().join("dormouse-disk-"))?;
    let base = dir.as_path().join("base.img");
    fs::File::create(&base)?.set_len(64 << 20)?;
    for (name, delta) in [("alice", "alice.delta"), ("bob", "bob.delta"), ("alice", "alice.delta")]
    {
        println!("--- {name}'s VM, whose writes go to {delta}; it boots in a moment");
        let delta = dir.as_path().join(delta);
        let disk = BlockConfig::new(&base).delta(&delta);
        let vm = MicroVm::create(config.clone().block(disk))?.start()?.wait();
        println!("    {}; the delta takes {} KiB", vm.exit_status(), kib_used(&delta)?);
    }
    println!("--- the disk itself takes {} KiB: nobody wrote to it", kib_used(&base)?);
    Ok(())
}

fn kib_used(path: &Path) -> io::Result<u64> {
    Ok(std::os::unix::fs::MetadataExt::blocks(&fs::metadata(path)?) / 2)
}

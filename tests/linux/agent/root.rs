use std::fs;
use std::os::unix::fs::{PermissionsExt, symlink};
use std::path::{Path, PathBuf};

use dormouse::{AgentConfig, BlockConfig, Cmdline, MountConfig, RootDisk, VmConfig};

use super::{Guest, block_on};
use crate::{Release, Scratch, guest_root, programs};

/// A disk with a file system of ext4.
struct RootImage {
    path: PathBuf,
    /// The directory that it is in, which goes with it.
    _scratch: Scratch,
}

impl RootImage {
    /// One that holds busybox.
    fn new(name: &str) -> Self {
        Self::of(name, |tree| {
            for directory in ["bin", "etc", "proc", "sys", "dev", "tmp", "run", "root"] {
                fs::create_dir(tree.join(directory)).unwrap();
            }
            fs::write(tree.join("etc/hostname"), "# of the disk\nits-own\n").unwrap();
            let busybox = tree.join("bin/busybox");
            fs::copy(guest_root().join("bin/busybox"), &busybox).unwrap();
            fs::set_permissions(&busybox, fs::Permissions::from_mode(0o755)).unwrap();
            for link in ["sh", "cat", "hostname", "ls", "mount", "ip", "df", "sleep"] {
                symlink("busybox", tree.join("bin").join(link)).unwrap();
            }
        })
    }

    /// One that holds nothing.
    fn empty(name: &str) -> Self {
        Self::of(name, |_| {})
    }

    fn of(name: &str, fill: impl FnOnce(&Path)) -> Self {
        let scratch = Scratch::new(&format!("root-{name}"));
        let (tree, path) = (scratch.0.join("tree"), scratch.0.join("ext4"));
        fs::create_dir(&tree).unwrap();
        fill(&tree);
        fs::File::create(&path).unwrap().set_len(32 << 20).unwrap();
        let made = programs::command("mke2fs")
            .args(["-q", "-t", "ext4", "-d"])
            .arg(&tree)
            .arg(&path)
            .status();
        assert!(made.unwrap().success());
        Self { path, _scratch: scratch }
    }
}

fn config(release: Release, agent: AgentConfig, image: &Path) -> VmConfig {
    VmConfig::new(release.kernel())
        .cmdline(Cmdline::default().push("quiet").unwrap())
        .block(BlockConfig::new(image).read_only())
        .agent(agent)
}

#[test]
fn a_root_disk_with_an_overlay_needs_no_other_tool_under_linux_6_1() {
    block_on(over_memory(Release::Linux6_1));
}

#[test]
fn a_root_disk_with_an_overlay_needs_no_other_tool_under_linux_6_12() {
    block_on(over_memory(Release::Linux6_12));
}

async fn over_memory(release: Release) {
    let image = RootImage::new(release.prefix());
    let agent = AgentConfig::new()
        .root(RootDisk::new(0).overlay_memory(16 << 20))
        .hostname("worker-7")
        .nameserver("192.0.2.1");
    let guest = Guest::boot(config(release, agent, &image.path)).await;
    assert_eq!(
        guest.sh("hostname; cat /etc/resolv.conf").await,
        "worker-7\nnameserver 192.0.2.1\n"
    );
    assert_eq!(
        guest.sh("echo new >/etc/new; cat /etc/new; ls /").await,
        "new\nbin\ndev\netc\nlost+found\nproc\nroot\nrun\nsys\ntmp\n"
    );
    let mounts = guest.sh("cat /proc/mounts").await;
    for mount in [
        " / overlay ",
        " /proc proc ",
        " /sys sysfs ",
        " /dev devtmpfs ",
        " /dev/pts devpts ",
        " /sys/fs/cgroup cgroup2 ",
    ] {
        assert!(mounts.contains(mount), "{mount} in {mounts}");
    }
    assert!(guest.sh("ip addr show lo").await.contains("127.0.0.1/8"));
    let resident = guest.agent.memory_bytes().await.unwrap();
    assert!(resident <= 4 << 20, "{resident}");
    // What a program may write is what the overlay has room for.
    guest.sh("! cat /dev/zero >/full 2>/dev/null; rm /full 2>/dev/null || busybox rm /full").await;
}

#[test]
fn a_root_disk_that_is_written_keeps_what_was_written() {
    block_on(async {
        let image = RootImage::new("written");
        let agent = AgentConfig::new().root(RootDisk::new(0).fs_type("ext4"));
        let config = VmConfig::new(Release::Linux6_12.kernel())
            .block(BlockConfig::new(&image.path))
            .agent(agent);
        let guest = Guest::boot(config.clone()).await;
        assert_eq!(guest.sh("hostname").await, "its-own\n");
        guest.agent.write("/etc/kept", "kept").await.unwrap();
        let ended = guest.vm.shutdown(std::time::Duration::from_secs(10)).await;
        assert!(ended.exit_status().is_clean(), "{}", guest.transcript.text());
        drop((ended, guest.agent));
        let guest = Guest::boot(config).await;
        assert_eq!(guest.agent.read("/etc/kept").await.unwrap(), b"kept");
        assert!(!guest.sh("busybox dmesg").await.contains("recovery"), "it was unmounted");
    });
}

#[test]
fn an_overlay_and_a_mount_on_disks_of_their_own_keep_what_was_written_and_the_root_is_as_it_was() {
    block_on(async {
        let (root, upper, data) =
            (RootImage::new("lower"), RootImage::empty("upper"), RootImage::empty("data"));
        let before = fs::read(&root.path).unwrap();
        let agent = AgentConfig::new()
            .root(RootDisk::new(0).fs_type("ext4").overlay_disk(1))
            .mount(MountConfig::new(2, "/data").fs_type("ext4"));
        let config = config(Release::Linux6_12, agent, &root.path)
            .block(BlockConfig::new(&upper.path))
            .block(BlockConfig::new(&data.path));
        let guest = Guest::boot(config.clone()).await;
        guest.agent.write("/etc/kept", "over").await.unwrap();
        guest.agent.write("/data/kept", "beside").await.unwrap();
        guest.agent.remove("/bin/hostname").await.unwrap();
        let mounts = guest.sh("cat /proc/mounts").await;
        assert!(mounts.contains(" / overlay ") && mounts.contains(" /data ext4 "), "{mounts}");
        let ended = guest.vm.shutdown(std::time::Duration::from_secs(10)).await;
        assert!(ended.exit_status().is_clean(), "{}", guest.transcript.text());
        drop((ended, guest.agent));
        let guest = Guest::boot(config).await;
        assert_eq!(guest.agent.read("/etc/kept").await.unwrap(), b"over");
        assert_eq!(guest.agent.read("/data/kept").await.unwrap(), b"beside");
        guest.agent.metadata("/bin/hostname").await.unwrap_err();
        assert!(!guest.sh("busybox dmesg").await.contains("recovery"), "they were unmounted");
        assert!(fs::read(&root.path).unwrap() == before);
    });
}

//! Virtio devices under the drivers of stock kernels.

use std::fs::{self, File};
use std::io::{Read, Write};
use std::os::unix::fs::MetadataExt;
use std::path::PathBuf;
use std::process::Command;
use std::time::Instant;

use dormouse::{
    BalloonConfig, BlockConfig, Cmdline, DeviceMetrics, ExitStatus, InitramfsBuilder, MicroVm,
    NetConfig, RateLimit, Running, VmConfig, VsockConfig,
};

use crate::{PATIENCE, Release, Transcript, guest_root, guest_tool, initramfs, run, unique};

/// A VM whose initramfs has these modules, and whose init loads them before it runs `script`.
pub fn config(release: Release, modules: &[&str], script: &str) -> VmConfig {
    config_with(release, modules, script, |initramfs| initramfs)
}

/// As [`config`], with more in the initramfs.
pub fn config_with(
    release: Release,
    modules: &[&str],
    script: &str,
    more: impl FnOnce(InitramfsBuilder) -> InitramfsBuilder,
) -> VmConfig {
    // A program that waits in the kernel for so long is told of, with where it waits.
    let options = "quiet sysctl.kernel.hung_task_timeout_secs=60";
    VmConfig::new(release.kernel())
        .initramfs(more(initramfs_with(release, modules, script)).build().unwrap())
        .cmdline(Cmdline::default().push(options).unwrap())
}

/// An initramfs with these modules, whose init loads them before it runs `script`.
pub fn initramfs_with(release: Release, modules: &[&str], script: &str) -> InitramfsBuilder {
    let load = "for module in /lib/modules/*.ko; do insmod $module; done";
    let archive = initramfs(&format!("{load}\n{script}"));
    archive.modules(release.modules_dir(), modules.iter().copied())
}

pub const DISK: &[&str] = &["virtio_mmio", "virtio_blk"];

/// A sparse file of this size in the temporary directory.
pub struct Image(pub PathBuf);

impl Image {
    pub fn new(name: &str, mib: u64) -> Self {
        let path = unique(&std::env::temp_dir(), name);
        File::create(&path).unwrap().set_len(mib << 20).unwrap();
        Self(path)
    }

    fn sha256(&self) -> String {
        let busybox = guest_root().join("bin/busybox");
        let output = Command::new(busybox).arg("sha256sum").arg(&self.0).output().unwrap();
        let text = String::from_utf8(output.stdout).unwrap();
        text.split_whitespace().next().unwrap().to_owned()
    }
}

impl Drop for Image {
    fn drop(&mut self) {
        let _ = fs::remove_file(&self.0);
    }
}

#[test]
fn two_disks_and_entropy_under_linux_6_1() {
    let source = Image::new("source", 8);
    let bytes: Vec<u8> =
        (0..8u32 << 20).map(|at| (at.wrapping_mul(2_654_435_761) >> 24) as u8).collect();
    fs::write(&source.0, bytes).unwrap();
    let target = Image::new("target", 64);
    let script = r#"
echo "ro=$(cat /sys/block/vda/ro) id=$(cat /sys/block/vda/serial) rw=$(cat /sys/block/vdb/ro)"
echo "first=$(sha256sum < /dev/vda)"
dd if=/dev/zero of=/dev/vda bs=512 count=1 conv=fsync 2>/dev/null && echo written
mke2fs -q /dev/vdb && mkdir /mnt && mount -t ext4 /dev/vdb /mnt || echo no mount
cp /dev/vda /mnt/copy && cp -r /bin/busybox /mnt && sync
umount /mnt && mount -t ext4 -o discard /dev/vdb /mnt
echo 3 > /proc/sys/vm/drop_caches
echo "second=$(sha256sum < /mnt/copy)"
rm /mnt/copy && sync && fstrim /mnt && umount /mnt
echo "rng=$(cat /sys/class/misc/hw_random/rng_current)"
echo "random=$(dd if=/dev/hwrng bs=4096 count=8 2>/dev/null | wc -c)"
dmesg | grep -iE 'virtio.*(error|fail)|I/O error' | grep -v vda
poweroff -f"#;
    let modules = [DISK, &["virtio-rng"]].concat();
    let config = config(Release::Linux6_1, &modules, script)
        .block(BlockConfig::new(&source.0).read_only().id("source-disk"))
        .block(BlockConfig::new(&target.0))
        .entropy(true)
        .vcpus(2)
        .memory_mib(256);
    let sha = source.sha256();
    let (vm, text) = run(config);
    assert_eq!(vm.exit_status(), &ExitStatus::PoweredOff, "{text}");
    assert!(text.contains("ro=1 id=source-disk rw=0"), "{text}");
    assert!(text.contains(&format!("first={sha}")), "{sha}: {text}");
    assert!(text.contains(&format!("second={sha}")), "{sha}: {text}");
    assert!(!text.contains("written\n") && !text.contains("no mount"), "{text}");
    assert!(text.contains("rng=virtio_rng"), "{text}");
    // Linux asks for 64 bytes at a time: 512 requests.
    assert!(text.contains("random=32768"), "{text}");
    assert_eq!(source.sha256(), sha, "the read-only disk changed");
    // The copy's 8 MiB were given back by the discard.
    let used = fs::metadata(&target.0).unwrap().blocks() * 512;
    assert!(used < 8 << 20, "{used} bytes of the disk are still used");
}

#[test]
fn nineteen_devices_at_once_under_linux_6_12() {
    let images: Vec<Image> = (0..19).map(|at| Image::new(&format!("disk{at}"), 1 + at)).collect();
    let script = r#"
for disk in /sys/block/vd*; do sizes="$sizes $(( $(cat $disk/size) / 2048 ))"; done
echo "sizes=$sizes"
for disk in /dev/vd*; do echo "$disk" | dd of=$disk bs=512 seek=7 conv=sync,fsync 2>/dev/null; done
poweroff -f"#;
    let config = images.iter().fold(config(Release::Linux6_12, DISK, script), |config, image| {
        config.block(BlockConfig::new(&image.0))
    });
    let (vm, text) = run(config.vcpus(2));
    assert_eq!(vm.exit_status(), &ExitStatus::PoweredOff, "{text}");
    let sizes: Vec<String> = (1..=19).map(|mib| mib.to_string()).collect();
    assert!(text.contains(&format!("sizes= {}\n", sizes.join(" "))), "{text}");
    for (image, letter) in images.iter().zip('a'..) {
        let bytes = fs::read(&image.0).unwrap();
        assert!(bytes[7 * 512..].starts_with(format!("/dev/vd{letter}\n").as_bytes()));
    }
}

#[test]
fn entropy_is_read_within_its_limit_and_then_without_one() {
    let script = r#"
echo "limited=$(dd if=/dev/hwrng bs=1024 count=64 2>/dev/null | wc -c)"
read line
echo "full=$(dd if=/dev/hwrng bs=4096 count=64 2>/dev/null | wc -c)"
poweroff -f"#;
    let script = format!("exec < /dev/ttyS0\n{script}");
    const RATE: u64 = 16 << 10;
    let limit = RateLimit::default().bytes_per_second(RATE);
    let transcript = Transcript::default();
    let config = config(Release::Linux6_12, &["virtio_mmio", "virtio-rng"], &script)
        .entropy(true)
        .entropy_rate_limit(limit)
        .console(transcript.clone());
    let given = |vm: &MicroVm<Running>| match vm.metrics()[..] {
        [DeviceMetrics::Entropy(metrics)] => metrics.bytes,
        ref other => panic!("{other:?}"),
    };
    let begin = Instant::now();
    let vm = MicroVm::create(config).unwrap().start().unwrap();
    transcript.wait_for("limited=65536\n");
    let bytes = given(&vm);
    // One burst is a second's, and no machine is too slow for this.
    let most = RATE as f64 * (1.0 + begin.elapsed().as_secs_f64());
    assert!(bytes >= 65536 && bytes as f64 <= most, "{bytes} bytes, at most {most}");

    vm.set_entropy_rate_limit(RateLimit::default()).unwrap();
    vm.console_input("go\n").unwrap();
    transcript.wait_for("full=262144\n");
    assert!(given(&vm) >= bytes + (256 << 10));
    let vm = transcript.end_of(vm);
    assert_eq!(vm.exit_status(), &ExitStatus::PoweredOff);
}

#[test]
fn two_disks_two_networks_and_vsock_are_one_machine_under_linux_6_12() {
    let disks = [Image::new("first", 16), Image::new("second", 16)];
    let (left, right) = NetConfig::pair().unwrap();
    let script = r#"
ls /sys/bus/virtio/devices | wc -l
for device in /sys/bus/virtio/devices/*; do basename $(readlink $device/driver); done | sort | uniq -c
ip addr add 10.1.0.1/24 dev eth0; ip link set eth0 up; ip link set eth1 up
cat /sys/class/net/eth0/address /sys/class/net/eth1/address
for disk in vda vdb; do dd if=/dev/urandom of=/dev/$disk bs=1M count=16 conv=fsync 2>/dev/null; done
guest-tool vsock-run 77 /bin/cat
poweroff -f"#;
    let modules = [DISK, &["virtio_net", "vmw_vsock_virtio_transport", "virtio-rng"]].concat();
    let config = config_with(
        Release::Linux6_12,
        &[&modules[..], &["virtio_balloon"]].concat(),
        script,
        |archive| archive.host_file("bin/guest-tool", guest_tool()),
    );
    let config = disks.iter().fold(config, |config, disk| config.block(BlockConfig::new(&disk.0)));
    let config = config
        .network(left.mac([2, 0, 0, 0, 0, 1]))
        .network(right.mac([2, 0, 0, 0, 0, 2]))
        .vsock(VsockConfig::default())
        .balloon(BalloonConfig::default())
        .entropy(true)
        .memory_mib(256)
        .vcpus(2);
    let transcript = Transcript::default();
    let vm = MicroVm::create(config.console(transcript.clone())).unwrap();
    let listener = vm.listen(77).unwrap();
    let vm = vm.start().unwrap();
    let echo = listener.accept_timeout(PATIENCE).unwrap();
    let message: Vec<u8> = (0..200_000u32).map(|at| (at * 7 + at / 251) as u8).collect();
    let mut back = vec![0; message.len()];
    std::thread::scope(|scope| {
        scope.spawn(|| (&echo).write_all(&message).unwrap());
        (&echo).read_exact(&mut back).unwrap();
    });
    assert!(back == message);
    drop(echo);
    let kinds: Vec<_> = vm
        .metrics()
        .iter()
        .map(|metrics| match metrics {
            DeviceMetrics::Block(disk) => format!("block {}", disk.written_bytes >> 20),
            DeviceMetrics::Net(_) => "net".into(),
            DeviceMetrics::Entropy(_) => "entropy".into(),
            DeviceMetrics::Balloon(_) => "balloon".into(),
            DeviceMetrics::Vsock(vsock) => format!("vsock {}", vsock.opened_by_guest),
            other => format!("{other:?}"),
        })
        .collect();
    assert_eq!(kinds, ["block 16", "block 16", "net", "net", "entropy", "balloon", "vsock 1"]);
    let vm = transcript.end_of(vm);
    let text = transcript.text();
    assert_eq!(vm.exit_status(), &ExitStatus::PoweredOff, "{text}");
    assert!(text.contains("\n7\n") || text.starts_with("7\n"), "{text}");
    for line in ["2 virtio_blk", "2 virtio_net", "1 virtio_rng", "1 virtio_balloon"] {
        assert!(text.contains(line), "{line}: {text}");
    }
    assert!(text.contains("02:00:00:00:00:01\n02:00:00:00:00:02\n"), "{text}");
}

//! Disks under real file systems and under fio, with every kind of backing.

use std::fs;
use std::os::unix::fs::MetadataExt;
use std::path::Path;
use std::process::Command;

use dormouse::{BlockConfig, DeviceMetrics, ExitStatus, MicroVm, VmConfig};

use crate::devices::{DISK, Image, config_with};
use crate::{PATIENCE, Release, Transcript, guest_root, programs, run};

/// The same work on three disks, in three kinds of backing.
fn three_disks(name: &str, mib: u64) -> ([Image; 3], Vec<BlockConfig>, Image) {
    let images = ["raw", "direct", "base"].map(|kind| Image::new(&format!("{name}-{kind}"), mib));
    let delta = Image::new(&format!("{name}-delta"), 0);
    fs::remove_file(&delta.0).unwrap();
    let disks = vec![
        BlockConfig::new(&images[0].0).queues(2),
        BlockConfig::new(&images[1].0).direct(true),
        BlockConfig::new(&images[2].0).delta(&delta.0),
    ];
    (images, disks, delta)
}

fn with_disks(config: VmConfig, disks: &[BlockConfig]) -> VmConfig {
    disks.iter().cloned().fold(config, VmConfig::block)
}

#[test]
fn fio_reads_what_it_wrote_on_every_kind_of_disk_at_once() {
    let (images, disks, delta) = three_disks("fio", 48);
    let script = r#"
fio --output=/log --eta=never --rw=randwrite --bsrange=512-128k --bs_unaligned=0 --size=48m --io_size=48m \
    --fsync=32 --direct=1 --ioengine=libaio --iodepth=16 \
    --verify=crc32c --verify_fatal=1 --do_verify=1 --randrepeat=0 \
    --name=vda --filename=/dev/vda --name=vdb --filename=/dev/vdb --name=vdc --filename=/dev/vdc
echo "fio=$?"
grep -iE 'verify:|error|err=' /log
echo 1 > /proc/sys/vm/drop_caches
poweroff -f"#;
    let config =
        config_with(Release::Linux6_12, DISK, script, |initramfs| programs::add(initramfs, "fio"));
    let (vm, text) = run(with_disks(config.memory_mib(512).vcpus(2), &disks));
    assert_eq!(vm.exit_status(), &ExitStatus::PoweredOff, "{text}");
    assert!(text.contains("fio=0\n"), "{text}");
    for disk in ["vda", "vdb", "vdc"] {
        let done = format!("{disk}: (groupid=0, jobs=1): err= 0");
        assert!(text.contains(&done), "{text}");
    }
    assert!(!text.contains("verify:") && !text.contains("I/O error"), "{text}");
    assert_eq!(fs::metadata(&images[2].0).unwrap().blocks(), 0, "the base was written to");
    assert!(fs::metadata(&delta.0).unwrap().blocks() > 0);
}

#[test]
fn ext4_is_made_filled_trimmed_and_found_whole_on_every_kind_of_disk() {
    let (images, disks, delta) = three_disks("ext4", 64);
    let script = r#"
mkdir -p /mnt /tree
for at in $(seq 300); do mkdir -p /tree/$((at % 17)); dd if=/dev/urandom of=/tree/$((at % 17))/$at bs=1k count=$((at % 64)) 2>/dev/null; done
tar -c -f /tree.tar -C / tree bin/busybox
sum=$(tar -x -O -f /tree.tar | sha256sum)
for disk in vda vdb vdc; do
    /bin/mke2fs -q -F -t ext4 -E discard /dev/$disk || echo "$disk no file system"
    mount -t ext4 -o discard /dev/$disk /mnt
    tar -x -f /tree.tar -C /mnt
    sync; umount /mnt; e2fsck -fn /dev/$disk > /log 2>&1; echo "$disk fsck=$?"
    mount -t ext4 -o discard /dev/$disk /mnt
    (cd /mnt && find tree -type f | sort | xargs sha256sum) > /sums
    sed -i 's| tree/| /tree/|' /sums; sha256sum -c /sums > /log 2>&1; echo "$disk sums=$? $(wc -l < /sums)"
    rm -r /mnt/tree; sync; fstrim /mnt
    umount /mnt; e2fsck -fn /dev/$disk > /log 2>&1; echo "$disk fsck-after=$?"
done
poweroff -f"#;
    let config = config_with(Release::Linux6_1, DISK, script, |initramfs| {
        ["mke2fs", "e2fsck"].into_iter().fold(initramfs, programs::add)
    });
    let (vm, text) = run(with_disks(config.memory_mib(384).vcpus(2), &disks));
    assert_eq!(vm.exit_status(), &ExitStatus::PoweredOff, "{text}");
    for disk in ["vda", "vdb", "vdc"] {
        assert!(text.contains(&format!("{disk} fsck=0\n")), "{text}");
        assert!(text.contains(&format!("{disk} sums=0 300\n")), "{text}");
        assert!(text.contains(&format!("{disk} fsck-after=0\n")), "{text}");
    }
    for image in &images[..2] {
        let check = programs::command("e2fsck").arg("-fn").arg(&image.0).output().unwrap();
        assert!(check.status.success(), "{}", String::from_utf8_lossy(&check.stdout));
        // What was trimmed is a hole; the journal and the tables remain.
        let used = fs::metadata(&image.0).unwrap().blocks() * 512;
        assert!(used < 12 << 20, "{used} bytes are still used");
    }
    assert_eq!(fs::metadata(&images[2].0).unwrap().blocks(), 0, "the base was written to");
    assert!(fs::metadata(&delta.0).unwrap().blocks() * 512 < 12 << 20);
}

#[test]
fn a_disk_goes_on_after_pauses_and_its_metrics_add_up() {
    let image = Image::new("pauses", 32);
    let script = r#"
dd if=/dev/urandom of=/pattern bs=1M count=32 2>/dev/null
echo ready
for round in 1 2 3; do dd if=/pattern of=/dev/vda bs=64k oflag=direct conv=fsync 2>/dev/null; done
dd if=/dev/vda bs=64k iflag=direct 2>/dev/null | cmp - /pattern && echo same
echo done; sleep 1000"#;
    let config = config_with(Release::Linux6_12, DISK, script, |initramfs| initramfs);
    let transcript = Transcript::default();
    let config = config.memory_mib(256).block(BlockConfig::new(&image.0));
    let mut vm = MicroVm::create(config.console(transcript.clone())).unwrap().start().unwrap();
    transcript.wait_for("ready");
    let begin = std::time::Instant::now();
    while !transcript.text().contains("done") {
        assert!(begin.elapsed() < PATIENCE, "{}", transcript.text());
        vm = vm.pause().unwrap().resume().unwrap();
        std::thread::sleep(std::time::Duration::from_millis(20));
    }
    assert!(transcript.text().contains("same"), "{}", transcript.text());
    let [DeviceMetrics::Block(metrics)] = vm.metrics()[..] else { panic!("one disk") };
    assert!(metrics.written_bytes >= 96 << 20, "{metrics:?}");
    assert!(metrics.read_bytes >= 32 << 20, "{metrics:?}");
    assert!(metrics.flushes >= 3 && metrics.errors == 0, "{metrics:?}");
    drop(vm.terminate());
    // The lock is gone with the VM, and what was written is there.
    let config = BlockConfig::new(&image.0).direct(true);
    let vm = MicroVm::create(VmConfig::new(Release::Linux6_12.kernel()).block(config));
    drop(vm.unwrap());
}

/// A block device of this machine over a file (loop(4)), which goes with it.
struct Loop(String);

impl Loop {
    fn new(file: &Path) -> Self {
        let device = losetup(&["-f"]);
        losetup(&[&device, file.to_str().unwrap()]);
        Self(device)
    }
}

impl Drop for Loop {
    fn drop(&mut self) {
        losetup(&["-d", &self.0]);
    }
}

fn losetup(arguments: &[&str]) -> String {
    let busybox = guest_root().join("bin/busybox");
    let output = Command::new(busybox).arg("losetup").args(arguments).output().unwrap();
    assert!(output.status.success(), "{arguments:?}: {}", String::from_utf8_lossy(&output.stderr));
    String::from_utf8(output.stdout).unwrap().trim().to_owned()
}

#[test]
fn block_devices_of_the_host_are_disks_filled_and_emptied_by_discards() {
    let images = ["loop", "loop-direct"].map(|name| Image::new(name, 48));
    // Made here, not by the guest: a loop device over a tmpfs, which keeps the space of no zeros
    // (FALLOC_FL_ZERO_RANGE), gives none back any more when it has been asked to, as mke2fs does.
    for image in &images {
        let mut mke2fs = programs::command("mke2fs");
        let made = mke2fs.args(["-q", "-F", "-t", "ext4"]).arg(&image.0).status();
        assert!(made.unwrap().success());
    }
    let devices = [0, 1].map(|at| Loop::new(&images[at].0));
    let script = r#"
mkdir -p /mnt; dd if=/dev/urandom of=/pattern bs=1M count=16 2>/dev/null
for disk in vda vdb; do
    mount -t ext4 /dev/$disk /mnt && cp /pattern /mnt && umount /mnt
    mount -t ext4 /dev/$disk /mnt && cmp /pattern /mnt/pattern && echo "$disk kept"; umount /mnt
done
sync; echo copied; read line
for disk in vda vdb; do
    mount -t ext4 /dev/$disk /mnt; rm /mnt/pattern; sync; fstrim /mnt
    cp /bin/busybox /mnt; umount /mnt; e2fsck -fn /dev/$disk > /log 2>&1; echo "$disk fsck=$?"
done
sync; echo trimmed; read line
for disk in vda vdb; do
    for at in 0 16 32; do dd if=/pattern of=/dev/$disk bs=1M seek=$at conv=fsync,notrunc 2>/dev/null; done
    dd if=/dev/$disk bs=1M skip=32 iflag=direct 2>/dev/null | cmp - /pattern && echo "$disk same"
done
echo full; read line
for disk in vda vdb; do
    blkdiscard /dev/$disk && echo "$disk others=$(tr -d '\0' < /dev/$disk | wc -c)"
done
echo empty; read line
poweroff -f"#;
    let script = format!("exec < /dev/ttyS0\n{script}");
    let config = config_with(Release::Linux6_12, DISK, &script, |initramfs| {
        programs::add(initramfs, "e2fsck")
    });
    let transcript = Transcript::default();
    let config = config
        .block(BlockConfig::new(&devices[0].0))
        .block(BlockConfig::new(&devices[1].0).direct(true))
        .memory_mib(384)
        .console(transcript.clone());
    let used = || [0, 1].map(|at| fs::metadata(&images[at].0).unwrap().blocks() * 512);
    let vm = MicroVm::create(config).unwrap().start().unwrap();
    let go_on = || vm.console_input("go\n").unwrap();
    transcript.wait_for("copied\n");
    assert!(used().iter().all(|used| *used > 16 << 20), "{:?}", used());
    go_on();
    transcript.wait_for("trimmed\n");
    // The journal and the tables remain.
    assert!(used().iter().all(|used| *used < 12 << 20), "{:?}", used());
    for image in &images {
        let check = programs::command("e2fsck").arg("-fn").arg(&image.0).output().unwrap();
        assert!(check.status.success(), "{}", String::from_utf8_lossy(&check.stdout));
    }
    go_on();
    transcript.wait_for("full\n");
    assert_eq!(used(), [48 << 20; 2]);
    go_on();
    transcript.wait_for("empty\n");
    assert_eq!(used(), [0; 2], "what was discarded is still there");
    go_on();
    let vm = transcript.end_of(vm);
    let text = transcript.text();
    assert_eq!(vm.exit_status(), &ExitStatus::PoweredOff, "{text}");
    for disk in ["vda", "vdb"] {
        for line in ["kept", "fsck=0", "same", "others=0"] {
            assert!(text.contains(&format!("{disk} {line}\n")), "{text}");
        }
    }
}

//! Every way to boot: two releases, two formats, two protocols, 1, 2 and 4 vCPUs, memory on both
//! sides of the devices' hole.

use std::fs;

use dormouse::{BootProtocol, ExitStatus, Initramfs, Kernel, VmConfig};

use crate::{Release, Scratch, config, guest_root, initramfs, run};

const REPORT: &str = r#"
echo "release=$(uname -r)"
echo "vcpus=$(nproc)"
echo "mib=$(awk '/MemTotal/ { print int($2 / 1024) }' /proc/meminfo)"
echo "clock=$(cat /sys/devices/system/clocksource/clocksource0/current_clocksource)"
echo "cmdline=$(cat /proc/cmdline)"
poweroff -f"#;

/// What a guest reported under a name.
fn value<'a>(text: &'a str, name: &str) -> &'a str {
    let line = text.lines().find_map(|line| line.strip_prefix(name)?.strip_prefix('='));
    line.unwrap_or_else(|| panic!("no {name}= in:\n{text}"))
}

/// Boots and checks what any guest must see.
fn boots(config: VmConfig, release: Release, vcpus: u8, mib: u32) {
    let (vm, text) = run(config.vcpus(vcpus).memory_mib(mib));
    assert_eq!(vm.exit_status(), &ExitStatus::PoweredOff, "{text}");
    assert!(value(&text, "release").starts_with(release.prefix()), "{text}");
    assert_eq!(value(&text, "vcpus"), vcpus.to_string());
    assert_eq!(value(&text, "clock"), "kvm-clock");
    assert_eq!(value(&text, "cmdline"), "console=ttyS0 panic=-1 quiet");
    // The kernel keeps some tens of MiB to itself, and for 5 GiB more.
    let seen: u32 = value(&text, "mib").parse().unwrap();
    assert!(seen < mib && seen > mib * 9 / 10 - 45, "{seen} of {mib} MiB");
}

/// The bzImage out of the package.
fn bzimage(release: Release, protocol: BootProtocol, vcpus: u8, mib: u32) {
    let kernel = release.kernel().protocol(protocol);
    boots(config(kernel, REPORT), release, vcpus, mib);
}

/// The vmlinux as a file.
fn elf(release: Release, protocol: BootProtocol, vcpus: u8, mib: u32) {
    let scratch = Scratch::new("elf");
    let path = scratch.0.join("vmlinux");
    fs::write(&path, release.kernel().vmlinux().unwrap()).unwrap();
    let kernel = Kernel::file(&path).protocol(protocol);
    boots(config(kernel, REPORT), release, vcpus, mib);
}

#[test]
fn linux_6_1_bzimage_by_pvh_on_1_vcpu() {
    bzimage(Release::Linux6_1, BootProtocol::Pvh, 1, 128);
}

#[test]
fn linux_6_1_bzimage_by_linux64_on_4_vcpus() {
    bzimage(Release::Linux6_1, BootProtocol::Linux64, 4, 256);
}

#[test]
fn linux_6_1_elf_by_pvh_on_2_vcpus() {
    elf(Release::Linux6_1, BootProtocol::Pvh, 2, 256);
}

#[test]
fn linux_6_1_elf_by_linux64_with_5_gib() {
    elf(Release::Linux6_1, BootProtocol::Linux64, 1, 5 << 10);
}

#[test]
fn linux_6_12_bzimage_by_pvh_with_5_gib() {
    bzimage(Release::Linux6_12, BootProtocol::Pvh, 2, 5 << 10);
}

#[test]
fn linux_6_12_bzimage_by_linux64_on_1_vcpu() {
    bzimage(Release::Linux6_12, BootProtocol::Linux64, 1, 128);
}

#[test]
fn linux_6_12_elf_by_pvh_on_4_vcpus() {
    elf(Release::Linux6_12, BootProtocol::Pvh, 4, 256);
}

#[test]
fn linux_6_12_elf_by_linux64_on_2_vcpus() {
    elf(Release::Linux6_12, BootProtocol::Linux64, 2, 256);
}

#[test]
fn the_newest_installed_kernel_boots_with_an_initramfs_file() {
    let kernel = Kernel::installed_in(guest_root()).unwrap();
    assert!(kernel.modules_dir().unwrap().join("kernel/drivers").is_dir());

    let scratch = Scratch::new("newest");
    let archive = scratch.0.join("initramfs");
    fs::write(&archive, initramfs(REPORT).build().unwrap().read().unwrap()).unwrap();
    let config = config(kernel, REPORT).initramfs(Initramfs::file(&archive));
    boots(config, Release::Linux6_12, 1, 128);
}

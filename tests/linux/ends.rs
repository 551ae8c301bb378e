//! How a Linux guest ends, and that each end is told apart.

use std::time::Duration;

use dormouse::{Cmdline, ExitStatus, MicroVm, VmConfig};

use crate::{Release, Transcript, config, initramfs, run};

fn end_of(config: VmConfig) -> ExitStatus {
    let (vm, _) = run(config);
    vm.exit_status().clone()
}

fn cmdline(arguments: &str) -> Cmdline {
    Cmdline::default().push("quiet").unwrap().push(arguments).unwrap()
}

#[test]
fn a_reboot_is_a_reboot_whichever_way_the_kernel_takes() {
    let guest =
        |arguments| config(Release::Linux6_12.kernel(), "reboot -f").cmdline(cmdline(arguments));
    // Left alone, the kernel takes a hardware-reduced machine for one with EFI, and ends up at
    // the BIOS's reset vector.
    for arguments in ["panic=-1", "reboot=acpi", "reboot=kbd"] {
        assert_eq!(end_of(guest(arguments)), ExitStatus::Rebooted, "{arguments}");
    }
}

#[test]
fn a_reboot_by_triple_fault_is_a_triple_fault() {
    let guest = config(Release::Linux6_1.kernel(), "reboot -f").cmdline(cmdline("reboot=triple"));
    assert_eq!(end_of(guest), ExitStatus::TripleFault);
}

#[test]
fn a_kernel_without_a_root_file_system_panics_with_its_own_words() {
    let guest = VmConfig::new(Release::Linux6_1.kernel()).cmdline(cmdline("root=/dev/none"));
    let ExitStatus::Panicked { message: Some(message) } = end_of(guest) else {
        panic!("no panic");
    };
    assert!(message.starts_with("VFS: Unable to mount root fs"), "{message}");
}

#[test]
fn a_panic_with_the_pvpanic_driver_ends_a_guest_that_would_hang() {
    // Linux 6.1's modules are not compressed.
    let driver = Release::Linux6_1.modules_dir().join("kernel/drivers/misc/pvpanic");
    let script = "insmod /pvpanic.ko && insmod /pvpanic-mmio.ko || exit\n\
                  echo c > /proc/sysrq-trigger";
    let initramfs = initramfs(script)
        .host_file("pvpanic.ko", driver.join("pvpanic.ko"))
        .host_file("pvpanic-mmio.ko", driver.join("pvpanic-mmio.ko"));
    let guest = VmConfig::new(Release::Linux6_1.kernel())
        .initramfs(initramfs.build().unwrap())
        // panic=0: the kernel stays where it is after a panic.
        .cmdline("console=ttyS0 quiet panic=0".parse().unwrap());
    let message = Some("sysrq triggered crash".to_owned());
    assert_eq!(end_of(guest), ExitStatus::Panicked { message });
}

#[test]
fn an_init_that_exits_is_a_panic() {
    let ExitStatus::Panicked { message: Some(message) } =
        end_of(config(Release::Linux6_12.kernel(), "exit 3"))
    else {
        panic!("no panic");
    };
    assert!(message.starts_with("Attempted to kill init! exitcode=0x00000300"), "{message}");
}

#[test]
fn terminate_ends_a_guest_that_is_busy_on_all_its_vcpus() {
    let script = "yes >/dev/null & yes >/dev/null & echo ready; wait";
    let transcript = Transcript::default();
    let guest = config(Release::Linux6_1.kernel(), script).vcpus(2).console(transcript.clone());
    let vm = MicroVm::create(guest).unwrap().start().unwrap();
    transcript.wait_for("ready");
    let failed = vm.wait_timeout(Duration::from_millis(200)).unwrap_err();
    assert_eq!(failed.vm.terminate().exit_status(), &ExitStatus::Terminated);
}

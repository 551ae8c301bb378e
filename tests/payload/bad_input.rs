//! What is refused, that the reason names it, and that nothing is left behind.

use std::fs;
use std::path::{Path, PathBuf};

use dormouse::{BlockConfig, BootProtocol, Error, ErrorKind, Initramfs, Kernel, MicroVm, VmConfig};

use crate::guest::{self, Program};
use crate::{PATIENCE, config, create, resources};

fn refusal(config: VmConfig) -> Error {
    match MicroVm::create(config) {
        Ok(_) => panic!("it was taken"),
        Err(error) => error,
    }
}

/// A refusal of this kind whose text contains `words`.
#[track_caller]
fn refuses(config: VmConfig, kind: ErrorKind, words: &str) {
    let error = refusal(config);
    assert_eq!(error.kind(), &kind, "{error:?}");
    assert!(error.to_string().contains(words), "{error}");
    assert!(error.phase().is_some(), "{error:?}");
}

fn halt() -> VmConfig {
    config(&Program::Halt)
}

fn kernel(image: Vec<u8>) -> VmConfig {
    VmConfig::new(Kernel::bytes(image))
}

/// A file of this test's own, removed at the end.
struct Scratch(PathBuf);

impl Scratch {
    fn new(name: &str, content: &[u8]) -> Self {
        let path = std::env::temp_dir().join(format!("dormouse-{}-{name}", std::process::id()));
        fs::write(&path, content).unwrap();
        Self(path)
    }
}

impl Drop for Scratch {
    fn drop(&mut self) {
        let _ = fs::remove_file(&self.0);
    }
}

#[test]
fn a_kvm_device_that_is_missing_or_something_else_is_named_with_the_fix() {
    refuses(halt().kvm_device("/nonexistent/kvm"), ErrorKind::KvmMissing, "modprobe");
    refuses(halt().kvm_device("/dev/null"), ErrorKind::KvmUnsupported, "/dev/null is not a KVM");
    refuses(halt().kvm_device("/dev/k\0vm"), ErrorKind::KvmMissing, "cannot open");
    refuses(halt().kvm_device("/tmp"), ErrorKind::KvmUnsupported, "cannot open /tmp");
}

#[test]
fn a_kvm_device_that_this_user_may_not_open_is_named_with_the_group() {
    use std::os::unix::fs::PermissionsExt;

    let device = Scratch::new("forbidden-kvm", b"");
    fs::set_permissions(&device.0, fs::Permissions::from_mode(0o0)).unwrap();
    let config = halt().kvm_device(&device.0);
    // The system call, unlike the library's function, changes this thread's user alone.
    let refused = std::thread::spawn(move || {
        // SAFETY: the call takes no memory; the thread that it changes ends here.
        unsafe { libc::syscall(libc::SYS_setresuid, 65534, 65534, 65534) };
        refusal(config)
    });
    let error = refused.join().unwrap();
    assert_eq!(error.kind(), &ErrorKind::KvmPermission, "{error:?}");
    assert!(error.to_string().contains("usermod -aG kvm"), "{error}");
}

#[test]
fn memory_and_vcpus_out_of_range_are_refused() {
    for bytes in [0, 1, 4095, (128 << 20) + 1, 1 << 20, u64::MAX, 1 << 50] {
        refuses(halt().memory(bytes), ErrorKind::Config, "bytes of memory");
    }
    for count in [0, 33, 255] {
        refuses(halt().vcpus(count), ErrorKind::Config, "1 to 32");
    }
}

#[test]
fn kernels_that_are_none_are_told_apart() {
    refuses(kernel(vec![]), ErrorKind::Kernel, "is empty");
    refuses(kernel(b"#!/bin/sh\n".to_vec()), ErrorKind::Kernel, "neither an ELF image nor a bz");
    let missing = VmConfig::new(Kernel::file("/nonexistent/vmlinux"));
    refuses(missing, ErrorKind::Kernel, "/nonexistent/vmlinux");
    refuses(VmConfig::new(Kernel::file("/tmp")), ErrorKind::Kernel, "Is a directory");

    let mut arm = guest::elf(&Program::Halt);
    arm[18] = 183;
    refuses(kernel(arm), ErrorKind::Kernel, "machine 183");
    let mut narrow = guest::elf(&Program::Halt);
    narrow[4] = 1;
    refuses(kernel(narrow), ErrorKind::Kernel, "class 1");
    let pvh = Kernel::bytes(guest::elf(&Program::Halt)).protocol(BootProtocol::Pvh);
    refuses(VmConfig::new(pvh).memory_mib(32), ErrorKind::Kernel, "no PVH entry");
}

#[test]
fn an_elf_kernel_truncated_at_any_byte_is_refused() {
    let whole = guest::elf(&Program::Halt);
    for len in 1..whole.len() {
        let error = refusal(kernel(whole[..len].to_vec()));
        assert_eq!(error.kind(), &ErrorKind::Kernel);
        let text = error.to_string();
        assert!(text.contains("truncated") || text.contains("neither"), "{len}: {text}");
    }
}

#[test]
fn elf_headers_of_any_content_are_refused_or_run_but_never_panic() {
    // Each field of the headers at its extremes, alone.
    let whole = guest::elf(&Program::Halt);
    for at in 4..120 {
        for byte in [0, 1, 0x7f, 0x80, 0xff] {
            let mut image = whole.clone();
            image[at] = byte;
            let _ = MicroVm::create(kernel(image).memory_mib(32));
        }
    }
    for at in (24..112).step_by(8) {
        for word in [0, u64::MAX, u64::MAX - 0xfff, 1 << 63, 0x100_0000] {
            let mut image = whole.clone();
            image[at..at + 8].copy_from_slice(&word.to_le_bytes());
            let _ = MicroVm::create(kernel(image).memory_mib(32));
        }
    }
}

#[test]
fn a_kernel_larger_than_memory_is_refused_with_both_sizes() {
    let config = halt().memory_mib(16);
    let sizes = "up to 17 MiB, the guest's ends at 16 MiB; give the guest more memory";
    refuses(config, ErrorKind::Kernel, sizes);
}

#[test]
fn an_initramfs_that_does_not_fit_or_is_not_there_is_refused() {
    let large = Initramfs::bytes(vec![0; 20 << 20]);
    refuses(halt().initramfs(large), ErrorKind::Initramfs, "initramfs of 20 MiB does not fit");
    let missing = Initramfs::file("/nonexistent/initrd");
    refuses(halt().initramfs(missing), ErrorKind::Initramfs, "/nonexistent/initrd");
}

#[test]
fn disks_that_are_not_there_or_too_many_are_refused() {
    let missing = BlockConfig::new("/nonexistent/disk");
    refuses(halt().block(missing), ErrorKind::Disk, "/nonexistent/disk");
    let directory = BlockConfig::new("/tmp");
    refuses(halt().block(directory.clone()), ErrorKind::Disk, "Is a directory");
    let read_only = directory.read_only();
    refuses(halt().block(read_only.clone()), ErrorKind::Disk, "neither a regular file nor");
    let many = (0..20).fold(halt(), |config, _| config.block(read_only.clone()));
    refuses(many, ErrorKind::Config, "20 virtio devices: it takes up to 19");
    let named = read_only.id("a name that is longer than 20 bytes");
    refuses(halt().block(named), ErrorKind::Config, "up to 20 bytes");
}

#[test]
fn where_no_kernel_is_installed_the_error_says_how_to_get_one() {
    let none = Kernel::installed_in("/nonexistent").unwrap_err();
    assert!(none.to_string().contains("apt-get install"), "{none}");
}

#[test]
fn a_package_that_is_none_is_refused() {
    let text = Scratch::new("text.deb", b"not an archive");
    refuses(VmConfig::new(Kernel::deb(&text.0)), ErrorKind::Kernel, "not a Debian package");
    let empty = Scratch::new("empty.deb", b"!<arch>\n");
    refuses(VmConfig::new(Kernel::deb(&empty.0)), ErrorKind::Kernel, "no data.tar");
    refuses(VmConfig::new(Kernel::deb("/nonexistent.deb")), ErrorKind::Kernel, "No such file");
}

#[test]
fn a_guest_that_touches_what_is_not_there_harms_nothing() {
    let (vm, _output) = create(&Program::Poke { ram_mib: 32 });
    let ended = vm.start().unwrap().wait_timeout(PATIENCE).unwrap();
    assert_eq!(ended.exit_status(), &dormouse::ExitStatus::PoweredOff);
}

#[test]
fn refusals_leave_no_descriptor_thread_or_mapping_behind() {
    if !resources::alone("refusals_leave_no_descriptor_thread_or_mapping_behind") {
        return;
    }
    let refuse_all = || {
        for config in [
            halt().kvm_device(Path::new("/dev/null")),
            halt().memory_mib(16),
            halt().initramfs(Initramfs::bytes(vec![0; 20 << 20])),
            halt().vcpus(33),
        ] {
            let _ = refusal(config);
        }
    };
    refuse_all();
    let before = resources::settled();
    for _ in 0..100 {
        refuse_all();
    }
    resources::assert_back_to(&before);
}

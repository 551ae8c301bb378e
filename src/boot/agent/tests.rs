//! Archives, read again as the kernel reads them.

use super::*;
use crate::config::{
    BalloonConfig, BlockConfig, Entrypoint, MountConfig, NetConfig, RootDisk, VsockConfig,
};
use crate::protocol::Setup;
use cpio::newc;
use std::collections::BTreeMap;
use std::fs;

/// A folder for an agent and a release's modules, which goes with it.
struct Folder(PathBuf);

impl Folder {
    fn new(name: &str, modules: &[&str]) -> Self {
        let folder =
            std::env::temp_dir().join(format!("dormouse-agent-{name}-{}", std::process::id()));
        fs::create_dir_all(folder.join("modules/kernel")).unwrap();
        fs::write(folder.join("agent"), agent_binary()).unwrap();
        fs::write(folder.join("modules/modules.builtin"), "kernel/virtio_rng.ko\n").unwrap();
        for name in modules {
            let depends = if *name == "virtio_net" { "net_failover" } else { "" };
            let module = format!("\x7fELF {name}\0depends={depends}\0");
            fs::write(folder.join(format!("modules/kernel/{name}.ko")), module).unwrap();
        }
        Self(folder)
    }

    fn agent(&self) -> AgentConfig {
        AgentConfig::new().binary(self.0.join("agent")).modules_dir(self.0.join("modules"))
    }
}

impl Drop for Folder {
    fn drop(&mut self) {
        let _ = fs::remove_dir_all(&self.0);
    }
}

fn agent_binary() -> Vec<u8> {
    let mut binary = b"\x7fELF\x02\x01\x01\0\0\0\0\0\0\0\0\0\x02\0\x3e\0".to_vec();
    binary.extend(b"the agent");
    binary
}

fn kernel() -> Kernel {
    Kernel::file("/vmlinux")
}

fn machine(agent: AgentConfig) -> MachineConfig {
    MachineConfig { agent: Some(agent), ..MachineConfig::default() }
}

fn made(config: &MachineConfig, own: Option<&Initramfs>) -> Vec<u8> {
    archive(&kernel(), own, config).unwrap().unwrap().to_vec()
}

/// A file of an archive: its mode, its device and its content.
type File = (u32, (u32, u32), Vec<u8>);

/// What the archive, and those behind it, hold.
fn unpacked(mut rest: &[u8]) -> BTreeMap<String, File> {
    let total = rest.len();
    let mut files = BTreeMap::new();
    while !rest.is_empty() {
        assert_eq!((total - rest.len()) % 4, 0, "the kernel looks for an archive every four bytes");
        let mut reader = newc::Reader::new(rest).unwrap();
        let entry = reader.entry().clone();
        let mut content = Vec::new();
        io::Read::read_to_end(&mut reader, &mut content).unwrap();
        let device = (entry.rdev_major(), entry.rdev_minor());
        files.insert(entry.name().to_owned(), (entry.mode(), device, content));
        rest = reader.finish().unwrap();
        let is_trailer = entry.is_trailer();
        while is_trailer && rest.first() == Some(&0) {
            rest = &rest[1..];
        }
    }
    files
}

fn module_names(archive: &[u8]) -> Vec<String> {
    let files = unpacked(archive);
    let folder = format!("{}/", MODULES_PATH.trim_start_matches('/'));
    files.keys().filter_map(|path| Some(path.strip_prefix(&folder)?.to_owned())).collect()
}

const ALWAYS: [&str; 2] = ["virtio_mmio", "vmw_vsock_virtio_transport"];

#[test]
fn the_agent_its_setup_and_its_modules_are_where_it_looks_for_them() {
    let folder = Folder::new("whole", &ALWAYS);
    let agent = folder.agent().hostname("guest").entrypoint(Entrypoint::new(["app"]));
    let files = unpacked(&made(&machine(agent.clone()), None));
    assert_eq!(files["init"], (0o100_755, (0, 0), agent_binary()));
    assert_eq!(files["dev/console"].0, 0o020_600);
    assert_eq!(files["dev/console"].1, (5, 1));
    for directory in ["dev", "proc", "sys", "run", "dormouse", "dormouse/modules"] {
        assert_eq!(files[directory].0 & 0o170_000, 0o040_000, "{directory}");
    }
    let setup = &files[SETUP_PATH.trim_start_matches('/')];
    assert_eq!(setup.0, 0o100_600);
    assert_eq!(Setup::from_bytes(&setup.2).unwrap(), agent.setup());
    let module = &files["dormouse/modules/00-virtio_mmio.ko"];
    assert!(module.2.starts_with(b"\x7fELF virtio_mmio"));
}

#[test]
fn the_users_archive_stays_and_ours_comes_behind_it() {
    let folder = Folder::new("behind", &ALWAYS);
    let own =
        Initramfs::builder().file("init", 0o700, "own").file("etc/x", 0o644, "x").build().unwrap();
    for odd in 0..4 {
        // Nothing of an archive is looked at: it may end anywhere.
        let mut bytes = own.load().unwrap().to_vec();
        bytes.resize(bytes.len() + odd, 0);
        let made = made(&machine(folder.agent()), Some(&Initramfs::bytes(bytes.clone())));
        assert!(made.starts_with(&bytes));
        let files = unpacked(&made);
        assert_eq!(files["init"].2, agent_binary());
        assert_eq!(files["etc/x"].2, b"x");
    }
}

#[test]
fn without_an_agent_the_users_archive_is_all() {
    let own = Initramfs::bytes(vec![1, 2, 3]);
    let config = MachineConfig::default();
    assert_eq!(archive(&kernel(), Some(&own), &config).unwrap().unwrap()[..], [1, 2, 3]);
    assert!(archive(&kernel(), None, &config).unwrap().is_none());
}

#[test]
fn devices_and_file_systems_bring_their_modules() {
    let all = [
        "virtio_mmio",
        "vmw_vsock_virtio_transport",
        "virtio_blk",
        "virtio_net",
        "net_failover",
        "virtio_balloon",
        "overlay",
        "squashfs",
        "ext4",
        "isofs",
        "dummy",
    ];
    let folder = Folder::new("needs", &all);
    let agent = || folder.agent();
    assert_eq!(
        module_names(&made(&machine(agent()), None)),
        ["00-virtio_mmio.ko", "01-vmw_vsock_virtio_transport.ko"]
    );
    let root = RootDisk::new(0).fs_type("squashfs").overlay_disk(1);
    let agent =
        agent().root(root).mount(MountConfig::new(2, "/cd").fs_type("iso9660")).module("dummy");
    let config = MachineConfig {
        blocks: vec![BlockConfig::new("/a"); 3],
        networks: vec![NetConfig::tap("tap0")],
        // Built in.
        entropy: true,
        balloon: Some(BalloonConfig::default()),
        vsock: Some(VsockConfig::default()),
        ..machine(agent)
    };
    let expected = [
        "virtio_mmio",
        "vmw_vsock_virtio_transport",
        "virtio_blk",
        "net_failover",
        "virtio_net",
        "virtio_balloon",
        "overlay",
        "ext4",
        "squashfs",
        "isofs",
        "dummy",
    ];
    let expected: Vec<_> =
        expected.iter().enumerate().map(|(at, name)| format!("{at:02}-{name}.ko")).collect();
    assert_eq!(module_names(&made(&config, None)), expected);
}

#[test]
fn a_disk_of_an_unknown_file_system_brings_those_that_there_are() {
    let folder = Folder::new("unknown", &[&ALWAYS[..], &["virtio_blk", "erofs"]].concat());
    let config = |agent: AgentConfig| MachineConfig {
        blocks: vec![BlockConfig::new("/a")],
        ..machine(agent.root(RootDisk::new(0)))
    };
    let names = module_names(&made(&config(folder.agent()), None));
    assert_eq!(names[2..], ["02-virtio_blk.ko", "03-erofs.ko"]);
}

#[test]
fn a_module_that_is_needed_and_missing_is_named_with_what_to_do() {
    let folder = Folder::new("missing", &["virtio_mmio"]);
    let error = archive(&kernel(), None, &machine(folder.agent())).unwrap_err();
    assert!(error.to_string().contains("no module vmw_vsock_virtio_transport in"), "{error}");
    assert!(error.how_to_fix().unwrap().contains("AgentConfig::modules_dir"));
    // As is one of a file system that is named.
    let folder = Folder::new("missing-fs", &[&ALWAYS[..], &["virtio_blk"]].concat());
    let config = MachineConfig {
        blocks: vec![BlockConfig::new("/a")],
        ..machine(folder.agent().root(RootDisk::new(0).fs_type("btrfs")))
    };
    let error = archive(&kernel(), None, &config).unwrap_err();
    assert!(error.to_string().contains("no module btrfs"), "{error}");
}

#[test]
fn a_kernel_that_comes_without_modules_needs_none() {
    let folder = Folder::new("builtin", &[]);
    let agent = AgentConfig::new().binary(folder.0.join("agent"));
    assert_eq!(module_names(&made(&machine(agent), None)), [""; 0]);
}

#[test]
fn an_installed_kernel_brings_its_modules() {
    let folder = Folder::new("installed", &ALWAYS);
    fs::create_dir_all(folder.0.join("boot")).unwrap();
    fs::create_dir_all(folder.0.join("lib/modules")).unwrap();
    fs::write(folder.0.join("boot/vmlinuz-6.1"), "").unwrap();
    fs::rename(folder.0.join("modules"), folder.0.join("lib/modules/6.1")).unwrap();
    let kernel = Kernel::installed_in(&folder.0).unwrap();
    let config = machine(AgentConfig::new().binary(folder.0.join("agent")));
    let made = archive(&kernel, None, &config).unwrap().unwrap();
    assert_eq!(module_names(&made).len(), ALWAYS.len());
}

#[test]
fn a_packaged_kernel_brings_its_modules() {
    let folder = Folder::new("packaged", &[]);
    let module = b"\x7fELF\0depends=\0";
    let files = ALWAYS.map(|name| (format!("./usr/lib/modules/6.12/kernel/{name}.ko"), module));
    let files: Vec<_> = files.iter().map(|(path, module)| (path.as_str(), &module[..])).collect();
    let package = crate::deb::tests::package("agent-packaged", "data.tar", &files, |tar| tar);
    let config = machine(AgentConfig::new().binary(folder.0.join("agent")));
    let kernel = Kernel::deb(package.as_path());
    let made = archive(&kernel, None, &config).unwrap().unwrap();
    assert_eq!(module_names(&made).len(), ALWAYS.len());
    // Whoever wants what it has not is told where it was looked for.
    let config = machine(config.agent.unwrap().module("nothing"));
    let kernel = Kernel::deb(package.as_path());
    let error = archive(&kernel, None, &config).unwrap_err().to_string();
    assert!(error.contains("no module nothing in") && error.contains("agent-packaged"), "{error}");
}

#[test]
fn clones_of_a_kernel_share_what_was_read() {
    let folder = Folder::new("shared", &ALWAYS);
    let (kernel, config) = (kernel(), machine(folder.agent()));
    let first = archive(&kernel.clone(), None, &config).unwrap();
    fs::remove_dir_all(folder.0.join("modules")).unwrap();
    assert_eq!(archive(&kernel, None, &config).unwrap(), first);
}

#[test]
fn an_agent_that_is_no_executable_is_refused() {
    let folder = Folder::new("binary", &[]);
    let path = folder.0.join("agent");
    let config = machine(AgentConfig::new().binary(&path));
    let mut other = agent_binary();
    other[18] = 183;
    for bad in [&b""[..], b"#!/bin/sh\n", &agent_binary()[..19], &other] {
        fs::write(&path, bad).unwrap();
        let error = archive(&kernel(), None, &config).unwrap_err();
        assert!(error.to_string().contains("no ELF executable"), "{error}");
    }
    fs::remove_file(&path).unwrap();
    let error = archive(&kernel(), None, &config).unwrap_err();
    assert!(error.to_string().contains("cannot read the agent"), "{error}");
}

#[test]
fn the_agent_of_the_build_is_an_executable_or_its_absence_is_said() {
    match archive(&kernel(), None, &machine(AgentConfig::new())) {
        Ok(archive) => {
            let agent = &unpacked(&archive.unwrap())["init"].2;
            assert!(agent.starts_with(b"\x7fELF"));
            // Every guest has it in its memory.
            assert!(agent.len() <= 3 << 19, "{} bytes", agent.len());
        }
        Err(error) => assert!(error.to_string().contains("has no agent"), "{error}"),
    }
}

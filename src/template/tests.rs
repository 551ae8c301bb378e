//! What makes a template another one, and what its directory holds.

use std::fs;
use std::path::PathBuf;

use super::*;
use crate::config::{AgentConfig, BlockConfig, NetConfig, RateLimit};
use crate::error::ErrorKind;
use crate::initramfs::Initramfs;
use crate::kernel::Kernel;

/// A directory that goes with the test.
struct Scratch(PathBuf);

impl Scratch {
    fn new(name: &str) -> Self {
        let name = format!("dormouse-template-{name}-{}", std::process::id());
        let path = std::env::temp_dir().join(name);
        let _ = fs::remove_dir_all(&path);
        fs::create_dir(&path).unwrap();
        Self(path)
    }
}

impl Drop for Scratch {
    fn drop(&mut self) {
        let _ = fs::remove_dir_all(&self.0);
    }
}

fn config() -> VmConfig {
    VmConfig::new(Kernel::bytes(&b"kernel"[..])).agent(AgentConfig::new())
}

fn key(config: &VmConfig) -> String {
    key::of(config, &Ready::Hook).unwrap().to_string()
}

#[test]
fn what_is_the_same_has_the_same_name_and_every_change_another() {
    let scratch = Scratch::new("key");
    let disk = scratch.0.join("disk");
    fs::write(&disk, "one").unwrap();
    let with_disk = || config().block(BlockConfig::new(&disk).read_only());
    assert_eq!(key(&config()), key(&config()));
    assert_eq!(key(&with_disk()), key(&with_disk()));
    let slow = RateLimit::default().bytes_per_second(1);
    let mut keys = vec![
        key(&config()),
        key(&with_disk()),
        key(&config().memory_mib(256)),
        key(&config().initramfs(Initramfs::bytes(&b"one"[..]))),
        key(&config().initramfs(Initramfs::bytes(&b"two"[..]))),
        key(&config().agent(AgentConfig::new().hostname("one"))),
        key(&VmConfig::new(Kernel::bytes(&b"other"[..])).agent(AgentConfig::new())),
        key(&config().network(NetConfig::tap("t").receive_rate_limit(slow))),
        key(&config().network(NetConfig::tap("t").transmit_rate_limit(slow))),
        key::of(&config(), &Ready::Port(80)).unwrap().to_string(),
    ];
    fs::write(&disk, "longer").unwrap();
    keys.push(key(&with_disk()));
    // A kernel is what its file is by now, whatever its handle has read.
    let file = scratch.0.join("vmlinuz");
    fs::write(&file, "first").unwrap();
    let kernel = VmConfig::new(Kernel::file(&file)).agent(AgentConfig::new());
    keys.push(key(&kernel));
    fs::write(&file, "a longer one").unwrap();
    keys.push(key(&kernel));
    let count = keys.len();
    keys.sort();
    keys.dedup();
    assert_eq!(keys.len(), count);
}

#[test]
fn what_cannot_be_a_template_says_why() {
    let refusal = |config: &VmConfig| {
        let error = key::of(config, &Ready::Hook).err().unwrap();
        (error.kind().clone(), error.to_string())
    };
    let (kind, text) = refusal(&VmConfig::new(Kernel::bytes(&b"kernel"[..])));
    assert_eq!(kind, ErrorKind::Template);
    assert!(text.contains("AgentConfig::new()"), "{text}");
    let disk = BlockConfig::new("/disk");
    for disk in [disk.clone(), disk.delta("/delta")] {
        let (kind, text) = refusal(&config().block(disk));
        assert_eq!(kind, ErrorKind::Template);
        assert!(text.contains("disk 0") && text.contains("discard_writes"), "{text}");
    }
    let (kind, text) = refusal(&config().network(NetConfig::pair().unwrap().0));
    assert_eq!(kind, ErrorKind::Template);
    assert!(text.contains("interface 0") && text.contains("NetConfig::user"), "{text}");
    for nothing in [Ready::Port(0), Ready::Log(String::new()), Ready::Command(Vec::new())] {
        assert_eq!(Error::from(nothing.check().unwrap_err()).kind(), &ErrorKind::Config);
    }
    let (kind, text) = refusal(&config().block(BlockConfig::new("/no/disk").read_only()));
    assert_eq!(kind, ErrorKind::File(std::io::ErrorKind::NotFound));
    assert!(text.contains("/no/disk"), "{text}");
}

#[test]
fn names_are_hashes_and_nothing_else() {
    let scratch = Scratch::new("names");
    for name in
        ["", ".", "../x", &"g".repeat(64), &"a".repeat(63), &"A".repeat(64), &"é".repeat(32)]
    {
        let error = Template::open(&scratch.0, name).unwrap_err();
        assert_eq!(error.kind(), &ErrorKind::Template, "{name}");
    }
    let id = "0".repeat(64);
    assert_eq!(Template::open(&scratch.0, &id).unwrap_err().kind(), &ErrorKind::Snapshot);
    fs::create_dir(scratch.0.join(&id)).unwrap();
    fs::write(scratch.0.join("notes.txt"), "").unwrap();
    assert_eq!(Template::list(&scratch.0).unwrap(), [id]);
    assert_eq!(Template::list(scratch.0.join("new/one")).unwrap(), [""; 0]);
    assert!(!scratch.0.join("new").exists(), "who looks makes nothing");
}

#[tokio::test]
async fn one_at_a_time_builds_and_what_is_deactivated_is_not_built() {
    let scratch = Scratch::new("lock");
    let store = Store::create(&scratch.0).unwrap();
    let entry = store.entry(key::of(&config(), &Ready::Hook).unwrap());
    let building = entry.building(|| panic!("nobody else has it")).await.unwrap();
    let waits = std::cell::Cell::new(false);
    {
        let second = entry.building(|| waits.set(true));
        tokio::pin!(second);
        let soon = std::time::Duration::from_millis(1);
        assert!(tokio::time::timeout(soon, &mut second).await.is_err());
        drop(building);
        second.await.unwrap();
    }
    assert!(waits.get());
    entry.deactivate().unwrap();
    assert!(!entry.is_active());
    let error = Template::build(config(), &TemplateOptions::new(&scratch.0)).await.unwrap_err();
    assert_eq!(error.kind(), &ErrorKind::Template);
    assert!(error.to_string().contains("deactivated"), "{error}");
    entry.activate().unwrap();
    entry.activate().unwrap();
    assert!(entry.is_active());
}

#[tokio::test]
async fn what_processes_that_ended_left_half_made_goes_and_nothing_else() {
    let scratch = Scratch::new("sweep");
    let store = Store::create(&scratch.0).unwrap();
    let ids = ["a", "b", "c"].map(|digit| digit.repeat(64));
    let [left, built, written] = ids.each_ref().map(|id| store.entry(id.parse().unwrap()));
    let half_made = [
        format!(".{}.building", ids[0]),
        format!(".{}.building", ids[1]),
        format!("..{}.building.partial-1-2", ids[2]),
    ];
    let others = [".building", ".x.building", "..building", &ids[0], "é", ".é.building"];
    for name in half_made.iter().map(String::as_str).chain(others) {
        fs::create_dir(scratch.0.join(name)).unwrap();
        fs::write(scratch.0.join(name).join("memory-0"), "").unwrap();
    }
    for entry in [&left, &written] {
        drop(entry.building(|| ()).await.unwrap());
    }
    let building = built.building(|| ()).await.unwrap();
    let is_there = || half_made.each_ref().map(|name| scratch.0.join(name).exists());
    left.sweep();
    assert_eq!(is_there(), [false, true, false]);
    assert!(others.iter().all(|name| scratch.0.join(name).exists()));
    drop(building);
    left.sweep();
    assert_eq!(is_there(), [false; 3]);
}

//! What a file of anybody may say, by a golden snapshot that is changed in one place at a time.

mod archive;

use std::fs::{self, File};
use std::os::unix::fs::FileExt;
use std::path::PathBuf;

use vmm_sys_util::tempfile::TempFile;

use super::*;
use crate::config::{
    AgentConfig, BlockConfig, HostService, InterfaceConfig, MountConfig, NetConfig, RestoreOptions,
    VsockConfig,
};
use crate::random::random;

macro_rules! golden {
    ($name:literal) => {
        zstd::decode_all(&include_bytes!(concat!("../../../tests/goldens/1/", $name, ".zst"))[..])
            .unwrap()
    };
}

/// The golden snapshot, in a directory that goes with the test.
struct Golden {
    path: PathBuf,
    state: State,
}

impl Golden {
    fn new() -> Self {
        let name = u128::from_ne_bytes(random().unwrap());
        let path = std::env::temp_dir().join(format!("dormouse-golden-{name:032x}"));
        fs::create_dir(&path).unwrap();
        let state = golden!("state");
        let state = format::decode(&state).unwrap();
        // What is in its memory is of no meaning here.
        let memory = File::create_new(path.join(memory_name(0))).unwrap();
        memory.set_len(32 << 20).unwrap();
        fs::write(path.join(disk_name(0)), golden!("disk-0")).unwrap();
        fs::write(path.join(disk_name(1)), golden!("disk-1")).unwrap();
        Self { path, state }
    }

    fn open(&self) -> Result<Snapshot, Error> {
        fs::write(self.path.join(STATE), format::encode(&self.state).unwrap()).unwrap();
        Snapshot::open(&self.path)
    }
}

impl Drop for Golden {
    fn drop(&mut self) {
        let _ = fs::remove_dir_all(&self.path);
    }
}

/// An entry takes a byte or two of the file, and hundreds in memory.
#[test]
fn lists_are_no_longer_than_any_machine_has_them_while_they_are_read() {
    const MANY: usize = 2000;
    let many: [fn(&mut State); 9] = [
        |state| state.config.blocks = vec![BlockConfig::new(""); MANY],
        |state| state.config.blocks[0].frozen = vec![PathBuf::new(); MANY],
        |state| state.config.networks = vec![NetConfig::tap(""); MANY],
        |state| agent(state).mounts = vec![MountConfig::new(0, ""); MANY],
        |state| agent(state).interfaces = vec![InterfaceConfig::new(); MANY],
        |state| agent(state).interfaces[0].addresses = vec![String::new(); MANY],
        |state| agent(state).nameservers = vec![String::new(); MANY],
        |state| state.memory = vec![state.memory[0].clone(); MANY],
        |state| state.disks = vec![state.disks[0].clone(); MANY],
    ];
    for change in many {
        let mut golden = Golden::new();
        change(&mut golden.state);
        let bytes = format::encode(&golden.state).unwrap();
        let error = format!("{:?}", format::decode::<State>(&bytes).unwrap_err());
        assert!(error.contains("invalid length 1025"), "{error}");
    }
}

fn agent(state: &mut State) -> &mut AgentConfig {
    let agent = AgentConfig::new().interface(InterfaceConfig::new());
    state.config.agent.get_or_insert(agent)
}

/// Why the golden snapshot, changed so, is not opened.
fn refusal(change: impl FnOnce(&mut State)) -> String {
    let mut golden = Golden::new();
    change(&mut golden.state);
    let error = golden.open().unwrap_err();
    assert_eq!(error.kind(), &crate::ErrorKind::Snapshot, "{error:?}");
    format!("{error:?}")
}

/// Why it gives no configuration to one who trusts nobody, but has connected its interfaces.
fn distrust(change: impl FnOnce(&mut State, &Path)) -> String {
    let mut golden = Golden::new();
    change(&mut golden.state, &golden.path);
    let options = RestoreOptions::new().disk_base(1, "/base").network(0, NetConfig::tap("tap7"));
    let snapshot = golden.open().unwrap();
    snapshot.config(&options, Purpose::Clones).unwrap_err().to_string()
}

fn saved_disk(json: &serde_json::Value) -> SavedDisk {
    SavedDisk::deserialize(json).unwrap()
}

#[test]
fn the_golden_snapshot_is_opened_and_gives_a_configuration() {
    let golden = Golden::new();
    let snapshot = golden.open().unwrap();
    let options = RestoreOptions::new().disk_base(1, "/base").network(0, NetConfig::tap("tap7"));
    snapshot.config(&options, Purpose::Clones).unwrap().check().unwrap();
    assert_eq!(snapshot.facts().memory_bytes, 32 << 20);
}

#[test]
fn sizes_and_counts_that_no_machine_has_are_refused() {
    for bytes in [0, 1, (2 << 20) - 4096, (32 << 20) + 1, 1 << 50, u64::MAX, u64::MAX - 4095] {
        let text = refusal(|state| state.config.memory_bytes = bytes);
        assert!(text.contains(&format!("{bytes} bytes of memory")), "{text}");
    }
    // What a machine may have, but not this one.
    for bytes in [64 << 20, (32 << 20) + 4096] {
        let text = refusal(|state| state.config.memory_bytes = bytes);
        assert!(text.contains("more or less memory"), "{text}");
    }
    for count in [0, 2, 33, 255] {
        let text = refusal(|state| state.config.vcpus = count);
        assert!(text.contains("vCPUs"), "{text}");
    }
    for bytes in [usize::MAX, (64 << 20) + 1] {
        refusal(|state| state.config.console_tail_bytes = bytes);
    }
    for count in [0, 65_537, usize::MAX] {
        let vsock = VsockConfig::default().max_connections(count);
        refusal(|state| state.config.vsock = Some(vsock));
    }
    for count in [0, 33, u16::MAX] {
        refusal(|state| state.config.blocks[0].queues = count);
    }
    refusal(|state| state.config.blocks.clear());
    refusal(|state| state.config.blocks = vec![BlockConfig::new("/disk"); 1000]);
    refusal(|state| state.config.blocks[1].frozen = vec!["/delta".into(); 1000]);
    refusal(|state| state.disks.clear());
    refusal(|state| state.disks = vec![state.disks[0].clone(); 1000]);
    refusal(|state| state.config.networks[0].mtu = Some(1));
    refusal(|state| state.created = u64::MAX);
    for layers in [0, 2, 17, 1000] {
        refusal(|state| state.memory = vec![state.memory[0].clone(); layers]);
    }
}

#[test]
fn another_layer_is_made_where_a_state_has_room_for_all_of_them() {
    let layer = |checksums: u32| {
        let checksums: Vec<_> =
            (0..checksums).map(|chunk| serde_json::json!({"chunk": chunk, "crc32": 7})).collect();
        let layer = serde_json::json!({
            "pages": 1 << 28, "present_pages": 0, "complete": true, "runs": [], "checksums": checksums
        });
        SavedMemory::deserialize(layer).unwrap()
    };
    let takes = |layers: Vec<SavedMemory>| save::take_another(&layers);
    assert!(!takes(vec![]) && takes(vec![layer(1); 15]) && !takes(vec![layer(1); 16]));
    let large = layer(70_000);
    assert!(takes(vec![large.clone(); 14]) && !takes(vec![large; 15]));
}

#[test]
fn files_that_are_not_there_or_have_another_length_are_refused() {
    let golden = Golden::new();
    golden.open().unwrap();
    let memory = File::options().write(true).open(golden.path.join("memory-0")).unwrap();
    for len in [0, (32 << 20) - 1, 33 << 20, 1 << 40] {
        memory.set_len(len).unwrap();
        assert!(golden.open().unwrap_err().to_string().contains("cannot be used"));
    }
    memory.set_len(32 << 20).unwrap();
    golden.open().unwrap();
    let mut layered = Golden::new();
    let file = serde_json::json!({"bytes": 512, "chunks": []});
    layered.state.disks[0] =
        saved_disk(&serde_json::json!({"layered": {"below": file, "data": file}}));
    assert!(layered.open().unwrap_err().to_string().contains("disk-0-below"));
    fs::write(layered.path.join("disk-0-below"), [0; 512]).unwrap();
    layered.open().unwrap();
    fs::remove_file(golden.path.join("disk-0")).unwrap();
    assert!(golden.open().unwrap_err().to_string().contains("disk-0"));
}

#[test]
fn a_newer_version_is_refused_by_its_number() {
    let golden = Golden::new();
    golden.open().unwrap();
    let path = golden.path.join(STATE);
    let file = File::options().write(true).open(&path).unwrap();
    file.write_all_at(&2u32.to_le_bytes(), 8).unwrap();
    let error = Snapshot::open(&golden.path).unwrap_err();
    assert!(error.to_string().contains("version 2"), "{error}");
}

#[test]
fn a_snapshot_names_no_file_of_the_host() {
    let facts = serde_json::json!({"bytes": 512});
    for kind in ["read_only", "left"] {
        for path in ["/etc/shadow", "etc/shadow", "../shadow", ""] {
            let base = serde_json::json!({"path": path, "facts": facts});
            let text = distrust(|state, _| {
                state.disks[0] = saved_disk(&serde_json::json!({kind: {"base": base}}));
            });
            assert!(text.contains("outside of its directory"), "{text}");
        }
    }
    // A path that begins as the directory does, and ends elsewhere.
    let text = distrust(|state, directory| {
        let path = directory.join("../../etc/shadow");
        let base = serde_json::json!({"path": path, "facts": facts});
        state.disks[0] = saved_disk(&serde_json::json!({"read_only": {"base": base}}));
    });
    assert!(text.contains("outside of its directory"), "{text}");
    // A delta that was left beside the disk, over a file that the snapshot may have.
    let text = distrust(|state, directory| {
        let base = serde_json::json!({"path": directory.join("disk-9"), "facts": facts});
        state.disks[0] = saved_disk(&serde_json::json!({"left": {"base": base}}));
        state.config.blocks[0] = BlockConfig::new("/disk").delta("/home/alice/delta");
    });
    assert!(text.contains("/home/alice/delta"), "{text}");
    // One below it, of a VM that is to wake.
    let mut golden = Golden::new();
    let below = golden.path.join("disk-9");
    fs::write(&below, [0; 512]).unwrap();
    let base = serde_json::json!({"path": below, "facts": facts});
    golden.state.disks[0] = saved_disk(&serde_json::json!({"left": {"base": base}}));
    golden.state.config.blocks[0] = BlockConfig::new("/disk").discard_writes();
    golden.state.config.blocks[0].frozen.push("/home/alice/delta".into());
    let other = golden.path.join("disk-8");
    File::create_new(&other).unwrap().set_len(128 << 10).unwrap();
    let options = RestoreOptions::new().disk_base(1, other);
    let options = options.network(0, NetConfig::tap("tap7"));
    let config = golden.open().unwrap().config(&options, Purpose::Sleep).unwrap();
    assert_eq!(config.blocks[0].frozen, [""; 0].map(PathBuf::from));
    let text = distrust(|state, _| {
        state.config.vsock = Some(VsockConfig::default().unix_socket("/run/socket"));
    });
    assert!(text.contains("/run/socket"), "{text}");
    let service = HostService::Tcp(([127, 0, 0, 1], 22).into());
    let agent = AgentConfig::new().service("ssh", 22, service);
    let text = distrust(|state, _| state.config.agent = Some(agent));
    assert!(text.contains("service \"ssh\""), "{text}");
    let tap = NetConfig::tap("tap0");
    let text = distrust(|state, _| state.config.networks.push(tap));
    assert!(text.contains("tap0") || text.contains("devices"), "{text}");
}

#[test]
fn a_snapshot_chooses_neither_the_device_nor_the_confinement() {
    let mut golden = Golden::new();
    golden.state.config.kvm_device = "/dev/mem".into();
    golden.state.config.seccomp = false;
    let snapshot = golden.open().unwrap();
    let options = RestoreOptions::new().disk_base(1, "/base").network(0, NetConfig::tap("tap7"));
    let config = snapshot.config(&options, Purpose::Clones).unwrap();
    assert_eq!((config.seccomp, config.kvm_device), (true, "/dev/kvm".into()));
    let own = options.clone().seccomp(false);
    assert!(!snapshot.config(&own, Purpose::Clones).unwrap().seccomp);
    let trusting = options.outside_paths(true);
    assert!(!snapshot.config(&trusting, Purpose::Clones).unwrap().seccomp);
}

#[test]
fn an_interface_has_the_back_end_and_the_address_that_a_restore_gives_it() {
    let golden = Golden::new();
    let snapshot = golden.open().unwrap();
    let network = NetConfig::tap("tap7").mac([2, 0, 0, 1, 2, 3]);
    let given = format!("{network:?}");
    let options = RestoreOptions::new().disk_base(1, "/base").network(0, network);
    let config = snapshot.config(&options, Purpose::Clones).unwrap();
    assert_eq!(format!("{:?}", config.networks[0]), given);
    let none = RestoreOptions::new().network(7, NetConfig::tap("tap8"));
    snapshot.config(&none, Purpose::Clones).unwrap_err();
}

#[test]
fn files_that_a_disk_has_no_use_for_are_refused() {
    let mut golden = Golden::new();
    golden.state.config.blocks[0] = golden.state.config.blocks[0].clone().read_only();
    let snapshot = golden.open().unwrap();
    let refused = |options: RestoreOptions| {
        let options = options.disk_base(1, "/base").network(0, NetConfig::tap("tap7"));
        snapshot.config(&options, Purpose::Clones).unwrap_err().to_string()
    };
    let text = refused(RestoreOptions::new().disk_base(0, "/base"));
    assert!(text.contains("stands on no other file"), "{text}");
    let text = refused(RestoreOptions::new().disk_delta(0, "/delta"));
    assert!(text.contains("read-only"), "{text}");
}

#[test]
fn one_that_sleeps_is_the_clone_that_its_guest_does_not_know_to_be_yet() {
    let mut golden = Golden::new();
    let names = CloneNames {
        hostname: Some("clone-7".to_owned()),
        interfaces: vec![InterfaceConfig::new().address("10.0.0.7/24")],
    };
    let agent = AgentConfig::new().hostname("base");
    golden.state.config.agent = Some(agent.interface(InterfaceConfig::new()));
    golden.state.sleep = Some(Sleep { clone: Some(names.clone()) });
    let base = TempFile::new().unwrap();
    base.as_file().set_len(128 << 10).unwrap();
    let given = RestoreOptions::new().network(0, NetConfig::tap("tap7"));
    let given = given.disk_base(1, base.as_path());
    let (sleep, options) = golden.open().unwrap().sleep(&given).unwrap();
    assert_eq!(sleep.clone, Some(names));
    let config = golden.open().unwrap().config(&options, Purpose::Sleep).unwrap();
    assert_eq!(config.agent.unwrap().hostname.as_deref(), Some("clone-7"));
    // It wakes as this one, and as no other.
    let error = golden.open().unwrap().sleep(&options).unwrap_err();
    assert!(error.to_string().contains("hostname"), "{error}");
    // What is no name of a host is refused.
    let names = CloneNames { hostname: Some("a b".to_owned()), interfaces: Vec::new() };
    golden.state.sleep = Some(Sleep { clone: Some(names) });
    let error = golden.open().unwrap().sleep(&given).unwrap_err();
    assert_eq!(error.kind(), &crate::ErrorKind::Config, "{error}");
}

#[test]
fn a_clone_has_addresses_of_its_own_for_all_interfaces_or_none() {
    let one = || InterfaceConfig::new().address("10.0.0.7/24");
    let mut golden = Golden::new();
    golden.state.config.agent = Some(AgentConfig::new().interface(one()));
    golden.state.config.networks = vec![NetConfig::tap("tap7"), NetConfig::tap("tap8")];
    let agent = golden.state.config.agent.take().unwrap().interface(one());
    golden.state.config.agent = Some(agent);
    let config = |interfaces: Vec<InterfaceConfig>| {
        let mut config = golden.state.config.clone();
        let mut options = RestoreOptions::new();
        options.interfaces = interfaces;
        options.apply(&mut config).map(|()| config)
    };
    let error = config(vec![one()]).unwrap_err().to_string();
    assert!(error.contains("addresses of 1 network interfaces"), "{error}");
    config(vec![one(), InterfaceConfig::new()]).unwrap();
    assert_eq!(config(Vec::new()).unwrap().agent, golden.state.config.agent);
}

#[test]
fn a_note_of_more_pages_than_are_worth_it_is_passed_over() {
    let golden = Golden::new();
    let noted = |runs: &[PageRun]| {
        fs::write(golden.path.join(WRITTEN), format::encode(&runs).unwrap()).unwrap();
        golden.open().unwrap().0.written.get().map(Vec::len)
    };
    let run = |first, count| PageRun { first, count };
    assert_eq!(noted(&[run(0, 4000), run(u64::MAX, 96)]), Some(2));
    assert_eq!(noted(&[run(0, 4097)]), None);
    assert_eq!(noted(&[run(0, u64::MAX), run(0, 2)]), None);
    assert_eq!(noted(&vec![run(0, 0); 4097]), None);
}

/// A snapshot, and what is to take its place.
fn replaced() -> (Golden, directory::Staging) {
    let golden = Golden::new();
    golden.open().unwrap();
    let staging = directory::Staging::begin(&golden.path).unwrap();
    (golden, staging)
}

#[test]
fn what_cannot_be_opened_is_not_put_into_place_and_what_was_there_stays() {
    let (golden, staging) = replaced();
    let place = &golden.path;
    fs::write(staging.path(STATE), fs::read(place.join(STATE)).unwrap()).unwrap();
    // It has neither the memory nor the disks that its state speaks of.
    let error = save::put_into_place(staging, true).unwrap_err();
    assert!(matches!(error, SnapshotError::Open { .. }), "{error:?}");
    Snapshot::open(place).unwrap();
}

#[test]
fn a_snapshot_is_opened_where_it_is_put() {
    let (golden, staging) = replaced();
    let place = &golden.path;
    for file in fs::read_dir(place).unwrap().map(|entry| entry.unwrap().file_name()) {
        fs::copy(place.join(&file), staging.path(file.to_str().unwrap())).unwrap();
    }
    let snapshot = save::put_into_place(staging, true).unwrap();
    assert_eq!(snapshot.directory(), Some(&**place));
    snapshot.check_disks_in_place().unwrap();
    // Nobody else has it locked.
    assert!(snapshot.wake_lock().unwrap().is_some());
}

#[test]
fn what_is_removed_is_the_snapshot_that_is_meant_and_what_is_damaged() {
    let golden = Golden::new();
    let place = &golden.path;
    let id = golden.open().unwrap().id();
    Snapshot::remove(place, [7; 16]);
    let awake = golden.open().unwrap().wake_lock().unwrap();
    Snapshot::remove(place, id);
    drop(awake);
    // Of a later version, which may be another's.
    let state = fs::read(place.join(STATE)).unwrap();
    let mut later = state.clone();
    later[8] += 1;
    fs::write(place.join(STATE), &later).unwrap();
    Snapshot::remove(place, id);
    assert!(place.join(STATE).exists() && place.join(disk_name(1)).exists());

    fs::write(place.join(STATE), &state[..100]).unwrap();
    Snapshot::remove(place, id);
    assert!(!place.exists());
    let golden = Golden::new();
    let id = golden.open().unwrap().id();
    fs::remove_file(golden.path.join(memory_name(0))).unwrap();
    Snapshot::remove(&golden.path, id);
    assert!(!golden.path.exists());
}

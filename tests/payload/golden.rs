//! A snapshot of each version of the format, kept in tests/goldens: this crate reads them, and what
//! it writes has the same fields.
//!
//! Each file is packed by zstd, since Git keeps no holes. After a change of the format that is
//! meant, `DORMOUSE_TEST_GOLDEN=1 cargo test --test payload a_golden_snapshot` writes this version's
//! anew; docs/snapshot-format.md says when the version is to be raised.

use std::collections::BTreeSet;
use std::fmt;
use std::fs::{self, File};
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};

use dormouse::{
    BalloonConfig, BlockConfig, ErrorKind, ExitStatus, MicroVm, NetConfig, Paused, RestoreOptions,
    Snapshot, VsockConfig,
};
use serde::de::{Deserialize, Deserializer, MapAccess, SeqAccess, Visitor};

use crate::output;
use crate::scratch::Scratch;
use crate::snapshot::Guest;

const FILES: [&str; 4] = ["state", "memory-0", "disk-0", "disk-1"];
const DISK_BYTES: usize = 128 << 10;

fn goldens() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/goldens/1")
}

/// A disk that has its number in every byte.
fn disk(scratch: &Scratch, number: u8) -> PathBuf {
    let path = scratch.join(&format!("base-{number}"));
    fs::write(&path, vec![number; DISK_BYTES]).unwrap();
    path
}

/// A guest with every kind of device, that is in the midst of its work.
fn guest(scratch: &Scratch) -> MicroVm<Paused> {
    let guest = Guest::boot_with(|config| {
        config
            .block(BlockConfig::new(disk(scratch, 1)))
            .block(BlockConfig::new(disk(scratch, 2)).delta(scratch.join("delta")))
            .network(NetConfig::pair().unwrap().0)
            .entropy(true)
            .balloon(BalloonConfig::default().deflate_on_oom(true))
            .vsock(VsockConfig::default())
    });
    guest.write(40, 3);
    guest.pause().0
}

fn pack(from: &Path, to: &Path) {
    fs::create_dir_all(to).unwrap();
    for name in FILES {
        let content = fs::read(from.join(name)).unwrap();
        let packed = zstd::encode_all(&content[..], 19).unwrap();
        fs::write(to.join(format!("{name}.zst")), packed).unwrap();
    }
}

/// Makes the files what they were, with holes.
fn unpack(from: &Path, to: &Path) {
    fs::create_dir(to).unwrap();
    for name in FILES {
        let packed = fs::read(from.join(format!("{name}.zst"))).unwrap();
        let content = zstd::decode_all(&packed[..]).unwrap();
        let file = File::create_new(to.join(name)).unwrap();
        file.set_len(content.len() as u64).unwrap();
        for (page, at) in content.chunks(4096).zip((0..).step_by(4096)) {
            if page.iter().any(|byte| *byte != 0) {
                file.write_all_at(page, at).unwrap();
            }
        }
    }
}

#[test]
fn a_golden_snapshot_is_read_and_its_guest_answers_where_the_host_fits() {
    let scratch = Scratch::new();
    if std::env::var_os("DORMOUSE_TEST_GOLDEN").is_some() {
        guest(&scratch).snapshot(scratch.join("new")).unwrap();
        pack(&scratch.join("new"), &goldens());
    }
    unpack(&goldens(), &scratch.join("golden"));
    let snapshot = Snapshot::open(scratch.join("golden")).unwrap();
    snapshot.verify().unwrap();
    let facts = snapshot.facts();
    assert_eq!((facts.memory_bytes, facts.memory_layers, facts.vcpus), (32 << 20, 1, 1));
    assert!(facts.msrs.len() > 10 && facts.cpuid.len() > 10, "{facts:?}");
    assert!(facts.created > std::time::SystemTime::UNIX_EPOCH);

    let (writer, output) = output();
    let options = RestoreOptions::new()
        .console(writer)
        .disk_base(1, disk(&scratch, 2))
        .network(0, NetConfig::pair().unwrap().0);
    match snapshot.restore_with(&options) {
        Ok(vm) => {
            let guest = Guest::resumed(vm, output);
            assert_eq!(guest.sum(50), 120);
            guest.vm.console_input("q").unwrap();
            let ended = guest.vm.wait_timeout(crate::PATIENCE).unwrap();
            assert_eq!(ended.exit_status(), &ExitStatus::PoweredOff);
        }
        // Another host is another host: what matters is that it says so.
        Err(error) => {
            assert_eq!(error.kind(), &ErrorKind::Snapshot, "{error:?}");
            let text = error.to_string();
            assert!(text.contains("does not fit this host: "), "{error:?}");
            assert!(text.contains("here"), "{error:?}");
        }
    }
}

#[test]
fn a_golden_snapshot_of_another_cpu_is_refused_by_name() {
    let scratch = Scratch::new();
    let golden = scratch.join("golden");
    unpack(&goldens(), &golden);
    let mut state = fs::read(golden.join("state")).unwrap();
    state.truncate(state.len() - 4);
    let names: [&[u8; 12]; 2] = [b"GenuineIntel", b"AuthenticAMD"];
    let found = (0..state.len()).find_map(|at| {
        let name = names.iter().position(|name| state[at..].starts_with(*name))?;
        Some((at, name))
    });
    let (at, name) = found.unwrap();
    // Neither is a vendor of whoever runs this.
    state[at..at + 12].copy_from_slice(b"CentaurHauls");
    state.extend(crc32fast::hash(&state).to_le_bytes());
    fs::write(golden.join("state"), state).unwrap();
    let snapshot = Snapshot::open(&golden).unwrap();
    let options = RestoreOptions::new()
        .disk_base(1, disk(&scratch, 2))
        .network(0, NetConfig::pair().unwrap().0);
    let error = snapshot.restore_with(&options).unwrap_err();
    assert_eq!(error.kind(), &ErrorKind::Snapshot, "{error:?} of {:?}", names[name]);
    let text = error.to_string();
    assert!(text.contains("\"CentaurHauls\" there"), "{text}");
}

#[test]
fn what_is_written_has_the_fields_of_the_golden_snapshot() {
    let scratch = Scratch::new();
    guest(&scratch).snapshot(scratch.join("new")).unwrap();
    unpack(&goldens(), &scratch.join("golden"));
    let (golden, written) = (fields(&scratch.join("golden")), fields(&scratch.join("new")));
    assert!(golden.contains("machine.vm.vcpus.[].msrs.[].index"), "{golden:#?}");
    let gone: Vec<_> = golden.difference(&written).collect();
    let new: Vec<_> = written.difference(&golden).collect();
    assert!(
        gone.is_empty() && new.is_empty(),
        "the state of a snapshot has other fields: {gone:?} are gone, {new:?} are new. Read \
         docs/snapshot-format.md on compatibility; is the version to be raised? Then write the \
         golden snapshot anew, as this file says",
    );
}

/// The paths of all fields in a snapshot's state.
fn fields(directory: &Path) -> BTreeSet<String> {
    let state = fs::read(directory.join("state")).unwrap();
    let Fields(fields) = rmp_serde::from_slice(&state[24..state.len() - 4]).unwrap();
    fields
}

/// The paths of the fields of any value.
struct Fields(BTreeSet<String>);

impl Fields {
    fn add(&mut self, name: &str, Self(value): Self) {
        self.0.extend(value.iter().map(|path| format!("{name}.{path}")));
        self.0.insert(name.to_owned());
    }
}

impl<'de> Deserialize<'de> for Fields {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        deserializer.deserialize_any(FieldsVisitor)
    }
}

struct FieldsVisitor;

/// What has no fields.
macro_rules! leaves {
    ($($visit:ident: $type:ty),*) => {
        $(fn $visit<E>(self, _: $type) -> Result<Fields, E> {
            Ok(Fields(BTreeSet::new()))
        })*
    };
}

impl<'de> Visitor<'de> for FieldsVisitor {
    type Value = Fields;

    fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("anything")
    }

    leaves!(visit_bool: bool, visit_u64: u64, visit_i64: i64, visit_str: &str, visit_bytes: &[u8]);

    fn visit_unit<E>(self) -> Result<Fields, E> {
        Ok(Fields(BTreeSet::new()))
    }

    fn visit_map<A: MapAccess<'de>>(self, mut map: A) -> Result<Fields, A::Error> {
        let mut fields = Fields(BTreeSet::new());
        while let Some((name, value)) = map.next_entry::<String, Fields>()? {
            fields.add(&name, value);
        }
        Ok(fields)
    }

    fn visit_seq<A: SeqAccess<'de>>(self, mut list: A) -> Result<Fields, A::Error> {
        let mut fields = Fields(BTreeSet::new());
        while let Some(value) = list.next_element::<Fields>()? {
            fields.add("[]", value);
        }
        Ok(fields)
    }
}

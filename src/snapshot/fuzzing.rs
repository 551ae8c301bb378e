//! The ways in for the fuzz targets `snapshot_archive`, which a test takes too, and `snapshot_state`.

#![allow(clippy::expect_used, clippy::panic, reason = "what a fuzz target finds is a panic")]
#![cfg_attr(not(fuzzing), expect(unreachable_pub, reason = "fuzz targets reach it"))]

#[cfg(fuzzing)]
mod state;

use std::fs;
use std::ops::ControlFlow;
use std::sync::LazyLock;

use serde::Deserialize;
use serde_json::json;

use super::directory::{STATE, WRITTEN, remove_snapshot};
use super::options::SnapshotOptions;
use super::{Snapshot, State, Temporary, format};
use crate::disk::SavedDisk;
use crate::error::Error;
use crate::memory::SavedMemory;

#[cfg(fuzzing)]
pub use self::state::snapshot_state;

/// The state of a snapshot, but for its header and checksum.
const GOLDEN: &[u8] = include_bytes!("../../fuzz/corpus/snapshot_state/golden_map");

/// How long the memory and the disks in the archive are: as short as memory may be, and zeros, so
/// that an entry of a few bytes, a sparse one, is such a file.
const FILE_BYTES: u64 = 2 << 20;

/// More than this is not written.
const MAX_UNPACKED_BYTES: u64 = 64 << 20;

/// The file `state` of the golden snapshot, with files of that kind.
static GOOD_STATE: LazyLock<Vec<u8>> = LazyLock::new(|| {
    let golden = format::decode(&format::framed(GOLDEN.to_vec()));
    let mut state: State = golden.expect("a golden state");
    let pages = FILE_BYTES / 4096;
    let memory = json!({
        "pages": pages, "present_pages": 0, "complete": true, "runs": [], "checksums": []
    });
    let disk = json!({"raw": {"data": {"bytes": FILE_BYTES, "chunks": []}}});
    state.config.memory_bytes = FILE_BYTES;
    state.memory = vec![SavedMemory::deserialize(memory).expect("memory")];
    state.disks.fill_with(|| SavedDisk::deserialize(&disk).expect("a disk"));
    format::encode(&state).expect("a state")
});

/// An archive that anybody may have written is unpacked and verified, or leaves nothing.
pub fn snapshot_archive(bytes: &[u8]) {
    let _ = unpacked(bytes);
}

/// Why the archive that the bytes make is none, or is not what its state says.
fn unpacked(bytes: &[u8]) -> Result<(), Error> {
    let outside = Temporary::new().expect("a directory");
    let (file, target) = (outside.path.join(WRITTEN), outside.path.join("target"));
    let packed = zstd::encode_all(&archive(bytes)[..], 1).expect("memory");
    fs::write(&file, packed).expect("a file");
    let options =
        SnapshotOptions::new().progress(|progress| match progress.bytes > MAX_UNPACKED_BYTES {
            true => ControlFlow::Break(()),
            false => ControlFlow::Continue(()),
        });
    let snapshot = Snapshot::unpack_with(&file, &target, &options);
    assert_eq!(snapshot.is_ok(), target.exists(), "what is refused leaves nothing");
    let verified = snapshot.and_then(|snapshot| snapshot.verify());
    remove_snapshot(&target);
    let left: Vec<_> = fs::read_dir(&outside.path).expect("a directory").flatten().collect();
    assert_eq!(left.len(), 1, "beside the archive there is {left:?}");
    verified
}

/// An archive whose `state` is good. What follows is made of the bytes: entries of some names,
/// kinds and lengths, with what is left of the bytes behind them as it is.
fn archive(mut bytes: &[u8]) -> Vec<u8> {
    let mut tar = tar::Builder::new(Vec::new());
    append(&mut tar, STATE, b'0', GOOD_STATE.len() as u64, &GOOD_STATE);
    while let [name, kind, size, rest @ ..] = bytes
        && *name < 0xc0
    {
        let names = [
            "memory-0", "memory-1", "disk-0", "disk-1", "disk-2", WRITTEN, STATE, "../out",
            "/tmp/out", "a/b",
        ];
        let name = names[usize::from(*name) % names.len()];
        let kind = *b"01235SgxLK".get(usize::from(*kind) % 10).expect("ten");
        let content = &rest[..rest.len().min(usize::from(*size))];
        bytes = &rest[content.len()..];
        let sizes = [content.len() as u64, 1 << 12, FILE_BYTES, u64::MAX >> 8];
        append(&mut tar, name, kind, sizes[usize::from(*size) % 4], content);
    }
    let mut archive = tar.into_inner().expect("memory");
    archive.extend_from_slice(bytes);
    archive
}

/// One entry, whose header may lie; that of a sparse file has the content at its beginning, and
/// nothing up to `size`.
fn append(tar: &mut tar::Builder<Vec<u8>>, name: &str, kind: u8, size: u64, content: &[u8]) {
    let mut header = tar::Header::new_gnu();
    header.as_mut_bytes()[..name.len()].copy_from_slice(name.as_bytes());
    header.set_entry_type(tar::EntryType::new(kind));
    header.set_size(size);
    if kind == b'S' {
        header.set_size(content.len() as u64);
        let gnu = header.as_gnu_mut().expect("a header of GNU tar");
        gnu.set_real_size(size);
        gnu.sparse[0].set_offset(0);
        gnu.sparse[0].set_length(content.len() as u64);
        gnu.sparse[1].set_offset(size);
        gnu.sparse[1].set_length(0);
    }
    header.set_cksum();
    tar.append(&header, content).expect("memory");
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Of the corpus: three sparse files, which the state speaks of.
    const WHOLE: &[u8] = include_bytes!("../../fuzz/corpus/snapshot_archive/whole");

    #[test]
    fn some_bytes_are_a_whole_archive_which_is_unpacked_and_verified() {
        unpacked(WHOLE).unwrap();
        snapshot_archive(WHOLE);
        // Without its last file, and with memory that is not zeros.
        let text = format!("{:?}", unpacked(&WHOLE[..10]).unwrap_err());
        assert!(text.contains("disk-1"), "{text}");
        let mut damaged = WHOLE.to_vec();
        damaged[3] = 7;
        let text = format!("{:?}", unpacked(&damaged).unwrap_err());
        assert!(text.contains("damaged in the MiB at 0"), "{text}");
    }
}

//! A packed snapshot comes back as it was, or not at all.

use std::fs::File;
use std::io::Read;
use std::path::PathBuf;
use std::sync::atomic::{AtomicU64, Ordering};

use super::*;

/// Names and contents.
type Files = Vec<(String, Vec<u8>)>;

/// A golden snapshot with some memory, its packed file, and a place to unpack it to.
struct Packed {
    golden: Golden,
    file: PathBuf,
    target: PathBuf,
}

impl Packed {
    fn new() -> Self {
        let golden = Golden::new();
        let memory = File::options().write(true).open(golden.path.join(memory_name(0)));
        let memory = memory.unwrap();
        for page in [0, 1, 700, 8191] {
            memory.write_all_at(&[page as u8 | 1; 4096], page * 4096).unwrap();
        }
        // Beside the snapshot's directory, and gone with this value.
        let file = golden.path.with_extension("tar.zst");
        let target = golden.path.with_extension("unpacked");
        let snapshot = golden.open().unwrap();
        fs::write(golden.path.join(WRITTEN), format::encode(&vec![RUN]).unwrap()).unwrap();
        snapshot.pack(&file).unwrap();
        Self { golden, file, target }
    }

    fn unpack(&self) -> Result<Snapshot, Error> {
        Snapshot::unpack(&self.file, &self.target)
    }

    /// Why these bytes are no packed snapshot. Nothing is left of them.
    fn refusal(&self, bytes: &[u8]) -> String {
        fs::write(&self.file, bytes).unwrap();
        let error = self.unpack().unwrap_err();
        assert_eq!(error.kind(), &crate::ErrorKind::Snapshot, "{error:?}");
        let name = self.target.file_name().unwrap().to_str().unwrap().to_owned();
        let entries = fs::read_dir(self.target.parent().unwrap()).unwrap();
        for entry in entries.map(|entry| entry.unwrap().file_name()) {
            assert!(!entry.to_str().unwrap().contains(&name), "{entry:?} is left");
        }
        format!("{error:?}")
    }

    /// The files in the archive.
    fn files(&self) -> Files {
        let bytes = zstd::decode_all(File::open(&self.file).unwrap()).unwrap();
        let mut archive = tar::Archive::new(&bytes[..]);
        let entries = archive.entries().unwrap().map(|entry| {
            let mut entry = entry.unwrap();
            let mut content = Vec::new();
            entry.read_to_end(&mut content).unwrap();
            (entry.path().unwrap().to_str().unwrap().to_owned(), content)
        });
        entries.collect()
    }
}

const RUN: PageRun = PageRun { first: 700, count: 1 };

impl Drop for Packed {
    fn drop(&mut self) {
        let _ = fs::remove_file(&self.file);
        let _ = fs::remove_dir_all(&self.target);
    }
}

/// An archive of these files.
fn archive(files: &[(String, Vec<u8>)]) -> Vec<u8> {
    let mut archive = tar::Builder::new(Vec::new());
    for (name, content) in files {
        let mut header = tar::Header::new_gnu();
        header.set_size(content.len() as u64);
        archive.append_data(&mut header, name, &content[..]).unwrap();
    }
    zstd::encode_all(&archive.into_inner().unwrap()[..], 1).unwrap()
}

#[test]
fn what_was_packed_is_unpacked_with_its_holes() {
    let packed = Packed::new();
    let files = packed.files();
    let names: Vec<_> = files.iter().map(|(name, _)| name.clone()).collect();
    assert_eq!(names, ["state", "memory-0", "disk-0", "disk-1", "written"]);
    assert!(fs::metadata(&packed.file).unwrap().len() < 100_000);
    let unpacked = packed.unpack().unwrap();
    assert_eq!(unpacked.facts(), packed.golden.open().unwrap().facts());
    assert_eq!(unpacked.0.written.get(), Some(&vec![RUN]));
    for name in names {
        let file = |directory: &Path| fs::read(directory.join(&name)).unwrap();
        assert!(file(&packed.target) == file(&packed.golden.path), "{name}");
    }
    use std::os::unix::fs::MetadataExt;
    let memory = fs::metadata(packed.target.join(memory_name(0))).unwrap();
    assert!(memory.blocks() * 512 < 1 << 20, "{} blocks", memory.blocks());
    assert_eq!(memory.mode() & 0o777, 0o600);
    // Packed once more over the file, and unpacked over the directory.
    unpacked.pack(&packed.file).unwrap();
    assert!(packed.files().into_iter().eq(files));
    // One whose files are another's by now says so.
    let gone = packed.unpack().unwrap();
    packed.unpack().unwrap();
    let error = format!("{:?}", gone.pack(&packed.file).unwrap_err());
    assert!(error.contains("cannot open") && error.contains("state"), "{error}");
    let unpacked = &packed.file.with_extension("none");
    let error = format!("{:?}", Snapshot::unpack(unpacked, &packed.target).unwrap_err());
    assert!(error.contains("Snapshot::pack"), "{error}");
}

#[test]
fn what_is_cut_or_flipped_is_refused_and_leaves_nothing() {
    let packed = Packed::new();
    let whole = fs::read(&packed.file).unwrap();
    for at in (0..whole.len()).step_by(whole.len() / 40 + 1) {
        packed.refusal(&whole[..at]);
        let mut flipped = whole.clone();
        flipped[at] ^= 1 << (at % 8);
        packed.refusal(&flipped);
    }
    packed.refusal(&whole[..whole.len() - 1]);
    assert!(packed.refusal(&[&whole[..], &whole[..]].concat()).contains("behind its end"));
    packed.refusal(b"");
    packed.refusal(b"<html>");
}

#[test]
fn archives_of_other_files_are_refused_by_name() {
    let packed = Packed::new();
    let files = packed.files();
    let refusal = |change: &dyn Fn(&mut Files)| {
        let mut files = files.clone();
        change(&mut files);
        packed.refusal(&archive(&files))
    };
    for name in ["memory-1", "disk-2", "sub/state", "state", "memory-0", "passwd"] {
        let text = refusal(&|files| files.push((name.to_owned(), b"more".to_vec())));
        assert!(text.contains(&format!("{name:?} is in it")), "{text}");
    }
    assert!(refusal(&|files| files.swap(0, 1)).contains("does not begin"));
    assert!(refusal(&|files| files.clear()).contains("does not begin"));
    let text = refusal(&|files| drop(files.remove(2)));
    assert!(text.contains("it has no disk-0"), "{text}");
    let text = refusal(&|files| files[1].1.truncate(4096));
    assert!(text.contains("its memory-0 has 4096 bytes instead of 33554432"), "{text}");
    let text = refusal(&|files| files[0].1[100] ^= 1);
    assert!(text.contains("checksum"), "{text}");
    // As anybody may make it, it is taken.
    fs::write(&packed.file, archive(&files)).unwrap();
    packed.unpack().unwrap();
}

#[test]
fn links_and_names_that_lead_elsewhere_are_refused() {
    let packed = Packed::new();
    for kind in [tar::EntryType::Symlink, tar::EntryType::Link, tar::EntryType::Directory] {
        let mut archive = tar::Builder::new(Vec::new());
        let mut header = tar::Header::new_gnu();
        header.set_entry_type(kind);
        header.set_size(0);
        archive.append_link(&mut header, "state", "/etc/passwd").unwrap();
        let bytes = zstd::encode_all(&archive.into_inner().unwrap()[..], 1).unwrap();
        assert!(packed.refusal(&bytes).contains("\"state\" is in it"));
    }
}

#[test]
fn a_header_without_an_end_is_refused_before_it_fills_the_memory() {
    let packed = Packed::new();
    // A long name.
    let mut header = tar::Header::new_gnu();
    header.set_entry_type(tar::EntryType::GNULongName);
    header.set_size(64 << 20);
    header.set_cksum();
    let mut encoder = zstd::Encoder::new(Vec::new(), 1).unwrap();
    io::Write::write_all(&mut encoder, header.as_bytes()).unwrap();
    io::copy(&mut io::repeat(b'x').take(64 << 20), &mut encoder).unwrap();
    let text = packed.refusal(&encoder.finish().unwrap());
    assert!(text.contains("a header has no end"), "{text}");
}

#[test]
fn both_ways_can_be_watched_and_interrupted() {
    let packed = Packed::new();
    let seen = Arc::new(AtomicU64::new(0));
    let watched = |stop: bool| {
        let seen = Arc::clone(&seen);
        SnapshotOptions::new().progress(move |progress| {
            assert_eq!(progress.stage, SaveStage::Archive);
            assert!(progress.bytes <= progress.total_bytes.unwrap());
            seen.store(progress.bytes, Ordering::Relaxed);
            if stop { ControlFlow::Break(()) } else { ControlFlow::Continue(()) }
        })
    };
    Snapshot::unpack_with(&packed.file, &packed.target, &watched(false)).unwrap();
    assert!(seen.load(Ordering::Relaxed) >= 32 << 20);
    let stopped = Snapshot::unpack_with(&packed.file, &packed.target, &watched(true));
    assert_eq!(stopped.unwrap_err().kind(), &crate::ErrorKind::Interrupted);
    // What was there before is there.
    let snapshot = Snapshot::open(&packed.target).unwrap();
    let memory = File::options().write(true).open(packed.target.join(memory_name(0))).unwrap();
    memory.write_all_at(&vec![1; 4 << 20], 0).unwrap();
    let stopped = snapshot.pack_with(&packed.file, &watched(true));
    assert_eq!(stopped.unwrap_err().kind(), &crate::ErrorKind::Interrupted);
    let again = packed.golden.path.with_extension("again");
    drop(Snapshot::unpack(&packed.file, &again).expect("the packed file of before"));
    fs::remove_dir_all(&again).unwrap();
    snapshot.pack_with(&packed.file, &watched(false)).unwrap();
    packed.unpack().unwrap();
}

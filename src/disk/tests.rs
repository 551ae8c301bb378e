//! Disks that are saved and gone on from, against a model that is an array of bytes. What a guest
//! does is done by hand: a disk says where bytes are, and others move them.

mod left;

use std::fs::{self, File};
use std::ops::ControlFlow;
use std::os::unix::fs::{FileExt, MetadataExt};
use std::path::PathBuf;

use super::*;
use crate::error::Error;
use crate::memory::GuestRam;
use vm_memory::GuestAddress;
use vmm_sys_util::tempdir::TempDir;

const SECTORS: usize = 8192 + 100;
const BYTES: usize = SECTORS * 512;

/// A folder for a test, gone with it.
struct Folder(TempDir);

impl Folder {
    fn new() -> Self {
        Self(TempDir::new().unwrap())
    }

    fn path(&self, name: &str) -> PathBuf {
        self.0.as_path().join(name)
    }

    /// A disk with some data, a large hole, and some more.
    fn base(&self) -> (PathBuf, Vec<u8>) {
        let mut content = vec![0; BYTES];
        for at in (0..100_000).chain(BYTES - 5000..BYTES) {
            content[at] = (at / 512 * 7 + at) as u8 | 1;
        }
        let path = self.path("base");
        let file = File::create_new(&path).unwrap();
        file.set_len(BYTES as u64).unwrap();
        file.write_all_at(&content[..100_000], 0).unwrap();
        file.write_all_at(&content[BYTES - 5000..], BYTES as u64 - 5000).unwrap();
        (path, content)
    }
}

fn go_on(_: u64) -> ControlFlow<()> {
    ControlFlow::Continue(())
}

fn ram() -> GuestRam {
    GuestRam::fresh(&[(GuestAddress(0), BYTES.next_multiple_of(4096))]).unwrap()
}

fn bytes(ram: &GuestRam, len: usize) -> GuestBytes<'_> {
    use vm_memory::GuestMemoryBackend;
    let mut bytes = GuestBytes::default();
    bytes.push(ram.inner().get_slice(GuestAddress(0), len).unwrap());
    bytes
}

/// Writes sectors as a guest does, to the disk and to its model.
fn write(disk: &mut Disk, model: &mut [u8], sector: usize, count: usize, value: u8) {
    let (offset, len) = (sector * 512, count * 512);
    let part_file = {
        let ram = ram();
        let part = disk.write(offset as u64, bytes(&ram, len));
        (Arc::clone(part.file), part.offset)
    };
    part_file.0.write_all_at(&vec![value; len], part_file.1).unwrap();
    disk.written(offset as u64, len as u64);
    model[offset..offset + len].fill(value);
}

/// All that the guest reads.
fn content(disk: &Disk) -> Vec<u8> {
    let ram = ram();
    let mut content = Vec::new();
    for part in disk.read(0, bytes(&ram, BYTES), usize::MAX).unwrap() {
        let mut piece = vec![0; part.bytes.len() as usize];
        part.file.read_exact_at(&mut piece, part.offset).unwrap();
        content.extend(piece);
    }
    assert_eq!(content.len(), BYTES);
    content
}

#[test]
fn a_disk_is_copied_with_its_holes_and_its_clones_leave_the_copy_alone() {
    let folder = Folder::new();
    let (base, mut model) = folder.base();
    let config = BlockConfig::new(&base);
    let mut disk = Disk::open(&config).unwrap();
    write(&mut disk, &mut model, 3000, 5, 0x33);
    let copy = folder.path("copy");
    let saved = disk.save(&copy, None, &mut go_on).unwrap();
    assert_eq!(fs::read(&copy).unwrap(), model);
    assert!(fs::metadata(&copy).unwrap().blocks() * 512 < 300_000, "holes are holes");
    saved.verify(&copy, &mut go_on).unwrap();
    // The original goes on.
    write(&mut disk, &mut model.clone(), 0, 10, 0xff);

    let text = serde_json::to_string(&saved).unwrap();
    let saved: SavedDisk = serde_json::from_str(&text).unwrap();
    let clone = || Disk::open(&saved.config(&config, &copy, None)).unwrap();
    let (mut one, other) = (clone(), clone());
    let mut one_model = model.clone();
    write(&mut one, &mut one_model, 1, 1, 0x11);
    assert!(!one.is_read_only());
    assert_eq!(content(&one), one_model);
    assert_eq!(content(&other), model);
    saved.verify(&copy, &mut go_on).unwrap();
}

#[test]
fn generations_of_deltas_become_one_and_every_clone_reads_its_own() {
    let folder = Folder::new();
    let (base, mut model) = folder.base();
    let original = BlockConfig::new(&base).delta(folder.path("first")).id("kept");
    let mut disk = Disk::open(&original).unwrap();
    write(&mut disk, &mut model, 10, 20, 0xa1);
    write(&mut disk, &mut model, SECTORS - 3, 3, 0xa2);
    let mut config = original;
    // Zeros over data are data.
    write(&mut disk, &mut model, 50, 4, 0);
    for generation in 0..4u8 {
        let path = folder.path(&format!("saved-{generation}"));
        let saved = disk.save(&path, None, &mut go_on).unwrap();
        assert!(matches!(saved, SavedDisk::Delta { .. }));
        saved.verify(&path, &mut go_on).unwrap();
        assert_eq!(content(&disk), model, "the parent is as it was");

        let delta = (generation % 2 == 0).then(|| folder.path(&format!("delta-{generation}")));
        config = saved.config(&config, &path, delta.as_deref());
        assert_eq!((config.frozen.len(), config.id.as_str()), (1, "kept"));
        let mut clone = Disk::open(&config).unwrap();
        let sibling = Disk::open(&saved.config(&config, &path, None)).unwrap();
        assert_eq!(content(&clone), model);
        let before = model.clone();
        write(&mut clone, &mut model, 15 + usize::from(generation), 3, generation);
        write(&mut clone, &mut model, 7000 + 40 * usize::from(generation), 9, 0xb0 + generation);
        assert_eq!(content(&clone), model);
        assert_eq!(content(&sibling), before);
        disk = clone;
    }
}

#[test]
fn several_frozen_deltas_are_read_from_the_top() {
    let folder = Folder::new();
    let (base, mut model) = folder.base();
    for (name, sector) in [("low", 4), ("high", 6)] {
        let mut disk = Disk::open(&BlockConfig::new(&base).delta(folder.path(name))).unwrap();
        write(&mut disk, &mut model, sector, 4, name.len() as u8);
    }
    let config = BlockConfig::new(&base).over(folder.path("low")).over(folder.path("high"));
    let disk = Disk::open(&config.clone().discard_writes()).unwrap();
    assert!(content(&disk) == model);
    let path = folder.path("merged");
    let saved = disk.save(&path, None, &mut go_on).unwrap();
    assert!(content(&Disk::open(&saved.config(&config, &path, None)).unwrap()) == model);

    // A disk that the guest only reads stays one.
    let config = config.read_only();
    let disk = Disk::open(&config).unwrap();
    let path = folder.path("read-only");
    let saved = disk.save(&path, None, &mut go_on).unwrap();
    let again = Disk::open(&saved.config(&config, &path, None)).unwrap();
    assert!(again.is_read_only() && content(&again) == model);
}

#[test]
fn of_a_disk_that_is_only_read_nothing_is_saved() {
    let folder = Folder::new();
    let (base, model) = folder.base();
    let config = BlockConfig::new(&base).read_only();
    let path = folder.path("nothing");
    let saved = Disk::open(&config).unwrap().save(&path, None, &mut go_on).unwrap();
    assert!(!path.exists());
    saved.verify(&path, &mut go_on).unwrap();
    let disk = Disk::open(&saved.config(&config, &path, None)).unwrap();
    assert!(disk.is_read_only() && content(&disk) == model);
}

#[test]
fn a_disk_that_changed_below_its_delta_is_refused_and_the_fact_is_named() {
    let folder = Folder::new();
    let (base, _) = folder.base();
    let config = BlockConfig::new(&base).discard_writes();
    let path = folder.path("delta");
    let saved = Disk::open(&config).unwrap().save(&path, None, &mut go_on).unwrap();
    let config = saved.config(&config, &path, None);
    let refusal = || Disk::open(&config).unwrap_err().to_string();
    Disk::open(&config).unwrap();

    let file = File::options().write(true).open(&base).unwrap();
    let modified = file.metadata().unwrap().modified().unwrap();
    file.write_all_at(b"x", 7).unwrap();
    file.set_modified(modified + std::time::Duration::from_nanos(4000)).unwrap();
    assert!(refusal().contains("its time of modification was"), "{}", refusal());
    file.set_len(BYTES as u64 + 512).unwrap();
    assert!(refusal().contains("its size in bytes was"), "{}", refusal());

    let same = folder.path("same");
    fs::copy(&base, &same).unwrap();
    fs::rename(&same, &base).unwrap();
    let file = File::options().write(true).open(&base).unwrap();
    file.set_len(BYTES as u64).unwrap();
    file.set_modified(modified).unwrap();
    assert!(refusal().contains("its inode was"), "{}", refusal());
    fs::remove_file(&base).unwrap();
    assert!(refusal().ends_with("is not there"), "{}", refusal());
}

#[test]
fn a_saved_copy_that_was_cut_is_refused() {
    let folder = Folder::new();
    let (base, _) = folder.base();
    let config = BlockConfig::new(&base);
    let path = folder.path("copy");
    let saved = Disk::open(&config).unwrap().save(&path, None, &mut go_on).unwrap();
    File::options().write(true).open(&path).unwrap().set_len(BYTES as u64 - 512).unwrap();
    let refused = Disk::open(&saved.config(&config, &path, None)).unwrap_err();
    assert!(matches!(refused, DiskError::BaseChanged { fact: "size in bytes", .. }), "{refused}");
}

#[test]
fn verify_finds_any_bit_that_flipped_also_in_holes_and_at_the_ends() {
    let folder = Folder::new();
    let (base, mut model) = folder.base();
    let raw = Disk::open(&BlockConfig::new(&base)).unwrap();
    let path = folder.path("copy");
    let saved = raw.save(&path, None, &mut go_on).unwrap();
    drop(raw);
    let mut disk = Disk::open(&BlockConfig::new(&base).discard_writes()).unwrap();
    write(&mut disk, &mut model, 100, 5, 1);
    let delta_path = folder.path("delta");
    let delta = disk.save(&delta_path, None, &mut go_on).unwrap();
    for (saved, path) in [(saved, path), (delta, delta_path)] {
        saved.verify(&path, &mut go_on).unwrap();
        let file = File::options().read(true).write(true).open(&path).unwrap();
        let len = file.metadata().unwrap().len();
        for (at, bit) in [(0, 0), (511, 7), (2 << 20, 3), (99_999, 5), (len - 1, 1), (4096, 2)] {
            let mut byte = [0];
            file.read_exact_at(&mut byte, at).unwrap();
            file.write_all_at(&[byte[0] ^ 1 << bit], at).unwrap();
            let damaged = saved.verify(&path, &mut go_on).unwrap_err().to_string();
            let place = format!("the 1 MiB at {:#x} has", at >> 20 << 20);
            assert!(damaged.contains(&place), "{damaged}");
            file.write_all_at(&byte, at).unwrap();
        }
        saved.verify(&path, &mut go_on).unwrap();
        file.set_len(len + 1).unwrap();
        saved.verify(&path, &mut go_on).unwrap_err();
        file.set_len(len - 1).unwrap();
        saved.verify(&path, &mut go_on).unwrap_err();
        fs::remove_file(&path).unwrap();
        let gone = saved.verify(&path, &mut go_on).unwrap_err();
        assert!(matches!(gone, DiskError::Open { .. }), "{gone}");
    }
}

#[test]
fn a_delta_whose_maker_was_ended_before_there_was_anything_in_it_is_made() {
    let folder = Folder::new();
    let (base, content_below) = folder.base();
    let delta = folder.path("delta");
    File::create_new(&delta).unwrap();
    let config = BlockConfig::new(&base).delta(&delta);
    assert!(content(&Disk::open(&config).unwrap()) == content_below);
    // Or before its header was there.
    fs::remove_file(&delta).unwrap();
    drop(Disk::open(&config).unwrap());
    let len = fs::metadata(&delta).unwrap().len();
    fs::remove_file(&delta).unwrap();
    File::create_new(&delta).unwrap().set_len(len).unwrap();
    assert!(content(&Disk::open(&config).unwrap()) == content_below);
    fs::write(&delta, [0; 19]).unwrap();
    assert!(matches!(Disk::open(&config), Err(DiskError::NotADelta { .. })));
}

#[test]
fn a_save_that_is_broken_off_or_fails_leaves_nothing() {
    let folder = Folder::new();
    let (base, _) = folder.base();
    let path = folder.path("copy");
    for config in [BlockConfig::new(&base), BlockConfig::new(&base).discard_writes()] {
        let mut disk = Disk::open(&config).unwrap();
        write(&mut disk, &mut vec![0; BYTES], 0, 2, 9);
        let mut seen = 0;
        let mut once = |bytes| {
            seen += bytes;
            ControlFlow::Break(())
        };
        let broken = disk.save(&path, None, &mut once).unwrap_err();
        assert!(matches!(broken, DiskError::Interrupted) && seen > 0);
        assert!(!path.exists());
        // What is there is not overwritten.
        fs::write(&path, "mine").unwrap();
        let refused = disk.save(&path, None, &mut go_on).unwrap_err();
        assert!(matches!(refused, DiskError::Save { .. }), "{refused}");
        assert_eq!(fs::read(&path).unwrap(), b"mine");
        fs::remove_file(&path).unwrap();
        disk.save(&path, None, &mut go_on).unwrap();
        fs::remove_file(&path).unwrap();
    }
}

#[test]
fn frozen_deltas_are_locked_against_writers_and_must_be_of_this_disk() {
    let folder = Folder::new();
    let (base, _) = folder.base();
    let delta = folder.path("delta");
    drop(Disk::open(&BlockConfig::new(&base).delta(&delta)).unwrap());
    let over = |base: &Path| BlockConfig::new(base).over(&delta).discard_writes();
    let (_one, _two) = (Disk::open(&over(&base)).unwrap(), Disk::open(&over(&base)).unwrap());
    let writer = Disk::open(&BlockConfig::new(&base).delta(&delta)).unwrap_err();
    assert!(matches!(writer, DiskError::InUse { .. }), "{writer}");

    let other = folder.path("other");
    fs::write(&other, vec![0; 512]).unwrap();
    let refused = Disk::open(&over(&other)).unwrap_err();
    assert!(matches!(refused, DiskError::OtherBase { .. }), "{refused}");
    let config = BlockConfig::new(&base).over(folder.path("no")).discard_writes();
    let missing = Disk::open(&config).unwrap_err();
    assert!(matches!(missing, DiskError::Open { .. }), "{missing}");
}

#[test]
fn a_disk_is_locked_until_its_last_operation_has_ended_whoever_has_copies_of_its_descriptors() {
    let folder = Folder::new();
    let (base, _) = folder.base();
    let delta = folder.path("delta");
    for config in [BlockConfig::new(&base), BlockConfig::new(&base).delta(&delta)] {
        let mut disk = Disk::open(&config).unwrap();
        let files = [Some(&**disk.file), disk.delta.as_ref().map(Delta::file)];
        let copies = files.map(|file| file.map(|file| file.try_clone().unwrap()));
        let flush = disk.flush();
        drop(disk);
        let error = Disk::open(&config).unwrap_err();
        assert!(matches!(error, DiskError::InUse { .. }), "{error}");
        drop(flush);
        Disk::open(&config).unwrap();
        drop(copies);
    }
}

#[test]
fn a_hole_of_exbibytes_is_no_disk_below_a_delta() {
    let folder = Folder::new();
    let path = folder.path("hole");
    let file = File::create_new(&path).unwrap();
    // Some file systems have no files of such a length.
    if file.set_len(1 << 47).is_err() {
        return;
    }
    Disk::open(&BlockConfig::new(&path)).unwrap();
    let error = Disk::open(&BlockConfig::new(&path).discard_writes()).unwrap_err();
    assert!(matches!(error, DiskError::TooLarge { .. }), "{error}");
}

#[test]
fn generations_over_a_saved_copy_have_it_too_and_need_no_other() {
    let folder = Folder::new();
    let (base, mut model) = folder.base();
    let mut config = BlockConfig::new(&base);
    let mut disk = Disk::open(&config).unwrap();
    write(&mut disk, &mut model, 10, 20, 0xa1);
    let mut path = folder.path("first");
    let mut saved = disk.save(&path, None, &mut go_on).unwrap();
    let first = fs::metadata(&path).unwrap().ino();
    for generation in 0..4u8 {
        config = saved.config(&config, &path, None);
        disk = Disk::open(&config).unwrap();
        write(&mut disk, &mut model, 15 + usize::from(generation), 3, generation);
        let next = folder.path(&format!("saved-{generation}"));
        // One that sleeps takes nothing for granted either, also with a delta that has a name.
        let next_saved = match generation % 2 {
            0 => disk.save(&next, saved.whole(), &mut go_on),
            _ => disk.leave(&next, saved.whole(), false, &mut go_on),
        };
        let next_saved = next_saved.unwrap();
        let below = folder.path(&format!("saved-{generation}-below"));
        assert_eq!(fs::metadata(&below).unwrap().ino(), first, "the same file by another name");
        for (behind, _) in saved.files() {
            let mut name = path.as_os_str().to_owned();
            name.push(behind);
            fs::remove_file(name).unwrap();
        }
        drop(disk);
        next_saved.verify(&next, &mut go_on).unwrap();
        (saved, path) = (next_saved, next);
        let clone = Disk::open(&saved.config(&config, &path, None)).unwrap();
        assert!(content(&clone) == model);
    }
    let text = serde_json::to_string(&saved).unwrap();
    assert_eq!(serde_json::from_str::<SavedDisk>(&text).unwrap(), saved);
    // Both files are looked at.
    for file in [path.clone(), folder.path("saved-3-below")] {
        let file = File::options().read(true).write(true).open(file).unwrap();
        let mut byte = [0];
        file.read_exact_at(&mut byte, 5000).unwrap();
        file.write_all_at(&[!byte[0]], 5000).unwrap();
        saved.verify(&path, &mut go_on).unwrap_err();
        file.write_all_at(&byte, 5000).unwrap();
    }
    saved.verify(&path, &mut go_on).unwrap();
}

#[test]
fn a_copy_that_cannot_be_linked_is_copied_and_a_save_of_it_that_fails_leaves_nothing() {
    let folder = Folder::new();
    let (base, mut model) = folder.base();
    let config = BlockConfig::new(&base);
    let path = folder.path("first");
    let saved = Disk::open(&config).unwrap().save(&path, None, &mut go_on).unwrap();
    let mut disk = Disk::open(&saved.config(&config, &path, None)).unwrap();
    write(&mut disk, &mut model, 0, 2, 9);
    // It has no name any more.
    fs::remove_file(&path).unwrap();
    let next = folder.path("next");
    let broken = disk.save(&next, saved.whole(), &mut |_| ControlFlow::Break(())).unwrap_err();
    assert!(matches!(broken, DiskError::Interrupted));
    assert_eq!(fs::read_dir(folder.path("")).unwrap().count(), 1, "what is left beside the base");
    let again = disk.save(&next, saved.whole(), &mut go_on).unwrap();
    drop(disk);
    again.verify(&next, &mut go_on).unwrap();
    assert!(content(&Disk::open(&again.config(&config, &next, None)).unwrap()) == model);
}

#[test]
fn no_file_of_a_disk_is_said_to_never_block() {
    let folder = Folder::new();
    let (base, _) = folder.base();
    let config = BlockConfig::new(&base).direct(true).delta(folder.path("delta"));
    // Made, and found again.
    for _ in 0..2 {
        let disk = Disk::open(&config).unwrap();
        let flags =
            [&disk.file, disk.direct.as_ref().unwrap()].map(|file| fcntl_getfl(&***file).unwrap());
        assert!(flags.iter().all(|flags| !flags.contains(OFlags::NONBLOCK)), "{flags:?}");
        assert!(flags[1].contains(OFlags::DIRECT) && flags[0].contains(OFlags::NOATIME));
    }
    let delta = open(&folder.path("delta"), true, 0).unwrap();
    assert!(!fcntl_getfl(&delta).unwrap().contains(OFlags::NONBLOCK));
}

#[test]
fn a_delta_whose_vm_ends_in_the_middle_of_a_flush_keeps_what_was_written() {
    let folder = Folder::new();
    let (base, mut model) = folder.base();
    let config = BlockConfig::new(&base).delta(folder.path("delta"));
    let mut disk = Disk::open(&config).unwrap();
    write(&mut disk, &mut model, 3000, 5, 0x33);
    let flush = disk.flush();
    drop(disk);
    drop(flush);
    assert!(content(&Disk::open(&config).unwrap()) == model);
}

#[test]
fn the_flush_of_the_first_change_brings_its_time_to_the_disk_too() {
    let folder = Folder::new();
    let (base, mut model) = folder.base();
    let delta = BlockConfig::new(&base).delta(folder.path("delta"));
    for config in [BlockConfig::new(&base), delta] {
        let mut disk = Disk::open(&config).unwrap();
        let first = |disk: &mut Disk| format!("{:?}", disk.flush().stages[0]);
        assert!(first(&mut disk).contains("data_only: true"));
        write(&mut disk, &mut model, 3000, 5, 0x33);
        assert!(first(&mut disk).contains("data_only: false"));
        assert!(first(&mut disk).contains("data_only: true"));
        let flush = disk.flush();
        disk.flush_failed(&flush);
        assert!(first(&mut disk).contains("data_only: false"));
    }
}

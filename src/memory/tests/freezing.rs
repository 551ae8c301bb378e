//! RAM that is frozen and goes on, alone and as clones, beside a model of plain bytes.

use std::fs::{self, File};
use std::io::Write;
use std::ops::ControlFlow;
use std::os::fd::AsFd;
use std::os::unix::fs::{MetadataExt, OpenOptionsExt};
use std::sync::Arc;

use proptest::prelude::*;
use vm_memory::{Bytes, GuestAddress, GuestMemoryBackend};

use super::super::backing::Backing;
use super::super::pages::PAGE_BYTES;
use super::super::{GuestBytes, GuestRam, MemoryError, MemoryImage, PageRun, Save, SavedMemory};
use super::{FileIo, Transfer, queues, wait_for};

/// Two regions, so that pages are counted through both.
pub(super) const LOW_PAGES: usize = 300;
pub(super) const PAGES: usize = 500;
pub(super) const RANGES: [(GuestAddress, usize); 2] = [
    (GuestAddress(0), LOW_PAGES * PAGE_BYTES),
    (GuestAddress(1 << 32), (PAGES - LOW_PAGES) * PAGE_BYTES),
];

pub(super) fn address(page: usize) -> GuestAddress {
    match page.checked_sub(LOW_PAGES) {
        None => GuestAddress((page * PAGE_BYTES) as u64),
        Some(page) => GuestAddress((1 << 32) + (page * PAGE_BYTES) as u64),
    }
}

/// A file without a name, which a save may be written to.
pub(super) fn temp_file() -> File {
    let options = File::options().read(true).write(true).custom_flags(libc::O_TMPFILE).clone();
    options.open(std::env::temp_dir()).unwrap()
}

pub(super) fn bytes_of(ram: &GuestRam) -> Vec<u8> {
    let mut bytes = vec![0; PAGES * PAGE_BYTES];
    let (low, high) = bytes.split_at_mut(LOW_PAGES * PAGE_BYTES);
    ram.inner().read_slice(low, address(0)).unwrap();
    ram.inner().read_slice(high, address(LOW_PAGES)).unwrap();
    bytes
}

pub(super) fn on(image: &MemoryImage) -> GuestRam {
    let ram = GuestRam::reserve(&RANGES).unwrap();
    ram.map_image(image).unwrap();
    ram
}

fn save(ram: &GuestRam, save: Save<'_>) -> (File, SavedMemory) {
    let file = temp_file();
    let saved = ram.save(&file, save, &|_| ControlFlow::Continue(())).unwrap();
    (file, saved)
}

/// A VM's memory, and what it has to be.
struct Vm {
    ram: GuestRam,
    model: Vec<u8>,
    /// What the RAM stands on, where it does, and what was saved of that, from the lowest.
    image: Option<(MemoryImage, Vec<(File, SavedMemory)>)>,
}

impl Vm {
    fn check(&self) {
        // Not by assert_eq, which would print it all.
        assert!(bytes_of(&self.ram) == self.model, "the RAM is as the model");
    }

    /// The chain of files opened again, which is the same memory, also as one file.
    fn check_files(&self, files: &[(File, SavedMemory)]) {
        let again =
            |(file, saved): &(File, SavedMemory)| (file.try_clone().unwrap(), saved.clone());
        let image = MemoryImage::open(&RANGES, files.iter().map(again).collect()).unwrap();
        image.verify(&|_| ControlFlow::Continue(())).unwrap();
        assert!(bytes_of(&on(&image)) == self.model, "the files are as the model");
        let file = temp_file();
        let saved = image.merge(&file, &|_| ControlFlow::Continue(())).unwrap();
        let merged = MemoryImage::open(&RANGES, vec![(file, saved)]).unwrap();
        merged.verify(&|_| ControlFlow::Continue(())).unwrap();
        assert!(bytes_of(&on(&merged)) == self.model, "the merged file is as the model");
    }
}

#[derive(Clone, Debug)]
enum Action {
    Write { vm: usize, page: usize, len: usize, byte: u8 },
    Discard { vm: usize, page: usize, count: usize },
    Freeze { vm: usize },
    Clone { vm: usize },
    Save { vm: usize },
    Drop { vm: usize },
}

fn actions() -> impl Strategy<Value = Vec<Action>> {
    let vm = 0usize..8;
    let page = 0..PAGES;
    let write = (vm.clone(), page.clone(), 1usize..40_000, prop_oneof![Just(0u8), any::<u8>()]);
    let action = prop_oneof![
        6 => write.prop_map(|(vm, page, len, byte)| Action::Write { vm, page, len, byte }),
        2 => (vm.clone(), page, 1usize..20)
            .prop_map(|(vm, page, count)| Action::Discard { vm, page, count }),
        2 => vm.clone().prop_map(|vm| Action::Freeze { vm }),
        2 => vm.clone().prop_map(|vm| Action::Clone { vm }),
        2 => vm.clone().prop_map(|vm| Action::Save { vm }),
        1 => vm.prop_map(|vm| Action::Drop { vm }),
    ];
    prop::collection::vec(action, 1..60)
}

fn act(vms: &mut Vec<Vm>, action: Action) {
    let count = vms.len();
    match action {
        Action::Write { vm, page, len, byte } => {
            let vm = &mut vms[vm % count];
            let end = if page < LOW_PAGES { LOW_PAGES } else { PAGES } * PAGE_BYTES;
            let begin = page * PAGE_BYTES + len % PAGE_BYTES;
            let end = (begin + len).min(end);
            let bytes = vec![byte; end - begin];
            let address = GuestAddress(address(page).0 + (len % PAGE_BYTES) as u64);
            vm.ram.write(&bytes, address).unwrap();
            vm.model[begin..end].copy_from_slice(&bytes);
        }
        Action::Discard { vm, page, count: pages } => {
            let vm = &mut vms[vm % count];
            let discarded = vm.ram.discard(address(page), pages * PAGE_BYTES) as usize;
            let range = page * PAGE_BYTES..page * PAGE_BYTES + discarded;
            let found = &bytes_of(&vm.ram)[range.clone()];
            if vm.image.is_none() {
                assert!(found.iter().all(|byte| *byte == 0));
            }
            // Over an image the bytes may be any, but are to stay what they are.
            vm.model[range].copy_from_slice(found);
        }
        Action::Freeze { vm } => {
            let vm = &mut vms[vm % count];
            let image = vm.ram.freeze().unwrap();
            assert!(vm.ram.written_pages().unwrap().is_empty());
            assert!(image.is_below(&vm.ram.freeze().unwrap()));
            assert!(bytes_of(&on(&image)) == vm.model, "the image is as the model");
            vm.image = Some((image, Vec::new()));
        }
        Action::Clone { vm } => {
            let Some((image, _)) = &vms[vm % count].image else { return };
            let (ram, image) = (on(image), (image.clone(), Vec::new()));
            let model = bytes_of(&ram);
            vms.push(Vm { ram, model, image: Some(image) });
        }
        Action::Save { vm } => {
            let vm = &mut vms[vm % count];
            vm.check_files(&[save(&vm.ram, Save::Full)]);
            let Some((image, mut files)) = vm.image.take() else { return };
            if files.is_empty() {
                files.push(save(&on(&image), Save::Full));
            }
            files.push(save(&vm.ram, Save::Diff(&image)));
            vm.check_files(&files);
            files.pop();
            vm.image = Some((image, files));
        }
        Action::Drop { vm } => {
            if count > 1 {
                vms.swap_remove(vm % count);
            }
        }
    }
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(24))]

    #[test]
    fn every_vm_has_the_memory_that_it_wrote_and_nobody_elses(actions in actions()) {
        let ram = GuestRam::fresh(&RANGES).unwrap();
        let mut vms = vec![Vm { ram, model: vec![0; PAGES * PAGE_BYTES], image: None }];
        for action in actions {
            act(&mut vms, action);
        }
        vms.iter().for_each(Vm::check);
    }
}

#[test]
fn more_freezes_than_layers_are_one_memory() {
    let ram = GuestRam::fresh(&RANGES).unwrap();
    let mut images = Vec::new();
    for round in 0..40 {
        ram.write(&[round as u8 + 1; 5000], address(round * 7)).unwrap();
        // What was written before may become zero again.
        ram.write(&[0; 4096], address(round * 3)).unwrap();
        let image = ram.freeze().unwrap();
        assert!(image.layers().len() <= 16);
        images.push((image, bytes_of(&ram)));
    }
    for (image, bytes) in images {
        assert!(bytes_of(&on(&image)) == bytes);
    }
}

#[test]
fn written_pages_are_those_that_anybody_wrote() {
    let file = temp_file();
    (&file).write_all(&[3; 3 * PAGE_BYTES]).unwrap();
    let file = Arc::new(file);
    let fresh = GuestRam::fresh(&RANGES).unwrap();
    for page in 0..PAGES {
        fresh.write(&[1], address(page)).unwrap();
    }
    let image = fresh.freeze().unwrap();
    for queue in queues() {
        for ram in [GuestRam::fresh(&RANGES).unwrap(), on(&image)] {
            let ram = Arc::new(ram);
            let touched = bytes_of(&on(&image));
            assert_eq!(touched.len(), PAGES * PAGE_BYTES);
            ram.write(&[5; 3], address(7)).unwrap();
            let slice = |page, len| {
                let mut bytes = GuestBytes::default();
                bytes.push(ram.inner().get_slice(address(page), len).unwrap());
                bytes
            };
            // A frame, and what a disk reads while nobody waits.
            let mut frame = std::io::pipe().unwrap();
            frame.1.write_all(&[6; 5000]).unwrap();
            let into = slice(LOW_PAGES + 10, 5000);
            into.read_frame(frame.0.as_fd(), &mut [0; 8]).unwrap();
            let io = FileIo::new(&queue).unwrap();
            let disk = Arc::new(file.try_clone().unwrap().into());
            let into = slice(100, 3 * PAGE_BYTES).keep(&ram);
            io.submit(vec![(0, Transfer::read(&disk, 0, into))]);
            assert_eq!(wait_for(&io, 1), [(0, None)]);
            ram.write(&[8], address(200)).unwrap();
            ram.discard(address(200), PAGE_BYTES);
            let runs: Vec<_> = ram.written_pages().unwrap().runs().collect();
            let run = |first, count| PageRun { first, count };
            assert_eq!(runs, [run(7, 1), run(100, 3), run(LOW_PAGES as u64 + 10, 2)]);
        }
    }
}

#[test]
fn content_comes_once_and_fits() {
    let image = GuestRam::fresh(&RANGES).unwrap().freeze().unwrap();
    let ram = GuestRam::reserve(&RANGES).unwrap();
    assert!(matches!(ram.freeze(), Err(MemoryError::NotMapped)));
    assert!(matches!(ram.written_pages(), Err(MemoryError::NotMapped)));
    let addresses: Vec<_> = ram.slots().map(|slot| slot.host_address).collect();
    ram.map_image(&image).unwrap();
    assert!(matches!(ram.map_image(&image), Err(MemoryError::Mapped)));
    assert!(matches!(ram.map_fresh(), Err(MemoryError::Mapped)));
    ram.write(&[1], address(0)).unwrap();
    ram.freeze().unwrap();
    let after: Vec<_> = ram.slots().map(|slot| slot.host_address).collect();
    assert_eq!(addresses, after);
    let other = GuestRam::reserve(&RANGES[..1]).unwrap();
    assert!(matches!(other.map_image(&image), Err(MemoryError::OtherRanges)));
    other.map_fresh().unwrap();
}

#[test]
fn populated_pages_are_there_with_their_content() {
    let fresh = GuestRam::fresh(&RANGES).unwrap();
    fresh.write(&[1; 3 * PAGE_BYTES], address(10)).unwrap();
    let ram = on(&fresh.freeze().unwrap());
    let run = |first, count| PageRun { first, count };
    ram.populate(&[run(11, 4), run(LOW_PAGES as u64 - 1, 2), run(PAGES as u64, 9), run(9, 0)]);
    ram.populate(&[run(u64::MAX, u64::MAX)]);
    let present: Vec<_> = ram.written_pages().unwrap().runs().collect();
    assert_eq!(present, [run(11, 4), run(LOW_PAGES as u64 - 1, 2)]);
    assert!(bytes_of(&ram) == bytes_of(&fresh));
}

#[test]
fn nothing_is_left_when_all_is_dropped() {
    let fresh = GuestRam::fresh(&RANGES).unwrap();
    fresh.write(&[1], address(0)).unwrap();
    let inode = match &*fresh.backing() {
        Backing::Fresh(file) => file.metadata().unwrap().ino(),
        other => panic!("{other:?}"),
    };
    // Other tests have memory of their own: look for this one's file alone.
    let maps = || {
        let maps = fs::read_to_string("/proc/self/maps").unwrap();
        let is_ours = |line: &&str| line.split_whitespace().nth(4) == Some(&inode.to_string());
        maps.lines().filter(is_ours).count()
    };
    let descriptors = || {
        let entries = fs::read_dir("/proc/self/fd").unwrap().flatten();
        let inodes = entries.filter_map(|entry| fs::metadata(entry.path()).ok());
        inodes.filter(|file| file.ino() == inode).count()
    };
    assert_eq!((maps(), descriptors()), (2, 1));
    let image = fresh.freeze().unwrap();
    let clones: Vec<_> = (0..100).map(|_| on(&image)).collect();
    assert_eq!(descriptors(), 1, "clones share the descriptor");
    drop((fresh, clones));
    assert_eq!(maps(), 0);
    drop(image);
    assert_eq!(descriptors(), 0);
}

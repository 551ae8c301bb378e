//! Saving: what it leaves out, how it is broken off, how it fails.

use std::fs::File;
use std::ops::ControlFlow;
use std::os::unix::fs::MetadataExt;
use std::sync::Mutex;

use vm_memory::GuestAddress;

use super::super::pages::{CHUNK_BYTES, PAGE_BYTES};
use super::super::{GuestRam, MemoryError, MemoryProgress, PageRun, Save};
use super::freezing::{PAGES, RANGES, address, on, temp_file};
use crate::error::Error;

fn go_on(_: MemoryProgress) -> ControlFlow<()> {
    ControlFlow::Continue(())
}

#[test]
fn zeros_take_no_space_and_the_file_is_as_long_as_the_ram() {
    let ram = GuestRam::fresh(&RANGES).unwrap();
    ram.write(&[0; 50 * PAGE_BYTES], address(0)).unwrap();
    ram.write(&[1; 2 * PAGE_BYTES], address(20)).unwrap();
    for frozen in [false, true] {
        if frozen {
            ram.freeze().unwrap();
        }
        let file = temp_file();
        let saved = ram.save(&file, Save::Full, &go_on).unwrap();
        assert!(saved.complete);
        assert_eq!(saved.present_pages, 2);
        assert_eq!(saved.runs, [PageRun { first: 20, count: 2 }]);
        let metadata = file.metadata().unwrap();
        assert_eq!(metadata.len(), (PAGES * PAGE_BYTES) as u64);
        assert_eq!(metadata.len(), saved.file_bytes());
        assert!(metadata.blocks() * 512 < 64 * 1024, "{} blocks", metadata.blocks());
    }
}

#[test]
fn a_diff_is_of_the_image_that_it_is_asked_for() {
    let ram = GuestRam::fresh(&RANGES).unwrap();
    let other = GuestRam::fresh(&RANGES).unwrap().freeze().unwrap();
    let diff = |ram: &GuestRam, image| {
        let saved = ram.save(&temp_file(), Save::Diff(image), &go_on)?;
        let runs = saved.runs.iter().map(|run| (run.first, run.count));
        Ok::<Vec<_>, MemoryError>(runs.collect())
    };
    assert!(matches!(diff(&ram, &other), Err(MemoryError::OtherImage)));
    let first = ram.freeze().unwrap();
    assert!(matches!(diff(&ram, &other), Err(MemoryError::OtherImage)));
    assert_eq!(diff(&ram, &first).unwrap(), Vec::<(u64, u64)>::new());
    ram.write(&[1], address(30)).unwrap();
    let second = ram.freeze().unwrap();
    ram.write(&[1], address(60)).unwrap();
    assert_eq!(diff(&ram, &first).unwrap(), [(30, 1), (60, 1)]);
    assert_eq!(diff(&ram, &second).unwrap(), [(60, 1)]);
    assert!(matches!(diff(&on(&first), &second), Err(MemoryError::OtherImage)));
}

#[test]
fn a_file_is_what_was_saved_last_and_nothing_else() {
    let ram = GuestRam::fresh(&RANGES).unwrap();
    ram.write(&[1; 20 * PAGE_BYTES], address(0)).unwrap();
    let file = temp_file();
    ram.save(&file, Save::Full, &go_on).unwrap();
    ram.discard(address(0), 19 * PAGE_BYTES);
    let saved = ram.save(&file, Save::Full, &go_on).unwrap();
    assert_eq!(saved.present_pages, 1);
    assert!(file.metadata().unwrap().blocks() * 512 < 64 * 1024);
}

#[test]
fn progress_is_told_each_mib_and_breaks_it_off() {
    const MIB: usize = 24;
    let ram = GuestRam::fresh(&[(GuestAddress(0), 2 * MIB * CHUNK_BYTES)]).unwrap();
    ram.write(&vec![1; MIB * CHUNK_BYTES], GuestAddress(0)).unwrap();
    let told = Mutex::new(Vec::new());
    let tell = |progress: MemoryProgress| {
        assert_eq!(progress.total_bytes, (MIB * CHUNK_BYTES) as u64);
        told.lock().unwrap().push(progress.done_bytes as usize / CHUNK_BYTES);
        ControlFlow::Continue(())
    };
    ram.save(&temp_file(), Save::Full, &tell).unwrap();
    let mut told = told.into_inner().unwrap();
    told.sort_unstable();
    assert_eq!(told, (1..=MIB).collect::<Vec<_>>());

    let calls = Mutex::new(0);
    let stop = |_| {
        *calls.lock().unwrap() += 1;
        ControlFlow::Break(())
    };
    let stopped = ram.save(&temp_file(), Save::Full, &stop);
    assert!(matches!(stopped, Err(MemoryError::Interrupted)));
    assert!(*calls.lock().unwrap() <= 4, "one for each thread at most");
}

#[test]
fn a_file_that_cannot_be_written_is_an_error_that_says_so() {
    let ram = GuestRam::fresh(&RANGES).unwrap();
    ram.write(&[1], address(0)).unwrap();
    for file in [File::open("/dev/zero").unwrap(), File::open("/proc/self/exe").unwrap()] {
        let error = ram.save(&file, Save::Full, &go_on).unwrap_err();
        assert!(matches!(error, MemoryError::File { .. }));
        assert!(Error::from(error).to_string().contains("the memory's file"));
    }
    let full = MemoryError::file("write to the memory's file")(std::io::Error::from_raw_os_error(
        libc::ENOSPC,
    ));
    assert!(Error::from(full).to_string().contains("make room"));
}

//! Guest RAM, and file operations that wait: their ends, their failures, and that none holds up
//! another.

use std::fs::{self, File};
use std::io::{PipeWriter, Write, pipe};
use std::os::fd::OwnedFd;
use std::os::unix::fs::{FileExt, MetadataExt};
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::thread;
use std::time::{Duration, Instant};

use vm_memory::{Bytes, GuestAddress, GuestMemoryBackend};

use super::{Clear, FileIo, GuestBytes, GuestRam, IoQueue, Transfer};
use crate::error::{Error, ErrorKind};
use crate::file_lock::LockedFile;
use crate::machine::disk_io;

/// A file that goes with it.
struct TempFile(PathBuf, Arc<LockedFile>);

impl TempFile {
    fn new(folder: &Path, name: &str, content: &[u8]) -> Self {
        let path = folder.join(format!("dormouse-transfer-{}-{name}", std::process::id()));
        fs::write(&path, content).unwrap();
        let file = File::options().read(true).write(true).open(&path).unwrap();
        Self(path, Arc::new(file.into()))
    }
}

impl Drop for TempFile {
    fn drop(&mut self) {
        let _ = fs::remove_file(&self.0);
    }
}

/// One end of a pipe, as a disk that hangs when it is full.
fn file_of(writer: &PipeWriter) -> Arc<LockedFile> {
    Arc::new(File::from(OwnedFd::from(writer.try_clone().unwrap())).into())
}

/// Both ways to wait: the process's ring, and threads.
fn queues() -> [Arc<IoQueue>; 2] {
    [disk_io::queue().unwrap(), disk_io::with_workers().unwrap()]
}

/// The errors of `count` operations, by their tokens.
fn wait_for(io: &FileIo, count: usize) -> Vec<(u64, Option<i32>)> {
    let begin = Instant::now();
    let mut all = Vec::new();
    while all.len() < count {
        assert!(begin.elapsed() < Duration::from_secs(60), "{} of {count}", all.len());
        let code = |error: std::io::Error| error.raw_os_error().unwrap_or(-1);
        all.extend(io.take_done().into_iter().map(|(token, end)| (token, end.err().map(code))));
        thread::sleep(Duration::from_micros(100));
    }
    all.sort_unstable();
    all
}

#[test]
fn a_full_disk_and_a_file_that_may_not_be_written_are_errors() {
    let full = Arc::new(File::options().write(true).open("/dev/full").unwrap().into());
    let read_only = Arc::new(File::open("/dev/zero").unwrap().into());
    for queue in queues() {
        let io = FileIo::new(&queue).unwrap();
        io.submit(vec![
            (1, Transfer::write_bytes(&full, 0, vec![1; 512])),
            (2, Transfer::write_bytes(&read_only, 0, vec![1; 512])),
        ]);
        assert_eq!(wait_for(&io, 2), [(1, Some(libc::ENOSPC)), (2, Some(libc::EBADF))]);
    }
}

#[test]
fn an_operation_that_hangs_holds_up_no_other() {
    let file = TempFile::new(&std::env::temp_dir(), "hang", &[0; 4096]);
    // Nothing to write into a full pipe until somebody reads from it.
    let (mut reader, mut writer) = pipe().unwrap();
    let pipe = file_of(&writer);
    let queue = disk_io::queue().unwrap();
    let (slow, quick) = (FileIo::new(&queue).unwrap(), FileIo::new(&queue).unwrap());
    slow.submit(vec![(1, Transfer::write_bytes(&pipe, 0, vec![7; 1 << 20]))]);
    for round in 0..100 {
        quick.submit(vec![(round, Transfer::write_bytes(&file.1, 0, vec![round as u8; 4096]))]);
        assert_eq!(wait_for(&quick, 1), [(round, None)]);
    }
    assert!(slow.take_done().is_empty());
    // The queue's users may go while it is under way; it ends all the same.
    drop((queue, quick));
    let mut bytes = vec![0; 1 << 20];
    std::io::Read::read_exact(&mut reader, &mut bytes).unwrap();
    assert_eq!(wait_for(&slow, 1), [(1, None)]);
    assert!(bytes.iter().all(|byte| *byte == 7));
    writer.flush().unwrap();
}

#[test]
fn ranges_are_cleared_on_file_systems_with_and_without_a_call_for_it() {
    const BYTES: usize = 3 << 20;
    // Of the two, a tmpfs has no FALLOC_FL_ZERO_RANGE.
    for folder in [std::env::temp_dir(), PathBuf::from("/dev/shm")] {
        for queue in queues() {
            let io = FileIo::new(&queue).unwrap();
            for (token, clear) in [(1, Clear::Unmap), (2, Clear::Keep), (3, Clear::Discard)] {
                let file = TempFile::new(&folder, "clear", &[0xaa; BYTES]);
                let before = file.1.metadata().unwrap().blocks();
                let (at, len) = (4096, BYTES as u64 - 8192);
                io.submit(vec![(token, Transfer::clear(&file.1, at, len, clear))]);
                assert_eq!(wait_for(&io, 1), [(token, None)]);
                let mut bytes = vec![1; BYTES];
                file.1.read_exact_at(&mut bytes, 0).unwrap();
                assert_eq!(bytes[..4096], [0xaa; 4096]);
                assert_eq!(bytes[BYTES - 4096..], [0xaa; 4096]);
                assert!(bytes[4096..BYTES - 4096].iter().all(|byte| *byte == 0), "{clear:?}");
                let after = file.1.metadata().unwrap().blocks();
                match clear {
                    Clear::Keep => assert_eq!(after, before),
                    Clear::Unmap | Clear::Discard => assert!(after < before),
                }
            }
        }
    }
}

#[test]
fn more_operations_than_the_ring_has_room_for_all_end() {
    let file = TempFile::new(&std::env::temp_dir(), "many", &[]);
    for queue in queues() {
        let io = FileIo::new(&queue).unwrap();
        let write = |at: u64| (at, Transfer::write_bytes(&file.1, at * 8, at.to_le_bytes().into()));
        io.submit((0..5000).map(write).collect());
        let ends = wait_for(&io, 5000);
        assert!(ends.iter().enumerate().all(|(at, end)| *end == (at as u64, None)));
        let bytes = fs::read(&file.0).unwrap();
        assert!(bytes.chunks(8).enumerate().all(|(at, word)| word == (at as u64).to_le_bytes()));
        file.1.set_len(0).unwrap();
    }
}

#[test]
fn many_threads_share_the_queue_and_each_gets_its_own_ends() {
    let queue = disk_io::queue().unwrap();
    thread::scope(|scope| {
        for id in 0..8u8 {
            let queue = Arc::clone(&queue);
            scope.spawn(move || {
                let name = format!("thread{id}");
                let file = TempFile::new(&std::env::temp_dir(), &name, &[0; 4096]);
                for round in 0..200u64 {
                    let io = FileIo::new(&queue).unwrap();
                    let sync = Transfer::data_sync(&file.1);
                    let write = Transfer::write_bytes(&file.1, round * 8, vec![id; 8]);
                    io.submit(vec![(round, write), (round + 1, sync)]);
                    assert_eq!(wait_for(&io, 2), [(round, None), (round + 1, None)]);
                }
                assert!(fs::read(&file.0).unwrap()[..1600].iter().all(|byte| *byte == id));
            });
        }
    });
}

#[test]
fn a_client_that_hangs_has_few_places_and_gives_up_what_has_not_begun() {
    const CANCELLED: Option<i32> = Some(libc::ECANCELED);
    let file = TempFile::new(&std::env::temp_dir(), "fair", &[0; 4096]);
    let queue = disk_io::queue().unwrap();
    let (hung, other) = (FileIo::new(&queue).unwrap(), FileIo::new(&queue).unwrap());
    let pipes: Vec<_> = (0..300).map(|_| pipe().unwrap()).collect();
    let writes = pipes.iter().map(|(_, writer)| {
        let pipe = file_of(writer);
        (0, Transfer::write_bytes(&pipe, 0, vec![7; 1 << 20]))
    });
    hung.submit(writes.collect());
    other.submit(vec![(1, Transfer::data_sync(&file.1))]);
    assert_eq!(wait_for(&other, 1), [(1, None)]);
    hung.cancel();
    let mut given_up = wait_for(&hung, 200);
    hung.submit(vec![(2, Transfer::data_sync(&file.1))]);
    // Those that have filled a pipe, and did not go on yet, are given up too, a little later.
    while !given_up.contains(&(2, CANCELLED)) {
        given_up.extend(wait_for(&hung, 1));
    }
    given_up.retain(|end| *end != (2, CANCELLED));
    assert!(given_up.iter().all(|end| *end == (0, CANCELLED)), "{given_up:?}");
    // The others end when their pipes do.
    drop(pipes);
    wait_for(&hung, 300 - given_up.len());
    assert!(hung.take_done().is_empty());
}

#[test]
fn zeros_that_many_want_are_the_same_and_a_clear_that_is_given_up_ends() {
    // Where they have to be written.
    let file = TempFile::new(Path::new("/dev/shm"), "zeros", &[]);
    let private_kib = || {
        let status = fs::read_to_string("/proc/self/status").unwrap();
        let line = status.lines().find(|line| line.starts_with("RssAnon:")).unwrap();
        line.split_whitespace().nth(1).unwrap().parse::<u64>().unwrap()
    };
    for queue in queues() {
        let io = FileIo::new(&queue).unwrap();
        let before = private_kib();
        let clear = |token| (token, Transfer::clear(&file.1, 0, 1 << 30, Clear::Keep));
        io.submit((0..4096).map(clear).collect());
        thread::sleep(Duration::from_millis(50));
        let most = private_kib();
        assert!(most < before + (512 << 10), "{before} {most}");
        io.cancel();
        assert_eq!(wait_for(&io, 4096).len(), 4096);
        file.1.set_len(0).unwrap();
    }
}

#[test]
fn bytes_in_pieces_are_cut_and_filled_as_one_sequence() {
    let ram = GuestRam::fresh(&[(GuestAddress(0), 1 << 20)]).unwrap();
    let places = [(4096u64, 16usize), (0, 4096), (8192, 1)];
    let mut bytes = GuestBytes::default();
    for (at, len) in places {
        bytes.push(ram.inner().get_slice(GuestAddress(at), len).unwrap());
    }
    let expected: Vec<u8> = (0..4113).map(|at| at as u8).collect();
    let content = |bytes: &GuestBytes<'_>| {
        let mut copy = vec![0; bytes.len() as usize];
        assert_eq!(bytes.copy_to(&mut copy), copy.len());
        copy
    };
    for at in [0, 1, 15, 16, 17, 4111, 4112, 4113] {
        assert_eq!(bytes.copy_from(&[0xff; 4113]), 4113);
        // In two steps, the second behind the first; what is too long is cut.
        assert_eq!(bytes.copy_from_at(0, &expected[..at]), at);
        assert_eq!(bytes.copy_from_at(at, &[&expected[at..], &[1; 5]].concat()), 4113 - at);
        assert_eq!(content(&bytes), expected);
        let mut first = bytes.clone();
        let others = first.split_off(at as u64).unwrap();
        assert_eq!((content(&first), content(&others)), split(&expected, at));
    }
    assert!(bytes.split_off(4114).is_none());
    assert_eq!(content(&bytes), expected, "as it was");
    assert_eq!(bytes.copy_from_at(4113, &[1]), 0);
}

fn split(bytes: &[u8], at: usize) -> (Vec<u8>, Vec<u8>) {
    (bytes[..at].to_vec(), bytes[at..].to_vec())
}

#[test]
fn write_across_the_end_is_an_error_and_writes_elsewhere_stand() {
    let ram = GuestRam::fresh(&[(GuestAddress(0), 0x2000)]).unwrap();
    ram.write(&[7; 16], GuestAddress(0x1ff0)).unwrap();
    assert!(ram.write(&[7; 17], GuestAddress(0x1ff0)).is_err());
    assert!(ram.write(&[7], GuestAddress(u64::MAX)).is_err());
}

#[test]
fn large_writes_go_where_small_ones_do() {
    let ranges = [(GuestAddress(0), 0x40000), (GuestAddress(1 << 32), 0x40000)];
    let fresh = GuestRam::fresh(&ranges).unwrap();
    let image = fresh.freeze().unwrap();
    let over_image = GuestRam::reserve(&ranges).unwrap();
    over_image.map_image(&image).unwrap();
    for ram in [GuestRam::fresh(&ranges).unwrap(), fresh, over_image] {
        let bytes: Vec<u8> = (0..0x20001u32).map(|at| (at % 251) as u8).collect();
        for address in [3, (1 << 32) + 0x1ffff] {
            ram.write(&bytes, GuestAddress(address)).unwrap();
            let mut found = vec![0; bytes.len()];
            ram.inner().read_slice(&mut found, GuestAddress(address)).unwrap();
            assert!(found == bytes);
        }
        let mut next = [1; 2];
        ram.inner().read_slice(&mut next, GuestAddress(3 + bytes.len() as u64)).unwrap();
        assert_eq!(next, [0; 2]);
        for address in [0x20000, (1 << 32) - 5, (1 << 32) + 0x20000, u64::MAX] {
            assert!(ram.write(&bytes, GuestAddress(address)).is_err());
        }
    }
    // What the RAM over the image wrote is its own.
    let clone = GuestRam::reserve(&ranges).unwrap();
    clone.map_image(&image).unwrap();
    assert_eq!(clone.inner().read_obj::<u64>(GuestAddress(3)).unwrap(), 0);
}

#[test]
fn absurd_sizes_are_refused_with_a_fix() {
    let error = GuestRam::fresh(&[(GuestAddress(0), usize::MAX & !0xfff)]).unwrap_err();
    let error = Error::from(error);
    assert_eq!(error.kind(), &ErrorKind::Resources);
    assert!(error.to_string().contains("less memory"), "{error}");
}

mod freezing;
mod hostile;
mod saving;

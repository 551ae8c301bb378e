//! The way in for the fuzz target `disk_delta`.

#![allow(clippy::expect_used, clippy::panic, reason = "what a fuzz target finds is a panic")]

use std::fs::{self, File};
use std::os::unix::fs::FileExt;

use vm_memory::{GuestAddress, GuestMemoryBackend};
use vmm_sys_util::tempdir::TempDir;

use super::{Disk, SECTOR_BYTES, is_used_delta};
use crate::config::BlockConfig;
use crate::memory::{GuestBytes, GuestRam};

/// Of two pages of a bitmap.
const SECTORS: u64 = 32_768 + 100;
/// As much as is looked at, at each end and around the border of the pages.
const WINDOW: u64 = 64 << 10;
/// Where a delta's header ends.
const BITMAP: u64 = 4096;

/// A byte that says what is done, the header of a delta, and its bitmap, over a disk of zeros: whatever it is, it is
/// refused, or every byte of the disk is somewhere, and what is written to it is found again.
pub fn disk_delta(bytes: &[u8]) {
    let Some((choice, bytes)) = bytes.split_first() else { return };
    let (header, bitmap) = bytes.split_at(bytes.len().min(20));
    let folder = TempDir::new().expect("a folder");
    let (base, delta) = (folder.as_path().join("base"), folder.as_path().join("delta"));
    let file = File::create_new(&base).expect("a disk");
    file.set_len(SECTORS * SECTOR_BYTES).expect("a disk");
    let file = File::create_new(&delta).expect("a delta");
    file.write_all_at(header, 0).expect("a delta");
    if choice & 1 == 0 {
        file.write_all_at(bitmap, BITMAP).expect("a delta");
        let bytes = BITMAP + 2 * 4096 + SECTORS * SECTOR_BYTES;
        file.set_len(bytes).expect("a delta");
    }
    drop(file);
    let _ = is_used_delta(&delta);
    let config = BlockConfig::new(&base);
    let config = match choice & 2 {
        0 => config.delta(&delta),
        _ => config.over(&delta).discard_writes(),
    };
    let mut disk = match Disk::open(&config) {
        Ok(disk) => disk,
        Err(error) => return drop(error.to_string()),
    };
    let ram = GuestRam::fresh(&[(GuestAddress(0), WINDOW as usize)]).expect("memory");
    let windows = [0, 32_768 * SECTOR_BYTES - WINDOW / 2, SECTORS * SECTOR_BYTES - WINDOW];
    for offset in windows {
        read(&disk, &ram, offset);
    }
    let offset = windows[usize::from(choice >> 2) % 3];
    {
        let part = disk.write(offset, guest(&ram, SECTOR_BYTES));
        part.file.write_all_at(&[7; SECTOR_BYTES as usize], part.offset).expect("a sector");
    }
    disk.written(offset, SECTOR_BYTES);
    assert_eq!(read(&disk, &ram, offset)[..SECTOR_BYTES as usize], [7; SECTOR_BYTES as usize]);
    drop(disk);
    let kept = fs::metadata(&base).expect("a disk").len();
    assert_eq!(kept, SECTORS * SECTOR_BYTES, "the disk below is as it was");
}

/// The bytes of a window, from wherever they are.
fn read(disk: &Disk, ram: &GuestRam, offset: u64) -> Vec<u8> {
    let mut content = Vec::new();
    for part in disk.read(offset, guest(ram, WINDOW), usize::MAX).expect("all pieces") {
        let mut piece = vec![0; part.bytes.len() as usize];
        part.file.read_exact_at(&mut piece, part.offset).expect("bytes that are there");
        content.extend(piece);
    }
    assert_eq!(content.len() as u64, WINDOW);
    content
}

fn guest(ram: &GuestRam, len: u64) -> GuestBytes<'_> {
    let mut bytes = GuestBytes::default();
    bytes.push(ram.inner().get_slice(GuestAddress(0), len as usize).expect("memory"));
    bytes
}

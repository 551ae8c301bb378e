//! Disks for what guests write, as the tools of ext4 see them.

use std::fs;
use std::os::unix::fs::MetadataExt;

use dormouse::{ErrorKind, OverlayDisk};

use crate::{Scratch, programs};

#[test]
fn a_disk_of_any_size_is_a_file_system_that_e2fsck_finds_nothing_wrong_with() {
    let scratch = Scratch::new("overlays");
    let path = scratch.0.join("disk");
    // The smallest; one whose last group is short; one whose last group is left out; many groups.
    for bytes in [16 << 20, 100_000_000, (128 << 20) + 4096, 300 << 20, (1 << 30) + 5000, 1 << 40] {
        OverlayDisk::create(&path, bytes).unwrap();
        let file = fs::metadata(&path).unwrap();
        assert_eq!(file.len(), bytes);
        assert!(file.blocks() * 512 <= (1 << 20) + bytes / 200_000, "{bytes}: {}", file.blocks());
        let output = programs::command("e2fsck").args(["-f", "-n"]).arg(&path).output().unwrap();
        let text = [output.stdout, output.stderr].concat();
        let text = String::from_utf8_lossy(&text);
        assert!(output.status.success(), "{bytes}: {text}");
        assert!(!text.contains("Fix?"), "{bytes}: {text}");
        fs::remove_file(&path).unwrap();
    }
}

#[test]
fn what_is_no_size_for_a_disk_and_a_file_that_is_there_are_refused() {
    let scratch = Scratch::new("overlay-refused");
    let path = scratch.0.join("disk");
    for bytes in [0, (16 << 20) - 1, (1 << 40) + 1, u64::MAX] {
        let error = OverlayDisk::create(&path, bytes).unwrap_err();
        assert_eq!(error.kind(), &ErrorKind::Config, "{error}");
        assert!(!path.exists());
    }
    fs::write(&path, "mine").unwrap();
    let error = OverlayDisk::create(&path, 16 << 20).unwrap_err();
    assert_eq!(error.kind(), &ErrorKind::File(std::io::ErrorKind::AlreadyExists));
    assert_eq!(fs::read(&path).unwrap(), b"mine");
}

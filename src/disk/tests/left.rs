//! Disks that stay where they are while their guest sleeps.

use super::*;

#[test]
fn a_disk_that_is_left_where_it_is_is_synced_where_that_is_asked_for() {
    // A file of the kernel's, which cannot be.
    let mut disk = Disk::open(&BlockConfig::new("/proc/self/oom_score_adj")).unwrap();
    let folder = Folder::new();
    let path = folder.path("copy");
    assert!(matches!(disk.leave(&path, None, false, &mut go_on), Ok(SavedDisk::Left { .. })));
    let refused = disk.leave(&path, None, true, &mut go_on).unwrap_err();
    assert!(matches!(refused, DiskError::Save { .. }), "{refused}");
}

#[test]
fn a_delta_that_was_left_and_is_gone_is_not_asked_for_elsewhere() {
    let folder = Folder::new();
    let (base, _) = folder.base();
    let delta = folder.path("delta");
    let config = BlockConfig::new(&base).delta(&delta);
    let mut disk = Disk::open(&config).unwrap();
    let saved = disk.leave(&folder.path("copy"), None, false, &mut go_on).unwrap();
    drop(disk);
    saved.check_left(&config).unwrap();
    fs::remove_file(&delta).unwrap();
    let error = Error::from(saved.check_left(&config).unwrap_err()).to_string();
    assert!(error.contains("is gone, which was left") && !error.contains("disk_base"), "{error}");
    // The disk below it may be had from elsewhere.
    fs::remove_file(&base).unwrap();
    let error = format!("{:?}", Error::from(saved.check_base().unwrap_err()));
    assert!(error.contains("is not there") && error.contains("disk_base"), "{error}");
}

#[cfg(feature = "session")]
#[test]
fn a_disk_has_changed_where_it_has_or_where_nobody_can_ever_tell() {
    let folder = Folder::new();
    let (base, _) = folder.base();
    let config = BlockConfig::new(&base);
    let left = |config| {
        let mut disk = Disk::open(config).unwrap();
        disk.leave(&folder.path("copy"), None, false, &mut go_on).unwrap()
    };
    let saved = left(&config);
    assert!(!saved.may_have_changed(&config, None));
    // It is where it was, by another name; a copy of it may have been written to.
    let copy = folder.path("elsewhere");
    fs::copy(&base, &copy).unwrap();
    let link = folder.path("link");
    std::os::unix::fs::symlink(&base, &link).unwrap();
    assert!([&base, &link].into_iter().all(|path| !saved.may_have_changed(&config, Some(path))));
    assert!(saved.may_have_changed(&config, Some(&copy)));
    // As of a block device, whose node does not say when it was written to.
    let SavedDisk::Left { base: mut device, delta } = saved.clone() else { panic!("{saved:?}") };
    device.facts.modified = None;
    let device = SavedDisk::Left { base: device, delta };
    assert!(device.may_have_changed(&config, None));
    // What nobody writes to may be anywhere, whatever is at its old place.
    let reads = config.clone().read_only();
    let reads_only = left(&reads);
    std::thread::sleep(std::time::Duration::from_millis(20));
    File::options().write(true).open(&base).unwrap().write_all_at(&[1], 0).unwrap();
    assert!(saved.may_have_changed(&config, None));
    assert!(reads_only.may_have_changed(&reads, None));
    assert!(!reads_only.may_have_changed(&reads, Some(&copy)));
    // What is not there now may be there, as it was, when it is wanted.
    let saved = left(&config);
    fs::remove_file(&base).unwrap();
    assert!(!saved.may_have_changed(&config, None));
    assert!(!saved.may_have_changed(&config, Some(&base)));
}

#[test]
fn a_delta_that_was_flushed_and_left_does_not_change_when_it_is_closed() {
    let folder = Folder::new();
    let (base, mut model) = folder.base();
    let delta = folder.path("delta");
    let config = BlockConfig::new(&base).delta(&delta);
    let mut disk = Disk::open(&config).unwrap();
    assert_eq!(fs::metadata(&delta).unwrap().mode() & 0o777, 0o600);
    write(&mut disk, &mut model, 3000, 5, 0x33);
    drop(disk.flush());
    let saved = disk.leave(&folder.path("copy"), None, false, &mut go_on).unwrap();
    // A time that the file's differs from if it is written to.
    std::thread::sleep(std::time::Duration::from_millis(20));
    drop(disk);
    saved.check_left(&config).unwrap();
    assert!(content(&Disk::open(&config).unwrap()) == model);
}

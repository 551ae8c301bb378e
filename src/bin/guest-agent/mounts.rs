//! The guest's file systems: the kernel's own, the root on its disk, and what lies over it.

use std::fs::{self, File};
use std::io;
use std::os::fd::{AsFd, AsRawFd};
use std::os::unix::fs::{DirBuilderExt, MetadataExt, chroot};
use std::path::{Path, PathBuf};
use std::sync::OnceLock;
use std::thread;
use std::time::{Duration, Instant};

use crate::failure::absolute;
use crate::protocol::{Failure, FailureKind, Mount, Overlay, Root};
use crate::sys::{self, MountFlags};
use crate::tree;

/// How long a disk may take to appear.
const PATIENCE: Duration = Duration::from_secs(5);

/// Where the root's parts are mounted while it is put together: in the initramfs, beside what the
/// host has put there.
const LOWER: &str = "/dormouse-lower";
const UPPER: &str = "/dormouse-upper";
const NEW_ROOT: &str = "/dormouse-root";

/// What comes along to the new root.
const MOVED: &[&str] = &["/dev", "/proc", "/sys", "/run"];

const EBUSY: i32 = 16;

/// What is mounted at [`UPPER`]: no path leads there any more when the root lies over it.
static UPPER_ROOT: OnceLock<File> = OnceLock::new();

/// Mounts what the kernel has to show. It goes on with what follows if one of them fails.
pub(crate) fn mount_kernels_own() -> Vec<Failure> {
    const KERNEL: MountFlags = MountFlags::KERNEL;
    const DEVICES: MountFlags = MountFlags::DEVICES;
    const DATA: MountFlags = MountFlags::DATA;
    let mounts = [
        ("/proc", "proc", KERNEL, ""),
        ("/sys", "sysfs", KERNEL, ""),
        ("/dev", "devtmpfs", DEVICES, "mode=755"),
        ("/dev/pts", "devpts", DEVICES, "mode=620,gid=5,ptmxmode=666"),
        ("/dev/shm", "tmpfs", DATA, "mode=1777"),
        ("/run", "tmpfs", DATA, "mode=755"),
        ("/sys/fs/cgroup", "cgroup2", KERNEL, ""),
    ];
    let results = mounts.map(|(path, fs_type, flags, options)| {
        let path = Path::new(path);
        let _ = fs::create_dir_all(path);
        match sys::mount(Path::new(fs_type), path, fs_type, flags, options) {
            // Somebody else has mounted it; or it is cgroups of version 2, without which nothing
            // is frozen, but everything else goes on.
            Err(error) if error.raw_os_error() == Some(EBUSY) || fs_type == "cgroup2" => Ok(()),
            result => result.map_err(|e| Failure::of_path("mount", path, &e)),
        }
    });
    link_descriptors();
    results.into_iter().filter_map(Result::err).collect()
}

/// Names in /dev that shells know.
fn link_descriptors() {
    let links = [("fd", ""), ("stdin", "/0"), ("stdout", "/1"), ("stderr", "/2")];
    for (name, of) in links {
        let target = format!("/proc/self/fd{of}");
        let _ = std::os::unix::fs::symlink(target, Path::new("/dev").join(name));
    }
}

/// The virtio disk of this number: /dev/vda, …, /dev/vdz, /dev/vdaa, …
fn disk_path(disk: u32) -> PathBuf {
    let mut letters = Vec::new();
    let mut rest = u64::from(disk) + 1;
    while rest > 0 {
        let digit = (rest - 1) % 26;
        letters.push(char::from(b'a' + digit as u8));
        rest = (rest - 1) / 26;
    }
    let letters: String = letters.iter().rev().collect();
    format!("/dev/vd{letters}").into()
}

fn wait_for_disk(disk: u32) -> Result<PathBuf, Failure> {
    let path = disk_path(disk);
    let deadline = Instant::now() + PATIENCE;
    while !path.exists() {
        if Instant::now() > deadline {
            let what = format!("find disk {disk}, {}", path.display());
            return Err(Failure::new(FailureKind::NotFound, what));
        }
        thread::sleep(Duration::from_millis(2));
    }
    Ok(path)
}

/// Mounts a disk: with its file system if that is given, else with the first that fits.
fn mount_disk(
    disk: u32,
    target: &Path,
    fs_type: Option<&str>,
    flags: MountFlags,
) -> Result<(), Failure> {
    const EINVAL: i32 = 22;
    let device = wait_for_disk(disk)?;
    let known = fs::read_to_string("/proc/filesystems").unwrap_or_default();
    let types: Vec<&str> = match fs_type {
        Some(fs_type) => vec![fs_type],
        None => known.lines().filter_map(|line| line.strip_prefix('\t')).collect(),
    };
    let mut fault = io::Error::from_raw_os_error(EINVAL);
    for fs_type in &types {
        match sys::mount(&device, target, fs_type, flags, "") {
            Ok(()) => return Ok(()),
            // Most say so of what is not theirs.
            Err(error) if error.raw_os_error() == Some(EINVAL) => {}
            Err(error) => fault = error,
        }
    }
    let (device, types) = (device.display(), types.join(", "));
    Err(Failure::of(format!("mount {device} at {} as {types}", target.display()), &fault))
}

/// Makes the root's disk the root. The initramfs goes, and what it held is freed.
pub(crate) fn switch_root(root: &Root) -> Result<(), Failure> {
    let new_root = Path::new(NEW_ROOT);
    make_directory(new_root)?;
    let fs_type = root.fs_type.as_deref();
    match &root.overlay {
        Overlay::None => mount_disk(root.disk, new_root, fs_type, MountFlags::NONE)?,
        Overlay::ReadOnly => mount_disk(root.disk, new_root, fs_type, MountFlags::READ_ONLY)?,
        Overlay::Memory(bytes) => {
            let options = match bytes {
                0 => "mode=755".to_owned(),
                bytes => format!("mode=755,size={bytes}"),
            };
            make_directory(Path::new(UPPER))?;
            mount("tmpfs", UPPER, "tmpfs", &options)?;
            mount_overlay(root)?;
        }
        Overlay::Disk(disk) => {
            make_directory(Path::new(UPPER))?;
            mount_disk(*disk, Path::new(UPPER), Some("ext4"), MountFlags::NONE)?;
            mount_overlay(root)?;
            if let Ok(upper) = File::open(UPPER) {
                let _ = UPPER_ROOT.set(upper);
            }
        }
    }
    enter(new_root, matches!(root.overlay, Overlay::ReadOnly))
        .map_err(|error| Failure::of("make the disk the root", &error))
}

fn mount(source: &str, target: &str, fs_type: &str, options: &str) -> Result<(), Failure> {
    let (source, target) = (Path::new(source), Path::new(target));
    sys::mount(source, target, fs_type, MountFlags::NONE, options)
        .map_err(|e| Failure::of_path("mount", target, &e))
}

/// Puts the new root together of the disk and a directory that takes what is written.
fn mount_overlay(root: &Root) -> Result<(), Failure> {
    let lower = Path::new(LOWER);
    make_directory(lower)?;
    mount_disk(root.disk, lower, root.fs_type.as_deref(), MountFlags::READ_ONLY)?;
    let (upper, work) = (format!("{UPPER}/upper"), format!("{UPPER}/work"));
    make_directory(Path::new(&upper))?;
    make_directory(Path::new(&work))?;
    let options = format!("lowerdir={LOWER},upperdir={upper},workdir={work}");
    mount("overlay", NEW_ROOT, "overlay", &options)
}

fn make_directory(path: &Path) -> Result<(), Failure> {
    match fs::DirBuilder::new().mode(0o755).create(path) {
        Err(error) if error.kind() != io::ErrorKind::AlreadyExists => {
            Err(Failure::of_path("make the directory", path, &error))
        }
        _ => Ok(()),
    }
}

fn enter(new_root: &Path, is_read_only: bool) -> io::Result<()> {
    let initramfs = File::open("/")?;
    let device = initramfs.metadata()?.dev();
    for path in MOVED {
        let target = new_root.join(&path[1..]);
        // On a read-only root they are there, or cannot be.
        let _ = fs::create_dir(&target);
        sys::mount(Path::new(path), &target, "", MountFlags::MOVE, "")?;
    }
    std::env::set_current_dir(new_root)?;
    sys::mount(Path::new("."), Path::new("/"), "", MountFlags::MOVE, "")?;
    chroot(".")?;
    std::env::set_current_dir("/")?;
    tree::clear(initramfs.as_fd(), device);
    if is_read_only {
        // Programs expect to write there.
        let tmp = Path::new("/tmp");
        let _ = sys::mount(Path::new("tmpfs"), tmp, "tmpfs", MountFlags::DATA, "mode=1777");
    }
    Ok(())
}

/// Has the disk that takes what is written over the root take no more, when the root does not: it is then as if
/// it were unmounted.
pub(crate) fn close_upper() {
    if let Some(upper) = UPPER_ROOT.get() {
        let path = format!("/proc/self/fd/{}", upper.as_raw_fd());
        let _ = sys::remount_read_only(Path::new(&path));
    }
}

/// Mounts another disk.
pub(crate) fn mount_other(mount: &Mount) -> Result<(), Failure> {
    let path = absolute(&mount.path)?;
    fs::create_dir_all(&path).map_err(|e| Failure::of_path("make the directory", &path, &e))?;
    let flags = if mount.read_only { MountFlags::READ_ONLY } else { MountFlags::NONE };
    mount_disk(mount.disk, &path, mount.fs_type.as_deref(), flags)
}

/// Replaces a file of the guest: on a read-only root by one in memory that lies over it.
pub(crate) fn replace_file(path: &Path, text: &str) -> io::Result<()> {
    const EROFS: i32 = 30;
    // A link is replaced too: it leads to what some other program would have written.
    if fs::symlink_metadata(path).is_ok_and(|file| file.is_symlink()) {
        let _ = fs::remove_file(path);
    }
    match fs::write(path, text) {
        Err(error) if error.raw_os_error() == Some(EROFS) => {
            let name = path.file_name().ok_or(io::ErrorKind::InvalidInput)?;
            let over = Path::new("/run").join(name);
            let is_new = !over.exists();
            fs::write(&over, text)?;
            match is_new {
                true => sys::mount(&over, path, "", MountFlags::BIND, ""),
                false => Ok(()),
            }
        }
        result => result,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn disks_are_named_as_the_kernel_names_them() {
        let cases =
            [(0, "vda"), (1, "vdb"), (25, "vdz"), (26, "vdaa"), (701, "vdzz"), (702, "vdaaa")];
        for (disk, name) in cases {
            assert_eq!(disk_path(disk), Path::new("/dev").join(name));
        }
        disk_path(u32::MAX);
    }

    #[test]
    fn a_file_is_replaced_also_where_it_is_a_link_to_nowhere() {
        let dir = crate::scratch::Scratch::new();
        let path = dir.path("resolv.conf");
        std::os::unix::fs::symlink("/nowhere/at/all", &path).unwrap();
        replace_file(&path, "nameserver 10.0.2.3\n").unwrap();
        assert_eq!(fs::read_to_string(&path).unwrap(), "nameserver 10.0.2.3\n");
    }
}

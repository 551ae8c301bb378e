use std::env;
use std::ffi::OsString;
use std::fs;
use std::io::{Read as _, Write as _};
use std::os::unix::ffi::OsStringExt;
use std::os::unix::fs::{MetadataExt, PermissionsExt, symlink};
use std::path::{Path, PathBuf};
use std::process;
use std::thread;
use std::time::Duration;

use crate::connection::Connection;
use crate::host::{ask, bytes, call, data, dial_with, failure, read_data};
use crate::protocol::{
    Bytes, Call, Channel, FailureKind, FileKind, Frame, MakeDirectory, Read, Remove, Reply, Stat,
    Write,
};
use crate::scratch::Scratch;

fn write_call(path: &Path) -> Write {
    Write { path: bytes(path), mode: None, owner: None, sync: false }
}

fn write_as(call_: Write, text: &[u8]) -> Reply {
    let mut connection = call(&Call::Write(call_));
    match connection.receive_message().unwrap() {
        Reply::Done => {}
        other => return other,
    }
    data(&mut connection, text);
    connection.queue_end().unwrap();
    connection.flush().unwrap();
    connection.receive_message().unwrap()
}

fn write(path: &Path, text: &[u8]) -> Reply {
    write_as(write_call(path), text)
}

fn read(path: &Path, offset: u64, length: Option<u64>) -> (Stat, Vec<u8>) {
    let mut connection = call(&Call::Read(Read { path: bytes(path), offset, length }));
    match connection.receive_message().unwrap() {
        Reply::Stat(stat) => (stat, read_data(&mut connection)),
        other => panic!("{other:?}"),
    }
}

fn mode(path: &Path) -> u32 {
    fs::symlink_metadata(path).unwrap().mode() & 0o7777
}

fn names(path: &Path) -> Vec<OsString> {
    let mut names: Vec<_> = fs::read_dir(path).unwrap().map(|e| e.unwrap().file_name()).collect();
    names.sort();
    names
}

#[test]
fn a_file_is_written_and_read_again() {
    let dir = Scratch::new();
    let path = dir.path("a");
    let text: Vec<u8> = (0..300_000_u32).map(|at| (at / 7) as u8).collect();
    assert_eq!(write_as(Write { sync: true, ..write_call(&path) }, &text), Reply::Done);
    let (stat, found) = read(&path, 0, None);
    assert!(found == text);
    assert_eq!((stat.kind, stat.size, stat.mode), (FileKind::File, 300_000, 0o644));
    assert_eq!(read(&path, 299_990, None).1, &text[299_990..]);
    assert_eq!(read(&path, 70_000, Some(70_000)).1, &text[70_000..140_000]);
    assert!(read(&path, 5, Some(0)).1.is_empty());
    assert!(read(&path, 1 << 40, None).1.is_empty());
    assert_eq!(write(&path, b""), Reply::Done);
    assert_eq!(fs::read(&path).unwrap(), b"");
    assert!(read(Path::new("/proc/self/status"), 0, None).1.starts_with(b"Name:"));
}

#[test]
fn a_new_file_takes_an_old_ones_place_at_once_and_keeps_its_mode() {
    let dir = Scratch::new();
    let path = dir.path("a");
    fs::write(&path, "old").unwrap();
    fs::set_permissions(&path, fs::Permissions::from_mode(0o640)).unwrap();
    let mut connection = call(&Call::Write(write_call(&path)));
    connection.receive_message::<Reply>().unwrap();
    data(&mut connection, b"new");
    connection.flush().unwrap();
    thread::sleep(Duration::from_millis(50));
    assert_eq!(fs::read(&path).unwrap(), b"old");
    connection.queue_end().unwrap();
    connection.flush().unwrap();
    assert_eq!(connection.receive_message::<Reply>().unwrap(), Reply::Done);
    assert_eq!((fs::read(&path).unwrap(), mode(&path)), (b"new".to_vec(), 0o640));
    let own = fs::metadata(&path).unwrap();
    let owner = Some((own.uid(), own.gid()));
    write_as(Write { mode: Some(0o4755), owner, ..write_call(&path) }, b"x");
    assert_eq!(mode(&path), 0o4755);
    assert_eq!(names(path.parent().unwrap()), ["a"]);
}

#[test]
fn what_is_cut_off_leaves_the_old_file_and_nothing_beside_it() {
    let dir = Scratch::new();
    let path = dir.path("a");
    fs::write(&path, "old").unwrap();
    let garbage = Frame::header(Channel::Stdout, 3).to_vec();
    for last in [Vec::new(), garbage, vec![255; 9], Frame::message(&Call::Freeze)] {
        let mut stream = dial_with(&Call::Write(write_call(&path)));
        stream.write_all(&Frame::header(Channel::Data, 3)).unwrap();
        stream.write_all(b"new").unwrap();
        stream.write_all(&last).unwrap();
        stream.shutdown(std::net::Shutdown::Write).unwrap();
        let mut connection = Connection::new(stream);
        assert_eq!(connection.receive_message::<Reply>().unwrap(), Reply::Done);
        connection.receive().unwrap_err();
        assert_eq!(fs::read(&path).unwrap(), b"old");
        assert_eq!(names(path.parent().unwrap()), ["a"]);
    }
}

#[test]
fn a_link_is_kept_and_what_it_leads_to_is_written() {
    let dir = Scratch::new();
    let (link, target) = (dir.path("link"), dir.path("target"));
    symlink("target", &link).unwrap();
    assert_eq!(write(&link, b"one"), Reply::Done);
    assert_eq!(write(&link, b"two"), Reply::Done);
    assert_eq!(fs::read(&target).unwrap(), b"two");
    assert!(fs::symlink_metadata(&link).unwrap().is_symlink());
    symlink("circle", dir.path("circle")).unwrap();
    assert_eq!(failure(write(&dir.path("circle"), b"")).errno, 40);
}

#[test]
fn a_full_disk_is_said_so_and_leaves_the_old_file() {
    assert_eq!(failure(write(Path::new("/dev/full"), &[1; 200_000])).kind, FailureKind::Full);
    assert_eq!(write(Path::new("/dev/null"), &[1; 200_000]), Reply::Done);
    // A file system of two pages, if a namespace of mounts can be had.
    let dir = Scratch::new();
    let Some(holder) = SmallDisk::at(&dir.path("")) else {
        return eprintln!("a full disk is not tested, which takes the right to mount one");
    };
    let path = PathBuf::from(format!("/proc/{}/root", holder.0.id()))
        .join(dir.path("a").strip_prefix("/").unwrap());
    assert_eq!(fs::read(&path).unwrap(), b"ok\n");
    assert_eq!(failure(write(&path, &[1; 200_000])).kind, FailureKind::Full);
    assert_eq!(fs::read(&path).unwrap(), b"ok\n");
    assert_eq!(names(path.parent().unwrap()), ["a"]);
}

/// A process that has a file system of two pages, with a file `a`, and is killed with the test.
struct SmallDisk(process::Child);

impl SmallDisk {
    fn at(place: &Path) -> Option<Self> {
        let mount = format!(
            "mount -t tmpfs -o size=8192 none {0} && echo ok > {0}/a && echo up && exec sleep 1000",
            place.display()
        );
        let mut unshare = process::Command::new("unshare");
        unshare.args(["-m", "sh", "-c", &mount]).stdout(process::Stdio::piped());
        let mut disk = Self(unshare.spawn().ok()?);
        let mut said = [0; 3];
        disk.0.stdout.take()?.read_exact(&mut said).is_ok().then_some(disk)
    }
}

impl Drop for SmallDisk {
    fn drop(&mut self) {
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

#[test]
fn paths_are_absolute_without_a_nul_and_of_the_systems_lengths() {
    let long_name = format!("/tmp/{}", "n".repeat(256));
    let long_path = format!("/{}", "a/".repeat(2100));
    let cases: [(&[u8], i32); 6] = [
        (b"tmp/a", 0),
        (b"", 0),
        (b"/tmp/a\0b", 0),
        (b"/tmp/\0", 0),
        (long_name.as_bytes(), 36),
        (long_path.as_bytes(), 36),
    ];
    for (path, errno) in cases {
        let path = || Bytes::from(path);
        let calls = [
            Call::Stat(path()),
            Call::List(path()),
            Call::Read(Read { path: path(), offset: 0, length: None }),
            Call::Write(Write { path: path(), mode: None, owner: None, sync: false }),
            Call::Remove(Remove { path: path(), recursive: true }),
            Call::MakeDirectory(MakeDirectory { path: path(), mode: 0o755, parents: false }),
            Call::CopyIn(path()),
            Call::CopyOut(path()),
        ];
        for asked in calls {
            let is_copy_in = matches!(asked, Call::CopyIn(_)) && path().0 == long_name.as_bytes();
            if is_copy_in {
                continue;
            }
            let failure = failure(ask(&asked));
            assert_eq!((failure.kind, failure.errno), (FailureKind::Invalid, errno), "{asked:?}");
        }
    }
}

#[test]
fn what_is_not_there_or_is_something_else_is_told_apart() {
    let dir = Scratch::new();
    fs::create_dir(dir.path("d")).unwrap();
    let kind = |asked: Call| failure(ask(&asked)).kind;
    let gone = bytes(dir.path("gone"));
    assert_eq!(kind(Call::Stat(gone.clone())), FailureKind::NotFound);
    assert_eq!(kind(Call::List(gone.clone())), FailureKind::NotFound);
    assert_eq!(
        kind(Call::Read(Read { path: gone.clone(), offset: 0, length: None })),
        FailureKind::NotFound
    );
    assert_eq!(kind(Call::Remove(Remove { path: gone, recursive: true })), FailureKind::NotFound);
    assert_eq!(kind(Call::Write(write_call(&dir.path("gone/a")))), FailureKind::NotFound);
    assert_eq!(kind(Call::Write(write_call(&dir.path("d")))), FailureKind::Invalid);
    let directory = Read { path: bytes(dir.path("d")), offset: 0, length: None };
    assert_eq!(kind(Call::Read(directory)), FailureKind::Invalid);
}

#[test]
fn a_directory_is_made_listed_and_removed() {
    let dir = Scratch::new();
    let make = |name: &str, mode, parents| {
        let path = bytes(dir.path(name));
        ask(&Call::MakeDirectory(MakeDirectory { path, mode, parents }))
    };
    assert_eq!(make("d", 0o1777, false), Reply::Done);
    assert_eq!(mode(&dir.path("d")), 0o1777);
    assert_eq!(failure(make("d", 0o700, false)).kind, FailureKind::Exists);
    assert_eq!(failure(make("x/y", 0o700, false)).kind, FailureKind::NotFound);
    assert_eq!(make("d/e/f", 0o700, true), Reply::Done);
    // One that is there stays as it is.
    assert_eq!(make("d/e/f", 0o750, true), Reply::Done);
    assert_eq!((mode(&dir.path("d/e/f")), mode(&dir.path("d/e"))), (0o700, 0o755));
    symlink(dir.path("d/e/f"), dir.path("to-f")).unwrap();
    assert_eq!(make("to-f", 0o755, true), Reply::Done);
    assert_eq!(mode(&dir.path("d/e/f")), 0o700);
    fs::write(dir.path("file"), "").unwrap();
    assert_eq!(failure(make("file", 0o755, true)).kind, FailureKind::Exists);
    fs::remove_file(dir.path("file")).unwrap();
    fs::remove_file(dir.path("to-f")).unwrap();
    let odd = dir.path("d").join(OsString::from_vec(b"\xff\n".to_vec()));
    fs::write(&odd, "odd").unwrap();
    symlink("/nowhere", dir.path("d/link")).unwrap();
    let mut connection = call(&Call::List(bytes(dir.path("d"))));
    let mut found = Vec::new();
    loop {
        match connection.receive_message().unwrap() {
            Reply::Entry(entry) => found.push((entry.name.0, entry.stat.kind, entry.stat.size)),
            Reply::Done => break,
            other => panic!("{other:?}"),
        }
    }
    found.sort_by(|a, b| a.0.cmp(&b.0));
    assert_eq!(found[0].0, b"e");
    assert_eq!(
        found[1..],
        [(b"link".to_vec(), FileKind::Symlink, 8), (b"\xff\n".to_vec(), FileKind::File, 3)]
    );
    let remove = |name: &str, recursive| {
        ask(&Call::Remove(Remove { path: bytes(dir.path(name)), recursive }))
    };
    assert_eq!(failure(remove("d", false)).kind, FailureKind::Exists);
    assert_eq!(remove("d/link", false), Reply::Done);
    assert_eq!(remove("d", true), Reply::Done);
    assert!(!dir.path("d").exists());
}

#[test]
fn a_tree_is_removed_without_following_links() {
    let dir = Scratch::new();
    fs::create_dir_all(dir.path("keep/below")).unwrap();
    fs::write(dir.path("keep/file"), "").unwrap();
    fs::create_dir_all(dir.path("tree/sub")).unwrap();
    symlink(dir.path("keep"), dir.path("tree/link")).unwrap();
    symlink(dir.path("keep"), dir.path("tree/sub/link")).unwrap();
    symlink(dir.path("tree"), dir.path("root")).unwrap();
    let remove =
        |name: &str| ask(&Call::Remove(Remove { path: bytes(dir.path(name)), recursive: true }));
    assert_eq!(remove("root"), Reply::Done);
    assert!(dir.path("tree/sub").exists());
    assert_eq!(remove("tree"), Reply::Done);
    assert!(!dir.path("tree").exists() && dir.path("keep/below").exists());
    assert!(dir.path("keep/file").exists());
}

#[test]
fn a_deep_tree_is_removed_within_a_small_stack() {
    let dir = Scratch::new();
    let mut path = dir.path("deep");
    for _ in 0..900 {
        fs::create_dir(&path).unwrap();
        path.push("d");
    }
    let remove = Call::Remove(Remove { path: bytes(dir.path("deep")), recursive: true });
    assert_eq!(ask(&remove), Reply::Done);
    assert!(!dir.path("deep").exists());
}

/// The most that this process has ever had in memory, in KiB.
fn peak_kib() -> u64 {
    let status = fs::read_to_string("/proc/self/status").unwrap();
    let line = status.lines().find_map(|line| line.strip_prefix("VmHWM:")).unwrap();
    line.split_whitespace().next().unwrap().parse().unwrap()
}

#[test]
fn a_gibibyte_passes_and_next_to_nothing_of_it_is_held() {
    const NAME: &str = "a_gibibyte_passes_and_next_to_nothing_of_it_is_held";
    const ALONE: &str = "DORMOUSE_TEST_ALONE";
    // In a process of its own: other tests take memory, too.
    if env::var_os(ALONE).is_none() {
        let mut itself = process::Command::new(env::current_exe().unwrap());
        let output = itself.args(["--nocapture", NAME]).env(ALONE, "1").output().unwrap();
        let text = String::from_utf8_lossy(&output.stdout);
        let errors = String::from_utf8_lossy(&output.stderr);
        assert!(output.status.success() && text.contains("1 passed"), "{text}{errors}");
        return;
    }
    let dir = Scratch::new();
    let path = dir.path("large");
    let piece: Vec<u8> = (0..1 << 20).map(|at| (at % 251) as u8).collect();
    let before = peak_kib();
    let mut connection = call(&Call::Write(write_call(&path)));
    assert_eq!(connection.receive_message::<Reply>().unwrap(), Reply::Done);
    for _ in 0..1024 {
        data(&mut connection, &piece);
    }
    connection.queue_end().unwrap();
    connection.flush().unwrap();
    assert_eq!(connection.receive_message::<Reply>().unwrap(), Reply::Done);
    assert_eq!(fs::metadata(&path).unwrap().len(), 1 << 30);
    let whole = Read { path: bytes(&path), offset: 0, length: None };
    let mut connection = call(&Call::Read(whole));
    assert!(matches!(connection.receive_message().unwrap(), Reply::Stat(_)));
    let mut at = 0;
    loop {
        let frame = connection.receive().unwrap();
        assert_eq!(frame.channel, Channel::Data);
        if frame.bytes.is_empty() {
            break;
        }
        // The pieces that come are not those that went.
        let first = at % piece.len();
        let count = frame.bytes.len().min(piece.len() - first);
        assert!(frame.bytes[..count] == piece[first..first + count], "at {at}");
        assert!(frame.bytes[count..] == piece[..frame.bytes.len() - count], "at {at}");
        at += frame.bytes.len();
    }
    assert_eq!(at, 1 << 30);
    // Both sides of it together.
    let grown = peak_kib() - before;
    assert!(grown < 8 << 10, "{grown} KiB");
}

use std::fs;
use std::os::unix::fs::{MetadataExt, PermissionsExt, symlink};
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::thread;
use std::time::Duration;

use super::*;
use crate::agent::tests::{agent_of, heard};
use crate::config::AgentConfig;
use crate::error::ErrorKind;
use crate::protocol::{Bytes, Entry, Failure, FailureKind, FileKind, Stat, Symlink};

struct Scratch(PathBuf);

impl Scratch {
    fn new(name: &str) -> Self {
        let path = std::env::temp_dir();
        let path = path.join(format!("dormouse-tree-{name}-{}", std::process::id()));
        let _ = fs::remove_dir_all(&path);
        fs::create_dir(&path).unwrap();
        Self(path)
    }
}

impl Drop for Scratch {
    fn drop(&mut self) {
        let _ = fs::remove_dir_all(&self.0);
    }
}

fn wire(socket: UnixStream, patience: Duration) -> BlockingWire {
    BlockingWire { socket: PatientSocket::new(socket, patience).unwrap(), body: Vec::new() }
}

fn pair() -> (BlockingWire, BlockingWire) {
    let (a, b) = UnixStream::pair().unwrap();
    (wire(a, PATIENCE), wire(b, PATIENCE))
}

fn receive(wire: &mut BlockingWire, path: &Path, limits: &CopyLimits) -> Result<Copied, String> {
    write::receive(wire, path, limits).map_err(|error| match error {
        TreeError::Wire => "the connection is over".to_owned(),
        TreeError::Silent => "the guest is silent".to_owned(),
        TreeError::Other(error) => error.to_string(),
    })
}

fn facts(kind: FileKind, mode: u32) -> Stat {
    Stat { kind, mode, uid: 0, gid: 0, size: 0, modified_ns: 1_500_000_000 }
}

fn directory(name: &str) -> Node {
    Node::Directory(Entry { name: Bytes::from(name), stat: facts(FileKind::Directory, 0o755) })
}

fn file(name: &str) -> Node {
    Node::File(Entry { name: Bytes::from(name), stat: facts(FileKind::File, 0o6777) })
}

fn link(name: &str, target: &str) -> Node {
    let entry = Entry { name: Bytes::from(name), stat: facts(FileKind::Symlink, 0o777) };
    Node::Symlink(Symlink { entry, target: Bytes::from(target) })
}

/// What a guest says, to a host that writes it below `path`.
fn says(path: &Path, frames: &[Vec<u8>]) -> Result<Copied, String> {
    let (mut host, mut guest) = pair();
    let bytes = frames.concat();
    let saying = thread::spawn(move || {
        let _ = guest.send_raw(&bytes);
        let _ = guest.socket.socket().shutdown(Shutdown::Write);
    });
    let said = receive(&mut host, path, &CopyLimits::new().bytes(100).entries(10));
    drop(host);
    saying.join().unwrap();
    said
}

fn frames(nodes: &[Node]) -> Vec<Vec<u8>> {
    nodes.iter().map(Frame::message).collect()
}

fn data(bytes: &[u8]) -> Vec<u8> {
    [&Frame::header(Channel::Data, bytes.len())[..], bytes].concat()
}

#[test]
fn a_tree_is_the_same_on_the_other_side() {
    let scratch = Scratch::new("same");
    let from = scratch.0.join("from");
    fs::create_dir_all(from.join("a/b")).unwrap();
    fs::write(from.join("a/b/text"), vec![7; 200_000]).unwrap();
    fs::set_permissions(from.join("a/b/text"), fs::Permissions::from_mode(0o751)).unwrap();
    fs::set_permissions(from.join("a"), fs::Permissions::from_mode(0o555)).unwrap();
    symlink("nowhere/../x", from.join("link")).unwrap();
    let sparse = fs::File::create(from.join("sparse")).unwrap();
    sparse.set_len(1 << 30).unwrap();
    std::os::unix::fs::FileExt::write_all_at(&sparse, b"end", (1 << 30) - 3).unwrap();
    let to = scratch.0.join("to");
    let (mut host, mut guest) = pair();
    let path = from.clone();
    let sending = thread::spawn(move || match read::send(&mut host, &path) {
        Ok(copied) => copied,
        Err(_) => panic!("not sent"),
    });
    let received = receive(&mut guest, &to, &CopyLimits::new()).unwrap();
    guest.send_raw(&Frame::message(&Reply::Done)).unwrap();
    assert_eq!(sending.join().unwrap(), received);
    assert_eq!(received.entries, 6);
    assert_eq!(fs::read(to.join("a/b/text")).unwrap(), vec![7; 200_000]);
    let mode = |path: &str| fs::metadata(to.join(path)).unwrap().mode() & 0o7777;
    assert_eq!((mode("a/b/text"), mode("a")), (0o751, 0o555));
    assert_eq!(fs::read_link(to.join("link")).unwrap(), Path::new("nowhere/../x"));
    let sparse = fs::metadata(to.join("sparse")).unwrap();
    assert_eq!(sparse.len(), 1 << 30);
    assert!(sparse.blocks() < 1000, "{}", sparse.blocks());
    let modified = |path: &Path| fs::metadata(path).unwrap().modified().unwrap();
    assert_eq!(modified(&from.join("a/b/text")), modified(&to.join("a/b/text")));
    for path in ["from/a", "to/a"] {
        fs::set_permissions(scratch.0.join(path), fs::Permissions::from_mode(0o755)).unwrap();
    }
}

#[test]
fn names_lead_nowhere_else() {
    let scratch = Scratch::new("names");
    let to = scratch.0.join("to");
    let long = "x".repeat(256);
    for name in ["..", ".", "", "a/b", "/etc/passwd", "a\0", &long] {
        for node in [file(name), directory(name), link(name, "x")] {
            let error = says(&to, &frames(&[directory(""), node])).unwrap_err();
            assert!(error.contains("a name that is none"), "{error}");
        }
    }
    let names: Vec<_> = fs::read_dir(&scratch.0).unwrap().collect();
    assert_eq!(names.len(), 1);
}

#[test]
fn links_are_made_and_never_followed() {
    let scratch = Scratch::new("links");
    let (to, outside) = (scratch.0.join("to"), scratch.0.join("outside"));
    fs::create_dir(&outside).unwrap();
    fs::write(outside.join("kept"), "kept").unwrap();
    // Into a directory that is a link.
    let nodes = [directory(""), link("d", "../outside"), directory("d")];
    says(&to, &frames(&nodes)).unwrap_err();
    // A file in the place of a link is a file, not what the link points to.
    let mut said = frames(&[directory(""), link("f", "../outside/kept"), file("f")]);
    said.extend([data(b"mine"), data(b"")]);
    said.extend(frames(&[Node::Leave, Node::End]));
    says(&to, &said).unwrap();
    assert_eq!(fs::read(outside.join("kept")).unwrap(), b"kept");
    assert_eq!(fs::read(to.join("f")).unwrap(), b"mine");
    assert_eq!(fs::metadata(to.join("f")).unwrap().mode() & 0o7777, 0o777, "no set-user-id");
    assert_eq!(fs::read_dir(&outside).unwrap().count(), 1);
}

#[test]
fn too_much_too_deep_and_nonsense_are_refused() {
    let scratch = Scratch::new("nonsense");
    let to = scratch.0.join("to");
    let refused = |said: &[Vec<u8>], why: &str| {
        let _ = fs::remove_dir_all(&to).or_else(|_| fs::remove_file(&to));
        let error = says(&to, said).unwrap_err();
        assert!(error.contains(why), "{error}");
    };
    let many: Vec<_> = (0..11).map(|at| link(&at.to_string(), "x")).collect();
    refused(&frames(&[&[directory("")][..], &many].concat()), "more than 10");
    let mut said = frames(&[file("")]);
    said.push(data(&[1; 101]));
    refused(&said, "more than 100");
    refused(&frames(&[file(""), Node::Hole(u64::MAX)]), "a file without an end");
    // Each byte takes a block of the disk.
    let mut said = frames(&[file("")]);
    for _ in 0..2 {
        said.push(data(&[1]));
        said.extend(frames(&[Node::Hole(4095)]));
    }
    refused(&said, "more than 100");
    let nothing = [&[file("")][..], &vec![Node::Hole(1); 101]].concat();
    refused(&frames(&nothing), "more than 100");
    refused(&frames(&[file(""), Node::Hole(0)]), "a hole of nothing");
    refused(&frames(&[file(""), Node::Leave]), "a file in a file");
    refused(&frames(&[Node::Leave]), "the end of no directory");
    refused(&frames(&[Node::Hole(1)]), "a hole outside of a file");
    refused(&frames(&[directory(""), Node::End]), "a directory without its end");
    refused(&frames(&[directory(""), Node::Leave, directory("x")]), "two roots");
    refused(&[vec![1, 0, 0, 0, 0, 99]], "no message");
    refused(&[], "the connection is over");
    let deep: Vec<_> =
        std::iter::once(directory("")).chain((0..9).map(|_| directory("d"))).collect();
    refused(&frames(&deep), "the connection is over");
}

#[test]
fn directories_that_are_there_stay_as_they_are() {
    let scratch = Scratch::new("kept");
    let to = scratch.0.join("to");
    fs::create_dir_all(to.join("private")).unwrap();
    let kept = [(to.clone(), 0o1711), (to.join("private"), 0o700)];
    for (path, mode) in &kept {
        fs::set_permissions(path, fs::Permissions::from_mode(*mode)).unwrap();
    }
    let nodes = [directory(""), directory("private"), Node::Leave, directory("new"), Node::Leave];
    says(&to, &frames(&[&nodes[..], &[Node::Leave, Node::End]].concat())).unwrap();
    for (path, mode) in &kept {
        assert_eq!(fs::metadata(path).unwrap().mode() & 0o7777, *mode, "{}", path.display());
    }
    assert_ne!(fs::metadata(to.join("new")).unwrap().mode() & 0o7777, 0o700);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_guest_whose_disk_is_full_is_sent_no_more_of_the_tree() {
    let scratch = Scratch::new("full");
    let path = scratch.0.join("large");
    fs::write(&path, vec![7; 32 << 20]).unwrap();
    let (agent, mut guests) = agent_of(AgentConfig::new(), 1);
    let mut guest = guests.remove(0);
    let reading = thread::spawn(move || {
        heard(&mut guest);
        guest.write_all(&Frame::message(&Reply::Done)).unwrap();
        heard(&mut guest);
        let full = Failure { kind: FailureKind::Full, errno: 28, what: "write /f".into() };
        guest.write_all(&Frame::message(&Reply::Failed(full))).unwrap();
        // As the agent does, which throws it away.
        io::copy(&mut guest, &mut io::sink()).unwrap()
    });
    let error = agent.copy_in(&path, "/f").await.unwrap_err();
    assert_eq!(error.kind(), &ErrorKind::File(io::ErrorKind::StorageFull), "{error}");
    let rest = reading.join().unwrap();
    assert!(rest < 4 << 20, "{rest} bytes");
}

#[test]
fn a_tree_of_the_host_that_is_too_deep_is_named_as_such() {
    let scratch = Scratch::new("deep");
    let mut path = scratch.0.join("d");
    for _ in 0..=MAX_DEPTH {
        fs::create_dir(&path).unwrap();
        path.push("d");
    }
    let (mut host, guest) = pair();
    let taking = thread::spawn(move || {
        let _ = io::copy(&mut guest.socket.socket(), &mut io::sink());
    });
    let sent = read::send(&mut host, &scratch.0.join("d"));
    let Err(TreeError::Other(error)) = sent else { panic!("{sent:?}") };
    assert_eq!(error.kind(), &ErrorKind::Resources);
    assert!(error.to_string().contains("/d/d/d"), "{error}");
    drop(host);
    taking.join().unwrap();
}

#[test]
fn a_guest_that_goes_silent_ends_the_copy() {
    let scratch = Scratch::new("silent");
    let patience = Duration::from_millis(50);
    let patient = |(ours, theirs): (UnixStream, UnixStream)| (wire(ours, patience), theirs);
    // Between two frames, and in the middle of one.
    for said in [frames(&[directory("")]).concat(), Frame::header(Channel::Data, 100).to_vec()] {
        let (mut host, mut guest) = patient(UnixStream::pair().unwrap());
        guest.write_all(&said).unwrap();
        let error = receive(&mut host, &scratch.0.join("to"), &CopyLimits::new()).unwrap_err();
        assert_eq!(error, "the guest is silent");
    }
    // It takes nothing any more.
    let path = scratch.0.join("large");
    fs::write(&path, vec![7; 4 << 20]).unwrap();
    let (mut host, _guest) = patient(UnixStream::pair().unwrap());
    assert!(matches!(read::send(&mut host, &path), Err(TreeError::Silent)));
}

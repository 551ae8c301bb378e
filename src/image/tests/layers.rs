//! What layers say becomes what a guest sees.

use super::tar::Tar;
use super::*;

#[test]
fn everything_that_a_layer_says_of_a_file_is_in_the_root() {
    let set = |header: &mut ::tar::Header| {
        header.set_mode(0o104_755);
        header.set_uid(1000);
        header.set_gid(70_000);
        header.set_mtime(1_234_567_890);
    };
    let device = |header: &mut ::tar::Header| {
        header.set_device_major(8).unwrap();
        header.set_device_minor(300).unwrap();
    };
    let long_target = "x/".repeat(300);
    let layer = Tar::new()
        .dir("./")
        .entry(b'0', b"./file", set, b"content")
        .symlink("link", "/no/where")
        .symlink("long-link", &long_target)
        .hard_link("other", "file")
        .entry(b'3', b"char", device, b"")
        .entry(b'4', b"block", device, b"")
        .entry(b'6', b"fifo", |_| {}, b"")
        .entry(b'5', b"sticky/", |header| header.set_mode(0o1777), b"")
        .file("empty", "");
    let root = unpack(&[layer.end()]).unwrap();
    let file = root.at("file");
    assert_eq!((file.mode, file.uid, file.gid), (0o104_755, 1000, 70_000));
    assert_eq!((file.mtime, file.links), ((1_234_567_890, 0), 2));
    assert_eq!(root.text("file"), "content");
    assert_eq!(root.at("other").inode, file.inode);
    assert_eq!((root.at("link").mode, root.text("link")), (0o120_644, "/no/where"));
    assert_eq!(root.text("long-link"), long_target);
    // minor & 0xff | major << 8 | (minor & !0xff) << 12
    assert_eq!((root.at("char").mode, root.at("char").device), (0o020_644, 0x10_082c));
    assert_eq!(root.at("block").mode, 0o060_644);
    assert_eq!(root.at("fifo").mode, 0o010_644);
    assert_eq!(root.at("sticky").mode, 0o041_777);
    assert_eq!(root.text("empty"), "");
    assert_eq!(root.at("").mtime, (1_000_000, 0));
}

#[test]
fn pax_records_say_what_headers_have_no_room_for() {
    let name = "directory/".repeat(30) + "file";
    let capability = b"\x01\0\0\x02\n\0\n\0";
    let layer = Tar::new()
        .pax(&[
            ("path", name.as_bytes()),
            ("uid", b"3000000"),
            ("mtime", b"12.25"),
            ("SCHILY.xattr.security.capability", capability),
            ("SCHILY.xattr.user.large", &[7; 9000]),
            ("SCHILY.xattr.com.apple.provenance", b"left out"),
            ("SCHILY.xattr.trusted.overlay.opaque", b"y"),
        ])
        .file("short", "x")
        .pax(&[("linkpath", name.as_bytes())])
        .hard_link("hard", "?")
        .pax(&[("SCHILY.xattr.user.a", b"1")])
        .symlink("soft", "target");
    let root = unpack(&[layer.end()]).unwrap();
    let file = root.at(&name);
    assert_eq!((file.uid, file.mtime, file.links), (3_000_000, (12, 250_000_000), 2));
    assert_eq!(file.xattrs["security.capability"], capability);
    assert_eq!(file.xattrs["user.large"], [7; 9000]);
    assert_eq!(file.xattrs.len(), 2);
    assert_eq!(root.at("hard").inode, file.inode);
    assert_eq!((root.text("soft"), root.at("soft").xattrs.len()), ("target", 1));
}

#[test]
fn an_upper_layer_hides_what_it_says() {
    let lower = Tar::new()
        .dir("etc")
        .file("etc/kept", "1")
        .file("etc/removed", "2")
        .dir("var/cache")
        .file("var/cache/a", "3")
        .file("var/cache/sub/b", "4")
        .dir("gone/deep")
        .file("gone/deep/er", "5")
        .file("replaced", "old");
    let upper = Tar::new()
        .file("var/cache/sub/new", "6")
        .file("etc/.wh.removed", "")
        .file("var/cache/.wh..wh..opq", "")
        .file("var/cache/after", "7")
        .file(".wh.gone", "")
        .file(".wh.never", "")
        .file("nowhere/.wh.x", "")
        .file(".wh..wh.plnk/x", "")
        .file("replaced", "new");
    let root = unpack(&[lower.end(), upper.end()]).unwrap();
    let paths = [
        ".wh..wh.plnk",
        ".wh..wh.plnk/x",
        "etc",
        "etc/kept",
        "replaced",
        "var",
        "var/cache",
        "var/cache/after",
        "var/cache/sub",
        "var/cache/sub/new",
    ];
    assert_eq!(root.paths(), paths);
    assert_eq!(root.text("replaced"), "new");
}

#[test]
fn a_whiteout_is_about_layers_below_only_wherever_it_stands() {
    let lower = Tar::new().file("dir/old", "1").file("file", "old");
    let before = Tar::new()
        .file(".wh.dir", "")
        .dir("dir")
        .file("dir/new", "2")
        .file(".wh.file", "")
        .file("file", "n");
    let after = Tar::new()
        .dir("dir")
        .file("dir/new", "2")
        .file(".wh.dir", "")
        .file("file", "n")
        .file(".wh.file", "");
    for upper in [before, after] {
        let root = unpack(&[lower.clone().end(), upper.end()]).unwrap();
        assert_eq!(root.paths(), ["dir", "dir/new", "file"]);
        assert_eq!(root.text("file"), "n");
    }
}

#[test]
fn a_directory_over_a_directory_changes_it_and_anything_else_replaces() {
    let lower = Tar::new()
        .dir("dir")
        .file("dir/kept", "1")
        .dir("becomes-file")
        .file("becomes-file/x", "2")
        .file("becomes-dir", "3")
        .symlink("link", "dir");
    let upper = Tar::new()
        .entry(b'5', b"dir", |header| header.set_mode(0o700), b"")
        .file("becomes-file", "4")
        .dir("becomes-dir")
        .file("becomes-dir/y", "5")
        .dir("link")
        .file("link/own", "6");
    let root = unpack(&[lower.end(), upper.end()]).unwrap();
    assert_eq!(root.at("dir").mode, 0o040_700);
    assert_eq!(
        root.paths(),
        ["becomes-dir", "becomes-dir/y", "becomes-file", "dir", "dir/kept", "link", "link/own"]
    );
}

#[test]
fn names_lead_through_symbolic_links_as_in_a_running_system() {
    let lower =
        Tar::new().dir("usr/bin").symlink("bin", "usr/bin").symlink("abs", "/usr/../usr/./bin");
    let upper = Tar::new()
        .file("bin/one", "1")
        .file("/abs/two", "2")
        .hard_link("bin/three", "abs/one")
        .symlink("up", "../../../usr")
        .file("up/four", "4");
    let root = unpack(&[lower.end(), upper.end()]).unwrap();
    let paths = [
        "abs",
        "bin",
        "up",
        "usr",
        "usr/bin",
        "usr/bin/one",
        "usr/bin/three",
        "usr/bin/two",
        "usr/four",
    ];
    assert_eq!(root.paths(), paths);
    assert_eq!(root.at("usr/bin/one").links, 2);
}

#[test]
fn a_link_keeps_what_it_leads_to_when_that_is_replaced() {
    let lower = Tar::new().file("a", "first").hard_link("b", "a");
    let upper = Tar::new().file("a", "second").hard_link("c", "b").hard_link("b", "b");
    let root = unpack(&[lower.end(), upper.end()]).unwrap();
    assert_eq!((root.text("a"), root.text("b"), root.text("c")), ("second", "first", "first"));
    assert_eq!((root.at("a").links, root.at("b").links), (1, 2));
}

#[test]
fn the_last_of_two_entries_with_one_name_counts() {
    let layer = Tar::new().file("x", "first").file("./x", "second").dir("y").file("y", "file");
    let root = unpack(&[layer.end()]).unwrap();
    assert_eq!((root.text("x"), root.text("y")), ("second", "file"));
}

#[test]
fn names_need_not_be_utf_8() {
    let layer = Tar::new().entry(b'0', b"caf\xe9", |_| {}, b"x").entry(
        b'0',
        b"\xff\xfe/\x01",
        |_| {},
        b"y",
    );
    let root = unpack(&[layer.end()]).unwrap();
    assert_eq!(root.paths(), ["\\xff\\xfe", "\\xff\\xfe/\\x01", "caf\\xe9"]);
}

#[test]
fn sparse_files_are_whole_in_each_format() {
    let mut expected = vec![0; 20_000];
    expected[4096..4101].copy_from_slice(b"hello");
    expected[12_000..12_003].copy_from_slice(b"end");
    let old = |header: &mut ::tar::Header| {
        let gnu = header.as_gnu_mut().unwrap();
        gnu.sparse[0].set_offset(4096);
        gnu.sparse[0].set_length(5);
        gnu.sparse[1].set_offset(12_000);
        gnu.sparse[1].set_length(3);
        gnu.set_real_size(20_000);
    };
    let mut map = b"2\n4096\n5\n12000\n3\n".to_vec();
    map.resize(512, 0);
    map.extend(b"helloend");
    let layer = Tar::new()
        .entry(b'S', b"old", old, b"helloend")
        .pax(&[
            ("GNU.sparse.major", b"0"),
            ("GNU.sparse.minor", b"1"),
            ("GNU.sparse.name", b"0.1"),
            ("GNU.sparse.size", b"20000"),
            ("GNU.sparse.map", b"4096,5,12000,3"),
        ])
        .file("GNUSparseFile.0/0.1", "helloend")
        .pax(&[
            ("GNU.sparse.size", b"20000"),
            ("GNU.sparse.numblocks", b"2"),
            ("GNU.sparse.offset", b"4096"),
            ("GNU.sparse.numbytes", b"5"),
            ("GNU.sparse.offset", b"12000"),
            ("GNU.sparse.numbytes", b"3"),
        ])
        .file("0.0", "helloend")
        .pax(&[
            ("GNU.sparse.major", b"1"),
            ("GNU.sparse.minor", b"0"),
            ("GNU.sparse.name", b"1.0"),
            ("GNU.sparse.realsize", b"20000"),
        ])
        .entry(b'0', b"GNUSparseFile.0/1.0", |_| {}, &map)
        .file("after", "x");
    let root = unpack(&[layer.end()]).unwrap();
    assert_eq!(root.paths(), ["0.0", "0.1", "1.0", "after", "old"]);
    for path in ["old", "0.1", "0.0", "1.0"] {
        assert!(root.at(path).data == expected, "{path}");
    }
}

#[test]
fn large_directories_and_large_files_are_whole() {
    let mut tar = Tar::new();
    for number in 0..3000 {
        tar = tar.file(&format!("many/file-{number:05}"), &number.to_string());
    }
    let large: String = (0..700_000).map(|n| char::from(b'a' + (n % 23) as u8)).collect();
    let mut layer = tar.file("large", &large).dir("wide");
    for number in 0..40 {
        layer = layer.dir(&format!("wide/{}{number}", "n".repeat(90)));
    }
    let root = unpack(&[layer.end()]).unwrap();
    assert_eq!(root.paths().iter().filter(|path| path.starts_with("many/")).count(), 3000);
    assert_eq!(root.text("many/file-02999"), "2999");
    assert_eq!(root.text("large"), large);
    assert_eq!(root.at("wide").links, 42);
}

#[test]
fn the_same_layers_are_the_same_bytes_however_they_are_packed() {
    let lower = Tar::new().file("a", &"x".repeat(100_000)).file("b", "kept").end();
    let upper = Tar::new().file("a", "short").file(".wh.b", "").end();
    let gzip = |bytes: &[u8]| {
        use std::io::Write;
        let mut packed = flate2::write::GzEncoder::new(Vec::new(), flate2::Compression::fast());
        packed.write_all(bytes).unwrap();
        packed.finish().unwrap()
    };
    let plain = root_of(&[lower.clone(), upper.clone()], limits()).unwrap();
    // Two streams, one behind the other, are one layer.
    let (front, back) = lower.split_at(50_000);
    let split = [gzip(front), gzip(back)].concat();
    let zstd = zstd::encode_all(&upper[..], 3).unwrap();
    assert!(root_of(&[split, zstd], limits()).unwrap() == plain);
    assert!(root_of(&[gzip(&lower), gzip(&upper)], limits()).unwrap() == plain);
    // What no file has any more is zeros.
    assert!(!plain.windows(8).any(|window| window == b"xxxxxxxx"));
    assert_eq!(Listing::read(&plain).text("a"), "short");
}

#[test]
fn a_root_is_found_wherever_its_names_leave_it_room() {
    // From one that lies beside its names in the first block to one whose names have a block of their own.
    for count in 194..=206 {
        let files = (0..count).fold(Tar::new(), |tar, at| tar.file(&format!("file-{at:03}"), "x"));
        let root = unpack(&[files.end()]).unwrap();
        assert_eq!(root.paths().len(), count, "{count}");
        assert_eq!(root.text("file-000"), "x");
    }
}

#[test]
fn large_ids_of_gnu_tar_are_read() {
    let layer = Tar::new().entry(b'0', b"f", |header| header.set_uid(1_234_567_890), b"x");
    assert_eq!(unpack(&[layer.end()]).unwrap().at("f").uid, 1_234_567_890);
}

//! Layers by somebody who means harm.

use super::tar::Tar;
use super::*;
use crate::random::random;

#[test]
fn names_that_climb_out_are_refused() {
    for path in ["../x", "a/../../x", "..", "/../x", "a/.."] {
        let text = refusal(&[Tar::new().file(path, "x").end()]);
        assert!(text.contains("climbs out"), "{path}: {text}");
    }
    let text = refusal(&[Tar::new().hard_link("x", "../../etc/shadow").end()]);
    assert!(text.contains("climbs out"), "{text}");
    for whiteout in [".wh...", ".wh..", ".wh.", "a/.wh..."] {
        let text = refusal(&[Tar::new().file(whiteout, "").end()]);
        assert!(text.contains("whiteout of nothing"), "{whiteout}: {text}");
    }
}

#[test]
fn links_lead_nowhere_but_into_the_root() {
    // A name that nothing in /tmp has yet.
    let name = format!("dormouse-{:032x}", u128::from_ne_bytes(random().unwrap()));
    let layer = Tar::new()
        .symlink("out", "../../../../../../tmp")
        .file(&format!("out/{name}"), "in the root")
        .symlink("etc", "/../../etc")
        .symlink("swap", "a")
        .dir("a")
        .file("swap/1", "1")
        .symlink("swap", "b")
        .file("swap/2", "2");
    let root = unpack(&[layer.end()]).unwrap();
    assert_eq!(root.text(&format!("tmp/{name}")), "in the root");
    assert_eq!((root.text("a/1"), root.text("b/2")), ("1", "2"));
    assert!(!std::path::Path::new("/tmp").join(name).exists());
}

#[test]
fn links_in_circles_are_refused() {
    let circle = Tar::new().symlink("a", "b").symlink("b", "a");
    let text = refusal(&[circle.clone().file("a/x", "").end()]);
    assert!(text.contains("too many symbolic links"), "{text}");
    let text = refusal(&[circle.hard_link("x", "a/y").end()]);
    assert!(text.contains("too many symbolic links"), "{text}");
    let text = refusal(&[Tar::new().symlink("self", "self").dir("self/x").end()]);
    assert!(text.contains("too many symbolic links"), "{text}");
    let text = refusal(&[Tar::new().hard_link("a", "b").hard_link("b", "a").end()]);
    assert!(text.contains("not there"), "{text}");
    let text = refusal(&[Tar::new().dir("a").hard_link("a/b", "a").end()]);
    assert!(text.contains("to a directory"), "{text}");
}

#[test]
fn what_no_file_system_could_hold_is_refused() {
    let long = "n".repeat(256);
    let deep = "d/".repeat(300);
    let endless = "d/".repeat(3000);
    let nul = [("path", &b"a\0b"[..])];
    let device = |header: &mut ::tar::Header| header.set_device_major(1 << 12).unwrap();
    let cases = [
        (Tar::new().file(&long, ""), "longer than 255"),
        (Tar::new().dir(&deep), "too many directories"),
        (Tar::new().dir(&endless), "too long"),
        (
            Tar::new()
                .symlink("s", &"d/".repeat(200))
                .dir("s/x")
                .symlink("s/t", &"e/".repeat(200))
                .dir("s/t/y"),
            "too many directories",
        ),
        (Tar::new().symlink("s", &long).dir("s/x"), "a name that cannot be"),
        (Tar::new().symlink("s", &"x".repeat(4096)), "more than 4095 bytes"),
        (Tar::new().symlink("s", ""), "link to nothing"),
        (Tar::new().pax(&nul).file("x", ""), "a NUL"),
        (Tar::new().file("a", "").file("a/b", ""), "no directory"),
        (Tar::new().file("", "x"), "the root is replaced"),
        (Tar::new().symlink("./", "x"), "the root is replaced"),
        (Tar::new().entry(b'3', b"device", device, b""), "no device of such a number"),
        (
            Tar::new().pax(&[("SCHILY.xattr.user.x", &[0; 65_536])]).file("x", ""),
            "larger than Linux",
        ),
        (Tar::new().entry(b'V', b"volume", |_| {}, b""), "the type V"),
    ];
    for (layer, expected) in cases {
        let text = refusal(&[layer.end()]);
        assert!(text.contains(expected), "{expected}: {text}");
    }
}

#[test]
fn an_archive_that_ends_early_is_refused() {
    let whole = Tar::new().file("a", &"x".repeat(2000)).pax(&[("uid", b"1")]).file("b", "y").cut();
    // Between two entries it ends as an archive may.
    let ends = [0, 2560, whole.len()];
    for length in (0..=whole.len()).step_by(128).filter(|length| !ends.contains(length)) {
        assert!(unpack(&[whole[..length].to_vec()]).is_err(), "{length}");
    }
    for length in ends {
        unpack(&[whole[..length].to_vec()]).unwrap();
    }
    let gzip = {
        use std::io::Write;
        let mut packed = flate2::write::GzEncoder::new(Vec::new(), flate2::Compression::fast());
        packed.write_all(&Tar::new().file("a", "b").end()).unwrap();
        packed.finish().unwrap()
    };
    for length in [12, 40, gzip.len() - 1] {
        assert!(unpack(&[gzip[..length].to_vec()]).is_err(), "{length}");
    }
    assert!(unpack(&[[&gzip[..], b"garbage"].concat()]).is_err());
    let zstd = zstd::encode_all(&Tar::new().file("a", "b").end()[..], 3).unwrap();
    assert!(unpack(&[zstd[..zstd.len() - 3].to_vec()]).is_err());
    assert!(unpack(&[[&zstd[..], b"garbage"].concat()]).is_err());
}

#[test]
fn archives_that_contradict_themselves_are_refused() {
    let mut wrong_sum = Tar::new().file("a", "b").end();
    wrong_sum[0] = b'x';
    let behind_zeros = Tar::new().raw(&[0; 512]).file("a", "b").end();
    let html = b"<html><body>Not found</body></html>".repeat(40);
    for (layer, expected) in [
        (wrong_sum, "wrong checksum"),
        (behind_zeros, "behind a block of zeros"),
        (html, "wrong checksum"),
        (vec![0xfd, b'7', b'z', b'X', b'Z', 0, 0, 0], "packed with xz"),
    ] {
        let text = refusal(&[layer]);
        assert!(text.contains(expected), "{expected}: {text}");
    }
    let sparse = |map: &[u8], size: &[u8]| {
        Tar::new()
            .pax(&[
                ("GNU.sparse.major", b"0"),
                ("GNU.sparse.minor", b"1"),
                ("GNU.sparse.size", size),
                ("GNU.sparse.map", map),
            ])
            .file("x", "12345678")
            .end()
    };
    unpack(&[sparse(b"0,4,4,4", b"100")]).unwrap();
    for (map, size) in [
        (&b"0,4,2,4"[..], &b"100"[..]),
        (b"0,9", b"100"),
        (b"0,8", b"4"),
        (b"8,4,0,4", b"100"),
        (b"18446744073709551615,8", b"100"),
        (b"0,4,4", b"100"),
        (b"", b"100"),
        (b"0,-8", b"100"),
    ] {
        assert!(unpack(&[sparse(map, size)]).is_err(), "{}", map.escape_ascii());
    }
}

#[test]
fn more_than_the_limits_allow_is_refused_before_it_is_kept() {
    let few = Limits { bytes: 1 << 20, entries: 10, memory: 1 << 16, ratio: 200 };
    let refuse = |layers: &[Vec<u8>], expected: &str| {
        let text = root_of(layers, few).unwrap_err().to_string();
        assert!(text.contains(expected), "{expected}: {text}");
    };
    let many = (0..11).fold(Tar::new(), |tar, n| tar.file(&n.to_string(), ""));
    refuse(&[many.clone().end()], "more than 10 entries");
    let half = (0..6).fold(Tar::new(), |tar, n| tar.file(&n.to_string(), "")).end();
    refuse(&[half.clone(), half], "more than 10 entries");
    refuse(&[Tar::new().file("x", &"x".repeat(2 << 20)).end()], "bytes");
    let hole = [
        ("GNU.sparse.major", &b"0"[..]),
        ("GNU.sparse.minor", b"1"),
        ("GNU.sparse.size", b"9000000000000000000"),
        ("GNU.sparse.map", b"0,1"),
    ];
    refuse(&[Tar::new().pax(&hole).file("x", "x").end()], "bytes of files");
    let value = [b'v'; 40_000];
    let attributes = [("SCHILY.xattr.user.x", &value[..])];
    let fat = Tar::new().pax(&attributes).file("a", "").pax(&attributes).file("b", "");
    refuse(&[fat.end()], "bytes of memory");
    // What is replaced takes nothing any more.
    let same = (0..4).fold(Tar::new(), |tar, _| tar.pax(&attributes).file("a", ""));
    root_of(&[same.end()], few).unwrap();
    let long = Tar::new().entry(b'L', b"long", |_| {}, &[b'x'; 10_000]).file("x", "");
    refuse(&[long.end()], "bytes in a name");
    let claims = |header: &mut ::tar::Header| header.set_size(1 << 40);
    refuse(&[Tar::new().entry(b'x', b"pax", claims, b"").end()], "bytes of pax records");
    refuse(&[Tar::new().entry(b'0', b"x", claims, b"").end()], "bytes of files");
    let skipped =
        Tar::new().entry(b'g', b"global", |header| header.set_size(3 << 20), &[0; 3 << 20]);
    refuse(&[skipped.end()], "bytes left for a layer");
}

#[test]
fn a_bomb_ends_early() {
    let zeros = vec![0; 1 << 20];
    let mut packed = zstd::stream::write::Encoder::new(Vec::new(), 1).unwrap();
    let header = Tar::new().entry(b'0', b"bomb", |header| header.set_size(300 << 20), b"").cut();
    std::io::Write::write_all(&mut packed, &header).unwrap();
    for _ in 0..300 {
        std::io::Write::write_all(&mut packed, &zeros).unwrap();
    }
    let text = refusal(&[packed.finish().unwrap()]);
    assert!(text.contains("200 unpacked bytes for each packed one"), "{text}");
}

#[test]
fn links_upon_links_take_a_bounded_time() {
    // Each leads through all those before it.
    let mut tar = Tar::new().dir("l0");
    for n in 1..60 {
        tar = tar.symlink(&format!("l{n}"), &format!("l{0}/../l{0}", n - 1));
    }
    let text = refusal(&[tar.file("l59/x", "").end()]);
    assert!(text.contains("too many symbolic links"), "{text}");
}

#[test]
fn streams_that_follow_each_other_are_one_and_one_that_wants_much_memory_is_refused() {
    let layer = Tar::new().file("a", &"x".repeat(3000)).end();
    let (front, back) = layer.split_at(1000);
    let zstd = |bytes: &[u8]| zstd::encode_all(bytes, 1).unwrap();
    let skipped = b"\x51\x2a\x4d\x18\x03\0\0\0abc";
    let several = [&skipped[..], &zstd(front), &skipped[..], &zstd(back)].concat();
    assert_eq!(unpack(&[several]).unwrap().text("a").len(), 3000);
    let text = refusal(&[[&zstd(front)[..], back].concat()]);
    assert!(text.contains("cannot be read"), "{text}");
    let with_window = |log| {
        let mut packed = zstd::stream::write::Encoder::new(Vec::new(), 1).unwrap();
        packed.window_log(log).unwrap();
        std::io::Write::write_all(&mut packed, &layer).unwrap();
        packed.finish().unwrap()
    };
    unpack(&[with_window(25)]).unwrap();
    let text = refusal(&[with_window(27)]);
    assert!(text.contains("cannot be read"), "{text}");
}

#[test]
fn absolute_names_are_names_in_the_root() {
    let layer = Tar::new()
        .file("/etc/passwd", "of the image")
        .file("//etc//./group", "too")
        .hard_link("/etc/again", "/etc/passwd");
    let root = unpack(&[layer.end()]).unwrap();
    assert_eq!(root.paths(), ["etc", "etc/again", "etc/group", "etc/passwd"]);
    assert_eq!((root.text("etc/again"), root.text("etc/group")), ("of the image", "too"));
}

#[test]
fn a_wrong_digest_is_found_out() {
    let scratch = Scratch::new();
    let file = File::create_new(scratch.0.join("root")).unwrap();
    let layer = Tar::new().file("a", "b").end();
    let packed =
        Packed { blob: scratch.blob(&layer), digest: Some(Digest::of(b"x")), max_ratio: 200 };
    let fault = Build::new(file, limits()).layer(packed, &mut |_| Ok(())).unwrap_err();
    assert!(fault.to_string().contains("digest"), "{fault}");
}

#[test]
fn headers_and_attributes_without_end_are_refused() {
    let names: Vec<_> = (0..2000).map(|at| format!("SCHILY.xattr.user.{at}")).collect();
    let many: Vec<_> = names.iter().map(|name| (name.as_str(), &b"x"[..])).collect();
    let text = refusal(&[Tar::new().pax(&many).file("x", "").end()]);
    assert!(text.contains("more than 1024 attributes of a file"), "{text}");
    let headers = (0..100).fold(Tar::new(), |tar, _| tar.pax(&[("uid", b"1")]));
    let text = refusal(&[headers.file("x", "").end()]);
    assert!(text.contains("more than 16 headers before an entry"), "{text}");
}

#[test]
fn whiteouts_upon_whiteouts_take_a_bounded_time() {
    let names = (0..20_000).fold(Tar::new(), |tar, at| tar.file(&at.to_string(), ""));
    let layer = (0..20_000).fold(names, |tar, _| tar.file(".wh..wh..opq", ""));
    let text = refusal(&[layer.end()]);
    assert!(text.contains("steps through names"), "{text}");
}

//! What becomes of an image, beside what umoci unpacks it to, file by file.

use std::collections::BTreeMap;
use std::fs;
use std::os::unix::ffi::OsStrExt;
use std::os::unix::fs::{FileTypeExt, MetadataExt};
use std::path::Path;

use dormouse::Image;
use rustix::fs::{lgetxattr, llistxattr};

use crate::erofs::{Found, Listing};
use crate::{Scratch, debian_image, programs, unpacked};

/// A host's root may give files to others, and everybody else has umoci keep them.
fn is_root() -> bool {
    fs::metadata("/proc/self").unwrap().uid() == 0
}

/// Everything that umoci makes of the image with this tag, by its path.
fn by_umoci(scratch: &Scratch, tag: &str) -> BTreeMap<String, Found> {
    let image = format!("{}:{tag}", debian_image::layout().display());
    let mut umoci = programs::command("umoci");
    umoci.args(["unpack", "--image", &image]).arg(scratch.0.join("bundle"));
    if !is_root() {
        umoci.arg("--rootless");
    }
    let output = umoci.output().unwrap();
    assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
    let mut found = BTreeMap::new();
    walk(&scratch.0.join("bundle/rootfs"), String::new(), &mut found);
    found
}

fn walk(path: &Path, name: String, found: &mut BTreeMap<String, Found>) {
    let metadata = fs::symlink_metadata(path).unwrap();
    let kind = metadata.file_type();
    assert!(!kind.is_block_device() && !kind.is_char_device(), "{name}: no image here has any");
    let data = if kind.is_file() {
        fs::read(path).unwrap()
    } else if kind.is_symlink() {
        fs::read_link(path).unwrap().into_os_string().into_encoded_bytes()
    } else {
        Vec::new()
    };
    if kind.is_dir() {
        for entry in fs::read_dir(path).unwrap().map(Result::unwrap) {
            let below = entry.file_name().as_bytes().escape_ascii().to_string();
            let below = if name.is_empty() { below } else { format!("{name}/{below}") };
            walk(&entry.path(), below, found);
        }
    }
    let this = Found {
        mode: metadata.mode() as u16,
        uid: metadata.uid(),
        gid: metadata.gid(),
        mtime: (metadata.mtime(), metadata.mtime_nsec() as u32),
        links: metadata.nlink() as u32,
        data,
        xattrs: xattrs(path),
        ..Found::default()
    };
    found.insert(name, this);
}

fn xattrs(path: &Path) -> BTreeMap<String, Vec<u8>> {
    let mut buffer = vec![0; 1 << 16];
    let length = llistxattr(path, &mut buffer[..]).unwrap();
    let names = buffer[..length].to_vec();
    let names = names.split(|&byte| byte == 0).filter(|name| !name.is_empty());
    let read = names.map(|name| {
        let length = lgetxattr(path, name, &mut buffer[..]).unwrap();
        (name.escape_ascii().to_string(), buffer[..length].to_vec())
    });
    read.collect()
}

/// Without what file systems number as they like, and without owners where umoci could not give any.
fn comparable(found: &Found) -> Found {
    let mut found = Found { inode: 0, ..found.clone() };
    if found.mode & 0o170_000 == 0o040_000 {
        found.links = 0;
    }
    if !is_root() {
        (found.uid, found.gid) = (0, 0);
        found.xattrs.clear();
    }
    found
}

#[test]
fn every_file_of_debians_nginx_and_python_is_as_umoci_unpacks_it() {
    let scratch = Scratch::new("umoci");
    let image = Image::open(debian_image::layout()).name("nginx");
    let image = unpacked(image, scratch.0.join("cache")).unwrap();
    let Listing(ours) = Listing::read(&fs::read(image.path()).unwrap());
    let theirs = by_umoci(&scratch, "nginx");
    assert!(ours.keys().eq(theirs.keys()), "other names");
    assert!(ours.len() > 1000, "{}", ours.len());
    for (name, our) in &ours {
        let (our, their) = (comparable(our), comparable(&theirs[name]));
        // The data would not be worth reading.
        assert!(our.data == their.data, "{name:?} has other bytes");
        let without = |found: Found| Found { data: Vec::new(), ..found };
        assert_eq!(without(our), without(their), "{name:?}");
    }
}

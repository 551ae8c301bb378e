//! The ways in for the fuzz targets `oci_layer`, `image_archive` and `image_config`.

#![allow(clippy::expect_used, clippy::panic, reason = "what a fuzz target finds is a panic")]

use std::env;
use std::fs::File;
use std::io::Write;
use std::os::fd::AsRawFd;
use std::path::PathBuf;

use super::blob::Blob;
use super::config::ConfigFile;
use super::layer::Packed;
use super::manifest::{Document, Platform, choose};
use super::rootfs::{Build, Limits, is_whole};
use super::source::{self, Wanted};

/// Small ones, so that a run takes milliseconds.
const LIMITS: Limits = Limits { bytes: 4 << 20, entries: 1000, memory: 1 << 20, ratio: 200 };

/// A layer, over another one that has something for it to replace and to hide: whatever it is, it is refused, or
/// becomes a root file system, which is the same the second time.
pub fn oci_layer(bytes: &[u8]) {
    let first = root(bytes);
    if let Some(root) = &first {
        let head = root.first_chunk().expect("a superblock");
        assert!(is_whole(head, root.len() as u64));
        assert!(first == self::root(bytes), "two roots of one layer");
    }
}

fn root(bytes: &[u8]) -> Option<Vec<u8>> {
    let mut build = Build::new(temporary(&[]), LIMITS);
    for layer in [&lower()[..], bytes] {
        let blob = Blob::whole(temporary(layer)).expect("a file");
        let packed = Packed { blob, digest: None, max_ratio: LIMITS.ratio };
        build.layer(packed, &mut |_| Ok(())).ok()?;
    }
    let file = build.finish().ok()?;
    let mut root = Vec::new();
    let mut blob = Blob::whole(file).expect("a file");
    std::io::Read::read_to_end(&mut blob, &mut root).expect("its bytes");
    Some(root)
}

fn lower() -> Vec<u8> {
    let mut tar = tar::Builder::new(Vec::new());
    for (path, kind) in [("a", b'0'), ("d/", b'5'), ("d/e", b'0'), ("l", b'2')] {
        let mut header = tar::Header::new_gnu();
        header.set_entry_type(tar::EntryType::new(kind));
        header.set_size(0);
        header.set_path(path).expect("a name");
        header.set_link_name("d").expect("a name");
        header.set_cksum();
        tar.append(&header, &[][..]).expect("memory");
    }
    tar.into_inner().expect("memory")
}

/// A file without a name.
fn temporary(bytes: &[u8]) -> File {
    use std::os::unix::fs::OpenOptionsExt;
    let mut options = File::options();
    let options = options.read(true).write(true).custom_flags(libc::O_TMPFILE);
    let mut file = options.open(env::temp_dir()).expect("a temporary file");
    file.write_all(bytes).expect("a temporary file");
    file
}

/// An archive of an image, as `docker save` writes it or of a layout: it is refused, or its layers become a root.
pub fn image_archive(bytes: &[u8]) {
    let file = temporary(bytes);
    let path = PathBuf::from(format!("/proc/self/fd/{}", file.as_raw_fd()));
    for name in [None, Some("latest")] {
        let wanted = Wanted { name: name.map(str::to_owned), platform: Platform::guest() };
        let found = match source::find(&path, &wanted) {
            Ok(found) => found,
            Err(error) => {
                // The text quotes the archive.
                let _ = error.to_string();
                continue;
            }
        };
        assert_eq!(found.config.diff_ids().map(|ids| ids.len()).ok(), Some(found.layers.len()));
        let mut build = Build::new(temporary(&[]), LIMITS);
        let built = found.layers.into_iter().try_for_each(|layer| {
            let packed = Packed { blob: layer.blob, digest: layer.digest, max_ratio: LIMITS.ratio };
            build.layer(packed, &mut |_| Ok(())).map(drop)
        });
        let _ = built.and_then(|()| build.finish().map(drop));
    }
}

/// JSON as an image's configuration, its manifest and its index.
pub fn image_config(bytes: &[u8]) {
    if let Ok(config) = ConfigFile::parse(bytes) {
        let _ = config.diff_ids();
        if let Ok(config) = config.run() {
            let _ = config.entrypoint();
        }
    }
    if let Ok(Document::Index(manifests)) = Document::parse(bytes, None) {
        for name in [None, Some("latest")] {
            if let Err(error) = choose(&manifests, name, &Platform::guest()) {
                // The text quotes the index.
                let _ = error.to_string();
            }
        }
    }
}

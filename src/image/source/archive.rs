//! An image's files in a tar archive, found by one pass over its headers.

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};

use super::Files;
use crate::image::ImageError;
use crate::image::blob::Blob;
use crate::image::layer::{EntryKind, LayerFault, TarReader};

/// Files in an archive: more than any image has.
const MAX_MEMBERS: usize = 1 << 16;
/// Longer names are of no file that is looked for.
const MAX_NAME_BYTES: usize = 512;
/// Old Dockers wrote a layer that two images share once, and a link to it.
const MAX_LINKS: usize = 4;

/// The members of an archive.
pub(super) struct Archive {
    path: PathBuf,
    blob: Blob,
    members: BTreeMap<String, Member>,
}

enum Member {
    File { begin: u64, len: u64 },
    Link(String),
}

impl Archive {
    pub(super) fn index(path: &Path, blob: Blob) -> Result<Self, ImageError> {
        refuse_packed(path, &blob)?;
        let broken = |fault| ImageError::Archive { path: path.to_owned(), fault };
        let mut tar = TarReader::new(blob.clone());
        let mut members = BTreeMap::new();
        while let Some(entry) = tar.next().map_err(broken)? {
            let Some(name) = name(&entry.path) else { continue };
            let member = match entry.kind {
                EntryKind::File { extents: None, size } => {
                    Member::File { begin: tar.source().position(), len: size }
                }
                EntryKind::Symlink(target) => match beside(&name, &target) {
                    Some(target) => Member::Link(target),
                    None => continue,
                },
                EntryKind::HardLink(target) => match self::name(&target) {
                    Some(target) => Member::Link(target),
                    None => continue,
                },
                _ => continue,
            };
            members.insert(name, member);
            if members.len() > MAX_MEMBERS {
                let limit = MAX_MEMBERS as u64;
                return Err(broken(LayerFault::Limit { what: "files", limit }));
            }
        }
        Ok(Self { path: path.to_owned(), blob, members })
    }
}

impl Files for Archive {
    fn open(&self, name: &str) -> Result<Option<Blob>, ImageError> {
        let mut name = name.to_owned();
        for _ in 0..=MAX_LINKS {
            match self.members.get(&name) {
                None => return Ok(None),
                Some(Member::Link(target)) => name.clone_from(target),
                Some(Member::File { begin, len }) => {
                    let (path, fault) = (&self.path, LayerFault::Truncated);
                    let truncated = || ImageError::Archive { path: path.clone(), fault };
                    return self.blob.part(*begin, *len).map(Some).ok_or_else(truncated);
                }
            }
        }
        Err(ImageError::Missing { name })
    }
}

/// An archive is read out of its order, which one that is packed as a whole does not allow.
fn refuse_packed(path: &Path, blob: &Blob) -> Result<(), ImageError> {
    use std::io::Read;
    let mut magic = Vec::new();
    let read = blob.clone().take(6).read_to_end(&mut magic);
    read.map_err(|source| ImageError::Open { path: path.to_owned(), source })?;
    let what = match magic[..] {
        [0x1f, 0x8b, ..] => "the archive is packed with gzip: unpack it first (gunzip)",
        [0x28, 0xb5, 0x2f, 0xfd, ..] => "the archive is packed with zstd: unpack it first (unzstd)",
        [0xfd, b'7', b'z', b'X', b'Z', 0] => {
            "the archive is packed with xz: unpack it first (unxz)"
        }
        _ => return Ok(()),
    };
    Err(ImageError::NotAnImage { path: path.to_owned(), what })
}

/// A member's name, without what may stand before it.
fn name(path: &[u8]) -> Option<String> {
    let text = std::str::from_utf8(path).ok().filter(|text| text.len() <= MAX_NAME_BYTES)?;
    resolve("", text)
}

/// What a link at `name` leads to.
fn beside(name: &str, target: &[u8]) -> Option<String> {
    let target = std::str::from_utf8(target).ok()?;
    let folder = name.rsplit_once('/').map_or("", |(folder, _)| folder);
    if target.len() > MAX_NAME_BYTES || target.starts_with('/') {
        return None;
    }
    resolve(folder, target)
}

/// None where it climbs out of the archive.
fn resolve(folder: &str, path: &str) -> Option<String> {
    let mut parts: Vec<&str> = Vec::new();
    for part in folder.split('/').chain(path.split('/')) {
        match part {
            "" | "." => {}
            ".." => {
                parts.pop()?;
            }
            _ => parts.push(part),
        }
    }
    Some(parts.join("/"))
}

//! A file of the tree: what EROFS will say of it.

use std::collections::BTreeMap;

use super::super::layer::{Device, Time, Xattr};

/// A node's place in its tree.
pub(in crate::image) type NodeId = u32;

#[derive(Debug)]
pub(in crate::image) struct Node {
    pub(in crate::image) kind: Kind,
    pub(in crate::image) mode: u16,
    pub(in crate::image) uid: u32,
    pub(in crate::image) gid: u32,
    pub(in crate::image) mtime: Time,
    /// Sorted by name.
    pub(in crate::image) xattrs: Box<[Xattr]>,
    /// How many names it has in the tree; a directory has one, or none if it is the root.
    pub(in crate::image) names: u32,
}

#[derive(Debug)]
pub(in crate::image) enum Kind {
    Directory(BTreeMap<Box<[u8]>, Child>),
    File(Content),
    Symlink(Box<[u8]>),
    Char(Device),
    Block(Device),
    Fifo,
}

/// Where a file's bytes are: in whole blocks of the image, one after the other.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(in crate::image) struct Content {
    pub(in crate::image) block: u64,
    pub(in crate::image) size: u64,
}

/// A name in a directory.
#[derive(Clone, Copy, Debug)]
pub(in crate::image) struct Child {
    pub(in crate::image) node: NodeId,
    /// The last layer that named it, or something below it: whiteouts are about those before.
    pub(in crate::image) layer: u32,
}

impl Node {
    /// A directory that nobody describes: one that a path leads through.
    pub(in crate::image) fn bare_directory() -> Self {
        Self {
            kind: Kind::Directory(BTreeMap::new()),
            mode: 0o755,
            uid: 0,
            gid: 0,
            mtime: Time::default(),
            xattrs: Box::default(),
            names: 0,
        }
    }

    pub(in crate::image) fn is_directory(&self) -> bool {
        matches!(self.kind, Kind::Directory(_))
    }
}

/// What EROFS calls the name space of an extended attribute, and what is left of its name.
pub(in crate::image) fn xattr_index(name: &[u8]) -> Option<(u8, &[u8])> {
    if name.starts_with(b"trusted.overlay.") || name.starts_with(b"user.overlay.") {
        return None;
    }
    match name {
        b"system.posix_acl_access" => return Some((2, b"")),
        b"system.posix_acl_default" => return Some((3, b"")),
        _ => {}
    }
    let spaces: [(u8, &[u8]); 3] = [(1, b"user."), (4, b"trusted."), (6, b"security.")];
    let mut found = spaces.into_iter().filter_map(|(index, space)| {
        let rest = name.strip_prefix(space)?;
        (!rest.is_empty()).then_some((index, rest))
    });
    found.next()
}

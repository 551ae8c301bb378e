//! What a layer says of one file.

use super::Extent;

/// An entry of a layer, as it is written there: nothing of it has been compared with the tree.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(in crate::image) struct Entry {
    /// As in the archive: it may begin with `./` or `/`, and end with `/`.
    pub(in crate::image) path: Vec<u8>,
    pub(in crate::image) kind: EntryKind,
    /// Permissions, with set-user-id, set-group-id and the sticky bit.
    pub(in crate::image) mode: u16,
    pub(in crate::image) uid: u32,
    pub(in crate::image) gid: u32,
    pub(in crate::image) mtime: Time,
    /// In the order of the archive, no name twice.
    pub(in crate::image) xattrs: Vec<Xattr>,
}

#[derive(Clone, Debug, PartialEq, Eq)]
pub(in crate::image) enum EntryKind {
    Directory,
    File {
        size: u64,
        /// Where its data lies, in order; what is between is zeros. None: everywhere.
        extents: Option<Vec<Extent>>,
    },
    HardLink(Vec<u8>),
    Symlink(Vec<u8>),
    Char(Device),
    Block(Device),
    Fifo,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(in crate::image) struct Device {
    pub(in crate::image) major: u32,
    pub(in crate::image) minor: u32,
}

/// Since 1970.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(in crate::image) struct Time {
    pub(in crate::image) seconds: i64,
    pub(in crate::image) nanoseconds: u32,
}

/// An extended attribute: its name with its name space, and its value.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(in crate::image) struct Xattr {
    pub(in crate::image) name: Vec<u8>,
    pub(in crate::image) value: Vec<u8>,
}

//! An inode and its extended attributes.
//!
//! Always the long form, of 64 bytes: the short one has no time of its own.

use super::super::node::{self, Kind, Node};
use crate::image::layer::{Device, Xattr};

const INODE_BYTES: usize = 64;
const XATTR_HEADER_BYTES: usize = 12;
const XATTR_ENTRY_BYTES: usize = 4;
const LONG_FORM: u16 = 1;

/// What the tree does not say of an inode.
#[derive(Clone, Copy, Debug)]
pub(super) struct Body {
    pub(super) number: u32,
    pub(super) size: u64,
    pub(super) links: u32,
    pub(super) data: DataPlace,
}

/// EROFS_INODE_FLAT_…: in blocks, or in blocks but for the end of it.
#[derive(Clone, Copy, Debug)]
pub(super) enum DataPlace {
    Blocks(u32),
    Inline(u32),
}

/// How long it is.
pub(super) fn body_bytes(node: &Node) -> u64 {
    (INODE_BYTES + xattr_bytes(&node.xattrs)) as u64
}

fn xattr_bytes(xattrs: &[Xattr]) -> usize {
    if xattrs.is_empty() {
        return 0;
    }
    let sizes = xattrs.iter().filter_map(|xattr| {
        let (_, name) = node::xattr_index(&xattr.name)?;
        Some((XATTR_ENTRY_BYTES + name.len() + xattr.value.len()).next_multiple_of(4))
    });
    XATTR_HEADER_BYTES + sizes.sum::<usize>()
}

pub(super) fn encode(node: &Node, body: &Body) -> Vec<u8> {
    let xattr_bytes = xattr_bytes(&node.xattrs);
    let mut bytes = vec![0; INODE_BYTES];
    let mut put = |at: usize, field: &[u8]| bytes[at..at + field.len()].copy_from_slice(field);
    let (layout, block) = match body.data {
        DataPlace::Blocks(block) => (0u16, block),
        DataPlace::Inline(block) => (2, block),
    };
    put(0, &(LONG_FORM | layout << 1).to_le_bytes());
    // The header counts as one, and four bytes of entries as one more.
    let xattr_count = match xattr_bytes {
        0 => 0,
        bytes => 1 + (bytes - XATTR_HEADER_BYTES) / 4,
    };
    put(2, &(xattr_count as u16).to_le_bytes());
    put(4, &(file_mode(&node.kind) | node.mode).to_le_bytes());
    put(8, &body.size.to_le_bytes());
    let place = match &node.kind {
        Kind::Char(device) | Kind::Block(device) => device_number(*device),
        Kind::Fifo => 0,
        _ => block,
    };
    put(16, &place.to_le_bytes());
    put(20, &body.number.to_le_bytes());
    put(24, &node.uid.to_le_bytes());
    put(28, &node.gid.to_le_bytes());
    put(32, &node.mtime.seconds.to_le_bytes());
    put(40, &node.mtime.nanoseconds.to_le_bytes());
    put(44, &body.links.to_le_bytes());
    if xattr_bytes > 0 {
        bytes.resize(INODE_BYTES + XATTR_HEADER_BYTES, 0);
        for xattr in &node.xattrs {
            push_xattr(&mut bytes, xattr);
        }
    }
    bytes
}

fn push_xattr(bytes: &mut Vec<u8>, xattr: &Xattr) {
    let Some((index, name)) = node::xattr_index(&xattr.name) else { return };
    bytes.extend([name.len() as u8, index]);
    bytes.extend((xattr.value.len() as u16).to_le_bytes());
    bytes.extend(name);
    bytes.extend(&xattr.value);
    bytes.resize(bytes.len().next_multiple_of(4), 0);
}

/// S_IF…
fn file_mode(kind: &Kind) -> u16 {
    match kind {
        Kind::Fifo => 0o010_000,
        Kind::Char(_) => 0o020_000,
        Kind::Directory(_) => 0o040_000,
        Kind::Block(_) => 0o060_000,
        Kind::File(_) => 0o100_000,
        Kind::Symlink(_) => 0o120_000,
    }
}

/// As the kernel writes device numbers of 32 bits.
fn device_number(device: Device) -> u32 {
    device.minor & 0xff | device.major << 8 | (device.minor & !0xff) << 12
}

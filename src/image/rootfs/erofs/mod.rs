//! EROFS, without compression: the file system that a guest mounts.
//!
//! Source: Linux Documentation/filesystems/erofs.rst and fs/erofs/erofs_fs.h of 6.1, the oldest kernel that is
//! tested with it. The file is: the superblock's block; the data of files, written before; blocks of large
//! directories; and the inodes, each with its attributes and, where it fits, its names or its link. The
//! same tree gives the same bytes.

mod directory;
mod inode;
mod layout;

use std::fs::File;
use std::io;
use std::os::unix::fs::FileExt;

use self::layout::Layout;
use super::data::{BLOCK, DataArea};
use super::tree::Tree;

/// Raised whenever the same image becomes other bytes: it is a part of the name in the cache.
pub(in crate::image) const FORMAT: u32 = 2;

const SUPER_OFFSET: u64 = 1024;
const MAGIC: u32 = 0xe0f5_e1e2;
/// log2 of the block.
const BLOCK_BITS: u8 = 12;
/// The times of inodes are those of the last change of their data.
const COMPAT_MTIME: u32 = 2;
/// Inodes are numbered by their place, in units of this.
const SLOT: u64 = 32;

/// Writes what the tree says behind the data of its files.
pub(super) fn write(tree: &Tree, mut data: DataArea) -> io::Result<File> {
    data.align()?;
    let layout = Layout::new(tree, data.position() / BLOCK)?;
    layout.write_blocks(tree, &mut data)?;
    let meta_block = data.position() / BLOCK;
    layout.write_inodes(tree, &mut data)?;
    data.align()?;
    let blocks = layout::block_number(data.position() / BLOCK)?;
    let root = layout.root_number()?;
    let mut superblock = [0; 128];
    let mut put = |at: usize, bytes: &[u8]| superblock[at..at + bytes.len()].copy_from_slice(bytes);
    put(0, &MAGIC.to_le_bytes());
    put(8, &COMPAT_MTIME.to_le_bytes());
    put(12, &[BLOCK_BITS]);
    put(14, &root.to_le_bytes());
    put(16, &layout.inodes().to_le_bytes());
    put(36, &blocks.to_le_bytes());
    put(40, &layout::block_number(meta_block)?.to_le_bytes());
    let file = data.finish()?;
    file.write_all_at(&superblock, SUPER_OFFSET)?;
    Ok(file)
}

/// Whether a file of so many bytes that begins like this is such an image, all of it.
pub(in crate::image) fn is_whole(head: &[u8; 2048], bytes: u64) -> bool {
    let superblock = &head[SUPER_OFFSET as usize..];
    let number = |at: usize| {
        let field = superblock[at..].first_chunk().copied().unwrap_or_default();
        u32::from_le_bytes(field)
    };
    number(0) == MAGIC && u64::from(number(36)) * BLOCK == bytes
}

//! An empty ext4 file system with a journal, as mke2fs would make it.
//!
//! What is zeros is not written. The groups that nothing is in say so (`uninit_bg`), so that what is written are
//! a few blocks, and 32 bytes for each group.
//!
//! Source: the kernel's Documentation/filesystems/ext4; the journal's format is its "Journal (jbd2)". e2fsck is asked
//! about it in tests/images.

use std::fs::File;
use std::io;
use std::os::unix::fs::FileExt;

pub(super) const MIN_BYTES: u64 = 16 << 20;
pub(super) const MAX_BYTES: u64 = 1 << 40;

const BLOCK: usize = 4096;
const GROUP_BLOCKS: u32 = 32_768;
const GROUP_INODES: u32 = 8192;
const INODE: usize = 256;
const TABLE_BLOCKS: u32 = GROUP_INODES * INODE as u32 / BLOCK as u32;
const DESCRIPTOR: usize = 32;

const ROOT_INODE: u32 = 2;
const JOURNAL_INODE: u32 = 8;
/// The directory for what e2fsck finds is the first inode that is free.
const LOST_INODE: u32 = 11;

/// has_journal, ext_attr.
const COMPAT: u32 = 0x4 | 0x8;
/// filetype, extents.
const INCOMPAT: u32 = 0x2 | 0x40;
/// sparse_super, large_file, huge_file, uninit_bg, dir_nlink, extra_isize.
const RO_COMPAT: u32 = 0x1 | 0x2 | 0x8 | 0x10 | 0x20 | 0x40;
/// user_xattr, acl.
const MOUNT_OPTIONS: u32 = 0x4 | 0x8;

const INODES_UNINIT: u16 = 1;
const BLOCKS_UNINIT: u16 = 2;
const TABLE_ZEROED: u16 = 4;

pub(super) struct Ext4 {
    blocks: u32,
    groups: u32,
    journal_blocks: u32,
    uuid: [u8; 16],
    now: u32,
}

impl Ext4 {
    /// One of so many bytes, `MIN_BYTES` to `MAX_BYTES`.
    pub(super) fn new(bytes: u64, uuid: [u8; 16], now: u32) -> Self {
        let mut blocks = (bytes / BLOCK as u64) as u32;
        // A last group that has hardly more than its own tables is left out.
        let last = blocks % GROUP_BLOCKS;
        if blocks > GROUP_BLOCKS && last < TABLE_BLOCKS + 256 {
            blocks -= last;
        }
        let journal_blocks = match bytes >> 20 {
            0..128 => 1024,
            128..1024 => 4096,
            1024..4096 => 8192,
            _ => 16_384,
        };
        Self { blocks, groups: blocks.div_ceil(GROUP_BLOCKS), journal_blocks, uuid, now }
    }

    pub(super) fn write(&self, file: &File) -> io::Result<()> {
        let put = |block: u32, bytes: &[u8]| file.write_all_at(bytes, at(block));
        let descriptors = self.descriptors();
        for group in (0..self.groups).filter(|group| has_super(*group)) {
            let begin = group * GROUP_BLOCKS;
            let offset = if group == 0 { 1024 } else { 0 };
            file.write_all_at(&self.superblock(group), at(begin) + offset)?;
            put(begin + 1, &descriptors)?;
        }
        put(self.tables(0), &self.block_bitmap(0))?;
        if self.groups > 1 {
            put(self.tables(self.groups - 1), &self.block_bitmap(self.groups - 1))?;
        }
        put(self.tables(0) + 1, &bitmap(LOST_INODE, GROUP_INODES))?;
        self.write_inodes(file)?;
        let root = self.root_block();
        put(
            root,
            &directory(&[(ROOT_INODE, "."), (ROOT_INODE, ".."), (LOST_INODE, "lost+found")]),
        )?;
        put(root + 1, &directory(&[(LOST_INODE, "."), (ROOT_INODE, "..")]))?;
        put(root + 2, &self.journal())
    }

    fn write_inodes(&self, file: &File) -> io::Result<()> {
        let (table, root) = (self.tables(0) + 2, self.root_block());
        for (number, inode) in [
            (ROOT_INODE, self.inode(0o040_755, 3, root, 1)),
            (JOURNAL_INODE, self.inode(0o100_600, 1, root + 2, self.journal_blocks)),
            (LOST_INODE, self.inode(0o040_700, 2, root + 1, 1)),
        ] {
            file.write_all_at(&inode, at(table) + u64::from(number - 1) * INODE as u64)?;
        }
        Ok(())
    }

    // --- where things are ---

    fn descriptor_blocks(&self) -> u32 {
        (self.groups * DESCRIPTOR as u32).div_ceil(BLOCK as u32)
    }

    /// The blocks of a group that a superblock and its descriptors take.
    fn front(&self, group: u32) -> u32 {
        if has_super(group) { 1 + self.descriptor_blocks() } else { 0 }
    }

    /// Where a group has its bitmap of blocks; then come the bitmap of inodes and their table.
    fn tables(&self, group: u32) -> u32 {
        group * GROUP_BLOCKS + self.front(group)
    }

    fn root_block(&self) -> u32 {
        self.tables(0) + 2 + TABLE_BLOCKS
    }

    fn blocks_in(&self, group: u32) -> u32 {
        (self.blocks - group * GROUP_BLOCKS).min(GROUP_BLOCKS)
    }

    fn used_in(&self, group: u32) -> u32 {
        // The two directories, and the journal.
        let files = if group == 0 { 2 + self.journal_blocks } else { 0 };
        self.front(group) + 2 + TABLE_BLOCKS + files
    }

    fn block_bitmap(&self, group: u32) -> Vec<u8> {
        bitmap(self.used_in(group), self.blocks_in(group))
    }

    // --- structures ---

    fn superblock(&self, group: u32) -> Vec<u8> {
        let free: u32 = (0..self.groups).map(|g| self.blocks_in(g) - self.used_in(g)).sum();
        let inodes = self.groups * GROUP_INODES;
        let mut block = vec![0; 1024];
        for (offset, value) in [
            (0, inodes),
            (4, self.blocks),
            (12, free),
            (16, inodes - LOST_INODE),
            // 1024 << 2 bytes, for blocks and clusters.
            (24, 2),
            (28, 2),
            (32, GROUP_BLOCKS),
            (36, GROUP_BLOCKS),
            (40, GROUP_INODES),
            (48, self.now),
            (64, self.now),
            // With inodes of any size.
            (76, 1),
            (84, LOST_INODE),
            (92, COMPAT),
            (96, INCOMPAT),
            (100, RO_COMPAT),
            (0xe0, JOURNAL_INODE),
            (0x100, MOUNT_OPTIONS),
            (0x108, self.now),
            // Hashes of names are of signed bytes, as on x86.
            (0x160, 1),
        ] {
            put32(&mut block, offset, value);
        }
        for (offset, value) in [
            // It is never checked for the number of its mounts.
            (54, 0xffff),
            (56, 0xef53),
            // Clean; go on after errors.
            (58, 1),
            (60, 1),
            (88, INODE as u16),
            (90, group as u16),
            (0x15c, 32),
            (0x15e, 32),
        ] {
            put16(&mut block, offset, value);
        }
        block[104..120].copy_from_slice(&self.uuid);
        // The seed of the hashes: random, and not the same.
        let seed: Vec<u8> = self.uuid.iter().rev().map(|byte| byte ^ 0x5a).collect();
        block[0xec..0xfc].copy_from_slice(&seed);
        // Names are hashed with half of an MD4.
        block[0xfc] = 1;
        block
    }

    fn descriptors(&self) -> Vec<u8> {
        (0..self.groups).flat_map(|group| self.descriptor(group)).collect()
    }

    fn descriptor(&self, group: u32) -> [u8; DESCRIPTOR] {
        let mut bytes = [0; DESCRIPTOR];
        let tables = self.tables(group);
        put32(&mut bytes, 0, tables);
        put32(&mut bytes, 4, tables + 1);
        put32(&mut bytes, 8, tables + 2);
        put16(&mut bytes, 12, (self.blocks_in(group) - self.used_in(group)) as u16);
        let used_inodes = if group == 0 { LOST_INODE } else { 0 };
        let free_inodes = (GROUP_INODES - used_inodes) as u16;
        put16(&mut bytes, 14, free_inodes);
        put16(&mut bytes, 16, if group == 0 { 2 } else { 0 });
        let mut flags = TABLE_ZEROED;
        if group > 0 {
            flags |= INODES_UNINIT;
        }
        // The last one's bitmap tells where it ends.
        if group > 0 && group + 1 < self.groups {
            flags |= BLOCKS_UNINIT;
        }
        put16(&mut bytes, 18, flags);
        put16(&mut bytes, 28, free_inodes);
        let checksum = crc16(crc16(0xffff, &self.uuid), &group.to_le_bytes());
        let checksum = crc16(checksum, &bytes[..30]);
        put16(&mut bytes, 30, checksum);
        bytes
    }

    /// An inode whose blocks follow one another.
    fn inode(&self, mode: u16, links: u16, first: u32, blocks: u32) -> Vec<u8> {
        let mut bytes = vec![0; INODE];
        put16(&mut bytes, 0, mode);
        put32(&mut bytes, 4, blocks * BLOCK as u32);
        for offset in [8, 12, 16, 0x90] {
            put32(&mut bytes, offset, self.now);
        }
        put16(&mut bytes, 26, links);
        // Blocks are counted in 512 bytes here.
        put32(&mut bytes, 28, blocks * 8);
        // It has extents: a header (magic, entries, room, depth), and one.
        put32(&mut bytes, 32, 0x8_0000);
        put16(&mut bytes, 40, 0xf30a);
        put16(&mut bytes, 42, 1);
        put16(&mut bytes, 44, 4);
        put16(&mut bytes, 56, blocks as u16);
        put32(&mut bytes, 60, first);
        // What of a large inode is in use.
        put16(&mut bytes, 128, 32);
        bytes
    }

    /// The begin of an empty journal. Its numbers are big-endian.
    fn journal(&self) -> Vec<u8> {
        let mut block = vec![0; BLOCK];
        for (offset, value) in [
            (0, 0xc03b_3998),
            // A superblock of version 2.
            (4, 4),
            (12, BLOCK as u32),
            (16, self.journal_blocks),
            (20, 1),
            (24, 1),
            (64, 1),
        ] {
            block[offset..offset + 4].copy_from_slice(&u32::to_be_bytes(value));
        }
        block
    }
}

fn at(block: u32) -> u64 {
    u64::from(block) * BLOCK as u64
}

/// Whether a group has a copy of the superblock: the first two, and powers of 3, 5 and 7.
fn has_super(group: u32) -> bool {
    let is_power = |base: u32| {
        let mut power = base;
        while power < group {
            power *= base;
        }
        power == group
    };
    group <= 1 || is_power(3) || is_power(5) || is_power(7)
}

/// A block of bits, of which the first are set, and those that stand for nothing.
fn bitmap(used: u32, all: u32) -> Vec<u8> {
    let mut block = vec![0; BLOCK];
    for bit in (0..used).chain(all..GROUP_BLOCKS) {
        block[bit as usize / 8] |= 1 << (bit % 8);
    }
    block
}

/// A directory of directories, in one block: its last entry goes to the end.
fn directory(entries: &[(u32, &str)]) -> Vec<u8> {
    let mut block = Vec::with_capacity(BLOCK);
    for (index, (inode, name)) in entries.iter().enumerate() {
        let own = 8 + name.len().next_multiple_of(4);
        let length = if index + 1 == entries.len() { BLOCK - block.len() } else { own };
        let end = block.len() + length;
        block.extend(inode.to_le_bytes());
        block.extend((length as u16).to_le_bytes());
        block.extend([name.len() as u8, 2]);
        block.extend(name.bytes());
        block.resize(end, 0);
    }
    block
}

fn put16(bytes: &mut [u8], offset: usize, value: u16) {
    bytes[offset..offset + 2].copy_from_slice(&value.to_le_bytes());
}

fn put32(bytes: &mut [u8], offset: usize, value: u32) {
    bytes[offset..offset + 4].copy_from_slice(&value.to_le_bytes());
}

/// The CRC of x¹⁶ + x¹⁵ + x² + 1, from its low bit.
fn crc16(crc: u16, bytes: &[u8]) -> u16 {
    bytes.iter().fold(crc, |crc, byte| {
        (0..8).fold(crc ^ u16::from(*byte), |crc, _| match crc & 1 {
            1 => crc >> 1 ^ 0xa001,
            _ => crc >> 1,
        })
    })
}

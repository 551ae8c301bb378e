//! Layers, one after the other, into a tree and a file.

use std::fs::File;
use std::io;
use std::thread;

use super::data::{BLOCK, DataArea};
use super::node::{Content, Kind, Node};
use super::path::MAX_PATH_BYTES;
use super::tree::Tree;
use super::{erofs, node};
use crate::image::digest::Digest;
use crate::image::layer::{
    Device, Entry, EntryKind, Extent, LayerFault, LayerStream, Packed, TarReader, Xattr,
};

/// Files that are to be hidden begin with it.
const WHITEOUT: &[u8] = b".wh.";
/// The directory that holds it shows nothing of those below.
const OPAQUE: &[u8] = b".wh..wh..opq";
/// What aufs kept for itself, and older tools left in layers.
const AUFS: &[u8] = b".wh..wh.";
/// XATTR_SIZE_MAX of Linux less one, since EROFS has 16 bits for it; and of all of a file.
const MAX_XATTR_BYTES: usize = 65_535;
const MAX_XATTRS_BYTES: usize = 128 << 10;
/// How the kernel numbers devices.
const MAX_MAJOR: u32 = (1 << 12) - 1;
const MAX_MINOR: u32 = (1 << 20) - 1;
/// The caller hears of progress so often, in unpacked bytes.
const REPORT_BYTES: u64 = 1 << 20;
const COPY_BYTES: usize = 64 << 10;

/// How much an image may be. What is more is refused, and nothing of it is kept.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(in crate::image) struct Limits {
    /// Of all layers unpacked, and of the root file system.
    pub(in crate::image) bytes: u64,
    /// Entries in all layers.
    pub(in crate::image) entries: u64,
    /// Memory for names and attributes.
    pub(in crate::image) memory: u64,
    /// Unpacked bytes for each packed one.
    pub(in crate::image) ratio: u64,
}

/// Who hears of bytes that were read, and may end it.
pub(in crate::image) type OnBytes<'a> = dyn FnMut(u64) -> Result<(), LayerFault> + 'a;

/// The same, while an entry is read.
type OnStream<'a> = dyn FnMut(&LayerStream) -> Result<(), LayerFault> + 'a;

/// A root file system that is being made.
pub(in crate::image) struct Build {
    tree: Tree,
    data: DataArea,
    limits: Limits,
    layer: u32,
    entries: u64,
    unpacked: u64,
    buffer: Vec<u8>,
}

impl Build {
    /// Begins in an empty file.
    pub(in crate::image) fn new(file: File, limits: Limits) -> Self {
        Self {
            tree: Tree::new(limits.memory),
            // The first block is the superblock's.
            data: DataArea::new(file, BLOCK),
            limits,
            layer: 0,
            entries: 0,
            unpacked: 0,
            buffer: vec![0; COPY_BYTES],
        }
    }

    /// Lays a layer over those before. Returns the digest of its unpacked bytes; `on_bytes` hears of packed ones.
    pub(in crate::image) fn layer(
        &mut self,
        packed: Packed,
        on_bytes: &mut OnBytes<'_>,
    ) -> Result<Digest, LayerFault> {
        self.layer += 1;
        let size = packed.blob.len();
        let digest = thread::scope(|scope| {
            let budget = self.limits.bytes.saturating_sub(self.unpacked);
            let (stream, thread) = LayerStream::start(scope, packed, budget)?;
            let digest = self.stream(stream, on_bytes);
            match thread.join() {
                Ok(()) => digest,
                Err(_) => Err(LayerFault::Thread(io::Error::other("it panicked"))),
            }
        })?;
        on_bytes(size)?;
        Ok(digest)
    }

    fn stream(
        &mut self,
        stream: LayerStream,
        on_bytes: &mut OnBytes<'_>,
    ) -> Result<Digest, LayerFault> {
        let mut tar = TarReader::new(stream);
        if let Err(fault) = self.entries(&mut tar, on_bytes) {
            let mut stream = tar.into_source();
            let fault = stream.take_fault().unwrap_or(fault);
            return Err(stream.explain(fault));
        }
        let (digest, count) = tar.into_source().finish()?;
        self.unpacked += count;
        Ok(digest)
    }

    /// Lays an archive that is not packed over those before.
    fn entries(
        &mut self,
        tar: &mut TarReader<LayerStream>,
        on_bytes: &mut OnBytes<'_>,
    ) -> Result<(), LayerFault> {
        let mut reported = 0;
        while let Some(entry) = tar.next()? {
            self.entries += 1;
            if self.entries > self.limits.entries {
                return Err(LayerFault::Limit { what: "entries", limit: self.limits.entries });
            }
            self.entry(entry, tar, &mut |stream| {
                if stream.count() >= reported + REPORT_BYTES {
                    reported = stream.count();
                    on_bytes(stream.packed())?;
                }
                Ok(())
            })?;
        }
        Ok(())
    }

    fn entry(
        &mut self,
        entry: Entry,
        tar: &mut TarReader<LayerStream>,
        on_stream: &mut OnStream<'_>,
    ) -> Result<(), LayerFault> {
        on_stream(tar.source())?;
        let trimmed =
            entry.path.len() - entry.path.iter().rev().take_while(|&&b| b == b'/').count();
        let begin = entry.path[..trimmed].iter().rposition(|&byte| byte == b'/');
        let (parent, name) = entry.path[..trimmed].split_at(begin.map_or(0, |slash| slash + 1));
        if name == OPAQUE {
            return self.tree.make_opaque(parent, self.layer);
        }
        if name.starts_with(AUFS) {
            return Ok(());
        }
        if let Some(hidden) = name.strip_prefix(WHITEOUT) {
            if matches!(hidden, b"" | b"." | b"..") {
                return Err(LayerFault::entry(&entry.path, "it is a whiteout of nothing"));
            }
            return self.tree.white_out(parent, hidden, self.layer);
        }
        let kind = match &entry.kind {
            EntryKind::HardLink(target) => {
                return self.tree.link(&entry.path, target, self.layer);
            }
            EntryKind::File { size, extents } => {
                let content = self.content(*size, extents.as_deref(), tar, on_stream);
                Kind::File(content?)
            }
            EntryKind::Directory => Kind::Directory(std::collections::BTreeMap::new()),
            EntryKind::Symlink(target) => Kind::Symlink(link_target(&entry.path, target)?),
            EntryKind::Char(device) => Kind::Char(checked(&entry.path, *device)?),
            EntryKind::Block(device) => Kind::Block(checked(&entry.path, *device)?),
            EntryKind::Fifo => Kind::Fifo,
        };
        let Entry { path, mode, uid, gid, mtime, xattrs, .. } = entry;
        let xattrs = kept_xattrs(&path, xattrs)?;
        let node = Node { kind, mode, uid, gid, mtime, xattrs, names: 0 };
        self.tree.put(&path, node, self.layer)
    }

    /// Writes a file's data, and says where.
    fn content(
        &mut self,
        size: u64,
        extents: Option<&[Extent]>,
        tar: &mut TarReader<LayerStream>,
        on_stream: &mut OnStream<'_>,
    ) -> Result<Content, LayerFault> {
        let content = self.begin_file(size)?;
        let begin = self.data.position();
        let whole = [Extent { offset: 0, len: size }];
        for extent in extents.unwrap_or(&whole) {
            let gap = begin + extent.offset - self.data.position();
            self.zeros(gap)?;
            let mut left = extent.len;
            while left > 0 {
                let wanted = left.min(COPY_BYTES as u64) as usize;
                let read = tar.read(&mut self.buffer[..wanted])?;
                if read == 0 {
                    return Err(LayerFault::Truncated);
                }
                self.data.write(&self.buffer[..read]).map_err(LayerFault::Write)?;
                left -= read as u64;
                on_stream(tar.source())?;
            }
        }
        let rest = begin + size - self.data.position();
        self.zeros(rest)?;
        Ok(content)
    }

    /// Puts a file at a path, with data that was written before.
    pub(in crate::image) fn put(&mut self, path: &[u8], node: Node) -> Result<(), LayerFault> {
        self.tree.put(path, node, self.layer)
    }

    /// Gives what is at `target` another name.
    pub(in crate::image) fn link(&mut self, path: &[u8], target: &[u8]) -> Result<(), LayerFault> {
        self.tree.link(path, target, self.layer)
    }

    /// The place of a file of so many bytes, which are written next.
    pub(in crate::image) fn begin_file(&mut self, size: u64) -> Result<Content, LayerFault> {
        self.data.align().map_err(LayerFault::Write)?;
        let begin = self.data.position();
        if size > self.limits.bytes.saturating_sub(begin) {
            return Err(LayerFault::Limit { what: "bytes of files", limit: self.limits.bytes });
        }
        Ok(Content { block: begin / BLOCK, size })
    }

    pub(in crate::image) fn data(&mut self, bytes: &[u8]) -> Result<(), LayerFault> {
        self.data.write(bytes).map_err(LayerFault::Write)
    }

    pub(in crate::image) fn zeros(&mut self, bytes: u64) -> Result<(), LayerFault> {
        self.data.zeros(bytes).map_err(LayerFault::Write)
    }

    /// Writes everything else, and returns the file: an EROFS image.
    pub(in crate::image) fn finish(mut self) -> Result<File, LayerFault> {
        for Content { block, size } in merged(self.tree.take_dead()) {
            let bytes = size.next_multiple_of(BLOCK);
            self.data.discard(block * BLOCK, bytes).map_err(LayerFault::Write)?;
        }
        let limit = self.limits.bytes;
        erofs::write(&self.tree, self.data).map_err(|error| match error.kind() {
            io::ErrorKind::FileTooLarge => {
                LayerFault::Limit { what: "bytes of a root file system", limit }
            }
            _ => LayerFault::Write(error),
        })
    }
}

/// Neighbours as one.
fn merged(mut dead: Vec<Content>) -> Vec<Content> {
    dead.sort_unstable_by_key(|content| content.block);
    let mut merged: Vec<Content> = Vec::new();
    for content in dead {
        match merged.last_mut() {
            Some(last) if last.block + last.size.div_ceil(BLOCK) == content.block => {
                last.size = (content.block - last.block) * BLOCK + content.size;
            }
            _ => merged.push(content),
        }
    }
    merged
}

fn link_target(path: &[u8], target: &[u8]) -> Result<Box<[u8]>, LayerFault> {
    match target {
        [] => Err(LayerFault::entry(path, "it is a symbolic link to nothing")),
        _ if target.len() > MAX_PATH_BYTES => {
            Err(LayerFault::entry(path, "it is a symbolic link of more than 4095 bytes"))
        }
        _ if target.contains(&0) => {
            Err(LayerFault::entry(path, "it is a symbolic link with a NUL in it"))
        }
        _ => Ok(target.into()),
    }
}

fn checked(path: &[u8], device: Device) -> Result<Device, LayerFault> {
    if device.major > MAX_MAJOR || device.minor > MAX_MINOR {
        return Err(LayerFault::entry(path, "Linux has no device of such a number"));
    }
    Ok(device)
}

/// Those that Linux has a name space for, sorted. Layers made elsewhere have others (`com.apple.…`), which
/// other tools leave out too; and overlayfs's own would steer the overlay that the guest mounts over the root.
pub(in crate::image) fn kept_xattrs(
    path: &[u8],
    mut xattrs: Vec<Xattr>,
) -> Result<Box<[Xattr]>, LayerFault> {
    xattrs.retain(|xattr| node::xattr_index(&xattr.name).is_some());
    xattrs.sort_by(|a, b| a.name.cmp(&b.name));
    let sum: usize = xattrs.iter().map(|xattr| xattr.name.len() + xattr.value.len()).sum();
    if sum > MAX_XATTRS_BYTES
        || xattrs.iter().any(|xattr| xattr.name.len() > 255 || xattr.value.len() > MAX_XATTR_BYTES)
        || xattrs.iter().any(|xattr| xattr.name.contains(&0))
    {
        return Err(LayerFault::entry(path, "an extended attribute is larger than Linux has them"));
    }
    Ok(xattrs.into())
}

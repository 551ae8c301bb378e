//! Where each inode lies.

use std::io;

use super::super::data::{BLOCK, DataArea};
use super::super::node::{Kind, NodeId};
use super::super::tree::Tree;
use super::SLOT;
use super::directory::{self, Name};
use super::inode::{self, Body, DataPlace};

/// Inode 0 would look like a name that was removed.
const FIRST_SLOT: u32 = 2;
const NOWHERE: Place = Place { slot: 0, block: 0, is_inline: false };

#[derive(Clone, Copy, Debug)]
struct Place {
    /// The inode's number.
    slot: u32,
    /// Of a directory's or a link's own blocks, if it has any.
    block: u32,
    /// The end of its data follows the inode.
    is_inline: bool,
}

/// The inodes in the order in which they lie: those of one directory together, the root first.
#[derive(Debug)]
pub(super) struct Layout {
    /// Each with the directory that it is in; only a directory's is asked for.
    order: Vec<(NodeId, NodeId)>,
    places: Vec<Place>,
}

pub(super) fn block_number(block: u64) -> io::Result<u32> {
    u32::try_from(block).map_err(|_| io::ErrorKind::FileTooLarge.into())
}

impl Layout {
    /// Lays out the inodes, and from `block` on what does not fit beside them.
    pub(super) fn new(tree: &Tree, mut block: u64) -> io::Result<Self> {
        let order = order(tree);
        let mut places = vec![NOWHERE; tree.capacity()];
        let mut at = u64::from(FIRST_SLOT) * SLOT;
        for &(id, _) in &order {
            let node = tree.node(id);
            let body = inode::body_bytes(node);
            let own = own_bytes(tree, id);
            let tail = own % BLOCK;
            let is_inline = tail > 0 && body + tail <= BLOCK;
            let length = body + if is_inline { tail } else { 0 };
            // The kernel wants what is inline in one block; so the whole is.
            if at % BLOCK + length > BLOCK {
                at = at.next_multiple_of(BLOCK);
            }
            let slot = u32::try_from(at / SLOT).map_err(|_| io::ErrorKind::FileTooLarge)?;
            places[id as usize] = Place { slot, block: block_number(block)?, is_inline };
            block += if is_inline { own / BLOCK } else { own.div_ceil(BLOCK) };
            at = (at + length).next_multiple_of(SLOT);
        }
        Ok(Self { order, places })
    }

    /// The root's, which is in the first block or at the begin of the second.
    pub(super) fn root_number(&self) -> io::Result<u16> {
        let (root, _) = self.order[0];
        u16::try_from(self.places[root as usize].slot)
            .map_err(|_| io::ErrorKind::FileTooLarge.into())
    }

    pub(super) fn inodes(&self) -> u64 {
        self.order.len() as u64
    }

    /// Writes what has blocks of its own.
    pub(super) fn write_blocks(&self, tree: &Tree, data: &mut DataArea) -> io::Result<()> {
        for &(id, parent) in &self.order {
            let own = self.own(tree, id, parent);
            let (blocks, _) = self.split(id, &own);
            if !blocks.is_empty() {
                data.write(blocks)?;
                data.align()?;
            }
        }
        Ok(())
    }

    /// Writes the inodes.
    pub(super) fn write_inodes(&self, tree: &Tree, data: &mut DataArea) -> io::Result<()> {
        let begin = data.position();
        for (number, &(id, parent)) in (1u32..).zip(&self.order) {
            let node = tree.node(id);
            let place = self.places[id as usize];
            let own = self.own(tree, id, parent);
            let (_, tail) = self.split(id, &own);
            let (size, data_place) = match &node.kind {
                Kind::File(content) => {
                    (content.size, DataPlace::Blocks(block_number(content.block)?))
                }
                Kind::Directory(_) | Kind::Symlink(_) if place.is_inline => {
                    (own.len() as u64, DataPlace::Inline(place.block))
                }
                _ => (own.len() as u64, DataPlace::Blocks(place.block)),
            };
            let links = match node.is_directory() {
                true => {
                    let children = tree.children(id);
                    2 + children.filter(|(_, child)| tree.node(*child).is_directory()).count()
                }
                false => node.names as usize,
            };
            let links = u32::try_from(links).unwrap_or(u32::MAX);
            data.zeros(begin + u64::from(place.slot) * SLOT - data.position())?;
            data.write(&inode::encode(node, &Body { number, size, links, data: data_place }))?;
            data.write(tail)?;
        }
        Ok(())
    }

    /// The part of a node's own data that has blocks, and the part that follows its inode.
    fn split<'o>(&self, id: NodeId, own: &'o [u8]) -> (&'o [u8], &'o [u8]) {
        match self.places[id as usize].is_inline {
            true => own.split_at(own.len() - own.len() % BLOCK as usize),
            false => (own, &[]),
        }
    }

    /// What a directory or a link holds.
    fn own(&self, tree: &Tree, id: NodeId, parent: NodeId) -> Vec<u8> {
        match &tree.node(id).kind {
            Kind::Symlink(target) => target.to_vec(),
            Kind::Directory(_) => {
                let name = |name, node: NodeId| Name {
                    name,
                    inode: self.places[node as usize].slot,
                    file_type: directory::file_type(&tree.node(node).kind),
                };
                let dots = [name(&b"."[..], id), name(&b".."[..], parent)].into_iter();
                let children = tree.children(id).map(|(text, node)| name(text, node));
                directory::encode(dots.chain(children).collect())
            }
            _ => Vec::new(),
        }
    }
}

/// How long that will be.
fn own_bytes(tree: &Tree, id: NodeId) -> u64 {
    match &tree.node(id).kind {
        Kind::Symlink(target) => target.len() as u64,
        Kind::Directory(_) => directory::encoded_bytes(tree.children(id).map(|(name, _)| name)),
        _ => 0,
    }
}

fn order(tree: &Tree) -> Vec<(NodeId, NodeId)> {
    let mut seen = vec![false; tree.capacity()];
    let mut order = vec![(tree.root(), tree.root())];
    let mut at = 0;
    while let Some(&(directory, _)) = order.get(at) {
        for (_, child) in tree.children(directory) {
            // One with several names lies where the first is.
            if !std::mem::replace(&mut seen[child as usize], true) {
                order.push((child, directory));
            }
        }
        at += 1;
    }
    order
}

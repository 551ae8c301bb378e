//! The tree that layers make, in memory: names, and all that is known of files but their data.
//!
//! Source: OCI image specification, layer.md. What it leaves open is as umoci and containerd have it: the
//! directories of a name may be symbolic links, which are followed inside of the tree; a directory over a
//! directory changes it, and anything else over anything replaces it.

use std::collections::BTreeMap;
use std::collections::btree_map::Entry as Place;

use super::super::layer::LayerFault;
use super::node::{Child, Content, Kind, Node, NodeId};
use super::path::components;

const ROOT: NodeId = 0;
/// Directories below one another.
const MAX_DEPTH: usize = 256;
/// Symbolic links that a name may lead through, as in Linux.
const MAX_LINKS: u32 = 40;
/// Steps from name to name, in all layers: links could make many of each entry.
const MAX_STEPS: u64 = 100_000_000;
/// What a name takes beside its bytes, and a node beside its parts.
const NAME_BYTES: u64 = 64;
const NODE_BYTES: u64 = size_of::<Node>() as u64;

#[derive(Debug)]
pub(in crate::image) struct Tree {
    nodes: Vec<Node>,
    free: Vec<NodeId>,
    /// What no file has any more.
    dead: Vec<Content>,
    /// Memory that it takes, and may.
    bytes: u64,
    max_bytes: u64,
    steps: u64,
}

/// Where a name would be, or is.
#[derive(Debug)]
struct Spot<'p> {
    directory: NodeId,
    name: &'p [u8],
}

impl Tree {
    pub(in crate::image) fn new(max_bytes: u64) -> Self {
        let nodes = vec![Node::bare_directory()];
        Self { nodes, free: Vec::new(), dead: Vec::new(), bytes: NODE_BYTES, max_bytes, steps: 0 }
    }

    pub(in crate::image) fn root(&self) -> NodeId {
        ROOT
    }

    pub(in crate::image) fn node(&self, id: NodeId) -> &Node {
        &self.nodes[id as usize]
    }

    /// How many places for nodes there are: more than any `NodeId`.
    pub(in crate::image) fn capacity(&self) -> usize {
        self.nodes.len()
    }

    /// The names in a directory, in order. Anything else has none.
    pub(in crate::image) fn children(&self, id: NodeId) -> impl Iterator<Item = (&[u8], NodeId)> {
        let children = match &self.node(id).kind {
            Kind::Directory(children) => Some(children.iter()),
            _ => None,
        };
        children.into_iter().flatten().map(|(name, child)| (&**name, child.node))
    }

    /// Data that was replaced or removed.
    pub(in crate::image) fn take_dead(&mut self) -> Vec<Content> {
        std::mem::take(&mut self.dead)
    }

    /// Puts a node at a path.
    pub(in crate::image) fn put(
        &mut self,
        path: &[u8],
        node: Node,
        layer: u32,
    ) -> Result<(), LayerFault> {
        let names = components(path)?;
        let Some(spot) = self.spot(path, &names, Some(layer))? else {
            return self.put_root(path, node);
        };
        if let Some(child) = self.child(spot.directory, spot.name)
            && node.is_directory()
            && self.node(child.node).is_directory()
        {
            self.describe(child.node, node)?;
            self.touch(spot.directory, spot.name, layer);
            return Ok(());
        }
        self.remove(spot.directory, spot.name);
        let id = self.add_node(node)?;
        self.add_name(spot.directory, spot.name, Child { node: id, layer })
    }

    fn put_root(&mut self, path: &[u8], node: Node) -> Result<(), LayerFault> {
        if !node.is_directory() {
            return Err(LayerFault::entry(path, "the root is replaced by what is no directory"));
        }
        self.describe(ROOT, node)
    }

    /// Gives a directory what another one has, but for its names.
    fn describe(&mut self, id: NodeId, node: Node) -> Result<(), LayerFault> {
        let old = &mut self.nodes[id as usize];
        let before = cost(old);
        let kind = std::mem::replace(&mut old.kind, Kind::Fifo);
        let names = old.names;
        *old = Node { kind, names, ..node };
        let after = cost(old);
        self.bytes = self.bytes - before + after;
        self.check_memory()
    }

    /// Gives what is at `target` another name.
    pub(in crate::image) fn link(
        &mut self,
        path: &[u8],
        target: &[u8],
        layer: u32,
    ) -> Result<(), LayerFault> {
        const NOT_THERE: &str = "it is a hard link to what is not there";
        let names = components(target)?;
        let found = self.spot(target, &names, None)?;
        let found = found.and_then(|spot| self.child(spot.directory, spot.name));
        let node = found.ok_or_else(|| LayerFault::entry(path, NOT_THERE))?.node;
        if self.node(node).is_directory() {
            return Err(LayerFault::entry(path, "it is a hard link to a directory"));
        }
        let names = components(path)?;
        let spot = self.spot(path, &names, Some(layer))?;
        let spot = spot.ok_or_else(|| LayerFault::entry(path, "the root is replaced by a link"))?;
        // The node has to outlive a name that it may have there already.
        self.nodes[node as usize].names += 1;
        self.remove(spot.directory, spot.name);
        self.nodes[node as usize].names -= 1;
        self.add_name(spot.directory, spot.name, Child { node, layer })
    }

    /// Removes what the layers below have at a path.
    pub(in crate::image) fn white_out(
        &mut self,
        path: &[u8],
        name: &[u8],
        layer: u32,
    ) -> Result<(), LayerFault> {
        let Some(directory) = self.existing(path)? else {
            return Ok(());
        };
        match self.child(directory, name) {
            Some(child) if child.layer < layer => self.remove(directory, name),
            Some(child) => return self.hide_lower(child.node, layer),
            None => {}
        }
        Ok(())
    }

    /// Removes all that the layers below have in a directory.
    pub(in crate::image) fn make_opaque(
        &mut self,
        path: &[u8],
        layer: u32,
    ) -> Result<(), LayerFault> {
        match self.existing(path)? {
            Some(directory) => self.hide_lower(directory, layer),
            None => Ok(()),
        }
    }

    fn hide_lower(&mut self, directory: NodeId, layer: u32) -> Result<(), LayerFault> {
        let mut directories = vec![directory];
        while let Some(directory) = directories.pop() {
            let names = self.children(directory).count();
            self.step(names as u64)?;
            let Kind::Directory(children) = &self.node(directory).kind else { continue };
            let mut hidden: Vec<Box<[u8]>> = Vec::new();
            for (name, child) in children {
                match child.layer < layer {
                    true => hidden.push(name.clone()),
                    false => directories.push(child.node),
                }
            }
            for name in hidden {
                self.remove(directory, &name);
            }
        }
        Ok(())
    }

    /// Takes so many steps of those that an image may take.
    fn step(&mut self, count: u64) -> Result<(), LayerFault> {
        self.steps += count;
        match self.steps > MAX_STEPS {
            true => Err(LayerFault::Limit { what: "steps through names", limit: MAX_STEPS }),
            false => Ok(()),
        }
    }

    /// The directory at a path, if it is there.
    fn existing(&mut self, path: &[u8]) -> Result<Option<NodeId>, LayerFault> {
        let names = components(path)?;
        let found = self.walk(path, &names, None)?;
        Ok(found.filter(|&id| self.node(id).is_directory()))
    }

    /// Where a path leads: none for the root. With `layer`, which names it, directories on the way are made
    /// where they are not there; else the way may end.
    fn spot<'p>(
        &mut self,
        path: &[u8],
        names: &[&'p [u8]],
        layer: Option<u32>,
    ) -> Result<Option<Spot<'p>>, LayerFault> {
        let Some((&name, parents)) = names.split_last() else {
            return Ok(None);
        };
        let directory = self.walk(path, parents, layer)?;
        Ok(directory.map(|directory| Spot { directory, name }))
    }

    /// Goes from the root from directory to directory, also through symbolic links, whose `..` and `/` lead
    /// no higher than the tree's root.
    fn walk(
        &mut self,
        path: &[u8],
        names: &[&[u8]],
        layer: Option<u32>,
    ) -> Result<Option<NodeId>, LayerFault> {
        let fault = |what| Err(LayerFault::entry(path, what));
        let mut way = vec![ROOT];
        let mut ahead: Vec<Box<[u8]>> = names.iter().rev().map(|&name| name.into()).collect();
        let mut links = 0;
        while let Some(name) = ahead.pop() {
            self.step(1)?;
            let here = way.last().copied().unwrap_or(ROOT);
            if &*name == b".." {
                way.truncate(way.len().max(2) - 1);
                continue;
            }
            let Some(child) = self.child(here, &name) else {
                let Some(layer) = layer else { return Ok(None) };
                way.push(self.make_directory(path, here, &name, layer)?);
                if way.len() > MAX_DEPTH {
                    return fault("it lies below too many directories");
                }
                continue;
            };
            match &self.node(child.node).kind {
                Kind::Directory(_) => {
                    way.push(child.node);
                    if let Some(layer) = layer {
                        self.touch(here, &name, layer);
                    }
                }
                Kind::Symlink(target) => {
                    links += 1;
                    if links > MAX_LINKS {
                        return fault("it lies behind too many symbolic links");
                    }
                    if target.starts_with(b"/") {
                        way.truncate(1);
                    }
                    let parts = target.split(|&byte| byte == b'/');
                    let parts = parts.filter(|part| !matches!(*part, b"" | b"."));
                    ahead.extend(parts.rev().map(Box::from));
                }
                _ if layer.is_none() => return Ok(None),
                _ => return fault("it lies below what is no directory"),
            }
            if way.len() > MAX_DEPTH {
                return fault("it lies below too many directories");
            }
        }
        Ok(way.last().copied())
    }

    fn make_directory(
        &mut self,
        path: &[u8],
        parent: NodeId,
        name: &[u8],
        layer: u32,
    ) -> Result<NodeId, LayerFault> {
        // What a symbolic link holds was not looked at as a name.
        if name.len() > 255 {
            return Err(LayerFault::entry(path, "it lies behind a link to a name that cannot be"));
        }
        let node = self.add_node(Node::bare_directory())?;
        self.add_name(parent, name, Child { node, layer })?;
        Ok(node)
    }

    fn child(&self, directory: NodeId, name: &[u8]) -> Option<Child> {
        match &self.node(directory).kind {
            Kind::Directory(children) => children.get(name).copied(),
            _ => None,
        }
    }

    fn directory(&mut self, id: NodeId) -> Option<&mut BTreeMap<Box<[u8]>, Child>> {
        match &mut self.nodes[id as usize].kind {
            Kind::Directory(children) => Some(children),
            _ => None,
        }
    }

    fn touch(&mut self, directory: NodeId, name: &[u8], layer: u32) {
        if let Some(child) = self.directory(directory).and_then(|children| children.get_mut(name)) {
            child.layer = layer;
        }
    }

    fn add_node(&mut self, node: Node) -> Result<NodeId, LayerFault> {
        self.bytes += cost(&node);
        self.check_memory()?;
        if let Some(id) = self.free.pop() {
            self.nodes[id as usize] = node;
            return Ok(id);
        }
        let id = u32::try_from(self.nodes.len());
        let limit = u64::from(u32::MAX);
        let id = id.map_err(|_| LayerFault::Limit { what: "files", limit })?;
        self.nodes.push(node);
        Ok(id)
    }

    /// Adds a name that is not there.
    fn add_name(&mut self, directory: NodeId, name: &[u8], child: Child) -> Result<(), LayerFault> {
        let Some(children) = self.directory(directory) else { return Ok(()) };
        if let Place::Vacant(place) = children.entry(name.into()) {
            place.insert(child);
            self.nodes[child.node as usize].names += 1;
            self.bytes += NAME_BYTES + name.len() as u64;
        }
        self.check_memory()
    }

    /// Removes a name, and what has no other.
    fn remove(&mut self, directory: NodeId, name: &[u8]) {
        let mut gone = Vec::new();
        if let Some(child) = self.directory(directory).and_then(|children| children.remove(name)) {
            self.bytes -= NAME_BYTES + name.len() as u64;
            gone.push(child.node);
        }
        while let Some(id) = gone.pop() {
            let node = &mut self.nodes[id as usize];
            node.names -= 1;
            if node.names > 0 {
                continue;
            }
            self.bytes -= cost(node);
            match std::mem::replace(&mut node.kind, Kind::Fifo) {
                Kind::Directory(children) => {
                    for (name, child) in children {
                        self.bytes -= NAME_BYTES + name.len() as u64;
                        gone.push(child.node);
                    }
                }
                Kind::File(content) if content.size > 0 => self.dead.push(content),
                _ => {}
            }
            node.xattrs = Box::default();
            self.free.push(id);
        }
    }

    fn check_memory(&self) -> Result<(), LayerFault> {
        if self.bytes > self.max_bytes {
            let what = "bytes of memory for names and attributes";
            return Err(LayerFault::Limit { what, limit: self.max_bytes });
        }
        Ok(())
    }
}

/// The memory that a node takes, without the names in it.
fn cost(node: &Node) -> u64 {
    let link = match &node.kind {
        Kind::Symlink(target) => target.len(),
        _ => 0,
    };
    let xattrs = node.xattrs.iter();
    let xattrs: usize = xattrs.map(|x| size_of_val(x) + x.name.len() + x.value.len()).sum();
    NODE_BYTES + (link + xattrs) as u64
}

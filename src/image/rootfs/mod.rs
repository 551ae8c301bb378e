//! The root file system of an image: layers, one over the other, become one EROFS file.
//!
//! Nothing of a layer becomes a file of the host: its entries go into a tree in memory, and its data into
//! one file, at the place where the guest will read it. So a name that climbs out has nowhere to
//! climb to, and neither root's rights nor a mount are needed.

mod build;
mod data;
mod erofs;
mod node;
mod path;
mod tree;

pub(super) use self::build::{Build, Limits, OnBytes, kept_xattrs};
pub(super) use self::erofs::{FORMAT, is_whole};
pub(super) use self::node::{Content, Kind, Node};

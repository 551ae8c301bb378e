//! A layer: a stream of tar entries that changes the tree below it.
//!
//! Source: OCI image specification, layer.md; POSIX pax; GNU tar's manual, "Basic Tar Format" and "Storing
//! Sparse Files". The headers' fields are read by the crate tar; its own iterator is not used, because it
//! reads names and pax records of any size into memory, and splits records at line ends that binary
//! values of extended attributes have too.

mod entry;
mod fault;
mod pax;
mod reader;
mod sparse;
mod stream;

pub(super) use self::entry::{Device, Entry, EntryKind, Time, Xattr};
pub(super) use self::fault::LayerFault;
pub(super) use self::reader::TarReader;
pub(super) use self::sparse::Extent;
pub(super) use self::stream::{LayerStream, Packed};

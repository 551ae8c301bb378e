//! A disk.

use std::path::PathBuf;

use serde::{Deserialize, Serialize};

/// A disk of a guest: a file, or a block device of the host.
///
/// ```
/// use dormouse::BlockConfig;
///
/// let root = BlockConfig::new("rootfs.squashfs").read_only();
/// let data = BlockConfig::new("data.img").id("data");
/// ```
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct BlockConfig {
    pub(crate) path: PathBuf,
    #[serde(default)]
    pub(crate) read_only: bool,
    #[serde(default)]
    pub(crate) id: String,
}

impl BlockConfig {
    /// A disk that the guest may write: as large as the file, in sectors of 512 bytes. What the
    /// guest flushes is on the host's disk (fdatasync).
    pub fn new(path: impl Into<PathBuf>) -> Self {
        Self { path: path.into(), read_only: false, id: String::new() }
    }

    /// The guest may only read it. Such a file can be the disk of many VMs.
    #[must_use]
    pub fn read_only(mut self) -> Self {
        self.read_only = true;
        self
    }

    /// What the guest reads as the disk's serial number: up to 20 printable ASCII characters.
    #[must_use]
    pub fn id(mut self, id: impl Into<String>) -> Self {
        self.id = id.into();
        self
    }
}

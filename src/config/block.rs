//! A disk.

use std::path::PathBuf;

use serde::{Deserialize, Serialize};

use super::RateLimit;

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
    #[serde(default)]
    pub(crate) rate_limit: RateLimit,
}

impl BlockConfig {
    /// A disk that the guest may write: as large as the file, in sectors of 512 bytes. What the
    /// guest flushes is on the host's disk (fdatasync).
    pub fn new(path: impl Into<PathBuf>) -> Self {
        let (id, rate_limit) = (String::new(), RateLimit::default());
        Self { path: path.into(), read_only: false, id, rate_limit }
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

    /// How fast the disk is; not limited unless set. Bytes are those read and written, operations
    /// are all requests. It can be changed while the guest runs, see
    /// [`MicroVm::set_disk_rate_limit`].
    ///
    /// [`MicroVm::set_disk_rate_limit`]: crate::MicroVm::set_disk_rate_limit
    #[must_use]
    pub fn rate_limit(mut self, limit: RateLimit) -> Self {
        self.rate_limit = limit;
        self
    }
}

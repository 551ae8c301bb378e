//! Disks that the agent mounts.

use serde::{Deserialize, Serialize};

/// The disk with the guest's root file system, and where writes to that go.
///
/// ```
/// use dormouse::RootDisk;
///
/// let own = RootDisk::new(0).fs_type("ext4");
/// let shared = RootDisk::new(0).fs_type("squashfs").overlay_disk(1);
/// ```
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct RootDisk {
    pub(crate) disk: usize,
    #[serde(default)]
    pub(crate) fs_type: Option<String>,
    #[serde(default)]
    pub(crate) overlay: Overlay,
}

/// Where writes to the root file system go.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub(crate) enum Overlay {
    #[default]
    None,
    ReadOnly,
    /// Bytes; 0 for half of the memory.
    Memory(u64),
    Disk(usize),
}

impl RootDisk {
    /// The disk with this number, counted from 0 in the order of
    /// [`VmConfig::block`](crate::VmConfig::block). What the guest writes goes to it.
    pub fn new(disk: usize) -> Self {
        Self { disk, fs_type: None, overlay: Overlay::None }
    }

    /// The file system, as mount(8) names it: `ext4`, `squashfs`, `erofs`, … Unless set, each that the
    /// guest's kernel has is tried, of ext4, squashfs and erofs where it has them as modules.
    #[must_use]
    pub fn fs_type(mut self, name: impl Into<String>) -> Self {
        self.fs_type = Some(name.into());
        self
    }

    /// The guest cannot write to its root.
    #[must_use]
    pub fn read_only(mut self) -> Self {
        self.overlay = Overlay::ReadOnly;
        self
    }

    /// What the guest writes stays in its memory, up to so many bytes (0: half of its memory), in a file
    /// system that lies over the disk's (overlayfs). The disk may be one that is only read.
    #[must_use]
    pub fn overlay_memory(mut self, bytes: u64) -> Self {
        self.overlay = Overlay::Memory(bytes);
        self
    }

    /// What the guest writes goes to another disk, which has an ext4 file system, and lies over this one
    /// (overlayfs). With the feature `image`, `OverlayDisk::create` makes such a disk.
    #[must_use]
    pub fn overlay_disk(mut self, disk: usize) -> Self {
        self.overlay = Overlay::Disk(disk);
        self
    }
}

/// A disk that is mounted somewhere below the guest's root.
///
/// ```
/// use dormouse::MountConfig;
///
/// let data = MountConfig::new(1, "/var/lib/data").fs_type("ext4");
/// ```
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct MountConfig {
    pub(crate) disk: usize,
    pub(crate) path: String,
    #[serde(default)]
    pub(crate) fs_type: Option<String>,
    #[serde(default)]
    pub(crate) read_only: bool,
}

impl MountConfig {
    /// The disk with this number, counted from 0, at an absolute path of the guest.
    pub fn new(disk: usize, path: impl Into<String>) -> Self {
        Self { disk, path: path.into(), fs_type: None, read_only: false }
    }

    /// The file system: see [`RootDisk::fs_type`].
    #[must_use]
    pub fn fs_type(mut self, name: impl Into<String>) -> Self {
        self.fs_type = Some(name.into());
        self
    }

    /// The guest cannot write to it.
    #[must_use]
    pub fn read_only(mut self) -> Self {
        self.read_only = true;
        self
    }
}

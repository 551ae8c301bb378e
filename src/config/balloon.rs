//! The memory balloon.

use serde::{Deserialize, Serialize};

/// A memory balloon: the guest puts pages into it, and the host has them back until the guest
/// takes them out. Its size follows [`MicroVm::set_balloon_mib`] as far as the guest can; it
/// starts empty.
///
/// Source: virtio 1.2 §5.5.
///
/// ```
/// use dormouse::{BalloonConfig, Kernel, VmConfig};
///
/// let config = VmConfig::new(Kernel::file("vmlinux"))
///     .memory_mib(1024)
///     .balloon(BalloonConfig::default().deflate_on_oom(true).free_page_reporting(true));
/// ```
///
/// [`MicroVm::set_balloon_mib`]: crate::MicroVm::set_balloon_mib
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct BalloonConfig {
    pub(crate) deflate_on_oom: bool,
    pub(crate) free_page_reporting: bool,
}

impl BalloonConfig {
    /// A guest that is out of memory takes pages out of the balloon before it kills a process.
    #[must_use]
    pub fn deflate_on_oom(mut self, on: bool) -> Self {
        self.deflate_on_oom = on;
        self
    }

    /// The guest reports pages that became free, and the host has them back until the guest uses
    /// them again. So a guest's use of the host's memory goes down by itself, in pieces of some
    /// MiB, seconds after the guest freed them. It needs no balloon to be inflated.
    #[must_use]
    pub fn free_page_reporting(mut self, on: bool) -> Self {
        self.free_page_reporting = on;
        self
    }
}

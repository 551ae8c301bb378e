//! A disk.

use std::path::PathBuf;

use serde::{Deserialize, Serialize};

use super::make_absolute;
use super::{ConfigError, RateLimit};
use crate::bounded;

/// A disk of a guest: a file, or a block device of the host.
///
/// The file is locked (flock) while the VM has it: by one VM that writes to it, or by any number
/// of VMs that do not.
///
/// Source: virtio 1.2 §5.2.
///
/// ```
/// use dormouse::BlockConfig;
///
/// let tools = BlockConfig::new("tools.squashfs").read_only();
/// let root = BlockConfig::new("rootfs.ext4").delta("vm-7.delta");
/// let data = BlockConfig::new("data.img").id("data");
/// ```
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct BlockConfig {
    pub(crate) path: PathBuf,
    #[serde(default)]
    pub(crate) writes: Writes,
    #[serde(default)]
    pub(crate) id: String,
    #[serde(default)]
    pub(crate) direct: bool,
    #[serde(default = "one")]
    pub(crate) queues: u16,
    #[serde(default)]
    pub(crate) rate_limit: RateLimit,
    /// Deltas that lie between the file and what this VM writes, the lowest first. Any number of
    /// VMs share them, as they share the file; nobody writes to them any more.
    #[serde(default, skip_serializing_if = "Vec::is_empty", deserialize_with = "bounded::list")]
    pub(crate) frozen: Vec<PathBuf>,
    /// What the file has to be, where something was made for the file as it was.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub(crate) expected: Option<FileFacts>,
}

/// What a file of the host is recognised by.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub(crate) struct FileFacts {
    pub(crate) bytes: u64,
    /// Its time of modification, in seconds and nanoseconds since 1970. None: not known or, for a
    /// block device, of no meaning.
    #[serde(default)]
    pub(crate) modified: Option<(i64, i64)>,
    /// None as above.
    #[serde(default)]
    pub(crate) inode: Option<u64>,
}

/// Deltas one above the other: each is a look-up more for every read.
const MAX_FROZEN: usize = 16;

/// What becomes of a guest's writes.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub(crate) enum Writes {
    #[default]
    ToDisk,
    ToDelta(PathBuf),
    Discarded,
    Refused,
}

fn one() -> u16 {
    1
}

impl BlockConfig {
    /// Whether what the guest writes is there when its VM is gone.
    #[cfg(feature = "session")]
    pub(crate) fn outlives_its_vm(&self) -> bool {
        matches!(self.writes, Writes::ToDisk | Writes::ToDelta(_))
    }

    /// A disk that the guest may write: as large as the file, in sectors of 512 bytes. What the
    /// guest flushes is on the host's disk (fdatasync; after the first write fsync, so that the file is known as changed).
    pub fn new(path: impl Into<PathBuf>) -> Self {
        let writes = Writes::default();
        let (id, rate_limit) = (String::new(), RateLimit::default());
        let (path, frozen, expected) = (path.into(), Vec::new(), None);
        Self { path, writes, id, direct: false, queues: 1, rate_limit, frozen, expected }
    }

    /// The guest may only read it. Such a file can be the disk of many VMs.
    #[must_use]
    pub fn read_only(mut self) -> Self {
        self.writes = Writes::Refused;
        self
    }

    /// What the guest writes goes to a file of this VM's own, and the disk itself, which many VMs
    /// may share, stays as it is. The file is created where it is not there; it is sparse, and of
    /// use only with the same disk. A write costs what it costs without a delta; the first flush
    /// after a write to a new place costs two fdatasyncs.
    #[must_use]
    pub fn delta(mut self, path: impl Into<PathBuf>) -> Self {
        self.writes = Writes::ToDelta(path.into());
        self
    }

    /// As [`delta`](Self::delta), with a file without a name in the folder for temporary files
    /// (`TMPDIR`): what the guest writes is gone with the VM.
    #[must_use]
    pub fn discard_writes(mut self) -> Self {
        self.writes = Writes::Discarded;
        self
    }

    /// What the guest reads as the disk's serial number: up to 20 printable ASCII characters
    /// without spaces.
    #[must_use]
    pub fn id(mut self, id: impl Into<String>) -> Self {
        self.id = id.into();
        self
    }

    /// Goes past the host's page cache (O_DIRECT) where a request is in whole, aligned pages of
    /// 4,096 bytes, as a guest's page cache makes them. Off unless set: it spares the host memory
    /// and costs a trip to the disk a read. A delta is not concerned.
    #[must_use]
    pub fn direct(mut self, on: bool) -> Self {
        self.direct = on;
        self
    }

    /// How many queues the guest may use: 1 to 32; 1 unless set. More spare a guest with several
    /// vCPUs a lock of its own; the host serves them all from one thread.
    #[must_use]
    pub fn queues(mut self, count: u16) -> Self {
        self.queues = count;
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

    /// A delta that nobody writes to any more lies over the file, and over those that were given
    /// before. The guest's writes go into another delta, are discarded, or refused.
    #[must_use]
    pub(crate) fn over(mut self, delta: impl Into<PathBuf>) -> Self {
        self.frozen.push(delta.into());
        self
    }

    /// Has its files found from whatever directory a process is in.
    pub(super) fn make_absolute(&mut self) {
        make_absolute(&mut self.path);
        self.frozen.iter_mut().for_each(make_absolute);
        if let Writes::ToDelta(delta) = &mut self.writes {
            make_absolute(delta);
        }
    }

    pub(super) fn check(&self) -> Result<(), ConfigError> {
        let count = self.frozen.len();
        if count > MAX_FROZEN {
            return Err(ConfigError::FrozenDeltas { count, max: MAX_FROZEN });
        }
        if count > 0 && self.writes == Writes::ToDisk {
            return Err(ConfigError::WritesBelowDelta { path: self.path.clone() });
        }
        self.rate_limit.check()
    }
}

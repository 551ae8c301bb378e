//! A disk that was saved: what a snapshot keeps of it, and how other disks go on from there.

use std::path::{Path, PathBuf};

use serde::{Deserialize, Serialize};

use super::DiskError;
use super::checksums::Checksums;
use super::progress::Progress;
use crate::config::{BlockConfig, FileFacts, Writes};

/// What became of a disk.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub(crate) enum SavedDisk {
    /// The guest does not write to it. Nothing was saved.
    ReadOnly { base: Base },
    /// The saved file is the whole disk.
    Raw { data: Checksums },
    /// The saved file is a delta over the disk's file.
    Delta { base: Base, data: Checksums },
    /// The saved file is a delta over a whole disk, which is [saved too](below_path): an earlier
    /// snapshot's, that the disk stood on.
    Layered { below: Checksums, data: Checksums },
    /// The disk's file, and the delta that it may have, stay where they are: the guest sleeps.
    /// Nothing was saved.
    Left {
        base: Base,
        #[serde(default)]
        delta: Option<FileFacts>,
    },
}

/// The file that a saved disk needs, as it was.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct Base {
    pub(super) path: PathBuf,
    pub(super) facts: FileFacts,
}

/// Where the whole disk is that lies below a saved delta.
pub(super) fn below_path(saved: &Path) -> PathBuf {
    let mut path = saved.as_os_str().to_owned();
    path.push(BELOW);
    path.into()
}

/// What its name has behind that of the delta.
pub(crate) const BELOW: &str = "-below";

impl SavedDisk {
    /// The configuration of a disk that goes on from the saved one, for one VM of many: the saved
    /// file at `saved` stays as it is, and so does the file below. What the guest writes goes to
    /// `delta`, or to a file without a name. All else is as in `original`, the configuration of
    /// the disk that was saved.
    ///
    /// [`Disk::open`](super::Disk::open) refuses it where the file below has changed since.
    pub(crate) fn config(
        &self,
        original: &BlockConfig,
        saved: &Path,
        delta: Option<&Path>,
    ) -> BlockConfig {
        let mut config = original.clone();
        config.frozen.clear();
        if config.writes != Writes::Refused {
            config.writes = match delta {
                Some(delta) => Writes::ToDelta(delta.to_owned()),
                None => Writes::Discarded,
            };
        }
        match self {
            Self::ReadOnly { base } => config.below(base),
            Self::Left { base, .. } => match &original.writes {
                Writes::ToDelta(left) => config.below(base).over(left),
                _ => config.below(base),
            },
            Self::Delta { base, .. } => config.below(base).over(saved),
            Self::Raw { data } => config.below(&Base::saved(saved.to_owned(), data)),
            Self::Layered { below, .. } => {
                config.below(&Base::saved(below_path(saved), below)).over(saved)
            }
        }
    }

    /// The configuration of the same disk when its guest wakes: as it was, with what was saved
    /// of it at `saved`.
    pub(crate) fn own_config(&self, original: &BlockConfig, saved: &Path) -> BlockConfig {
        match self {
            Self::Left { base, .. } => {
                let mut config = original.clone().below(base);
                // A disk over a saved one is saved, and not left: whoever wrote this wants a file of the host.
                config.frozen.clear();
                config
            }
            _ => self.config(original, saved, None),
        }
    }

    /// The saved files: what their names have behind the disk's, and how long they are.
    pub(crate) fn files(&self) -> impl Iterator<Item = (&'static str, u64)> {
        let (data, below) = match self {
            Self::Raw { data } | Self::Delta { data, .. } => (Some(data), None),
            Self::Layered { below, data } => (Some(data), Some(below)),
            Self::ReadOnly { .. } | Self::Left { .. } => (None, None),
        };
        let data = data.map(|data| ("", data.bytes));
        data.into_iter().chain(below.map(|below| (BELOW, below.bytes)))
    }

    /// The checksums of the whole disk that a VM of this one stands on, where it is a saved file.
    pub(crate) fn whole(&self) -> Option<&Checksums> {
        match self {
            Self::Raw { data: whole } | Self::Layered { below: whole, .. } => Some(whole),
            Self::ReadOnly { .. } | Self::Delta { .. } | Self::Left { .. } => None,
        }
    }

    /// The file of the host that the saved disk needs.
    pub(crate) fn base(&self) -> Option<&Path> {
        match self {
            Self::ReadOnly { base } | Self::Delta { base, .. } | Self::Left { base, .. } => {
                Some(&base.path)
            }
            Self::Raw { .. } | Self::Layered { .. } => None,
        }
    }

    /// The delta that was left where it is, for a VM of many.
    pub(crate) fn left_delta<'a>(&self, original: &'a BlockConfig) -> Option<&'a Path> {
        match (self, &original.writes) {
            (Self::Left { .. }, Writes::ToDelta(left)) => Some(left),
            _ => None,
        }
    }

    /// Whether the delta that was left is as it was: the base below it says nothing of that.
    ///
    /// # Errors
    ///
    /// [`DiskError::BaseChanged`] where it is not; it cannot be found.
    pub(crate) fn check_left(&self, original: &BlockConfig) -> Result<(), DiskError> {
        let Self::Left { delta: Some(expected), .. } = self else { return Ok(()) };
        let Some(path) = self.left_delta(original) else { return Ok(()) };
        let metadata =
            std::fs::metadata(path).map_err(|source| DiskError::of_left_delta(path, source))?;
        super::compare(path, expected, &super::facts(&metadata, metadata.len()))
    }

    /// Whether the file that the disk stands on is as it was, as far as that can be told without
    /// opening it. [`Disk::open`](super::Disk::open) asks again, of the file that it has open.
    ///
    /// # Errors
    ///
    /// [`DiskError::BaseChanged`] where it is not; it cannot be found.
    pub(crate) fn check_base(&self) -> Result<(), DiskError> {
        let (Self::ReadOnly { base } | Self::Delta { base, .. } | Self::Left { base, .. }) = self
        else {
            return Ok(());
        };
        let path = &base.path;
        let metadata =
            std::fs::metadata(path).map_err(|source| DiskError::of_known(path, source))?;
        match metadata.is_file() {
            true => super::compare(path, &base.facts, &super::facts(&metadata, metadata.len())),
            // The size of a block device is not in its node.
            false => Ok(()),
        }
    }

    /// Whether what the disk needs beside its saved file may be another than it was when its guest went to sleep; `given`
    /// is where the file that it stands on is said to be now. A block device does not say whether it was written to, nor a
    /// file at another place, whose size is checked when it is opened, as what cannot be found is refused then.
    #[cfg(feature = "session")]
    pub(crate) fn may_have_changed(&self, original: &BlockConfig, given: Option<&Path>) -> bool {
        let is_base = |given: &Path| {
            let saved = self.base();
            // By its own name also where it is not there now.
            saved == Some(given) || std::fs::canonicalize(given).is_ok_and(|it| saved == Some(&it))
        };
        let is_elsewhere = given.is_some_and(|given| !is_base(given));
        if let Self::Left { base, delta: None } = self
            && (is_elsewhere || base.facts.modified.is_none())
        {
            return true;
        }
        let checked = self.check_left(original).and_then(|()| match is_elsewhere {
            true => Ok(()),
            false => self.check_base(),
        });
        matches!(checked, Err(DiskError::BaseChanged { .. }))
    }

    /// The same disk, on a file at another place, which is known by its size alone.
    pub(crate) fn moved(&self, path: &Path) -> Self {
        let mut moved = self.clone();
        match &mut moved {
            Self::ReadOnly { base } | Self::Delta { base, .. } | Self::Left { base, .. } => {
                base.path = path.to_owned();
                (base.facts.modified, base.facts.inode) = (None, None);
            }
            Self::Raw { .. } | Self::Layered { .. } => {}
        }
        moved
    }

    /// Reads the saved files whole, and says where it is not what it was. A disk of which nothing
    /// was saved is not looked at.
    ///
    /// # Errors
    ///
    /// [`DiskError::Damaged`] where a byte has changed; the file cannot be read; or `progress`
    /// breaks off.
    pub(crate) fn verify(
        &self,
        saved: &Path,
        progress: &mut Progress<'_>,
    ) -> Result<(), DiskError> {
        match self {
            Self::ReadOnly { .. } | Self::Left { .. } => Ok(()),
            Self::Raw { data } | Self::Delta { data, .. } => data.verify(saved, progress),
            Self::Layered { below, data } => {
                below.verify(&below_path(saved), progress)?;
                data.verify(saved, progress)
            }
        }
    }
}

impl Base {
    /// A file of a snapshot, which is known by its size alone.
    fn saved(path: PathBuf, data: &Checksums) -> Self {
        Self { path, facts: FileFacts { bytes: data.bytes, modified: None, inode: None } }
    }
}

impl BlockConfig {
    fn below(mut self, base: &Base) -> Self {
        self.path.clone_from(&base.path);
        self.expected = Some(base.facts);
        self
    }
}

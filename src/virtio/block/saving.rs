//! Saving the disk of a paused device.

use std::path::Path;

use super::Block;
use crate::disk::{Checksums, Disk, DiskError, Progress, SavedDisk};
use crate::virtio::DeviceHandle;

/// The disk of a device that stands still, which gets it back when this is dropped. The device
/// itself is not locked meanwhile: the device thread, which may look at it, is everybody's.
struct Lent<'a> {
    device: &'a DeviceHandle<Block>,
    disk: Option<Disk>,
}

impl Drop for Lent<'_> {
    fn drop(&mut self) {
        // None where another has it, or the VM is over.
        if let Some(disk) = self.disk.take() {
            self.device.with(|block| block.disk = Some(disk));
        }
    }
}

impl DeviceHandle<Block> {
    /// Saves the disk, as [`Disk::save`] says. The device is paused, and stays so until this
    /// returns.
    ///
    /// # Errors
    ///
    /// As [`Disk::save`]; the device can go on in any case.
    pub(crate) fn save(
        &self,
        to: &Path,
        whole: Option<&Checksums>,
        progress: &mut Progress<'_>,
    ) -> Result<SavedDisk, DiskError> {
        self.lend().disk.as_ref().ok_or(DiskError::Over)?.save(to, whole, progress)
    }

    /// Leaves the disk where it is, as [`Disk::leave`] says. The device is paused.
    ///
    /// # Errors
    ///
    /// As [`Disk::leave`].
    pub(crate) fn leave(
        &self,
        to: &Path,
        whole: Option<&Checksums>,
        sync: bool,
        progress: &mut Progress<'_>,
    ) -> Result<SavedDisk, DiskError> {
        self.lend().disk.as_mut().ok_or(DiskError::Over)?.leave(to, whole, sync, progress)
    }

    fn lend(&self) -> Lent<'_> {
        Lent { device: self, disk: self.with(|block| block.disk.take()) }
    }
}

//! The disk of a VM's own for what it writes over an image.

mod ext4;

use std::fs::{self, File};
use std::io;
use std::path::Path;

use self::ext4::{Ext4, MAX_BYTES, MIN_BYTES};
use super::ImageError;
use crate::config::BlockConfig;
use crate::error::Error;
use crate::random::random;

/// A disk for what one guest writes over its root.
#[derive(Debug)]
pub struct OverlayDisk;

impl OverlayDisk {
    /// Makes a file of `bytes`, from 16 MiB to 1 TiB, with an empty ext4 file system, for
    /// [`RootDisk::overlay_disk`](crate::RootDisk::overlay_disk) or
    /// [`MountConfig`](crate::MountConfig). The file is sparse: it takes as much of the host's disk as the guest has
    /// written, and some 100 KiB at the begin. It needs no root and no other program; some 0.2 ms for 1 GiB.
    ///
    /// ```no_run
    /// use dormouse::{AgentConfig, Image, ImageCache, Kernel, OverlayDisk, VmConfig};
    ///
    /// # async fn run() -> Result<(), dormouse::Error> {
    /// let image = Image::open("python.tar").unpack(&ImageCache::open("images")?).await?;
    /// let own = OverlayDisk::create("vm-1.ext4", 8 << 30)?;
    /// // The image's disk comes behind those that are there.
    /// let agent = AgentConfig::new().root(image.root(1).overlay_disk(0));
    /// let config = image.configure(VmConfig::new(Kernel::installed()?).block(own).agent(agent));
    /// # Ok(())
    /// # }
    /// ```
    ///
    /// # Errors
    ///
    /// [`ErrorKind::Config`](crate::ErrorKind::Config) for another size; [`ErrorKind::File`](crate::ErrorKind::File)
    /// where the file is there already, or cannot be written. Nothing is left then.
    pub fn create(path: impl AsRef<Path>, bytes: u64) -> Result<BlockConfig, Error> {
        let path = path.as_ref();
        if !(MIN_BYTES..=MAX_BYTES).contains(&bytes) {
            return Err(ImageError::OverlaySize { bytes, min: MIN_BYTES, max: MAX_BYTES }.into());
        }
        let fault = |source| ImageError::Overlay { path: path.to_owned(), source };
        let file = File::create_new(path).map_err(fault)?;
        if let Err(error) = format(&file, bytes) {
            // It is of no use to anybody, and the reason is told.
            let _ = fs::remove_file(path);
            return Err(fault(error).into());
        }
        Ok(BlockConfig::new(path))
    }
}

fn format(file: &File, bytes: u64) -> io::Result<()> {
    let uuid = random()?;
    let now = std::time::SystemTime::now().duration_since(std::time::UNIX_EPOCH);
    // The format has 32 bits for it, and two more that nobody needs before 2106.
    let now = now.map_or(0, |now| now.as_secs() as u32);
    file.set_len(bytes)?;
    Ext4::new(bytes, uuid, now).write(file)
}

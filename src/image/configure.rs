//! An image in the configuration of a VM.

use super::Image;
use crate::config::VmConfig;

impl Image {
    /// The configuration with this image in it: its root file system as one more disk, and, of what the
    /// [agent](VmConfig::agent) is not told already, that disk as the guest's root and the image's entrypoint.
    /// What the guest writes stays in its memory. For the root without the entrypoint, see [`Image`].
    ///
    /// ```no_run
    /// use dormouse::{Image, ImageCache, Kernel, MicroVm, VmConfig};
    ///
    /// # async fn run() -> Result<(), dormouse::Error> {
    /// let image = Image::open("python.tar").unpack(&ImageCache::open("images")?).await?;
    /// let config = image.configure(VmConfig::new(Kernel::installed()?).memory_mib(512));
    /// let vm = MicroVm::create(config)?.start()?;
    /// # Ok(())
    /// # }
    /// ```
    pub fn configure(&self, config: VmConfig) -> VmConfig {
        let (.., machine) = config.parts();
        let index = machine.blocks.len();
        let mut agent = machine.agent.clone().unwrap_or_default();
        if agent.root.is_none() {
            agent = agent.root(self.root(index));
        }
        if let (None, Some(entrypoint)) = (&agent.entrypoint, self.config().entrypoint()) {
            agent = agent.entrypoint(entrypoint);
        }
        config.block(self.disk()).agent(agent)
    }
}

//! An image in the configuration of a VM.

use std::ffi::OsStr;

use super::Image;
use crate::agent::{Agent, Command};
use crate::config::VmConfig;

impl Image {
    /// The configuration with this image in it: its root file system as one more disk, and, of what the
    /// [agent](VmConfig::agent) is not told already, that disk as the guest's root and the image's entrypoint.
    /// What the guest writes stays in its memory.
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
        let config = self.configure_root(config);
        let agent = config.parts().3.agent.clone().unwrap_or_default();
        match self.config().entrypoint().filter(|_| agent.entrypoint.is_none()) {
            Some(entrypoint) => config.agent(agent.entrypoint(entrypoint)),
            None => config,
        }
    }

    /// As [`configure`](Self::configure), without the image's entrypoint: for programs that the host starts, by
    /// [`command`](Self::command) say.
    pub fn configure_root(&self, config: VmConfig) -> VmConfig {
        let (.., machine) = config.parts();
        let index = machine.blocks.len();
        let mut agent = machine.agent.clone().unwrap_or_default();
        if agent.root.is_none() {
            agent = agent.root(self.root(index));
        }
        config.block(self.disk()).agent(agent)
    }

    /// A program to run in a guest with this image's root, with the environment, the working directory and the user of the
    /// image. What is set afterwards counts.
    pub fn command(&self, agent: &Agent, program: impl AsRef<OsStr>) -> Command {
        let config = self.config();
        let mut command = agent.command(program);
        for (name, value) in &config.env {
            command = command.env(name, value);
        }
        if let Some(directory) = &config.working_dir {
            command = command.current_dir(directory);
        }
        if let Some(user) = &config.user {
            command = command.user(user);
        }
        command
    }
}

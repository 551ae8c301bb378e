//! A template of a container image.

use super::{Template, TemplateOptions};
use crate::config::VmConfig;
use crate::error::Error;
use crate::image::Image;

impl Image {
    /// The template of this image in a VM of this [configuration](Image::configure): found, or booted, awaited
    /// and saved. See [`Template::build`].
    ///
    /// ```no_run
    /// use dormouse::{Image, ImageCache, Kernel, Ready, TemplateOptions, VmConfig};
    ///
    /// # async fn run() -> Result<(), dormouse::Error> {
    /// let image = Image::open("nginx.tar").unpack(&ImageCache::open("images")?).await?;
    /// let options = TemplateOptions::new("templates").ready(Ready::Port(80));
    /// let template = image.template(VmConfig::new(Kernel::installed()?), &options).await?;
    /// let _vm = template.start().await?;
    /// # Ok(())
    /// # }
    /// ```
    ///
    /// # Errors
    ///
    /// As [`Template::build`].
    pub async fn template(
        &self,
        config: VmConfig,
        options: &TemplateOptions,
    ) -> Result<Template, Error> {
        Template::build(self.configure(config), options).await
    }
}

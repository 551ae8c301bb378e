//! The kernel inside a Debian package.

use std::ops::ControlFlow;
use std::path::Path;

use super::{KernelError, read_bounded};
use crate::deb::{DebError, visit_files};

/// Reads `boot/vmlinuz-*` out of a package.
pub(super) fn kernel_image(package: &Path) -> Result<Vec<u8>, KernelError> {
    let mut image = None;
    let visited = visit_files(package, |path, content| {
        let kernel = path.parent() == Some(Path::new("boot"))
            && path.file_name().is_some_and(|n| n.as_encoded_bytes().starts_with(b"vmlinuz-"));
        if !kernel {
            return Ok(ControlFlow::Continue(()));
        }
        image = Some(read_bounded(content)?);
        Ok(ControlFlow::Break(()))
    });
    let fault = |reason| KernelError::Package { path: package.into(), reason };
    visited.map_err(|error| match error {
        DebError::Open(source) => KernelError::Read { path: package.into(), source },
        error => fault(error.to_string()),
    })?;
    let image = image.ok_or_else(|| fault("it holds no boot/vmlinuz-*".to_owned()))?;
    image.ok_or(KernelError::TooLarge)
}

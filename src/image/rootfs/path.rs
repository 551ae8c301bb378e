//! Names in layers.

use super::super::layer::LayerFault;

/// NAME_MAX of Linux, and of EROFS.
const MAX_NAME_BYTES: usize = 255;
/// PATH_MAX of Linux without the terminating NUL: of a path, and of what a symbolic link holds.
pub(super) const MAX_PATH_BYTES: usize = 4095;

/// The names that a path leads through, from the root. It may begin with `/` or `./`; `..` is refused,
/// since no tool that makes layers writes it.
pub(super) fn components(path: &[u8]) -> Result<Vec<&[u8]>, LayerFault> {
    if path.len() > MAX_PATH_BYTES {
        return Err(LayerFault::entry(path, "the name is too long"));
    }
    let names = path.split(|&byte| byte == b'/').filter(|name| !matches!(*name, b"" | b"."));
    names
        .map(|name| match name {
            b".." => Err(LayerFault::entry(path, "the name climbs out of its directory")),
            _ if name.len() > MAX_NAME_BYTES => {
                Err(LayerFault::entry(path, "a part of the name is longer than 255 bytes"))
            }
            _ if name.contains(&0) => Err(LayerFault::entry(path, "the name has a NUL in it")),
            _ => Ok(name),
        })
        .collect()
}

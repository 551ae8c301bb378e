//! A module, and what it says of itself.

use super::{MAX_MODULE_BYTES, MAX_MODULES, ModuleError, Packed, canonical};
use crate::compression;

/// A module, unpacked.
#[derive(Debug)]
pub(crate) struct Module {
    pub(crate) name: String,
    pub(crate) content: Vec<u8>,
    /// What has to be loaded before it.
    pub(super) depends: Vec<String>,
    /// What is loaded before it, where it is there.
    pub(super) wishes: Vec<String>,
}

impl Module {
    pub(super) fn unpack(packed: Packed) -> Result<Self, ModuleError> {
        let Packed { name, path, content } = packed;
        let content = compression::unpack(&content, MAX_MODULE_BYTES);
        let Some((content, facts)) = content.ok().and_then(|content| {
            let facts = Facts::of(&content)?;
            Some((content, facts))
        }) else {
            return Err(ModuleError::Damaged { path });
        };
        Ok(Self { name, content, depends: facts.depends, wishes: facts.wishes })
    }
}

/// What a module's `.modinfo` says, whose strings end with NUL.
#[derive(Default)]
struct Facts {
    depends: Vec<String>,
    wishes: Vec<String>,
}

impl Facts {
    /// None where it is no module, or names more than anybody could load.
    fn of(module: &[u8]) -> Option<Self> {
        let mut facts = Self::default();
        let mut is_module = false;
        for entry in module.split(|byte| *byte == 0) {
            if let Some(names) = entry.strip_prefix(b"depends=") {
                is_module = true;
                let names = std::str::from_utf8(names).ok()?.split(',');
                let names = names.filter(|name| !name.is_empty()).map(canonical);
                facts.depends.extend(names.take(MAX_MODULES + 1));
            } else if let Some(words) = entry.strip_prefix(b"softdep=") {
                let names = wishes(std::str::from_utf8(words).ok()?);
                facts.wishes.extend(names.take(MAX_MODULES + 1));
            }
            if facts.depends.len().max(facts.wishes.len()) > MAX_MODULES {
                return None;
            }
        }
        is_module.then_some(facts)
    }
}

/// The names between `pre:` and `post:`. They may be of an algorithm (`crc32c`), whose portable module is
/// mostly called so with `_generic` behind; aliases in general only depmod knows.
fn wishes(softdep: &str) -> impl Iterator<Item = String> {
    let words = softdep.split_whitespace().skip_while(|word| *word != "pre:").skip(1);
    let names = words.take_while(|word| *word != "post:").map(canonical);
    names.flat_map(|name| [name.clone(), format!("{name}_generic")])
}

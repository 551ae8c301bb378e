//! How whoever asked for a copy of a disk follows it, and stops it.

use std::ops::ControlFlow;

/// Called with each number of bytes that were copied or read; says whether to go on.
pub(crate) type Progress<'a> = dyn FnMut(u64) -> ControlFlow<()> + 'a;

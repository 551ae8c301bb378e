//! Readers that can leave bytes out.

use std::io::{self, Read};

/// A reader that can leave bytes out.
pub(super) trait Skip: Read {
    /// Goes on so many bytes further, which have to be there.
    fn skip(&mut self, bytes: u64) -> io::Result<()>;
}

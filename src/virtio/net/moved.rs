//! The answers of whatever moves frames.

/// What became of the attempt to move a frame.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Moved {
    /// It was moved; so many bytes with the header.
    Frame(u64),
    /// It was too large, too small or malformed, and is gone.
    Dropped,
    /// There is none, or the other end takes none now: its descriptor will say when.
    Nothing,
}

/// What the next frame takes, with its header.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Room {
    /// So many bytes.
    Known(u64),
    /// Only reading it tells.
    Unknown,
}

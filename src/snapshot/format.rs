//! The file `state` of a snapshot: a header, one MessagePack map, and a checksum of both.
//!
//! ```text
//!   0  8  "DORMOUSE"
//!   8  4  version, little-endian, as all numbers here
//!  12  4  0
//!  16  8  length of the map in bytes
//!  24  n  the map: MessagePack, structures as maps by the names of their fields
//! 24+n 4  CRC-32 (IEEE 802.3) of all that comes before it
//! ```
//!
//! The version is raised when a reader of the version before would misunderstand a file; a field
//! that can be left out does not raise it. docs/snapshot-format.md has the rules.

use std::io;

use serde::Serialize;
use serde::de::DeserializeOwned;
use thiserror::Error as ThisError;

/// The version that this crate writes, and the only one so far that it reads.
pub(crate) const VERSION: u32 = 1;

const MAGIC: [u8; 8] = *b"DORMOUSE";
const HEADER_BYTES: usize = 24;
const CHECKSUM_BYTES: usize = 4;
/// What a state may take: the checksums of 1 TiB of memory are 24 MiB, those of a disk of as much 11 MiB,
/// and 32 vCPUs 1 MiB.
pub(crate) const MAX_STATE_BYTES: u64 = 64 << 20;

/// Why a file is no state of a snapshot, or none for this crate.
#[derive(Debug, ThisError)]
pub(crate) enum FormatError {
    #[error("it does not begin with the mark of a snapshot")]
    Magic,
    #[error("it is of version {found}, and this is a dormouse for version {VERSION}")]
    Version { found: u32 },
    #[error("its header is damaged")]
    Header,
    #[error("it has {found} bytes, and says that it has {expected}")]
    Length { found: u64, expected: u64 },
    #[error("it is longer than any state, {MAX_STATE_BYTES} bytes")]
    TooLong,
    #[error("its checksum is {found:08x}, and {expected:08x} is written in it")]
    Checksum { found: u32, expected: u32 },
    #[error("it cannot be understood")]
    Decode(#[source] rmp_serde::decode::Error),
    #[error("it cannot be written")]
    Encode(#[source] rmp_serde::encode::Error),
}

impl From<FormatError> for io::Error {
    fn from(error: FormatError) -> Self {
        Self::new(io::ErrorKind::InvalidData, error)
    }
}

/// A state as the bytes of its file, of which none is longer than what is read again.
pub(crate) fn encode(state: &impl Serialize) -> Result<Vec<u8>, FormatError> {
    let bytes = framed(rmp_serde::to_vec_named(state).map_err(FormatError::Encode)?);
    match bytes.len() as u64 <= MAX_STATE_BYTES {
        true => Ok(bytes),
        false => Err(FormatError::TooLong),
    }
}

/// A map with its header and checksum.
pub(super) fn framed(map: Vec<u8>) -> Vec<u8> {
    let mut bytes = Vec::with_capacity(HEADER_BYTES + map.len() + CHECKSUM_BYTES);
    bytes.extend(MAGIC);
    bytes.extend(VERSION.to_le_bytes());
    bytes.extend(0u32.to_le_bytes());
    bytes.extend((map.len() as u64).to_le_bytes());
    bytes.extend(map);
    bytes.extend(crc32fast::hash(&bytes).to_le_bytes());
    bytes
}

/// The state in a file that anybody may have written.
pub(crate) fn decode<T: DeserializeOwned>(bytes: &[u8]) -> Result<T, FormatError> {
    let mut rest = bytes;
    if take(&mut rest)? != MAGIC {
        return Err(FormatError::Magic);
    }
    let found = u32::from_le_bytes(take(&mut rest)?);
    if found != VERSION {
        return Err(FormatError::Version { found });
    }
    if take(&mut rest)? != [0; 4] {
        return Err(FormatError::Header);
    }
    let map_bytes = u64::from_le_bytes(take(&mut rest)?);
    let around = (HEADER_BYTES + CHECKSUM_BYTES) as u64;
    let (found, expected) = (bytes.len() as u64, map_bytes.saturating_add(around));
    if found != expected {
        return Err(FormatError::Length { found, expected });
    }
    let (map, checksum) = rest.split_at(rest.len() - CHECKSUM_BYTES);
    let expected = checksum.iter().rev().fold(0, |word, byte| word << 8 | u32::from(*byte));
    let found = crc32fast::hash(&bytes[..HEADER_BYTES + map.len()]);
    if found != expected {
        return Err(FormatError::Checksum { found, expected });
    }
    rmp_serde::from_slice(map).map_err(FormatError::Decode)
}

/// The next bytes of the header.
fn take<const N: usize>(rest: &mut &[u8]) -> Result<[u8; N], FormatError> {
    let (taken, left) = rest.split_first_chunk::<N>().ok_or(FormatError::Magic)?;
    *rest = left;
    Ok(*taken)
}

/// What is on disk stays what it is.
const _: () = {
    assert!(VERSION == 1, "write the rules for the version before into docs/snapshot-format.md");
    assert!(HEADER_BYTES == MAGIC.len() + 4 + 4 + 8);
};

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;
    use serde::Deserialize;

    #[derive(Debug, PartialEq, Serialize, Deserialize)]
    struct State {
        name: String,
        words: Vec<u64>,
        #[serde(default)]
        later: Option<u8>,
    }

    fn state() -> State {
        State { name: "dormouse".to_owned(), words: (0..300).collect(), later: Some(7) }
    }

    fn refusal(bytes: &[u8]) -> String {
        decode::<State>(bytes).unwrap_err().to_string()
    }

    #[test]
    fn what_was_written_is_read() {
        assert_eq!(decode::<State>(&encode(&state()).unwrap()).unwrap(), state());
    }

    #[test]
    fn a_field_that_is_not_there_yet_is_its_default_and_one_that_is_unknown_is_passed_over() {
        #[derive(Serialize)]
        struct Other {
            words: Vec<u64>,
            unknown: Vec<String>,
            name: String,
        }
        let other = Other { words: vec![1], unknown: vec![String::new(); 3], name: "n".into() };
        let read: State = decode(&encode(&other).unwrap()).unwrap();
        assert_eq!(read, State { name: "n".into(), words: vec![1], later: None });
    }

    #[test]
    fn a_file_that_is_cut_anywhere_is_refused() {
        let bytes = encode(&state()).unwrap();
        for len in 0..bytes.len() {
            refusal(&bytes[..len]);
        }
        assert!(refusal(&[]).contains("mark"));
        assert!(refusal(&bytes[..bytes.len() - 1]).contains("says that it has"));
        let longer = [&bytes[..], &[0]].concat();
        assert!(refusal(&longer).contains("says that it has"));
    }

    #[test]
    fn every_flipped_bit_is_found() {
        let bytes = encode(&state()).unwrap();
        for bit in 0..bytes.len() * 8 {
            let mut flipped = bytes.clone();
            flipped[bit / 8] ^= 1 << (bit % 8);
            refusal(&flipped);
        }
    }

    #[test]
    fn what_would_not_be_read_again_is_not_written() {
        let long = State { words: vec![u64::MAX; 8 << 20], ..state() };
        assert!(matches!(encode(&long), Err(FormatError::TooLong)));
    }

    #[test]
    fn another_version_is_named() {
        let mut bytes = encode(&state()).unwrap();
        bytes[8] = 9;
        assert_eq!(refusal(&bytes), "it is of version 9, and this is a dormouse for version 1");
    }

    proptest! {
        #[test]
        fn bytes_of_anybody_do_no_harm(map in prop::collection::vec(any::<u8>(), 0..200)) {
            let _ = decode::<State>(&framed(map));
        }
    }
}

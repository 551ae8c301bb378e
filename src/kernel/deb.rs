//! The kernel inside a Debian package: an `ar` archive that holds a compressed `tar`.
//!
//! Source: deb(5), ar(5). Only the data member is looked at, and only until the kernel is found.
//! The `ar` headers are read here, because the crate for it allocates what they say, and trusts
//! the offsets of long names, which packages do not have.

use std::io::{self, BufReader, Read};
use std::path::{Path, PathBuf};

use super::{KernelError, MAX_IMAGE_BYTES, read_bounded};
use crate::compression;
use crate::input_file;

/// What an `ar` archive begins with.
const MAGIC: &[u8; 8] = b"!<arch>\n";
/// The header of a member, in text: its name first, and its size in decimal.
const HEADER_BYTES: usize = 60;
const NAME_END: usize = 16;
const SIZE_START: usize = 48;
const SIZE_END: usize = 58;

/// Reads `boot/vmlinuz-*` out of a package.
pub(super) fn kernel_image(path: &Path) -> Result<Vec<u8>, KernelError> {
    let file =
        input_file::open(path).map_err(|source| KernelError::Read { path: path.into(), source })?;
    find(BufReader::new(file)).map_err(|error| match error {
        Fault::Io(source) => KernelError::Package { path: path.into(), reason: source.to_string() },
        Fault::Reason(reason) => KernelError::Package { path: path.into(), reason },
        Fault::TooLarge => KernelError::TooLarge,
    })
}

enum Fault {
    Io(io::Error),
    Reason(String),
    TooLarge,
}

impl From<io::Error> for Fault {
    fn from(error: io::Error) -> Self {
        Self::Io(error)
    }
}

fn find(mut package: impl Read) -> Result<Vec<u8>, Fault> {
    let mut magic = [0; MAGIC.len()];
    package.read_exact(&mut magic)?;
    if &magic != MAGIC {
        return Err(Fault::Reason("it is no ar archive".to_owned()));
    }
    let mut header = [0; HEADER_BYTES];
    loop {
        match package.read_exact(&mut header) {
            Err(error) if error.kind() == io::ErrorKind::UnexpectedEof => {
                return Err(Fault::Reason("it has no data.tar".to_owned()));
            }
            read => read?,
        }
        let name = String::from_utf8_lossy(&header[..NAME_END]);
        let size = String::from_utf8_lossy(&header[SIZE_START..SIZE_END]);
        let size: u64 = size.trim_end().parse().map_err(|_| {
            Fault::Reason(format!("the size of its member {} is no number", name.trim_end()))
        })?;
        let Some(suffix) = name.trim_end_matches([' ', '/']).strip_prefix("data.tar") else {
            // Members begin at even offsets.
            io::copy(&mut package.by_ref().take(size + size % 2), &mut io::sink())?;
            continue;
        };
        let member = package.take(size);
        return match suffix {
            "" => find_in_tar(member),
            ".xz" => find_in_tar(compression::xz(member)?),
            ".gz" => find_in_tar(flate2::read::GzDecoder::new(member)),
            ".zst" => find_in_tar(zstd::stream::read::Decoder::new(member)?),
            other => Err(Fault::Reason(format!("its data is compressed as {other}"))),
        };
    }
}

fn find_in_tar(data: impl Read) -> Result<Vec<u8>, Fault> {
    // A package of a few MiB can unpack to anything; no more than this is looked at.
    let mut tar = tar::Archive::new(data.take(4 * MAX_IMAGE_BYTES));
    // Raw entries: a long name or a PAX record, of any size, would be read into memory.
    for entry in tar.entries()?.raw(true) {
        let entry = entry?;
        let path: PathBuf =
            entry.path()?.components().skip_while(|c| c.as_os_str() == ".").collect();
        let kernel = path.parent() == Some(Path::new("boot"))
            && path.file_name().is_some_and(|n| n.as_encoded_bytes().starts_with(b"vmlinuz-"));
        if kernel && entry.header().entry_type().is_file() {
            return read_bounded(entry)?.ok_or(Fault::TooLarge);
        }
    }
    Err(Fault::Reason("it holds no boot/vmlinuz-*".to_owned()))
}

//! The kernel inside a Debian package: an `ar` archive that holds a compressed `tar`.
//!
//! Source: deb(5). Only the data member is looked at, and only until the kernel is found.

use std::fs::File;
use std::io::{self, BufReader, Read};
use std::path::{Path, PathBuf};

use super::{KernelError, MAX_IMAGE_BYTES, read_bounded};

/// Reads `boot/vmlinuz-*` out of a package.
pub(super) fn kernel_image(path: &Path) -> Result<Vec<u8>, KernelError> {
    let file =
        File::open(path).map_err(|source| KernelError::Read { path: path.into(), source })?;
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

fn find(package: impl Read) -> Result<Vec<u8>, Fault> {
    let mut archive = ar::Archive::new(package);
    while let Some(member) = archive.next_entry() {
        let member = member?;
        let name = String::from_utf8_lossy(member.header().identifier()).into_owned();
        let Some(compression) = name.strip_prefix("data.tar") else {
            continue;
        };
        return match compression {
            "" => find_in_tar(member),
            ".xz" => find_in_tar(liblzma::read::XzDecoder::new(member)),
            ".gz" => find_in_tar(flate2::read::GzDecoder::new(member)),
            ".zst" => find_in_tar(zstd::stream::read::Decoder::new(member)?),
            other => Err(Fault::Reason(format!("its data is compressed as {other}"))),
        };
    }
    Err(Fault::Reason("it has no data.tar".to_owned()))
}

fn find_in_tar(data: impl Read) -> Result<Vec<u8>, Fault> {
    // A package of a few MiB can unpack to anything; no more than this is looked at.
    let mut tar = tar::Archive::new(data.take(4 * MAX_IMAGE_BYTES));
    for entry in tar.entries()? {
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

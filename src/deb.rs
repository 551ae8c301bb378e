//! The files in a Debian package: an `ar` archive that holds a compressed `tar`.
//!
//! Source: deb(5), ar(5), and GNU tar's manual for names of more than 100 bytes. Only the data member is looked
//! at, and only for as long as somebody wants more. The `ar` headers are read here, because the crate for
//! it allocates what they say, and trusts the offsets of long names, which packages do not have.

use std::io::{self, BufReader, Read};
use std::ops::ControlFlow;
use std::path::{Path, PathBuf};

use thiserror::Error as ThisError;

use crate::compression;
use crate::input_file;

/// What an `ar` archive begins with.
const MAGIC: &[u8; 8] = b"!<arch>\n";
/// The header of a member, in text: its name first, and its size in decimal.
const HEADER_BYTES: usize = 60;
const NAME_END: usize = 16;
const SIZE_START: usize = 48;
const SIZE_END: usize = 58;

/// A package of a few MiB can unpack to anything; no more than this is looked at: 4 GiB.
const MAX_DATA_BYTES: u64 = 4 << 30;
/// PATH_MAX of Linux: the longest name of a file.
const MAX_NAME_BYTES: u64 = 4096;

/// Who looks at files, and says when that is enough.
type Visit<'a> = dyn FnMut(&Path, &mut dyn Read) -> io::Result<ControlFlow<()>> + 'a;

/// Why a file is no package.
#[derive(Debug, ThisError)]
pub(crate) enum DebError {
    #[error("it cannot be opened")]
    Open(#[source] io::Error),
    #[error(transparent)]
    Read(#[from] io::Error),
    #[error("{0}")]
    Format(String),
}

/// Shows the regular files of a package, each with its path from the root, until `visit` has what it wants.
pub(crate) fn visit_files(
    package: &Path,
    mut visit: impl FnMut(&Path, &mut dyn Read) -> io::Result<ControlFlow<()>>,
) -> Result<(), DebError> {
    let file = input_file::open(package).map_err(DebError::Open)?;
    let (suffix, member) = data_member(BufReader::new(file))?;
    match suffix.as_str() {
        "" => visit_tar(member, &mut visit),
        ".xz" => visit_tar(compression::xz(member)?, &mut visit),
        ".gz" => visit_tar(flate2::read::GzDecoder::new(member), &mut visit),
        ".zst" => visit_tar(zstd::stream::read::Decoder::new(member)?, &mut visit),
        other => Err(DebError::Format(format!("its data is compressed as {other}"))),
    }
}

/// The member `data.tar`, and what follows that in its name.
fn data_member<R: Read>(mut package: R) -> Result<(String, io::Take<R>), DebError> {
    let mut magic = [0; MAGIC.len()];
    package.read_exact(&mut magic)?;
    if &magic != MAGIC {
        return Err(DebError::Format("it is no ar archive".to_owned()));
    }
    let mut header = [0; HEADER_BYTES];
    loop {
        match package.read_exact(&mut header) {
            Err(error) if error.kind() == io::ErrorKind::UnexpectedEof => {
                return Err(DebError::Format("it has no data.tar".to_owned()));
            }
            read => read?,
        }
        let name = String::from_utf8_lossy(&header[..NAME_END]);
        let size = String::from_utf8_lossy(&header[SIZE_START..SIZE_END]);
        let size: u64 = size.trim_end().parse().map_err(|_| {
            DebError::Format(format!("the size of its member {} is no number", name.trim_end()))
        })?;
        match name.trim_end_matches([' ', '/']).strip_prefix("data.tar") {
            Some(suffix) => return Ok((suffix.to_owned(), package.take(size))),
            // Members begin at even offsets.
            None => io::copy(&mut package.by_ref().take(size + size % 2), &mut io::sink())?,
        };
    }
}

fn visit_tar(data: impl Read, visit: &mut Visit<'_>) -> Result<(), DebError> {
    let mut tar = tar::Archive::new(data.take(MAX_DATA_BYTES));
    let mut long_name = None;
    // Raw entries: a long name or a PAX record, of any size, would be read into memory.
    for entry in tar.entries()?.raw(true) {
        let mut entry = entry?;
        let kind = entry.header().entry_type();
        if kind.is_gnu_longname() {
            let name = input_file::read_bounded(&mut entry, MAX_NAME_BYTES)?;
            let name = name.ok_or_else(|| {
                DebError::Format(format!("a name in it is longer than {MAX_NAME_BYTES} bytes"))
            })?;
            let name = name.split(|byte| *byte == 0).next().unwrap_or_default();
            long_name = Some(PathBuf::from(String::from_utf8_lossy(name).into_owned()));
            continue;
        }
        // What stands between a long name and its file is about that file as well.
        if kind.is_gnu_longlink() || kind.is_pax_local_extensions() {
            continue;
        }
        let path = match long_name.take() {
            Some(name) => name,
            None => entry.path()?.into_owned(),
        };
        let path: PathBuf = path.components().skip_while(|c| c.as_os_str() == ".").collect();
        if kind.is_file() && visit(&path, &mut entry)?.is_break() {
            break;
        }
    }
    Ok(())
}

#[cfg(test)]
pub(crate) mod tests {
    use vmm_sys_util::tempfile::TempFile;

    use super::*;

    /// A package with these files, and its data packed by `pack` as `member`.
    pub(crate) fn package(
        name: &str,
        member: &str,
        files: &[(&str, &[u8])],
        pack: impl Fn(Vec<u8>) -> Vec<u8>,
    ) -> TempFile {
        let mut tar = tar::Builder::new(Vec::new());
        for (path, content) in files {
            let mut header = tar::Header::new_gnu();
            header.set_size(content.len() as u64);
            header.set_mode(0o644);
            header.set_cksum();
            tar.append_data(&mut header, path, *content).unwrap();
        }
        let data = pack(tar.into_inner().unwrap());
        let mut archive = b"!<arch>\n".to_vec();
        for (name, bytes) in [("debian-binary", &b"2.0\n"[..]), (member, &data)] {
            archive.extend(ar_header(name, bytes.len()));
            archive.extend(bytes);
            archive.resize(archive.len().next_multiple_of(2), b'\n');
        }
        scratch(name, &archive)
    }

    pub(crate) fn ar_header(name: &str, size: usize) -> Vec<u8> {
        format!("{name:<16}{:<12}{:<6}{:<6}{:<8}{size:<10}`\n", 0, 0, 0, 100_644).into_bytes()
    }

    /// A file with `name` in its own, which goes with the test.
    pub(crate) fn scratch(name: &str, content: &[u8]) -> TempFile {
        let prefix = std::env::temp_dir().join(format!("dormouse-{name}-"));
        let file = TempFile::new_with_prefix(prefix).unwrap();
        std::fs::write(file.as_path(), content).unwrap();
        file
    }

    fn names(package: &Path) -> Result<Vec<String>, DebError> {
        let mut names = Vec::new();
        visit_files(package, |path, _| {
            names.push(path.display().to_string());
            Ok(ControlFlow::Continue(()))
        })?;
        Ok(names)
    }

    #[test]
    fn names_of_any_length_up_to_that_of_a_path_are_found_whole() {
        let long = format!("./{}/file", vec!["directory"; 20].join("/"));
        let files = [("./short", &b"x"[..]), (&long, b"y"), ("./after", b"z")];
        let file = package("long-names", "data.tar", &files, |tar| tar);
        assert_eq!(names(file.as_path()).unwrap(), ["short", &long[2..], "after"]);

        let endless = format!("./{}", vec!["directory"; 500].join("/"));
        let file = package("endless-name", "data.tar", &[(&endless, b"")], |tar| tar);
        let error = names(file.as_path()).unwrap_err();
        assert!(error.to_string().contains("longer than 4096 bytes"), "{error}");
    }

    #[test]
    fn a_visitor_that_has_enough_sees_no_more() {
        let files = [("./a", &b"1"[..]), ("./b", b"2")];
        let file = package("enough", "data.tar", &files, |tar| tar);
        let mut seen = Vec::new();
        visit_files(file.as_path(), |path, content| {
            content.read_to_end(&mut seen)?;
            Ok(if path == Path::new("a") {
                ControlFlow::Break(())
            } else {
                ControlFlow::Continue(())
            })
        })
        .unwrap();
        assert_eq!(seen, b"1");
    }
}

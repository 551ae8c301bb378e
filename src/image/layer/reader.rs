//! The entries of a tar archive, one after the other.

use std::io::Read;

use tar::{EntryType, Header};

use super::pax::Pax;
use super::{Device, Entry, EntryKind, Extent, LayerFault, Time, sparse};
use crate::image::skip::Skip;

const BLOCK: usize = 512;
/// PATH_MAX of Linux, with some room for `./` and the like.
const MAX_NAME_BYTES: u64 = 8192;
/// pax records of one entry: mostly extended attributes, of up to 64 KiB.
const MAX_PAX_BYTES: u64 = 1 << 20;
/// Headers that say something about the one entry behind them, or about all: two would do.
const MAX_PREFIXES: u64 = 16;
/// Of an entry's data: a sum of two never overflows.
const MAX_BYTES: u64 = i64::MAX as u64;
const BAD_FIELD: LayerFault = LayerFault::Tar("a header in it has a field that is no number");

/// Reads entries, and the data of each.
#[derive(Debug)]
pub(in crate::image) struct TarReader<R> {
    source: R,
    /// Data of the entry that nobody has read yet, and the zeros behind it.
    left: u64,
    padding: u64,
}

/// What stands before an entry, and is about it.
#[derive(Default)]
struct Prefix {
    name: Option<Vec<u8>>,
    link: Option<Vec<u8>>,
    pax: Pax,
}

impl<R: Skip> TarReader<R> {
    pub(in crate::image) fn new(source: R) -> Self {
        Self { source, left: 0, padding: 0 }
    }

    /// What is read from, at the begin of the entry's data where none of it was read.
    pub(in crate::image) fn source(&self) -> &R {
        &self.source
    }

    pub(in crate::image) fn into_source(self) -> R {
        self.source
    }

    /// The next entry; what is left of the one before is skipped.
    pub(in crate::image) fn next(&mut self) -> Result<Option<Entry>, LayerFault> {
        let (mut prefix, mut is_begun) = (Prefix::default(), false);
        for _ in 0..=MAX_PREFIXES {
            self.source.skip(self.left + self.padding)?;
            (self.left, self.padding) = (0, 0);
            let Some(header) = self.header()? else {
                return if is_begun { Err(LayerFault::Truncated) } else { Ok(None) };
            };
            is_begun = header.entry_type() != EntryType::XGlobalHeader;
            match header.entry_type() {
                EntryType::GNULongName => prefix.name = Some(self.long_name(&header)?),
                EntryType::GNULongLink => prefix.link = Some(self.long_name(&header)?),
                EntryType::XHeader => {
                    let records = self.bounded(&header, MAX_PAX_BYTES, "bytes of pax records")?;
                    prefix.pax = Pax::parse(&records)?;
                }
                // Of the whole archive: comments, by those who make layers.
                EntryType::XGlobalHeader => self.set_data(size(&header)?),
                _ => return self.entry(&header, prefix).map(Some),
            }
        }
        Err(LayerFault::Limit { what: "headers before an entry", limit: MAX_PREFIXES })
    }

    /// Reads data of the entry; 0 at its end.
    pub(in crate::image) fn read(&mut self, buffer: &mut [u8]) -> Result<usize, LayerFault> {
        let wanted = usize::try_from(self.left).unwrap_or(usize::MAX).min(buffer.len());
        let read = self.source.read(&mut buffer[..wanted])?;
        if read == 0 && wanted > 0 {
            return Err(LayerFault::Truncated);
        }
        self.left -= read as u64;
        Ok(read)
    }

    fn set_data(&mut self, bytes: u64) {
        self.left = bytes;
        self.padding = bytes.wrapping_neg() % BLOCK as u64;
    }

    /// A block that is a header; none at the end, which is two blocks of zeros, or no more bytes.
    fn header(&mut self) -> Result<Option<Header>, LayerFault> {
        let mut header = Header::new_old();
        if !self.block(header.as_mut_bytes())? {
            return Ok(None);
        }
        if header.as_bytes().iter().all(|&byte| byte == 0) {
            let is_end = !self.block(header.as_mut_bytes())?
                || header.as_bytes().iter().all(|&byte| byte == 0);
            return match is_end {
                true => Ok(None),
                false => Err(LayerFault::Tar("it goes on behind a block of zeros")),
            };
        }
        if !has_its_checksum(&header) {
            return Err(LayerFault::Tar("a header in it has a wrong checksum, or it is no tar"));
        }
        Ok(Some(header))
    }

    fn block(&mut self, block: &mut [u8; BLOCK]) -> Result<bool, LayerFault> {
        let mut filled = 0;
        while filled < BLOCK {
            match self.source.read(&mut block[filled..])? {
                0 if filled == 0 => return Ok(false),
                0 => return Err(LayerFault::Truncated),
                read => filled += read,
            }
        }
        Ok(true)
    }

    fn long_name(&mut self, header: &Header) -> Result<Vec<u8>, LayerFault> {
        let mut name = self.bounded(header, MAX_NAME_BYTES, "bytes in a name")?;
        let end = name.iter().position(|&byte| byte == 0).unwrap_or(name.len());
        name.truncate(end);
        Ok(name)
    }

    fn bounded(
        &mut self,
        header: &Header,
        limit: u64,
        what: &'static str,
    ) -> Result<Vec<u8>, LayerFault> {
        let size = size(header)?;
        if size > limit {
            return Err(LayerFault::Limit { what, limit });
        }
        self.set_data(size);
        let mut bytes = Vec::new();
        let read = (&mut self.source).take(size).read_to_end(&mut bytes)?;
        self.left -= read as u64;
        if self.left > 0 { Err(LayerFault::Truncated) } else { Ok(bytes) }
    }

    fn entry(&mut self, header: &Header, prefix: Prefix) -> Result<Entry, LayerFault> {
        let pax = prefix.pax;
        let path = pax.path.or(prefix.name).unwrap_or_else(|| header.path_bytes().into_owned());
        let mut path = pax.sparse.name.clone().unwrap_or(path);
        let link = || {
            let own = || header.link_name_bytes().map(std::borrow::Cow::into_owned);
            pax.link.or(prefix.link).or_else(own).unwrap_or_default()
        };
        let size = match pax.size {
            Some(size) if size > MAX_BYTES => return Err(BAD_FIELD),
            Some(size) => size,
            None => size(header)?,
        };
        let kind = match header.entry_type().as_byte() {
            // Before POSIX a directory was a file with such a name.
            0 if path.ends_with(b"/") => EntryKind::Directory,
            0 | b'0' | b'7' | b'S' => self.file(header, size, pax.sparse)?,
            b'1' => EntryKind::HardLink(link()),
            b'2' => EntryKind::Symlink(link()),
            b'3' => EntryKind::Char(device(header)?),
            b'4' => EntryKind::Block(device(header)?),
            b'5' => EntryKind::Directory,
            b'6' => EntryKind::Fifo,
            other => return Err(LayerFault::Type(other)),
        };
        if path.len() as u64 > MAX_NAME_BYTES {
            path.truncate(MAX_NAME_BYTES as usize);
            return Err(LayerFault::entry(&path, "the name is too long"));
        }
        let old = header.as_old();
        let id = |pax: Option<u64>, field: &[u8]| {
            let id = pax.map_or_else(|| number(field), Ok)?;
            u32::try_from(id).map_err(|_| BAD_FIELD)
        };
        let mtime = match pax.mtime {
            Some(mtime) => mtime,
            // What is before 1970 is a negative number of 64 bits.
            None => Time { seconds: number(&old.mtime)?.cast_signed(), nanoseconds: 0 },
        };
        Ok(Entry {
            path,
            kind,
            mode: (number(&old.mode)? & 0o7777) as u16,
            uid: id(pax.uid, &old.uid)?,
            gid: id(pax.gid, &old.gid)?,
            mtime,
            xattrs: pax.xattrs,
        })
    }

    fn file(
        &mut self,
        header: &Header,
        data: u64,
        pax: super::pax::PaxSparse,
    ) -> Result<EntryKind, LayerFault> {
        let is_gnu = header.entry_type() == EntryType::GNUSparse;
        let mut taken = 0;
        let (size, extents): (u64, Vec<Extent>) = match (pax.major, pax.minor, pax.map) {
            (1, 0, _) => {
                let (bytes, extents) = sparse::leading(&mut self.source, data)?;
                taken = bytes;
                (pax.real_size.ok_or(BAD_FIELD)?, extents)
            }
            (0, 0 | 1, Some(map)) => (pax.real_size.ok_or(BAD_FIELD)?, map),
            (0, 0, None) if is_gnu => sparse::gnu(header, &mut self.source)?,
            (0, 0, None) => {
                self.set_data(data);
                return Ok(EntryKind::File { size: data, extents: None });
            }
            _ => return Err(LayerFault::Tar("a sparse file in it has an unknown format")),
        };
        self.set_data(data);
        self.left -= taken;
        sparse::check(&extents, size, self.left)?;
        Ok(EntryKind::File { size, extents: Some(extents) })
    }
}

fn size(header: &Header) -> Result<u64, LayerFault> {
    let size = number(&header.as_old().size)?;
    if size > MAX_BYTES { Err(BAD_FIELD) } else { Ok(size) }
}

/// A field with octal digits, or, where its first bit is set, with a number in all other bits (GNU). The crate tar
/// has no number for a field that nothing was written to.
fn number(field: &[u8]) -> Result<u64, LayerFault> {
    if let Some(0x80..) = field.first() {
        let (&last, front) = field
            .last_chunk::<8>()
            .map_or((&[0; 8], field), |last| (last, &field[..field.len() - last.len()]));
        // The rest is the sign.
        let is_small = front.iter().all(|&byte| matches!(byte, 0 | 0x80 | 0xff));
        let number = u64::from_be_bytes(last);
        return match is_small {
            // The first bit is in it, and a negative one is no number of what has so small a field.
            true if front.is_empty() => Ok(number & !(1 << 63)),
            true => Ok(number),
            false => Err(BAD_FIELD),
        };
    }
    let digits = field.split(|&byte| byte == 0).next().unwrap_or_default().trim_ascii();
    digits
        .iter()
        .try_fold(0u64, |number, digit| match digit {
            b'0'..=b'7' => number.checked_mul(8)?.checked_add(u64::from(digit - b'0')),
            _ => None,
        })
        .ok_or(BAD_FIELD)
}

fn device(header: &Header) -> Result<Device, LayerFault> {
    let (major, minor) = match (header.as_ustar(), header.as_gnu()) {
        (Some(ustar), _) => (&ustar.dev_major, &ustar.dev_minor),
        (_, Some(gnu)) => (&gnu.dev_major, &gnu.dev_minor),
        (None, None) => return Err(BAD_FIELD),
    };
    let number = |field| u32::try_from(number(field)?).map_err(|_| BAD_FIELD);
    Ok(Device { major: number(major)?, minor: number(minor)? })
}

/// The sum of all bytes, with spaces for the field itself. Some old programs summed signed ones.
fn has_its_checksum(header: &Header) -> bool {
    const FIELD: std::ops::Range<usize> = 148..156;
    let Ok(expected) = number(&header.as_old().cksum) else {
        return false;
    };
    let bytes = header.as_bytes().iter().enumerate();
    let bytes = bytes.map(|(at, &byte)| if FIELD.contains(&at) { b' ' } else { byte });
    let (unsigned, signed) = bytes.fold((0u32, 0i32), |(unsigned, signed), byte| {
        (unsigned + u32::from(byte), signed + i32::from(byte.cast_signed()))
    });
    u64::from(unsigned) == expected || i64::from(signed) == expected.cast_signed()
}

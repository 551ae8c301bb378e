//! pax records: what a header's fields have no room for.
//!
//! Source: POSIX.1-2017, pax, "pax Extended Header": `LENGTH KEY=VALUE\n`, where the length is that of the
//! whole record, so that a value may hold any byte.

use super::{Extent, LayerFault, Time, Xattr};

const MALFORMED: LayerFault = LayerFault::Tar("a pax record in it is malformed");
/// What star and Go write extended attributes as.
const XATTR: &[u8] = b"SCHILY.xattr.";
/// Of one entry. All their names together have 64 KiB under Linux (XATTR_LIST_MAX).
const MAX_XATTRS: usize = 1024;

/// The records that were there. An empty value takes back what was said before.
#[derive(Debug, Default)]
pub(super) struct Pax {
    pub(super) path: Option<Vec<u8>>,
    pub(super) link: Option<Vec<u8>>,
    pub(super) size: Option<u64>,
    pub(super) uid: Option<u64>,
    pub(super) gid: Option<u64>,
    pub(super) mtime: Option<Time>,
    pub(super) xattrs: Vec<Xattr>,
    pub(super) sparse: PaxSparse,
}

/// GNU tar's sparse files in a pax archive, of formats 0.0, 0.1 and 1.0.
#[derive(Debug, Default)]
pub(super) struct PaxSparse {
    pub(super) major: u64,
    pub(super) minor: u64,
    pub(super) name: Option<Vec<u8>>,
    pub(super) real_size: Option<u64>,
    /// The map of formats 0.0 and 0.1; format 1.0 has it before the data.
    pub(super) map: Option<Vec<Extent>>,
    offset: Option<u64>,
}

impl Pax {
    pub(super) fn parse(mut bytes: &[u8]) -> Result<Self, LayerFault> {
        let mut pax = Self::default();
        while !bytes.is_empty() {
            let space = bytes.iter().take(20).position(|&byte| byte == b' ').ok_or(MALFORMED)?;
            let length = usize::try_from(number(&bytes[..space])?).map_err(|_| MALFORMED)?;
            if length <= space + 1 || length > bytes.len() {
                return Err(MALFORMED);
            }
            let (record, rest) = bytes.split_at(length);
            let record = record[space + 1..].strip_suffix(b"\n").ok_or(MALFORMED)?;
            let equals = record.iter().position(|&byte| byte == b'=').ok_or(MALFORMED)?;
            pax.record(&record[..equals], &record[equals + 1..])?;
            bytes = rest;
        }
        Ok(pax)
    }

    fn record(&mut self, key: &[u8], value: &[u8]) -> Result<(), LayerFault> {
        let text = (!value.is_empty()).then(|| value.to_vec());
        let count = || if value.is_empty() { Ok(None) } else { number(value).map(Some) };
        match key {
            b"path" => self.path = text,
            b"linkpath" => self.link = text,
            b"size" => self.size = count()?,
            b"uid" => self.uid = count()?,
            b"gid" => self.gid = count()?,
            b"mtime" => self.mtime = if value.is_empty() { None } else { Some(time(value)?) },
            b"GNU.sparse.major" => self.sparse.major = number(value)?,
            b"GNU.sparse.minor" => self.sparse.minor = number(value)?,
            b"GNU.sparse.name" => self.sparse.name = text,
            b"GNU.sparse.size" | b"GNU.sparse.realsize" => self.sparse.real_size = count()?,
            b"GNU.sparse.map" => self.sparse.map = Some(map(value)?),
            b"GNU.sparse.offset" => self.sparse.offset = count()?,
            b"GNU.sparse.numbytes" => {
                let offset = self.sparse.offset.take().ok_or(MALFORMED)?;
                let extents = self.sparse.map.get_or_insert_default();
                extents.push(Extent { offset, len: number(value)? });
            }
            _ => {
                if let Some(name) = key.strip_prefix(XATTR) {
                    if self.xattrs.len() == MAX_XATTRS {
                        let limit = MAX_XATTRS as u64;
                        return Err(LayerFault::Limit { what: "attributes of a file", limit });
                    }
                    self.xattrs.retain(|xattr| xattr.name != name);
                    self.xattrs.push(Xattr { name: name.to_vec(), value: value.to_vec() });
                }
            }
        }
        Ok(())
    }
}

/// A decimal number, without a sign.
pub(super) fn number(digits: &[u8]) -> Result<u64, LayerFault> {
    if digits.is_empty() || !digits.iter().all(u8::is_ascii_digit) {
        return Err(MALFORMED);
    }
    std::str::from_utf8(digits).ok().and_then(|text| text.parse().ok()).ok_or(MALFORMED)
}

/// `OFFSET,LENGTH,OFFSET,LENGTH…`
fn map(value: &[u8]) -> Result<Vec<Extent>, LayerFault> {
    let numbers: Vec<u64> =
        value.split(|&byte| byte == b',').map(number).collect::<Result<_, _>>()?;
    let (pairs, []) = numbers.as_chunks::<2>() else { return Err(MALFORMED) };
    Ok(pairs.iter().map(|&[offset, len]| Extent { offset, len }).collect())
}

/// Seconds, with a fraction of any length, perhaps negative.
fn time(value: &[u8]) -> Result<Time, LayerFault> {
    let (negative, value) = match value.strip_prefix(b"-") {
        Some(rest) => (true, rest),
        None => (false, value),
    };
    let mut parts = value.splitn(2, |&byte| byte == b'.');
    let whole = parts.next().unwrap_or_default();
    let fraction = parts.next().unwrap_or_default();
    let seconds = i64::try_from(number(whole)?).map_err(|_| MALFORMED)?;
    let mut nanoseconds = 0;
    for at in 0..9 {
        let digit = match fraction.get(at) {
            Some(digit) if digit.is_ascii_digit() => u32::from(digit - b'0'),
            Some(_) => return Err(MALFORMED),
            None => 0,
        };
        nanoseconds = nanoseconds * 10 + digit;
    }
    Ok(match (negative, nanoseconds) {
        (false, _) => Time { seconds, nanoseconds },
        (true, 0) => Time { seconds: -seconds, nanoseconds },
        (true, _) => Time { seconds: -seconds - 1, nanoseconds: 1_000_000_000 - nanoseconds },
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    fn record(key: &str, value: &[u8]) -> Vec<u8> {
        let rest = key.len() + value.len() + 3;
        // The length counts its own digits.
        let length = (1..).map(|digits| rest + digits).find(|n| n.to_string().len() + rest == *n);
        [format!("{} {key}=", length.unwrap()).as_bytes(), value, b"\n"].concat()
    }

    #[test]
    fn a_value_may_hold_any_byte() {
        let value = b"\x01\n12 path=/etc/shadow\n\0";
        let pax = Pax::parse(&record("SCHILY.xattr.security.capability", value)).unwrap();
        assert_eq!(pax.path, None);
        assert_eq!(pax.xattrs[0].name, b"security.capability");
        assert_eq!(pax.xattrs[0].value, value);
    }

    #[test]
    fn times_have_fractions_and_signs() {
        let of = |text: &str| time(text.as_bytes()).map(|t| (t.seconds, t.nanoseconds)).ok();
        assert_eq!(of("12"), Some((12, 0)));
        assert_eq!(of("12.5"), Some((12, 500_000_000)));
        assert_eq!(of("12.0000000019"), Some((12, 1)));
        assert_eq!(of("-1.25"), Some((-2, 750_000_000)));
        assert_eq!(of("-1"), Some((-1, 0)));
        for bad in ["", ".5", "x", "1.x", "--1", "99999999999999999999"] {
            assert_eq!(of(bad), None, "{bad}");
        }
    }

    #[test]
    fn a_record_that_lies_about_its_length_is_refused() {
        for bad in [&b"5 a=b"[..], b"99 a=b\n", b"a=b\n", b"0 =\n", b"3 \n", b"6 abc\n", b"99999"] {
            assert!(Pax::parse(bad).is_err(), "{bad:?}");
        }
        let both = [record("path", b"first"), record("path", b"")].concat();
        assert_eq!(Pax::parse(&both).unwrap().path, None);
    }
}

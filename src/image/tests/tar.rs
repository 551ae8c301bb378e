//! Tar archives, as hostile as they have to be.

use tar::{EntryType, Header};

/// An archive that is written entry by entry.
#[derive(Clone, Default)]
pub(in crate::image) struct Tar(Vec<u8>);

impl Tar {
    pub(in crate::image) fn new() -> Self {
        Self::default()
    }

    /// An entry of this type.
    pub(in crate::image) fn entry(
        self,
        kind: u8,
        path: &[u8],
        mut change: impl FnMut(&mut Header),
        data: &[u8],
    ) -> Self {
        self.entry_of(kind, path, &mut change, data)
    }

    fn entry_of(
        mut self,
        kind: u8,
        path: &[u8],
        change: &mut dyn FnMut(&mut Header),
        data: &[u8],
    ) -> Self {
        let mut header = Header::new_gnu();
        header.set_entry_type(EntryType::new(kind));
        header.set_mode(if kind == b'5' { 0o755 } else { 0o644 });
        header.set_uid(0);
        header.set_gid(0);
        header.set_mtime(1_000_000);
        header.set_size(data.len() as u64);
        if path.len() <= 100 {
            header.as_old_mut().name[..path.len()].copy_from_slice(path);
        } else {
            self = self.entry_of(b'L', b"././@LongLink", &mut |_| {}, &[path, b"\0"].concat());
        }
        change(&mut header);
        header.set_cksum();
        self.raw(header.as_bytes()).raw(data).padded()
    }

    pub(in crate::image) fn raw(mut self, bytes: &[u8]) -> Self {
        self.0.extend(bytes);
        self
    }

    pub(in crate::image) fn padded(mut self) -> Self {
        self.0.resize(self.0.len().next_multiple_of(512), 0);
        self
    }

    pub(in crate::image) fn file(self, path: &str, data: &str) -> Self {
        self.entry(b'0', path.as_bytes(), |_| {}, data.as_bytes())
    }

    pub(in crate::image) fn dir(self, path: &str) -> Self {
        self.entry(b'5', path.as_bytes(), |_| {}, b"")
    }

    pub(in crate::image) fn symlink(self, path: &str, target: &str) -> Self {
        self.link_of(b'2', path, target)
    }

    pub(in crate::image) fn hard_link(self, path: &str, target: &str) -> Self {
        self.link_of(b'1', path, target)
    }

    fn link_of(mut self, kind: u8, path: &str, target: &str) -> Self {
        let (short, long) = if target.len() <= 100 { (target, "") } else { ("", target) };
        if !long.is_empty() {
            self = self.entry(b'K', b"././@LongLink", |_| {}, long.as_bytes());
        }
        let name = |header: &mut Header| {
            header.as_old_mut().linkname[..short.len()].copy_from_slice(short.as_bytes());
        };
        self.entry(kind, path.as_bytes(), name, b"")
    }

    /// pax records for the next entry.
    pub(in crate::image) fn pax(self, records: &[(&str, &[u8])]) -> Self {
        let mut data = Vec::new();
        for (key, value) in records {
            let rest = key.len() + value.len() + 3;
            let mut length = rest;
            while length != rest + length.to_string().len() {
                length = rest + length.to_string().len();
            }
            data.extend(format!("{length} {key}=").as_bytes());
            data.extend(*value);
            data.push(b'\n');
        }
        self.entry(b'x', b"pax", |_| {}, &data)
    }

    /// The archive, with the zeros at its end.
    pub(in crate::image) fn end(mut self) -> Vec<u8> {
        self.0.extend([0; 1024]);
        self.0
    }

    /// The archive as far as it is.
    pub(in crate::image) fn cut(self) -> Vec<u8> {
        self.0
    }
}

//! A reader of EROFS that trusts what it reads, and was written from the format's description alone.

use std::collections::BTreeMap;
use std::ops::Range;

const BLOCK: usize = 4096;

/// Everything in a root file system, by its path.
#[derive(Debug, PartialEq, Eq)]
pub(super) struct Listing(pub(super) BTreeMap<String, Found>);

#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub(super) struct Found {
    /// With the type.
    pub(super) mode: u16,
    pub(super) uid: u32,
    pub(super) gid: u32,
    pub(super) mtime: (i64, u32),
    pub(super) links: u32,
    pub(super) device: u32,
    pub(super) inode: u64,
    /// Of a file, or the target of a link.
    pub(super) data: Vec<u8>,
    pub(super) xattrs: BTreeMap<String, Vec<u8>>,
}

struct Image<'i> {
    bytes: &'i [u8],
    meta: usize,
}

impl Listing {
    pub(super) fn read(bytes: &[u8]) -> Self {
        let number = |at: usize| u32::from_le_bytes(bytes[at..at + 4].try_into().unwrap());
        assert_eq!(number(1024), 0xe0f5_e1e2);
        assert_eq!((bytes[1036], number(1104)), (12, 0), "blocks of 4 KiB, no features");
        assert_eq!(number(1060) as usize * BLOCK, bytes.len());
        let image = Image { bytes, meta: number(1064) as usize * BLOCK };
        let root = u64::from(u16::from_le_bytes([bytes[1038], bytes[1039]]));
        let mut listing = BTreeMap::new();
        image.walk(root, root, String::new(), &mut listing);
        let inodes: std::collections::BTreeSet<u64> = listing.values().map(|f| f.inode).collect();
        assert_eq!(u64::from(number(1040)), inodes.len() as u64);
        Self(listing)
    }

    /// The paths, in order.
    pub(super) fn paths(&self) -> Vec<&str> {
        self.0.keys().map(String::as_str).filter(|path| !path.is_empty()).collect()
    }

    #[track_caller]
    pub(super) fn at(&self, path: &str) -> &Found {
        self.0.get(path).unwrap_or_else(|| panic!("no {path} in {:?}", self.paths()))
    }

    #[track_caller]
    pub(super) fn text(&self, path: &str) -> &str {
        std::str::from_utf8(&self.at(path).data).unwrap()
    }
}

impl Image<'_> {
    fn number<const N: usize>(&self, at: usize) -> u64 {
        let mut bytes = [0; 8];
        bytes[..N].copy_from_slice(&self.bytes[at..at + N]);
        u64::from_le_bytes(bytes)
    }

    fn walk(&self, inode: u64, parent: u64, path: String, listing: &mut BTreeMap<String, Found>) {
        let (found, data) = self.inode(inode);
        if found.mode & 0o170_000 != 0o040_000 {
            listing.insert(path, Found { data, ..found });
            return;
        }
        let mut names = Vec::new();
        for block in data.chunks(BLOCK) {
            let entries = usize::from(u16::from_le_bytes([block[8], block[9]])) / 12;
            let offset = |at: usize| match at < entries {
                true => usize::from(u16::from_le_bytes([block[at * 12 + 8], block[at * 12 + 9]])),
                false => block.len(),
            };
            for at in 0..entries {
                let name = &block[offset(at)..offset(at + 1)];
                let name = name.split(|&byte| byte == 0).next().unwrap();
                let child = u64::from_le_bytes(block[at * 12..at * 12 + 8].try_into().unwrap());
                names.push((name.to_vec(), child, block[at * 12 + 10]));
            }
        }
        assert!(names.is_sorted(), "{names:?}");
        let directories = names.iter().filter(|(.., file_type)| *file_type == 2).count();
        assert_eq!(found.links as usize, directories);
        listing.insert(path.clone(), found);
        for (name, child, file_type) in names {
            match &name[..] {
                b"." => assert_eq!(child, inode),
                b".." => assert_eq!(child, parent),
                _ => {
                    let name = name.escape_ascii();
                    let below =
                        if path.is_empty() { name.to_string() } else { format!("{path}/{name}") };
                    self.walk(child, inode, below.clone(), listing);
                    let kinds = [0o10, 0o4, 0o2, 0o6, 0o1, 0o14, 0o12];
                    assert_eq!(listing[&below].mode >> 12, kinds[usize::from(file_type) - 1]);
                }
            }
        }
    }

    fn inode(&self, inode: u64) -> (Found, Vec<u8>) {
        let at = self.meta + inode as usize * 32;
        let format = self.number::<2>(at);
        assert_eq!(format & 1, 1, "the long form");
        let count = self.number::<2>(at + 2) as usize;
        let xattr_bytes = if count == 0 { 0 } else { 12 + (count - 1) * 4 };
        let size = self.number::<8>(at + 8) as usize;
        let place = self.number::<4>(at + 16);
        let mode = self.number::<2>(at + 4) as u16;
        let body = at + 64 + xattr_bytes;
        let has_data = matches!(mode >> 12, 0o4 | 0o10 | 0o12);
        let data = match format >> 1 {
            _ if !has_data => Vec::new(),
            0 => self.bytes[block_range(place, size)].to_vec(),
            2 => {
                let tail = size % BLOCK;
                assert!(at / BLOCK == (body + tail - 1) / BLOCK, "it crosses a block");
                let blocks = &self.bytes[block_range(place, size - tail)];
                [blocks, &self.bytes[body..body + tail]].concat()
            }
            other => panic!("layout {other}"),
        };
        let found = Found {
            mode,
            uid: self.number::<4>(at + 24) as u32,
            gid: self.number::<4>(at + 28) as u32,
            mtime: (self.number::<8>(at + 32).cast_signed(), self.number::<4>(at + 40) as u32),
            links: self.number::<4>(at + 44) as u32,
            device: if matches!(mode >> 12, 2 | 6) { place as u32 } else { 0 },
            inode,
            data: Vec::new(),
            xattrs: self.xattrs(at + 64..body),
        };
        (found, data)
    }

    fn xattrs(&self, range: Range<usize>) -> BTreeMap<String, Vec<u8>> {
        let mut xattrs = BTreeMap::new();
        let mut at = range.start + 12;
        while at < range.end {
            let (name, index) = (self.bytes[at] as usize, self.bytes[at + 1]);
            let value = self.number::<2>(at + 2) as usize;
            let space = match index {
                1 => "user.",
                2 => "system.posix_acl_access",
                3 => "system.posix_acl_default",
                4 => "trusted.",
                6 => "security.",
                other => panic!("name space {other}"),
            };
            let text = self.bytes[at + 4..at + 4 + name].escape_ascii();
            let begin = at + 4 + name;
            xattrs.insert(format!("{space}{text}"), self.bytes[begin..begin + value].to_vec());
            at = (begin + value).next_multiple_of(4);
        }
        xattrs
    }
}

fn block_range(block: u64, size: usize) -> Range<usize> {
    // An empty file has no block.
    if size == 0 {
        return 0..0;
    }
    let begin = block as usize * BLOCK;
    begin..begin + size
}

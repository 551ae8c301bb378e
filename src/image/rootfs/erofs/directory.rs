//! The data of a directory.
//!
//! It is in blocks. Each begins with an entry of 12 bytes for each of its names, which follow; where the first
//! one begins says how many there are. Names are in order, over all blocks.

use super::super::data::BLOCK;
use super::super::node::Kind;

const ENTRY_BYTES: usize = 12;

/// A name, and what it leads to.
#[derive(Clone, Copy, Debug)]
pub(super) struct Name<'t> {
    pub(super) name: &'t [u8],
    pub(super) inode: u32,
    pub(super) file_type: u8,
}

/// EROFS_FT_…
pub(super) fn file_type(kind: &Kind) -> u8 {
    match kind {
        Kind::File(_) => 1,
        Kind::Directory(_) => 2,
        Kind::Char(_) => 3,
        Kind::Block(_) => 4,
        Kind::Fifo => 5,
        Kind::Symlink(_) => 7,
    }
}

/// How long a directory with these names will be, which are in order, and to which `.` and `..` are added.
pub(super) fn encoded_bytes<'t>(names: impl Iterator<Item = &'t [u8]>) -> u64 {
    let mut sizes: Vec<usize> = Vec::new();
    let mut dots = [&b"."[..], b".."].into_iter().peekable();
    for name in names {
        while let Some(dot) = dots.next_if(|dot| *dot < name) {
            sizes.push(ENTRY_BYTES + dot.len());
        }
        sizes.push(ENTRY_BYTES + name.len());
    }
    sizes.extend(dots.map(|dot| ENTRY_BYTES + dot.len()));
    let counts = counts(&sizes);
    let last = counts.last().copied().unwrap_or_default();
    let tail: usize = sizes[sizes.len() - last..].iter().sum();
    (counts.len() as u64 - 1) * BLOCK + tail as u64
}

/// The directory's data.
pub(super) fn encode(mut names: Vec<Name<'_>>) -> Vec<u8> {
    names.sort_unstable_by(|a, b| a.name.cmp(b.name));
    let sizes: Vec<usize> = names.iter().map(|name| ENTRY_BYTES + name.name.len()).collect();
    let (mut data, mut rest) = (Vec::new(), &names[..]);
    for count in counts(&sizes) {
        data.resize(data.len().next_multiple_of(BLOCK as usize), 0);
        let (block, after) = rest.split_at(count);
        rest = after;
        let mut name_at = count * ENTRY_BYTES;
        for name in block {
            data.extend(u64::from(name.inode).to_le_bytes());
            data.extend((name_at as u16).to_le_bytes());
            data.extend([name.file_type, 0]);
            name_at += name.name.len();
        }
        for name in block {
            data.extend(name.name);
        }
    }
    data
}

/// How many names are in each block.
fn counts(sizes: &[usize]) -> Vec<usize> {
    let (mut counts, mut used) = (Vec::new(), BLOCK as usize);
    for size in sizes {
        if used + size > BLOCK as usize {
            counts.push(0);
            used = 0;
        }
        used += size;
        if let Some(last) = counts.last_mut() {
            *last += 1;
        }
    }
    counts
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_length_is_known_before_and_names_are_in_order() {
        for count in [0, 1, 3, 200, 300, 5000] {
            let names: Vec<String> =
                (0..count).map(|n| format!("!{n:03}").repeat(1 + n % 9)).collect();
            let mut names: Vec<&[u8]> = names.iter().map(String::as_bytes).collect();
            names.sort_unstable();
            let all = [&b"."[..], b".."].into_iter().chain(names.iter().copied());
            let all = all.map(|name| Name { name, inode: 7, file_type: 1 });
            let data = encode(all.collect());
            assert_eq!(data.len() as u64, encoded_bytes(names.iter().copied()));
            let mut found = Vec::new();
            for block in data.chunks(BLOCK as usize) {
                let offset = |at: usize| {
                    usize::from(u16::from_le_bytes([block[at * 12 + 8], block[at * 12 + 9]]))
                };
                let count = offset(0) / ENTRY_BYTES;
                for at in 0..count {
                    let end = if at + 1 < count { offset(at + 1) } else { block.len() };
                    let name = &block[offset(at)..end];
                    found.push(name.split(|&byte| byte == 0).next().unwrap().to_vec());
                }
            }
            assert_eq!(found.len(), count + 2);
            assert!(found.is_sorted());
        }
    }
}

//! Pages of guest RAM, counted through all its regions from the lowest address: runs and sets.

use serde::{Deserialize, Serialize};

/// What pages are counted in: the host's and the guest's smallest page.
pub(crate) const PAGE_BYTES: usize = 4096;

/// How many pages a chunk has: 1 MiB, the unit of work and of checksums.
pub(super) const CHUNK_PAGES: u64 = 256;
pub(super) const CHUNK_BYTES: usize = CHUNK_PAGES as usize * PAGE_BYTES;
const CHUNK_WORDS: usize = CHUNK_PAGES as usize / 64;

/// The pages of one chunk, a bit each, the lowest first.
pub(super) type ChunkPages = [u64; CHUNK_WORDS];

/// Pages that follow one another.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub(crate) struct PageRun {
    pub(crate) first: u64,
    pub(crate) count: u64,
}

impl PageRun {
    pub(super) fn between(first: u64, end: u64) -> Self {
        Self { first, count: end.saturating_sub(first) }
    }

    /// The page behind the last.
    pub(super) fn end(self) -> u64 {
        self.first.saturating_add(self.count)
    }

    /// What is in both; without pages where nothing is.
    pub(super) fn common(self, other: Self) -> Self {
        Self::between(self.first.max(other.first), self.end().min(other.end()))
    }

    pub(super) fn offset(self) -> u64 {
        self.first * PAGE_BYTES as u64
    }

    pub(super) fn bytes(self) -> usize {
        self.count as usize * PAGE_BYTES
    }
}

/// Which gaps between runs stay gaps: each run is a mapping of its own, so there are not to be
/// many. The pages in a gap that is closed are stored too.
#[derive(Clone, Copy, Debug)]
pub(super) struct Gaps {
    /// A shorter one is closed.
    pub(super) min: u64,
    /// Of more than these, the shortest are closed.
    pub(super) most: usize,
}

/// Some of `pages` pages, a bit each: 64 KiB for 2 GiB of RAM.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct PageSet {
    words: Vec<u64>,
    pages: u64,
}

impl PageSet {
    /// None of `pages`.
    pub(super) fn new(pages: u64) -> Self {
        // Whole chunks, so that each has all its words.
        let words = pages.div_ceil(CHUNK_PAGES) as usize * CHUNK_WORDS;
        Self { words: vec![0; words], pages }
    }

    pub(super) fn of(pages: u64, runs: &[PageRun]) -> Self {
        let mut set = Self::new(pages);
        for run in runs {
            set.insert(*run);
        }
        set
    }

    /// Adds the pages of a run that there are.
    pub(super) fn insert(&mut self, run: PageRun) {
        self.for_words(run, |word, mask| *word |= mask);
    }

    pub(super) fn remove(&mut self, run: PageRun) {
        self.for_words(run, |word, mask| *word &= !mask);
    }

    fn for_words(&mut self, run: PageRun, change: impl Fn(&mut u64, u64)) {
        let end = run.end().min(self.pages);
        let mut page = run.first;
        while page < end {
            let (bit, next) = (page % 64, (page / 64 + 1) * 64);
            let count = end.min(next) - page;
            let mask = (u64::MAX >> (64 - count)) << bit;
            if let Some(word) = self.words.get_mut((page / 64) as usize) {
                change(word, mask);
            }
            page = next;
        }
    }

    /// Adds the pages of another set of as many.
    pub(super) fn unite(&mut self, other: &Self) {
        for (word, other) in self.words.iter_mut().zip(&other.words) {
            *word |= other;
        }
    }

    /// Leaves only the pages that another set has too.
    pub(super) fn intersect(&mut self, other: &Self) {
        for (word, other) in self.words.iter_mut().zip(&other.words) {
            *word &= other;
        }
    }

    /// How many pages are in the set.
    pub(crate) fn len(&self) -> u64 {
        self.words.iter().map(|word| u64::from(word.count_ones())).sum()
    }

    pub(crate) fn is_empty(&self) -> bool {
        self.words.iter().all(|word| *word == 0)
    }

    /// The pages, as few runs as there can be.
    pub(crate) fn runs(&self) -> impl Iterator<Item = PageRun> + '_ {
        runs(&self.words)
    }

    /// The pages, in runs over all gaps but the greatest.
    pub(super) fn joined(&self, gaps: Gaps) -> Vec<PageRun> {
        let all: Vec<_> = self.runs().collect();
        let lengths = all.windows(2).map(|pair| pair[1].first - pair[0].end());
        let mut kept: Vec<_> = lengths.zip(1..).filter(|(len, _)| *len >= gaps.min).collect();
        if kept.len() > gaps.most {
            kept.sort_unstable_by(|a, b| b.cmp(a));
            kept.truncate(gaps.most);
            kept.sort_unstable_by_key(|(_, at)| *at);
        }
        let ends = kept.iter().map(|(_, at)| *at).chain([all.len()]);
        let mut begin = 0;
        let mut joined = Vec::with_capacity(kept.len() + 1);
        for end in ends {
            if let [first, .., last] | [first @ last] = &all[begin..end] {
                joined.push(PageRun::between(first.first, last.end()));
            }
            begin = end;
        }
        joined
    }

    /// The chunks that have a page in the set, with these pages.
    pub(super) fn chunks(&self) -> impl Iterator<Item = (u32, ChunkPages)> + '_ {
        let (chunks, _) = self.words.as_chunks::<CHUNK_WORDS>();
        (0..).zip(chunks.iter().copied()).filter(|(_, pages)| pages.iter().any(|word| *word != 0))
    }

    /// Adds pages of a chunk.
    pub(super) fn insert_chunk(&mut self, index: u32, pages: ChunkPages) {
        let (chunks, _) = self.words.as_chunks_mut::<CHUNK_WORDS>();
        if let Some(chunk) = chunks.get_mut(index as usize) {
            *chunk = std::array::from_fn(|word| chunk[word] | pages[word]);
        }
    }
}

/// The runs of ones in some words.
pub(super) fn runs(words: &[u64]) -> impl Iterator<Item = PageRun> + '_ {
    let mut from = 0;
    std::iter::from_fn(move || {
        let first = next(words, from, u64::MAX)?;
        let end = next(words, first, 0).unwrap_or(words.len() as u64 * 64);
        from = end;
        Some(PageRun::between(first, end))
    })
}

/// The next bit from `from` on that is one, or with `flip` 0, that is zero.
fn next(words: &[u64], from: u64, flip: u64) -> Option<u64> {
    let first = (from / 64) as usize;
    let rest = words.get(first..)?;
    let mut mask = u64::MAX << (from % 64);
    for (at, word) in (first as u64..).zip(rest) {
        let wanted = (word ^ !flip) & mask;
        if wanted != 0 {
            return Some(at * 64 + u64::from(wanted.trailing_zeros()));
        }
        mask = u64::MAX;
    }
    None
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn run(first: u64, count: u64) -> PageRun {
        PageRun { first, count }
    }

    proptest! {
        #[test]
        fn a_set_is_what_a_list_of_booleans_is(
            pages in 1u64..700,
            changes in prop::collection::vec((any::<bool>(), 0u64..800, 0u64..300), 0..20),
        ) {
            let mut set = PageSet::new(pages);
            let mut model = vec![false; pages as usize];
            for (insert, first, count) in changes {
                match insert {
                    true => set.insert(run(first, count)),
                    false => set.remove(run(first, count)),
                }
                for page in first..(first + count).min(pages) {
                    model[page as usize] = insert;
                }
            }
            let mut from_runs = vec![false; pages as usize];
            let mut end = None;
            for run in set.runs() {
                prop_assert!(run.count > 0 && end.is_none_or(|end| run.first > end));
                end = Some(run.end());
                from_runs[run.first as usize..run.end() as usize].fill(true);
            }
            prop_assert_eq!(&from_runs, &model);
            prop_assert_eq!(set.len(), model.iter().filter(|page| **page).count() as u64);
            prop_assert_eq!(set.is_empty(), !model.contains(&true));
            let mut again = PageSet::new(pages);
            set.chunks().for_each(|(index, chunk)| again.insert_chunk(index, chunk));
            prop_assert_eq!(again, set);
        }
    }

    #[test]
    fn small_gaps_are_closed_and_the_greatest_stay() {
        let set = PageSet::of(1000, &[run(3, 2), run(6, 1), run(20, 5), run(100, 1), run(990, 10)]);
        let joined = |min, most| set.joined(Gaps { min, most });
        assert_eq!(joined(1, 9), set.runs().collect::<Vec<_>>());
        assert_eq!(joined(2, 9), [run(3, 4), run(20, 5), run(100, 1), run(990, 10)]);
        assert_eq!(joined(1, 2), [run(3, 22), run(100, 1), run(990, 10)]);
        assert_eq!(joined(1, 0), [run(3, 997)]);
        assert_eq!(PageSet::new(10).joined(Gaps { min: 1, most: 3 }), []);
    }

    #[test]
    fn runs_beyond_all_numbers_add_what_there_is() {
        assert_eq!(PageSet::of(70, &[run(65, u64::MAX)]).runs().collect::<Vec<_>>(), [run(65, 5)]);
        assert!(PageSet::of(70, &[run(u64::MAX, 5), run(9, 0)]).is_empty());
    }
}

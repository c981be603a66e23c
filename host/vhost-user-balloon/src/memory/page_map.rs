// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! Sets of the guest's pages, with a bit for each balloon page.

use std::ops::Range;

use super::bitmap::{WORD, find, index, set};

/// The pages of a region of memory.
#[derive(Debug)]
struct Region {
    /// All of them.
    all: Range<u64>,
    /// A bit for each.
    bits: Vec<u64>,
}

/// The result of adding pages to a set, in balloon pages.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Added {
    /// Pages that were not in it.
    pub new: u64,
    /// Pages outside of the guest's memory.
    pub outside: u64,
}

/// A set of the guest's pages.
#[derive(Debug, Default)]
pub struct PageMap(Vec<Region>);

impl PageMap {
    /// An empty set for memory in these ranges of balloon pages, which ascend.
    pub fn new(memory: impl Iterator<Item = Range<u64>>) -> Self {
        let region = |all: Range<u64>| {
            let pages = all.end.saturating_sub(all.start);
            Region {
                bits: vec![0; index(pages.div_ceil(WORD))],
                all,
            }
        };
        Self(memory.map(region).collect())
    }

    /// Adds a range of balloon pages, as far as they are in memory.
    pub fn add(&mut self, pages: &Range<u64>) -> Added {
        let mut added = Added {
            new: 0,
            outside: pages.end.saturating_sub(pages.start),
        };
        for region in &mut self.0 {
            let start = pages.start.max(region.all.start);
            let end = pages.end.min(region.all.end);
            if start < end {
                let bits = start - region.all.start..end - region.all.start;
                added.new += set(&mut region.bits, bits, true, |_| {});
                added.outside -= end - start;
            }
        }
        added
    }

    /// Where memory ends, in balloon pages.
    pub fn end(&self) -> u64 {
        self.0.last().map_or(0, |region| region.all.end)
    }

    /// The pages of the set from `from` on, as ascending ranges of balloon pages. Each is as long as
    /// possible within a region of memory.
    pub fn ranges(&self, from: u64) -> impl Iterator<Item = Range<u64>> {
        self.0.iter().flat_map(move |region| {
            let first = region.all.start;
            let mut bit = from.saturating_sub(first);
            std::iter::from_fn(move || {
                let start = find(&region.bits, bit, true)?;
                bit = find(&region.bits, start, false).unwrap_or(region.all.end - first);
                Some(first + start..first + bit)
            })
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;
    use std::collections::BTreeSet;

    #[test]
    fn only_memory_is_in_a_set() {
        let mut map = PageMap::new([0..100, 200..300].into_iter());
        let added = |new, outside| Added { new, outside };
        assert_eq!(map.add(&(90..210)), added(20, 100));
        assert_eq!(map.add(&(95..100)), added(0, 0));
        assert_eq!(map.add(&(299..u64::MAX)), added(1, u64::MAX - 300));
        assert_eq!(map.end(), 300);
        let ranges = |from| map.ranges(from).collect::<Vec<_>>();
        assert_eq!(ranges(0), [90..100, 200..210, 299..300]);
        assert_eq!(ranges(205), [205..210, 299..300]);
        assert_eq!(ranges(300), []);
        assert_eq!(ranges(u64::MAX), []);
        assert_eq!(PageMap::default().end(), 0);
    }

    proptest! {
        /// The set contains exactly the added pages, however they are cut, and from wherever they
        /// are read.
        #[test]
        fn a_set_has_what_was_added(
            ranges in prop::collection::vec((0_u64..400, 0_u64..150), 0..12), from in 0_u64..500,
        ) {
            let memory = [3..133, 133..140, 192..320];
            let mut map = PageMap::new(memory.clone().into_iter());
            let mut expected = BTreeSet::new();
            for (start, length) in ranges {
                let pages = start..start + length;
                let inside: Vec<_> = pages
                    .clone()
                    .filter(|page| memory.iter().any(|region| region.contains(page)))
                    .collect();
                let outside = length - inside.len() as u64;
                let before = expected.len();
                expected.extend(inside);
                let new = (expected.len() - before) as u64;
                prop_assert_eq!(map.add(&pages), Added { new, outside });
            }
            let found: Vec<_> = map.ranges(from).collect();
            prop_assert!(found.iter().all(|range| range.start < range.end));
            let found: Vec<_> = found.into_iter().flatten().collect();
            let expected: Vec<_> = expected.into_iter().filter(|&page| page >= from).collect();
            prop_assert_eq!(found, expected);
        }
    }
}

// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! The guest's memory, and what of it is in the balloon.
//!
//! A bit for each balloon page says whether it is in the balloon, so that a page is given back once
//! however often the guest names it. Where a granule has several pages, a count for each granule says how
//! many of them are in the balloon, and the granule is given back when the last one comes in.

use std::fs::File;
use std::ops::Range;
use std::os::unix::fs::MetadataExt;
use std::sync::Arc;

use balloon_wire::BALLOON_PAGE_SIZE;
use log::error;
use vm_memory::{Address, GuestMemoryBackend, GuestMemoryMmap, GuestMemoryRegion};

use crate::discard::{Granularity, Pieces};

/// What became of the pages of a message, in balloon pages.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Tally {
    /// They went in, or came out.
    pub moved: u64,
    /// They were there already.
    pub repeated: u64,
    /// They are not in the guest's memory.
    pub outside: u64,
}

/// A region of the guest's memory.
#[derive(Debug)]
struct Region {
    /// Its balloon pages.
    pages: Range<u64>,
    file: Arc<File>,
    /// What tells the file from others.
    identity: (u64, u64),
    /// Where the region begins in the file, in bytes.
    offset: u64,
    granule: u64,
    /// A bit for each page.
    held: Vec<u64>,
    /// How many pages of each granule are in the balloon and may still be changed, from the granule that the
    /// region begins in. Nothing where a granule is a page.
    counts: Vec<u64>,
}

impl Region {
    /// The region whose first byte is at the guest's physical address `start`.
    fn new(
        start: u64,
        bytes: u64,
        file: &Arc<File>,
        offset: u64,
        granularity: Granularity,
    ) -> Option<Self> {
        let end = start.checked_add(bytes)?;
        let metadata = file.metadata().ok()?;
        let granule = granularity.of(file);
        let aligned = [start, bytes, offset]
            .iter()
            .all(|value| value % BALLOON_PAGE_SIZE == 0);
        if !aligned {
            return None;
        }
        let granules = offset.checked_add(bytes)?.div_ceil(granule) - offset / granule;
        Some(Self {
            pages: start / BALLOON_PAGE_SIZE..end / BALLOON_PAGE_SIZE,
            file: Arc::clone(file),
            identity: (metadata.dev(), metadata.ino()),
            offset,
            granule,
            held: vec![0; words((bytes / BALLOON_PAGE_SIZE).div_ceil(64))],
            counts: match granule {
                BALLOON_PAGE_SIZE => Vec::new(),
                _ => vec![0; words(granules)],
            },
        })
    }

    /// Whether the other one is the same memory at the same place.
    fn is(&self, other: &Self) -> bool {
        (&self.pages, self.identity, self.offset, self.granule)
            == (&other.pages, other.identity, other.offset, other.granule)
    }

    /// Where a page begins in the file.
    fn position(&self, page: u64) -> u64 {
        self.offset + (page - self.pages.start) * BALLOON_PAGE_SIZE
    }

    /// Sets whether a page of the region is in the balloon, and says whether that is new.
    fn hold(&mut self, page: u64, hold: bool) -> bool {
        let index = page - self.pages.start;
        let Some(word) = self.held.get_mut(words(index / 64)) else {
            return false;
        };
        let bit = 1 << (index % 64);
        if (*word & bit != 0) == hold {
            return false;
        }
        *word ^= bit;
        true
    }

    fn count(&mut self, page: u64) -> Option<&mut u64> {
        let granule = self.position(page) / self.granule - self.offset / self.granule;
        self.counts.get_mut(words(granule))
    }

    fn inflate(&mut self, page: u64, whole: &mut Pieces) -> bool {
        let new = self.hold(page, true);
        if new {
            let position = self.position(page);
            let granule = self.granule;
            let complete = match self.count(page) {
                None => true,
                Some(count) => {
                    *count += 1;
                    *count == granule / BALLOON_PAGE_SIZE
                }
            };
            if complete {
                let start = position / granule * granule;
                whole.push(&self.file, start..start + granule);
            }
        }
        new
    }

    fn deflate(&mut self, page: u64, out: &mut Pieces) -> bool {
        let new = self.hold(page, false);
        if new {
            let position = self.position(page);
            if let Some(count) = self.count(page) {
                *count = count.saturating_sub(1);
            }
            out.push(&self.file, position..position + BALLOON_PAGE_SIZE);
        }
        new
    }

    fn empty(&mut self) {
        self.held.fill(0);
        self.counts.fill(0);
    }
}

/// Memory of which there is more than fits into a `usize` cannot have been mapped.
fn words(number: u64) -> usize {
    usize::try_from(number).unwrap_or(usize::MAX)
}

/// The guest's memory, with the balloon.
#[derive(Debug, Default)]
pub struct Balloon {
    /// In the order of their addresses.
    regions: Vec<Region>,
}

impl Balloon {
    /// Takes over the memory that the front end has sent. What is in the balloon stays there in regions
    /// that were there before, as when a stopped VM goes on.
    pub fn set_memory(&mut self, memory: &GuestMemoryMmap, granularity: Granularity) {
        let old = std::mem::take(&mut self.regions);
        for region in memory.iter() {
            let start = region.start_addr().raw_value();
            let new = region.file_offset().and_then(|file| {
                Region::new(start, region.len(), file.arc(), file.start(), granularity)
            });
            if new.is_none() {
                error!(
                    "the guest's memory at {start:#x} is in no file that memory can be given back from; have \
                     the VMM use a memory file, as QEMU's memory-backend-memfd with share=on is"
                );
            }
            self.regions.extend(new);
        }
        for region in old {
            if let Some(place) = self.regions.iter_mut().find(|new| new.is(&region)) {
                *place = region;
            }
        }
    }

    /// How much memory the guest has, in bytes.
    pub fn memory(&self) -> u64 {
        let pages = self.regions.iter().map(|r| r.pages.end - r.pages.start);
        pages.sum::<u64>() * BALLOON_PAGE_SIZE
    }

    /// The largest granule in bytes.
    pub fn granule(&self) -> Option<u64> {
        self.regions.iter().map(|region| region.granule).max()
    }

    /// Puts pages into the balloon, which are sorted, and adds the granules that are whole now to `whole`.
    pub fn inflate(&mut self, pfns: &[u32], whole: &mut Pieces) -> Tally {
        self.each(pfns, |region, page| region.inflate(page, whole))
    }

    /// Takes pages out of the balloon, which are sorted, and adds them to `out`.
    pub fn deflate(&mut self, pfns: &[u32], out: &mut Pieces) -> Tally {
        self.each(pfns, |region, page| region.deflate(page, out))
    }

    fn each(&mut self, pfns: &[u32], mut act: impl FnMut(&mut Region, u64) -> bool) -> Tally {
        let mut tally = Tally::default();
        let mut regions = self.regions.iter_mut();
        let mut region = regions.next();
        for page in pfns.iter().copied().map(u64::from) {
            while region.as_ref().is_some_and(|r| r.pages.end <= page) {
                region = regions.next();
            }
            match &mut region {
                Some(region) if region.pages.contains(&page) => {
                    if act(region, page) {
                        tally.moved += 1;
                    } else {
                        tally.repeated += 1;
                    }
                }
                _ => tally.outside += 1,
            }
        }
        tally
    }

    /// Adds the whole granules of a range of the guest's physical addresses to `whole`, and returns how
    /// many bytes of the range are in the guest's memory. The balloon stays as it is.
    pub fn whole_granules(&self, range: &Range<u64>, whole: &mut Pieces) -> u64 {
        let mut inside = 0;
        for region in &self.regions {
            let first = region.pages.start * BALLOON_PAGE_SIZE;
            let start = range.start.max(first);
            let end = range.end.min(region.pages.end * BALLOON_PAGE_SIZE);
            if start >= end {
                continue;
            }
            inside += end - start;
            let granule = region.granule;
            let from = (region.offset + (start - first)).next_multiple_of(granule);
            let to = (region.offset + (end - first)) / granule * granule;
            if from < to {
                whole.push(&region.file, from..to);
            }
        }
        inside
    }

    /// Has granules not wait for more pages: the driver may use those that it has sent.
    pub fn settle(&mut self) {
        for region in &mut self.regions {
            region.counts.fill(0);
        }
    }

    /// Forgets what is in the balloon.
    pub fn empty(&mut self) {
        self.regions.iter_mut().for_each(Region::empty);
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::counters::Counters;
    use crate::discard::Discarder;
    use crate::testing::{HOLE, MemoryFiles, PAGE};
    use proptest::prelude::*;
    use std::collections::BTreeSet;

    /// Two regions of a file with a hole between them in the guest's address space.
    fn balloon(files: &MemoryFiles, granule: u64) -> Balloon {
        let mut balloon = Balloon::default();
        balloon.set_memory(&files.memory(), Granularity::Bytes(granule));
        balloon
    }

    fn discard(pieces: &mut Pieces) {
        let counters = Counters::default();
        Discarder::default().discard(pieces, &counters);
        assert_eq!(counters.discard_failures.get(), 0);
    }

    fn pages(bytes: u64) -> u32 {
        u32::try_from(bytes / PAGE).unwrap()
    }

    #[test]
    fn only_new_pages_are_punched() {
        let files = MemoryFiles::new(1 << 20, 1 << 20);
        let mut balloon = balloon(&files, PAGE);
        let mut pieces = Pieces::default();
        let tally = balloon.inflate(&[3, 4, 4, 255, pages(HOLE) - 1], &mut pieces);
        assert_eq!(
            tally,
            Tally {
                moved: 3,
                repeated: 1,
                outside: 1
            }
        );
        discard(&mut pieces);
        assert_eq!(files.holes(), BTreeSet::from([3, 4, 255]));

        files.fill();
        let tally = balloon.inflate(&[3, 4], &mut pieces);
        assert_eq!(
            tally,
            Tally {
                repeated: 2,
                ..Tally::default()
            }
        );
        discard(&mut pieces);
        assert_eq!(files.holes(), BTreeSet::new());

        let mut out = Pieces::default();
        let tally = balloon.deflate(&[4, 5], &mut out);
        assert_eq!(
            tally,
            Tally {
                moved: 1,
                repeated: 1,
                outside: 0
            }
        );
        balloon.inflate(&[4], &mut pieces);
        discard(&mut pieces);
        assert_eq!(files.holes(), BTreeSet::from([4]));
    }

    #[test]
    fn a_granule_waits_for_its_last_page() {
        let files = MemoryFiles::new(1 << 20, 1 << 20);
        let mut balloon = balloon(&files, 8 * PAGE);
        let mut pieces = Pieces::default();
        balloon.inflate(&[8, 9, 10, 11, 12, 13, 14], &mut pieces);
        balloon.deflate(&[8], &mut Pieces::default());
        balloon.inflate(&[15], &mut pieces);
        discard(&mut pieces);
        assert_eq!(files.holes(), BTreeSet::new());
        balloon.inflate(&[8], &mut pieces);
        discard(&mut pieces);
        assert_eq!(files.holes(), (8..16).collect());
    }

    #[test]
    fn pages_that_may_be_in_use_complete_no_granule() {
        let files = MemoryFiles::new(1 << 20, 1 << 20);
        let mut balloon = balloon(&files, 4 * PAGE);
        let mut pieces = Pieces::default();
        balloon.inflate(&[8, 9, 10], &mut pieces);
        balloon.settle();
        balloon.inflate(&[11, 12, 13, 14, 15], &mut pieces);
        balloon.settle();
        balloon.deflate(&[8], &mut Pieces::default());
        discard(&mut pieces);
        assert_eq!(files.holes(), (12..16).collect());
    }

    #[test]
    fn an_emptied_balloon_forgets_half_a_granule() {
        let files = MemoryFiles::new(1 << 20, 1 << 20);
        let mut balloon = balloon(&files, 2 * PAGE);
        let mut pieces = Pieces::default();
        balloon.inflate(&[8], &mut pieces);
        balloon.empty();
        balloon.inflate(&[9], &mut pieces);
        discard(&mut pieces);
        assert_eq!(files.holes(), BTreeSet::new());
    }

    #[test]
    fn memory_that_is_sent_again_keeps_its_balloon() {
        let files = MemoryFiles::new(1 << 20, 1 << 20);
        let mut balloon = balloon(&files, 2 * PAGE);
        balloon.inflate(&[8], &mut Pieces::default());
        balloon.set_memory(&files.memory(), Granularity::Bytes(2 * PAGE));
        let mut pieces = Pieces::default();
        balloon.inflate(&[9], &mut pieces);
        discard(&mut pieces);
        assert_eq!(files.holes(), BTreeSet::from([8, 9]));

        let others = MemoryFiles::new(1 << 20, 1 << 20);
        balloon.set_memory(&others.memory(), Granularity::Bytes(2 * PAGE));
        assert_eq!(balloon.inflate(&[8], &mut pieces).moved, 1);
    }

    #[test]
    fn reported_ranges_are_trimmed_inward() {
        let files = MemoryFiles::new(1 << 20, 1 << 20);
        let balloon = balloon(&files, 4 * PAGE);
        let mut pieces = Pieces::default();
        let inside = balloon.whole_granules(&(PAGE..13 * PAGE), &mut pieces);
        assert_eq!(inside, 12 * PAGE);
        // The range goes past the region's end.
        let inside = balloon.whole_granules(&((1 << 20) - PAGE..(1 << 20) + PAGE), &mut pieces);
        assert_eq!(inside, PAGE);
        discard(&mut pieces);
        assert_eq!(files.holes(), (4..12).collect());
    }

    proptest! {
        #![proptest_config(ProptestConfig::with_cases(64))]

        /// Whatever the guest names, the holes are exactly the whole granules that are in the balloon.
        #[test]
        fn holes_are_the_whole_granules(
            batches in prop::collection::vec(
                (any::<bool>(), prop::collection::vec(0_u32..700, 0..200), 0_u32..600, 0_u32..64), 0..8),
            shift in 0_u32..4,
        ) {
            let granule_pages = 1_u64 << shift;
            // The second region begins and ends in the middle of a granule of the file.
            let files = MemoryFiles::new(129 * PAGE, 130 * PAGE);
            let mut balloon = balloon(&files, granule_pages * PAGE);
            let mut held = BTreeSet::new();
            let mut holes = BTreeSet::new();
            for (inflate, mut pfns, first, length) in batches {
                pfns.extend(first..first + length);
                pfns.sort_unstable();
                let mut pieces = Pieces::default();
                if inflate {
                    balloon.inflate(&pfns, &mut pieces);
                    discard(&mut pieces);
                } else {
                    balloon.deflate(&pfns, &mut pieces);
                }
                for page in pfns.iter().filter_map(|&pfn| files.file_page(pfn.into())) {
                    if inflate { held.insert(page); } else { held.remove(&page); }
                }
                // The regions share the granule in the file where they meet, which is whole in neither.
                let whole = |page: u64| {
                    let start = page / granule_pages * granule_pages;
                    let granule = start..start + granule_pages;
                    granule.clone().all(|page| held.contains(&page))
                        && (granule.end <= 129 || granule.start >= 129)
                };
                if inflate {
                    holes.extend(held.iter().copied().filter(|&page| whole(page)));
                }
                prop_assert_eq!(files.holes(), holes.clone());
            }
        }
    }
}

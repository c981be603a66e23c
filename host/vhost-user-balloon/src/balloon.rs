// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! The guest's memory, and what of it is in the balloon.
//!
//! A bit for each balloon page says whether it is in the balloon, so that a page is given back once
//! however often the guest names it. Where a granule has several pages, a number for each granule says how
//! much of it is in the balloon, and the granule is given back when the rest comes in.

use std::collections::BTreeSet;
use std::fs::File;
use std::io;
use std::ops::Range;

use balloon_wire::BALLOON_PAGE_SIZE;
use log::error;
use vm_memory::{Address, GuestMemoryBackend, GuestMemoryMmap, GuestMemoryRegion};

use crate::bitmap::WORD;
use crate::discard::{Granularity, Piece, Pieces};
use crate::hazard::{Hazard, Identity};
use crate::kept::Kept;
use crate::page_map::PageMap;

mod granules;
mod region;

use region::{Absent, Region};

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

/// Puts ranges in order, and makes one of those that meet. Returns how much is in several of them.
pub(crate) fn merge(ranges: &mut Vec<Range<u64>>) -> u64 {
    let mut repeated = 0_u64;
    ranges.sort_unstable_by_key(|range| range.start);
    ranges.dedup_by(|next, range| {
        let meet = next.start <= range.end;
        if meet {
            repeated = repeated.saturating_add(range.end.min(next.end) - next.start);
            range.end = range.end.max(next.end);
        }
        meet
    });
    repeated
}

/// The guest's memory, with the balloon.
#[derive(Debug, Default)]
pub struct Balloon {
    /// What memory is to be discarded in spite of.
    allowed: Vec<Hazard>,
    /// In the order of their addresses.
    regions: Vec<Region>,
    /// Where memory begins that is in no file, in bytes.
    unbacked: BTreeSet<u64>,
    /// Where another process finds what is in the balloon.
    kept: Option<Kept>,
    /// Memory that may come, or come back: the front end sends it piece by piece, and takes a piece back to change its
    /// bounds. None of it is in `regions`.
    absent: Vec<Absent>,
}

impl Balloon {
    /// Memory that is discarded in spite of these hazards.
    pub fn new(allowed: &[Hazard]) -> Self {
        Self {
            allowed: allowed.to_vec(),
            ..Self::default()
        }
    }

    /// Keeps what is in the balloon in a file, for another process, and takes over its content once there is
    /// memory.
    pub fn keep(&mut self, file: File) {
        let kept = Kept::new(file);
        match kept.load() {
            Ok(left) => {
                let absent = left.into_iter().map(|(region, held)| Absent {
                    pages: region.pages,
                    identity: region.identity,
                    offset: region.offset,
                    held,
                });
                self.absent.extend(absent);
                self.kept = Some(kept);
            }
            Err(error) => kept.give_up(&error),
        }
    }

    /// Writes down that the balloon has changed in these pages, which are in memory and in order.
    pub fn write_down(&mut self, changed: &[Range<u64>]) {
        let Some(kept) = &self.kept else {
            return;
        };
        let result = self
            .regions
            .iter()
            .enumerate()
            .try_for_each(|(number, region)| {
                let first = region.pages.start;
                let from = changed.partition_point(|pages| pages.end <= first);
                let inside = changed.get(from..).unwrap_or_default().iter();
                let words = inside
                    .take_while(|pages| pages.start < region.pages.end)
                    .map(|pages| {
                        let end = pages.end.min(region.pages.end) - first;
                        pages.start.saturating_sub(first) / WORD..end.div_ceil(WORD)
                    });
                kept.update(number, words, &region.held)
            });
        self.check(result);
    }

    /// Writes down all of it.
    fn write_all_down(&mut self) {
        let Some(kept) = &mut self.kept else {
            return;
        };
        let regions = self.regions.iter();
        let result = kept.reset(regions.map(|region| {
            let Region {
                pages,
                identity,
                offset,
                held,
                ..
            } = region;
            (pages.clone(), *identity, *offset, held.len())
        }));
        // The file has zeroes already.
        let result = result.and_then(|()| {
            self.regions
                .iter()
                .enumerate()
                .try_for_each(|(number, region)| {
                    let words = (0..).zip(&region.held).filter(|(_, word)| **word != 0);
                    let words = words.map(|(place, _)| place..place + 1);
                    kept.update(number, words, &region.held)
                })
        });
        self.check(result);
    }

    fn check(&mut self, result: io::Result<()>) {
        let Err(error) = result else {
            return;
        };
        if let Some(kept) = self.kept.take() {
            kept.give_up(&error);
        }
    }

    /// Takes over the memory that the front end has sent. What is in the balloon stays there in regions
    /// that were there before, as when a stopped VM goes on.
    pub fn set_memory(&mut self, memory: &GuestMemoryMmap, granularity: Granularity) {
        let old = std::mem::take(&mut self.regions);
        for region in memory.iter() {
            let start = region.start_addr().raw_value();
            let new = region.file_offset().and_then(|file| {
                Region::new(start, region.len(), file.arc(), file.start(), granularity)
            });
            if new.is_some() {
                self.unbacked.remove(&start);
            } else if self.unbacked.insert(start) {
                // A guest can have its VMM send the memory again as often as it likes.
                error!(
                    "the guest's memory at {start:#x} is in no file that memory can be given back from; have \
                     the VMM use a memory file, as QEMU's memory-backend-memfd with share=on is"
                );
            }
            self.regions.extend(new.map(|region| {
                Region {
                    hazard: region
                        .hazard
                        .filter(|hazard| !self.allowed.contains(hazard)),
                    ..region
                }
            }));
        }
        // What another process had, or this one, perhaps in regions of other sizes.
        let same = old.len() == self.regions.len()
            && old
                .iter()
                .all(|old| self.regions.iter().any(|new| new.is(old)));
        for region in old {
            match self.regions.iter_mut().find(|new| new.is(&region)) {
                Some(place) => *place = region,
                None => self.absent.push(region.into()),
            }
        }
        for absent in &mut self.absent {
            for region in &mut self.regions {
                region.inherit(absent);
            }
        }
        self.absent
            .retain(|absent| absent.held.iter().any(|&word| word != 0));
        if !same {
            self.write_all_down();
        }
    }

    /// Has granules be as full as the balloon says, for a driver that tells before it uses a page again.
    pub fn refill(&mut self) {
        self.regions.iter_mut().for_each(Region::refill);
    }

    /// The files that hold it.
    pub fn files(&self) -> BTreeSet<Identity> {
        self.regions.iter().map(|region| region.identity).collect()
    }

    /// Why some of it must not be discarded.
    pub fn hazards(&self) -> BTreeSet<Hazard> {
        self.regions
            .iter()
            .filter_map(|region| region.hazard)
            .collect()
    }

    /// How much memory the guest has, in bytes.
    pub fn memory(&self) -> u64 {
        let pages = self.regions.iter().map(|r| r.pages.end - r.pages.start);
        pages.sum::<u64>() * BALLOON_PAGE_SIZE
    }

    /// A set of its pages, with none in it.
    pub fn no_pages(&self) -> PageMap {
        PageMap::new(self.regions.iter().map(|region| region.pages.clone()))
    }

    /// The largest granule in bytes.
    pub fn granule(&self) -> Option<u64> {
        self.regions.iter().map(|region| region.granules.size).max()
    }

    /// Puts ranges of balloon pages into the balloon, and adds the granules that are whole now to `whole`.
    pub fn inflate(&mut self, ranges: &[Range<u64>], whole: &mut Pieces) -> Tally {
        self.each(ranges, |region, pages| region.inflate(pages, whole))
    }

    /// Takes ranges of balloon pages out of the balloon.
    pub fn deflate(&mut self, ranges: &[Range<u64>]) -> Tally {
        for range in ranges {
            for absent in &mut self.absent {
                absent.deflate(range);
            }
        }
        self.each(ranges, Region::deflate)
    }

    /// Adds what is in the balloon of a range of balloon pages to `held`.
    pub fn find(&self, pages: &Range<u64>, held: &mut Pieces) {
        for region in &self.regions {
            let part = pages.start.max(region.pages.start)..pages.end.min(region.pages.end);
            if !part.is_empty() {
                region.find(&part, held);
            }
        }
    }

    /// The first piece of shared memory in the balloon from balloon page `from` on, and the page where the next search
    /// starts. Files of hugetlbfs and files on a disk are left out: they do not report their holes.
    pub(crate) fn next_held(&self, from: u64) -> Option<(Piece, u64)> {
        let is_shared = |region: &&Region| Hazard::of_file(&region.file).is_none();
        let mut regions = self.regions.iter().filter(is_shared);
        regions.find_map(|region| region.next_held(from))
    }

    /// Where its memory is, as ranges of balloon pages.
    pub fn memory_ranges(&self) -> Vec<Range<u64>> {
        self.regions
            .iter()
            .map(|region| region.pages.clone())
            .collect()
    }

    /// The same with absent memory, of which pages may come out of the balloon. No two ranges meet.
    pub fn known_ranges(&self) -> Vec<Range<u64>> {
        let mut ranges = self.memory_ranges();
        ranges.extend(self.absent.iter().map(|absent| absent.pages.clone()));
        merge(&mut ranges);
        ranges
    }

    /// Calls `act` for the part of each range that is in a region. It says how many of the pages it moves.
    fn each(
        &mut self,
        ranges: &[Range<u64>],
        mut act: impl FnMut(&mut Region, &Range<u64>) -> u64,
    ) -> Tally {
        let mut tally = Tally::default();
        for range in ranges {
            let mut outside = range.end.saturating_sub(range.start);
            let first = self
                .regions
                .partition_point(|region| region.pages.end <= range.start);
            let regions = self.regions.get_mut(first..).unwrap_or_default();
            for region in regions {
                let start = range.start.max(region.pages.start);
                let end = range.end.min(region.pages.end);
                if start >= end {
                    break;
                }
                let inside = end - start;
                let moved = act(region, &(start..end));
                tally.moved = tally.moved.saturating_add(moved);
                tally.repeated = tally.repeated.saturating_add(inside - moved);
                outside -= inside;
            }
            tally.outside = tally.outside.saturating_add(outside);
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
            let granule = region.granules.size;
            let from = (region.offset + (start - first)).next_multiple_of(granule);
            let to = (region.offset + (end - first)) / granule * granule;
            match region.hazard {
                None if from < to => whole.push(&region.file, from..to, granule),
                Some(_) if from < to => whole.withhold(to - from),
                _ => {}
            }
        }
        inside
    }

    /// Has granules not wait for more pages: the driver may use those that it has sent.
    pub fn settle(&mut self) {
        for region in &mut self.regions {
            region.granules.empty();
        }
    }

    /// Forgets what is in the balloon.
    pub fn empty(&mut self) {
        self.regions.iter_mut().for_each(Region::empty);
        self.absent.clear();
        self.write_all_down();
    }
}

#[cfg(test)]
mod tests;

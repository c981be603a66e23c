// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! The guest's memory, and its balloon.
//!
//! A bit for each balloon page records whether it is in the balloon, so that the device returns a page
//! once, however often the guest lists it. If a granule has several pages, a number for each granule
//! records how much of it is in the balloon, and the device returns the granule when it is complete.

use std::collections::{BTreeMap, BTreeSet};
use std::fs::File;
use std::io;
use std::ops::Range;

use balloon_wire::BALLOON_PAGE_SIZE;
use balloon_wire::status::Status;
use log::error;
use vm_memory::{Address, GuestMemoryBackend, GuestMemoryMmap, GuestMemoryRegion};

use super::bitmap::WORD;
use super::discard::{Granularity, Piece, Pieces};
use super::hazard::{Hazard, Identity};
use super::kept::{Kept, Memory};
use super::page_map::PageMap;

mod granules;
mod region;

use region::{Absent, Region};

/// The result for the pages of a message, in balloon pages.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Tally {
    /// They were inflated, or deflated.
    pub moved: u64,
    /// They had already that state.
    pub repeated: u64,
    /// They are outside of the guest's memory.
    pub outside: u64,
}

/// Sorts ranges, and merges adjacent and overlapping ones. Returns the size of the overlaps.
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

/// All memory with its part of the balloon, in the order of the file.
fn parts<'a>(
    regions: &'a [Region],
    absent: &'a [Absent],
) -> impl Iterator<Item = Memory<'a>> + Clone {
    let regions = regions.iter().map(Region::part);
    regions.chain(absent.iter().map(Absent::part))
}

/// The guest's memory, with the balloon.
#[derive(Debug, Default)]
pub struct Balloon {
    /// The hazards to ignore.
    allowed: Vec<Hazard>,
    /// Sorted by address.
    regions: Vec<Region>,
    /// The start of memory that is in no file, in bytes.
    unbacked: BTreeSet<u64>,
    /// The balloon's state in a file, for the next worker.
    kept: Option<Kept>,
    /// Whether the file has other regions than those here. While memory comes piece by piece, the file keeps the state of
    /// all pieces. It gets the present regions with the next change of the balloon.
    is_outdated: bool,
    /// Whether the file's state is that of this memory. Otherwise it is another VM's.
    is_own: bool,
    /// Absent memory: the front end adds memory piece by piece, and removes a piece to change its bounds. None of it
    /// is in `regions`.
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

    /// Stores the balloon's state in a file, for the next worker, and reads the file when there is memory.
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

    /// Stores the state of these pages, which are sorted.
    pub fn write_down(&mut self, changed: &[Range<u64>]) {
        if self.is_outdated {
            return self.write_all_down();
        }
        let Some(kept) = &self.kept else {
            return;
        };
        let write = |(number, part): (usize, Memory<'_>)| {
            let first = part.pages.start;
            let from = changed.partition_point(|pages| pages.end <= first);
            let inside = changed.get(from..).unwrap_or_default().iter();
            let inside = inside.take_while(|pages| pages.start < part.pages.end);
            let words = inside.map(|pages| {
                let end = pages.end.min(part.pages.end) - first;
                pages.start.saturating_sub(first) / WORD..end.div_ceil(WORD)
            });
            kept.update(number, words, part.held)
        };
        let result = parts(&self.regions, &self.absent)
            .enumerate()
            .try_for_each(write);
        self.check(result);
    }

    /// Stores the driver's report of its balloon.
    pub fn write_status_down(&mut self, status: Status) {
        if self.is_outdated {
            self.write_all_down();
        }
        let result = match &mut self.kept {
            Some(kept) => kept.set_status(status),
            None => Ok(()),
        };
        self.check(result);
    }

    /// The stored report.
    pub fn status(&self) -> Status {
        let kept = self.kept.as_ref().filter(|_| self.is_own);
        kept.map(Kept::status).unwrap_or_default()
    }

    /// Stores the whole state.
    fn write_all_down(&mut self) {
        let Some(kept) = &mut self.kept else {
            return;
        };
        let mut result = Ok(());
        if !self.is_own {
            self.absent.clear();
            result = kept.set_status(Status::default());
        }
        let result = result.and_then(|()| kept.replace(parts(&self.regions, &self.absent)));
        self.is_outdated = false;
        self.is_own = true;
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

    /// Adopts the memory that the front end has sent. Known regions keep their balloon, such as when a
    /// stopped VM continues. The stored report is that of the VM whose memory was stored with it.
    pub fn set_memory(&mut self, memory: &GuestMemoryMmap, granularity: Granularity) {
        let old = std::mem::take(&mut self.regions);
        // A file keeps its granule when the host's settings change. Front ends send many regions of a file one by one.
        let mut granules: BTreeMap<_, _> = old
            .iter()
            .map(|region| (region.identity, region.granules.size))
            .collect();
        for region in memory.iter() {
            let start = region.start_addr().raw_value();
            let new = region.file_offset().and_then(|file| {
                let granule = |identity| {
                    let known = granules.entry(identity);
                    *known.or_insert_with(|| granularity.of(file.file()))
                };
                Region::new(start, region.len(), file.arc(), file.start(), granule)
            });
            if new.is_some() {
                self.unbacked.remove(&start);
            } else if self.unbacked.insert(start) {
                // A guest can make its VMM send the memory again without end.
                error!(
                    "the guest's memory at {start:#x} is in no file that memory can be returned from; have \
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
        let files = self.files();
        self.is_own |= self.kept.as_ref().is_some_and(|kept| kept.has_any(&files));
        // The state of an earlier worker or of this one, perhaps in regions of other sizes.
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
        if same {
            return;
        }
        for absent in &mut self.absent {
            for region in &mut self.regions {
                region.inherit(absent);
            }
        }
        self.absent
            .retain(|absent| absent.held.iter().any(|&word| word != 0));
        self.is_outdated = true;
    }

    /// Sets the granules from the balloon, for a driver that notifies the device before it reuses a
    /// page.
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

    /// The size of the guest's memory, in bytes.
    pub fn memory(&self) -> u64 {
        let pages = self.regions.iter().map(|r| r.pages.end - r.pages.start);
        pages.sum::<u64>() * BALLOON_PAGE_SIZE
    }

    /// How much of it is in the balloon, in bytes.
    pub fn held(&self) -> u64 {
        let counts = self.regions.iter().map(|region| region.count);
        counts.sum::<u64>() * BALLOON_PAGE_SIZE
    }

    /// An empty set of its pages.
    pub fn no_pages(&self) -> PageMap {
        PageMap::new(self.regions.iter().map(|region| region.pages.clone()))
    }

    /// The largest granule in bytes.
    pub fn granule(&self) -> Option<u64> {
        self.regions.iter().map(|region| region.granules.size).max()
    }

    /// Inflates ranges of balloon pages, and adds the complete granules to `whole`.
    pub fn inflate(&mut self, ranges: &[Range<u64>], whole: &mut Pieces) -> Tally {
        self.each(ranges, |region, pages| region.inflate(pages, whole))
    }

    /// Deflates ranges of balloon pages.
    pub fn deflate(&mut self, ranges: &[Range<u64>]) -> Tally {
        for range in ranges {
            for absent in &mut self.absent {
                absent.deflate(range);
            }
        }
        self.each(ranges, Region::deflate)
    }

    /// Adds the pages of a range that are in the balloon to `held`.
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

    /// The ranges of its memory, in balloon pages.
    pub fn memory_ranges(&self) -> Vec<Range<u64>> {
        self.regions
            .iter()
            .map(|region| region.pages.clone())
            .collect()
    }

    /// The same with absent memory, whose pages can be deflated. No two ranges are adjacent.
    pub fn known_ranges(&self) -> Vec<Range<u64>> {
        let mut ranges = self.memory_ranges();
        ranges.extend(self.absent.iter().map(|absent| absent.pages.clone()));
        merge(&mut ranges);
        ranges
    }

    /// Calls `act` for the part of each range that is in a region. It returns the number of changed
    /// pages.
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
    /// many bytes of the range are in the guest's memory. The balloon does not change.
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

    /// Empties incomplete granules: the driver may use the pages that it has sent.
    pub fn settle(&mut self) {
        for region in &mut self.regions {
            region.granules.empty();
        }
    }

    /// Empties the balloon.
    pub fn empty(&mut self) {
        self.regions.iter_mut().for_each(Region::empty);
        self.absent.clear();
        self.write_all_down();
    }
}

#[cfg(test)]
mod tests;

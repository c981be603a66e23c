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
use std::os::unix::fs::MetadataExt;
use std::sync::Arc;

use balloon_wire::BALLOON_PAGE_SIZE;
use log::error;
use vm_memory::{Address, GuestMemoryBackend, GuestMemoryMmap, GuestMemoryRegion};

use crate::discard::{Granularity, Pieces};
use crate::hazard::{Hazard, Identity};
use crate::kept::Kept;
use crate::page_map::{PageMap, find};

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

/// How much of each granule of a region is in the balloon and may still be changed.
#[derive(Debug)]
struct Granules {
    /// The size of a granule in bytes.
    size: u64,
    /// Which granule of the file the region begins in.
    first: u64,
    /// So many bytes of each. Nothing where a granule is a page.
    filled: Vec<u64>,
}

impl Granules {
    /// None are filled of those that these bytes of a file are in.
    fn new(size: u64, bytes: &Range<u64>) -> Option<Self> {
        let first = bytes.start / size;
        let last = bytes.end.checked_next_multiple_of(size)? / size;
        let number = if size == BALLOON_PAGE_SIZE {
            0
        } else {
            index(last - first)
        };
        Some(Self {
            size,
            first,
            filled: vec![0; number],
        })
    }

    /// The granules that these bytes of the file are in: where each one is, how many of the bytes are in it,
    /// and how much of it is filled.
    fn of(&mut self, bytes: &Range<u64>) -> impl Iterator<Item = (Range<u64>, u64, &mut u64)> {
        let Range { start, end } = *bytes;
        let size = self.size;
        let granules = start / size..end.div_ceil(size);
        let place = index(granules.start - self.first);
        let filled = self.filled.get_mut(place..).unwrap_or_default();
        granules.zip(filled).map(move |(granule, filled)| {
            let granule = granule * size..(granule + 1) * size;
            let part = end.min(granule.end) - start.max(granule.start);
            (granule, part, filled)
        })
    }

    /// Fills them with these bytes of the file, which are not in them yet, and calls `whole` for what is whole
    /// now.
    fn fill(&mut self, bytes: Range<u64>, mut whole: impl FnMut(Range<u64>)) {
        if self.filled.is_empty() {
            whole(bytes);
            return;
        }
        let size = self.size;
        for (granule, part, filled) in self.of(&bytes) {
            *filled += part;
            if *filled == size {
                whole(granule);
            }
        }
    }

    /// Takes these bytes of the file out again.
    fn drain(&mut self, bytes: &Range<u64>) {
        if self.filled.is_empty() {
            return;
        }
        for (_, part, filled) in self.of(bytes) {
            *filled = filled.saturating_sub(part);
        }
    }

    /// Forgets what they are filled with.
    fn empty(&mut self) {
        self.filled.fill(0);
    }
}

/// A region of the guest's memory.
#[derive(Debug)]
struct Region {
    /// Its balloon pages.
    pages: Range<u64>,
    file: Arc<File>,
    /// What tells the file from others.
    identity: Identity,
    /// Where the region begins in the file, in bytes.
    offset: u64,
    /// A bit for each page.
    held: Vec<u64>,
    granules: Granules,
    /// Why it must not be discarded.
    hazard: Option<Hazard>,
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
        let aligned = [start, bytes, offset]
            .iter()
            .all(|value| value % BALLOON_PAGE_SIZE == 0);
        if !aligned {
            return None;
        }
        let place = offset..offset.checked_add(bytes)?;
        Some(Self {
            pages: start / BALLOON_PAGE_SIZE..end / BALLOON_PAGE_SIZE,
            file: Arc::clone(file),
            identity: (metadata.dev(), metadata.ino()),
            offset,
            held: vec![0; index((bytes / BALLOON_PAGE_SIZE).div_ceil(WORD))],
            granules: Granules::new(granularity.of(file), &place)?,
            hazard: Hazard::of_file(file),
        })
    }

    /// Takes over what is in the balloon of absent memory that is in the same place of the guest and of the file.
    fn inherit(&mut self, absent: &mut Absent) {
        let Absent {
            pages,
            identity,
            offset,
            held,
        } = absent;
        let (start, end) = (
            self.pages.start.max(pages.start),
            self.pages.end.min(pages.end),
        );
        let place = |first: u64, offset: u64| {
            let bytes = (start - first).checked_mul(BALLOON_PAGE_SIZE)?;
            offset.checked_add(bytes)
        };
        let same = start < end
            && self.identity == *identity
            && place(self.pages.start, self.offset) == place(pages.start, *offset);
        if !same {
            return;
        }
        let mut bit = start - pages.start;
        let end = end - pages.start;
        while let Some(first) = find(held, bit, true).filter(|&first| first < end) {
            bit = find(held, first, false).map_or(end, |bit| bit.min(end));
            let shift = |bit: u64| bit + pages.start - self.pages.start;
            set(&mut self.held, shift(first)..shift(bit), true, |_| {});
            set(held, first..bit, false, |_| {});
        }
    }

    /// Fills granules with what is in the balloon.
    fn refill(&mut self) {
        self.granules.empty();
        let offset = self.offset;
        let mut bit = 0;
        while let Some(first) = find(&self.held, bit, true) {
            bit = find(&self.held, first, false).unwrap_or(self.pages.end - self.pages.start);
            self.granules.fill(in_file(&(first..bit), offset), |_| {});
        }
    }

    /// Whether the other one is the same memory at the same place.
    fn is(&self, other: &Self) -> bool {
        (&self.pages, self.identity, self.offset, self.granules.size)
            == (
                &other.pages,
                other.identity,
                other.offset,
                other.granules.size,
            )
    }

    /// Puts pages of the region into the balloon, and adds what is whole now to `whole`. Returns how many were
    /// not there.
    fn inflate(&mut self, pages: &Range<u64>, whole: &mut Pieces) -> u64 {
        let (first, offset) = (self.pages.start, self.offset);
        let granule = self.granules.size;
        let bits = pages.start - first..pages.end - first;
        set(&mut self.held, bits, true, |run| {
            self.granules
                .fill(in_file(&run, offset), |bytes| match self.hazard {
                    None => whole.push(&self.file, bytes, granule),
                    Some(_) => whole.withhold(bytes.end - bytes.start),
                });
        })
    }

    /// Takes pages of the region out of the balloon. Returns how many were there.
    fn deflate(&mut self, pages: &Range<u64>) -> u64 {
        let (first, offset) = (self.pages.start, self.offset);
        let bits = pages.start - first..pages.end - first;
        set(&mut self.held, bits, false, |run| {
            self.granules.drain(&in_file(&run, offset));
        })
    }

    /// Adds those of these pages of the region to `held` that are in the balloon.
    fn find(&self, pages: &Range<u64>, held: &mut Pieces) {
        let (first, offset) = (self.pages.start, self.offset);
        let end = pages.end - first;
        let mut bit = pages.start - first;
        while let Some(start) = find(&self.held, bit, true).filter(|&start| start < end) {
            bit = find(&self.held, start, false).map_or(end, |bit| bit.min(end));
            held.push(
                &self.file,
                in_file(&(start..bit), offset),
                self.granules.size,
            );
        }
    }

    fn empty(&mut self) {
        self.held.fill(0);
        self.granules.empty();
    }
}

/// Memory that the front end has not sent, or has taken back, and of which there is some in the balloon.
#[derive(Debug)]
struct Absent {
    /// Its balloon pages.
    pages: Range<u64>,
    /// What tells its file from others.
    identity: Identity,
    /// Where it begins in the file, in bytes.
    offset: u64,
    /// A bit for each page.
    held: Vec<u64>,
}

impl Absent {
    /// Takes pages out of the balloon.
    fn deflate(&mut self, pages: &Range<u64>) {
        let first = self.pages.start;
        let (start, end) = (pages.start.max(first), pages.end.min(self.pages.end));
        if start < end {
            set(&mut self.held, start - first..end - first, false, |_| {});
        }
    }
}

impl From<Region> for Absent {
    fn from(region: Region) -> Self {
        let Region {
            pages,
            identity,
            offset,
            held,
            ..
        } = region;
        Self {
            pages,
            identity,
            offset,
            held,
        }
    }
}

/// Where the pages of a region are in its file, in bytes.
fn in_file(pages: &Range<u64>, offset: u64) -> Range<u64> {
    offset + pages.start * BALLOON_PAGE_SIZE..offset + pages.end * BALLOON_PAGE_SIZE
}

/// How many bits a word of a bitmap has.
pub(crate) const WORD: u64 = u64::BITS as u64;

/// Makes bits of a bitmap ones or zeroes, a word at a time, and calls `each` for the runs of those that were
/// not so; a run ends with its word. Returns how many bits that are.
pub(crate) fn set(
    words: &mut [u64],
    bits: Range<u64>,
    ones: bool,
    mut each: impl FnMut(Range<u64>),
) -> u64 {
    let mut changed = 0;
    let mut start = bits.start;
    while start < bits.end {
        let base = start / WORD * WORD;
        let end = bits.end.min(base + WORD);
        let Some(word) = words.get_mut(index(base / WORD)) else {
            break;
        };
        let mask = (u64::MAX << (start - base)) & (u64::MAX >> (base + WORD - end));
        let mut change = mask & if ones { !*word } else { *word };
        *word ^= change;
        changed += u64::from(change.count_ones());
        while change != 0 {
            let first = change.trailing_zeros();
            let last = first + (change >> first).trailing_ones();
            each(base + u64::from(first)..base + u64::from(last));
            change &= u64::MAX.checked_shl(last).unwrap_or(0);
        }
        start = end;
    }
    changed
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

/// Memory of which there is more than fits into a `usize` cannot have been mapped.
pub(crate) fn index(number: u64) -> usize {
    usize::try_from(number).unwrap_or(usize::MAX)
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
mod tests {
    use super::*;
    use crate::counters::Counters;
    use crate::discard::Discarder;
    use crate::queue::Budget;
    use crate::testing::{HOLE, MemoryFiles, PAGE, memory_file};
    use nix::fcntl::{FcntlArg, SealFlag, fcntl};
    use proptest::prelude::*;

    /// Two regions of a file with a hole between them in the guest's address space.
    fn balloon(files: &MemoryFiles, granule: u64) -> Balloon {
        let mut balloon = Balloon::default();
        balloon.set_memory(&files.memory(), Granularity::Bytes(granule));
        balloon
    }

    fn discard(pieces: &mut Pieces) {
        let counters = Counters::default();
        assert!(Discarder::default().discard(pieces, &counters, &mut 0, Budget::UNLIMITED));
        assert_eq!(counters.discard_failures.get(), 0);
    }

    /// A range for each page.
    fn pages(pages: &[u64]) -> Vec<Range<u64>> {
        pages.iter().map(|&page| page..page + 1).collect()
    }

    #[test]
    fn only_new_pages_are_punched() {
        let files = MemoryFiles::new(1 << 20, 1 << 20);
        let mut balloon = balloon(&files, PAGE);
        let mut pieces = Pieces::default();
        let tally = balloon.inflate(&pages(&[3, 4, 4, 255, HOLE / PAGE - 1]), &mut pieces);
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
        let tally = balloon.inflate(&pages(&[3, 4]), &mut pieces);
        assert_eq!(
            tally,
            Tally {
                repeated: 2,
                ..Tally::default()
            }
        );
        discard(&mut pieces);
        assert_eq!(files.holes(), BTreeSet::new());

        let mut held = Pieces::default();
        balloon.find(&(0..HOLE), &mut held);
        discard(&mut held);
        assert_eq!(files.holes(), BTreeSet::from([3, 4, 255]));
        files.fill();
        let tally = balloon.deflate(&pages(&[4, 5]));
        assert_eq!(
            tally,
            Tally {
                moved: 1,
                repeated: 1,
                outside: 0
            }
        );
        balloon.inflate(&pages(&[4]), &mut pieces);
        discard(&mut pieces);
        assert_eq!(files.holes(), BTreeSet::from([4]));
    }

    #[test]
    fn a_granule_waits_for_its_last_page() {
        let files = MemoryFiles::new(1 << 20, 1 << 20);
        let mut balloon = balloon(&files, 8 * PAGE);
        let mut pieces = Pieces::default();
        balloon.inflate(&pages(&[8, 9, 10, 11, 12, 13, 14]), &mut pieces);
        balloon.deflate(&pages(&[8]));
        balloon.inflate(&pages(&[15]), &mut pieces);
        discard(&mut pieces);
        assert_eq!(files.holes(), BTreeSet::new());
        balloon.inflate(&pages(&[8]), &mut pieces);
        discard(&mut pieces);
        assert_eq!(files.holes(), (8..16).collect());
    }

    #[test]
    fn pages_that_may_be_in_use_complete_no_granule() {
        let files = MemoryFiles::new(1 << 20, 1 << 20);
        let mut balloon = balloon(&files, 4 * PAGE);
        let mut pieces = Pieces::default();
        balloon.inflate(&pages(&[8, 9, 10]), &mut pieces);
        balloon.settle();
        balloon.inflate(&pages(&[11, 12, 13, 14, 15]), &mut pieces);
        balloon.settle();
        balloon.deflate(&pages(&[8]));
        discard(&mut pieces);
        assert_eq!(files.holes(), (12..16).collect());
    }

    #[test]
    fn an_emptied_balloon_forgets_half_a_granule() {
        let files = MemoryFiles::new(1 << 20, 1 << 20);
        let mut balloon = balloon(&files, 2 * PAGE);
        let mut pieces = Pieces::default();
        balloon.inflate(&pages(&[8]), &mut pieces);
        balloon.empty();
        balloon.inflate(&pages(&[9]), &mut pieces);
        discard(&mut pieces);
        assert_eq!(files.holes(), BTreeSet::new());
    }

    #[test]
    fn memory_that_is_sent_again_keeps_its_balloon() {
        let files = MemoryFiles::new(1 << 20, 1 << 20);
        let mut balloon = balloon(&files, 2 * PAGE);
        balloon.inflate(&pages(&[8]), &mut Pieces::default());
        balloon.set_memory(&files.memory(), Granularity::Bytes(2 * PAGE));
        let mut pieces = Pieces::default();
        balloon.inflate(&pages(&[9]), &mut pieces);
        discard(&mut pieces);
        assert_eq!(files.holes(), BTreeSet::from([8, 9]));

        // So does memory that is cut otherwise.
        balloon.set_memory(
            &files.part(4 * PAGE, 16 * PAGE),
            Granularity::Bytes(2 * PAGE),
        );
        let tally = balloon.inflate(&pages(&[8, 9, 10]), &mut pieces);
        assert_eq!((tally.moved, tally.repeated), (1, 2));
        balloon.set_memory(&files.memory(), Granularity::Bytes(2 * PAGE));
        let tally = balloon.inflate(&pages(&[8, 9, 10]), &mut pieces);
        assert_eq!((tally.moved, tally.repeated), (0, 3));

        let others = MemoryFiles::new(1 << 20, 1 << 20);
        balloon.set_memory(&others.memory(), Granularity::Bytes(2 * PAGE));
        assert_eq!(balloon.inflate(&pages(&[8]), &mut pieces).moved, 1);
    }

    /// A front end takes memory back and adds it again to change its bounds, which takes two messages.
    #[test]
    fn memory_that_comes_back_keeps_its_balloon() {
        let files = MemoryFiles::new(1 << 20, 1 << 20);
        let mut balloon = balloon(&files, PAGE);
        let mut pieces = Pieces::default();
        balloon.inflate(&pages(&[8, 9]), &mut pieces);
        balloon.set_memory(&files.part(16 * PAGE, 32 * PAGE), Granularity::Bytes(PAGE));
        assert_eq!(balloon.known_ranges().first(), Some(&(0..256)));
        // The guest takes a page back meanwhile.
        let tally = balloon.deflate(&pages(&[9]));
        assert_eq!((tally.moved, tally.outside), (0, 1));
        balloon.set_memory(&files.memory(), Granularity::Bytes(PAGE));
        let tally = balloon.inflate(&pages(&[8, 9]), &mut pieces);
        assert_eq!((tally.moved, tally.repeated), (1, 1));
        assert_eq!(balloon.known_ranges(), balloon.memory_ranges());
        // Another driver knows nothing of it.
        balloon.set_memory(&files.part(16 * PAGE, 32 * PAGE), Granularity::Bytes(PAGE));
        balloon.empty();
        balloon.set_memory(&files.memory(), Granularity::Bytes(PAGE));
        assert_eq!(balloon.inflate(&pages(&[8]), &mut pieces).moved, 1);
    }

    #[test]
    fn another_process_knows_what_is_in_the_balloon() {
        let files = MemoryFiles::new(1 << 20, 1 << 20);
        let kept = memory_file(0);
        let process = || {
            let mut balloon = Balloon::default();
            balloon.keep(kept.try_clone().unwrap());
            balloon.set_memory(&files.memory(), Granularity::Bytes(2 * PAGE));
            balloon
        };
        let mut first = process();
        let high = HOLE / PAGE;
        let ranges = [3..5, 100..101, high + 1..high + 2];
        first.inflate(&ranges, &mut Pieces::default());
        first.write_down(&ranges);
        first.deflate(&pages(&[4]));
        first.write_down(&pages(&[4]));
        // What was not written down was not used, and is done again.
        first.inflate(&pages(&[50]), &mut Pieces::default());

        let mut second = process();
        second.refill();
        let mut pieces = Pieces::default();
        assert_eq!(
            second
                .inflate(&pages(&[3, 100, high + 1]), &mut pieces)
                .repeated,
            3
        );
        assert_eq!(second.inflate(&pages(&[2, 4, 50]), &mut pieces).moved, 3);
        discard(&mut pieces);
        assert_eq!(
            files.holes(),
            BTreeSet::from([2, 3]),
            "it was half a granule"
        );

        second.empty();
        let blocks = kept.metadata().unwrap().blocks();
        assert_eq!(blocks, 8, "only the table of regions takes memory");
        assert_eq!(process().deflate(&pages(&[3, 100, high + 1])).moved, 0);
    }

    /// The next process must not count a page as in the balloon whose deflation was not written down.
    #[test]
    fn a_file_that_cannot_be_written_is_given_up() {
        let files = MemoryFiles::new(1 << 20, 1 << 20);
        let kept = memory_file(0);
        let process = || {
            let mut balloon = Balloon::default();
            balloon.keep(kept.try_clone().unwrap());
            balloon.set_memory(&files.memory(), Granularity::Bytes(2 * PAGE));
            balloon
        };
        let mut first = process();
        first.inflate(&pages(&[8]), &mut Pieces::default());
        first.write_down(&pages(&[8]));
        fcntl(&*kept, FcntlArg::F_ADD_SEALS(SealFlag::F_SEAL_WRITE)).unwrap();
        first.deflate(&pages(&[8]));
        first.write_down(&pages(&[8]));

        let mut second = process();
        second.refill();
        let mut pieces = Pieces::default();
        second.inflate(&pages(&[9]), &mut pieces);
        discard(&mut pieces);
        assert_eq!(files.holes(), BTreeSet::new());
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
                (any::<bool>(), prop::collection::vec(0_u64..700, 0..200), 0_u64..600, 0_u64..200), 0..8),
            shift in 0_u32..4,
        ) {
            let granule_pages = 1_u64 << shift;
            // The second region begins and ends in the middle of a granule of the file.
            let files = MemoryFiles::new(129 * PAGE, 130 * PAGE);
            let mut balloon = balloon(&files, granule_pages * PAGE);
            let mut held = BTreeSet::new();
            let mut holes = BTreeSet::new();
            for (inflate, named, first, length) in batches {
                let mut ranges = pages(&named);
                ranges.push(first..first + length);
                ranges.sort_unstable_by_key(|range| range.start);
                let mut pieces = Pieces::default();
                if inflate {
                    balloon.inflate(&ranges, &mut pieces);
                    discard(&mut pieces);
                } else {
                    balloon.deflate(&ranges);
                }
                for page in ranges.into_iter().flatten().filter_map(|page| files.file_page(page)) {
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

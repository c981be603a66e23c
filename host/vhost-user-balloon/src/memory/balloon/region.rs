// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! A region of the guest's memory, and its part of the balloon.

use std::fs::File;
use std::ops::Range;
use std::os::unix::fs::MetadataExt;
use std::sync::Arc;

use balloon_wire::BALLOON_PAGE_SIZE;

use super::granules::Granules;
use crate::memory::bitmap::{WORD, find, index, set};
use crate::memory::discard::{Piece, Pieces};
use crate::memory::hazard::{Hazard, Identity};
use crate::memory::kept::Memory;

/// The largest piece of the balloon that is searched in one step, in bytes.
const STEP: u64 = 4 << 20;

/// A region of the guest's memory.
#[derive(Debug)]
pub(crate) struct Region {
    /// Its balloon pages.
    pub(crate) pages: Range<u64>,
    pub(crate) file: Arc<File>,
    /// The identity of the file.
    pub(crate) identity: Identity,
    /// The offset of the region in the file, in bytes.
    pub(crate) offset: u64,
    /// A bit for each page.
    pub(crate) held: Vec<u64>,
    /// How many of them are set.
    pub(crate) count: u64,
    pub(crate) granules: Granules,
    /// Why it must not be discarded.
    pub(crate) hazard: Option<Hazard>,
}

impl Region {
    /// The region whose first byte is at the guest's physical address `start`. `granule` returns the granule of the file.
    pub(crate) fn new(
        start: u64,
        bytes: u64,
        file: &Arc<File>,
        offset: u64,
        granule: impl FnOnce(Identity) -> u64,
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
        let identity = (metadata.dev(), metadata.ino());
        Some(Self {
            pages: start / BALLOON_PAGE_SIZE..end / BALLOON_PAGE_SIZE,
            file: Arc::clone(file),
            identity,
            offset,
            held: vec![0; index((bytes / BALLOON_PAGE_SIZE).div_ceil(WORD))],
            count: 0,
            granules: Granules::new(granule(identity), &place)?,
            hazard: Hazard::of_file(file),
        })
    }

    /// Adopts the balloon of absent memory with the same addresses in the guest and in the file.
    pub(crate) fn inherit(&mut self, absent: &mut Absent) {
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
            self.count += set(&mut self.held, shift(first)..shift(bit), true, |_| {});
            set(held, first..bit, false, |_| {});
        }
    }

    /// Fills granules from the balloon.
    pub(crate) fn refill(&mut self) {
        self.granules.empty();
        let offset = self.offset;
        let mut bit = 0;
        while let Some(first) = find(&self.held, bit, true) {
            bit = find(&self.held, first, false).unwrap_or(self.pages.end - self.pages.start);
            self.granules.fill(in_file(&(first..bit), offset), |_| {});
        }
    }

    /// Whether the other one is the same memory at the same place.
    pub(crate) fn is(&self, other: &Self) -> bool {
        (&self.pages, self.identity, self.offset, self.granules.size)
            == (
                &other.pages,
                other.identity,
                other.offset,
                other.granules.size,
            )
    }

    /// Inflates pages of the region, and adds complete granules to `whole`. Returns how many were not in the
    /// balloon.
    pub(crate) fn inflate(&mut self, pages: &Range<u64>, whole: &mut Pieces) -> u64 {
        let (first, offset) = (self.pages.start, self.offset);
        let granule = self.granules.size;
        let bits = pages.start - first..pages.end - first;
        let moved = set(&mut self.held, bits, true, |run| {
            self.granules
                .fill(in_file(&run, offset), |bytes| match self.hazard {
                    None => whole.push(&self.file, bytes, granule),
                    Some(_) => whole.withhold(bytes.end - bytes.start),
                });
        });
        self.count += moved;
        moved
    }

    /// Deflates pages of the region. Returns how many were in the balloon.
    pub(crate) fn deflate(&mut self, pages: &Range<u64>) -> u64 {
        let (first, offset) = (self.pages.start, self.offset);
        let bits = pages.start - first..pages.end - first;
        let moved = set(&mut self.held, bits, false, |run| {
            self.granules.drain(&in_file(&run, offset));
        });
        self.count -= moved;
        moved
    }

    /// Adds those of these pages of the region to `held` that are in the balloon.
    pub(crate) fn find(&self, pages: &Range<u64>, held: &mut Pieces) {
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

    /// The first piece of the region in the balloon from balloon page `from` on, without parts of granules, and the
    /// page where the next search starts. The length of a piece is limited, so that it takes a small part of a turn.
    pub(crate) fn next_held(&self, from: u64) -> Option<(Piece, u64)> {
        let (first, granule) = (self.pages.start, self.granules.size);
        let start = find(&self.held, from.saturating_sub(first), true)?;
        let end = find(&self.held, start, false).unwrap_or(self.pages.end - first);
        let bytes = in_file(&(start..end), self.offset);
        let step = STEP.max(granule);
        let stop = bytes.end.min((bytes.start / step + 1) * step);
        let next = first + start + (stop - bytes.start) / BALLOON_PAGE_SIZE;
        let piece = Piece {
            file: Arc::clone(&self.file),
            range: bytes.start.next_multiple_of(granule)..stop / granule * granule,
            granule,
        };
        Some((piece, next))
    }

    pub(crate) fn empty(&mut self) {
        self.held.fill(0);
        self.count = 0;
        self.granules.empty();
    }

    /// Its part of the balloon, as a file stores it.
    pub(crate) fn part(&self) -> Memory<'_> {
        Memory {
            pages: &self.pages,
            identity: self.identity,
            offset: self.offset,
            held: &self.held,
        }
    }
}

/// Memory that the front end has not sent, or has removed, with pages in the balloon.
#[derive(Debug)]
pub(crate) struct Absent {
    /// Its balloon pages.
    pub(crate) pages: Range<u64>,
    /// The identity of its file.
    pub(crate) identity: Identity,
    /// Its offset in the file, in bytes.
    pub(crate) offset: u64,
    /// A bit for each page.
    pub(crate) held: Vec<u64>,
}

impl Absent {
    /// Takes pages out of the balloon.
    pub(crate) fn deflate(&mut self, pages: &Range<u64>) {
        let first = self.pages.start;
        let (start, end) = (pages.start.max(first), pages.end.min(self.pages.end));
        if start < end {
            set(&mut self.held, start - first..end - first, false, |_| {});
        }
    }

    /// Its part of the balloon, as a file stores it.
    pub(crate) fn part(&self) -> Memory<'_> {
        Memory {
            pages: &self.pages,
            identity: self.identity,
            offset: self.offset,
            held: &self.held,
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

/// The offsets of a region's pages in its file, in bytes.
fn in_file(pages: &Range<u64>, offset: u64) -> Range<u64> {
    offset + pages.start * BALLOON_PAGE_SIZE..offset + pages.end * BALLOON_PAGE_SIZE
}

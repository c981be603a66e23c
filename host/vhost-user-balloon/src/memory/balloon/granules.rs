// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! The amount of each granule that is in the balloon.

use std::ops::Range;

use balloon_wire::BALLOON_PAGE_SIZE;

use crate::memory::bitmap::index;

/// The amount of each granule of a region that is in the balloon and that the device may still
/// change.
#[derive(Debug)]
pub(crate) struct Granules {
    /// The size of a granule in bytes.
    pub(crate) size: u64,
    /// The granule of the file that contains the start of the region.
    first: u64,
    /// The bytes of each granule. Empty if a granule is a page.
    filled: Vec<u64>,
}

impl Granules {
    /// Empty granules for these bytes of a file.
    pub(crate) fn new(size: u64, bytes: &Range<u64>) -> Option<Self> {
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

    /// The granules of these bytes of the file: the range of each one, how many of the bytes are in it, and
    /// how much of it is filled.
    pub(crate) fn of(
        &mut self,
        bytes: &Range<u64>,
    ) -> impl Iterator<Item = (Range<u64>, u64, &mut u64)> {
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

    /// Fills them with these bytes of the file, which were not in them, and calls `whole` for complete
    /// granules.
    pub(crate) fn fill(&mut self, bytes: Range<u64>, mut whole: impl FnMut(Range<u64>)) {
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

    /// Removes these bytes of the file.
    pub(crate) fn drain(&mut self, bytes: &Range<u64>) {
        if self.filled.is_empty() {
            return;
        }
        for (_, part, filled) in self.of(bytes) {
            *filled = filled.saturating_sub(part);
        }
    }

    /// Empties all of them.
    pub(crate) fn empty(&mut self) {
        self.filled.fill(0);
    }
}

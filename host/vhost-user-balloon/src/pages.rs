// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! Messages that name pages by their page frame numbers: little-endian numbers of 32 bits, in units of
//! balloon pages (specification, clause 5.5.6).

use std::ops::Range;

use balloon_wire::BALLOON_PAGE_SIZE;
use vm_memory::GuestMemoryMmap;

use crate::balloon::Tally;
use crate::counters::{Counter, Counters, Refusal};
use crate::queue::{Chain, read};

/// How many pages a message may name by their numbers.
const MAX_PFNS: usize = 64 << 10;

/// How many ranges may be named before the device acts on them.
const MAX_RANGES: usize = 64 << 10;

/// The size of a page frame number in bytes.
const PFN: usize = size_of::<u32>();

/// The pages that a batch of messages names. The space stays from one batch to the next.
#[derive(Debug, Default)]
pub struct Pages {
    /// In balloon pages. None is empty; those of several messages may overlap.
    ranges: Vec<Range<u64>>,
    bytes: Vec<u8>,
}

impl Pages {
    /// Adds those of a message, and says whether there is room for another one.
    pub fn read(
        &mut self,
        memory: &GuestMemoryMmap,
        chain: Chain<'_>,
        counters: &Counters,
    ) -> bool {
        self.bytes.clear();
        let message = read(memory, chain, MAX_PFNS * PFN, &mut self.bytes);
        if let Err(reason) = message.and_then(|()| self.pfns()) {
            counters.refuse(reason);
        }
        self.ranges.len() < MAX_RANGES
    }

    /// Adds the pages of an array of page frame numbers.
    fn pfns(&mut self) -> Result<(), Refusal> {
        let pfns = self.bytes.chunks_exact(PFN);
        if self.bytes.is_empty() || !pfns.remainder().is_empty() {
            return Err(Refusal::Truncated);
        }
        for pfn in pfns.filter_map(<[u8]>::first_chunk) {
            let page = u64::from(u32::from_le_bytes(*pfn));
            // Drivers name neighbours one after the other, upwards or downwards.
            match self.ranges.last_mut() {
                Some(last) if last.end == page => last.end = page + 1,
                Some(last) if last.start == page + 1 => last.start = page,
                _ => self.ranges.push(page..page + 1),
            }
        }
        Ok(())
    }

    /// All of them in order, as ranges of balloon pages.
    pub fn sorted(&mut self) -> &[Range<u64>] {
        self.ranges.sort_unstable_by_key(|range| range.start);
        &self.ranges
    }

    /// Removes all.
    pub fn clear(&mut self) {
        self.ranges.clear();
    }
}

impl Tally {
    /// Counts the bytes that were moved, and a refusal if some pages were where they should be, or are not
    /// in the guest's memory.
    pub fn count(self, moved: &Counter, repeated: Refusal, counters: &Counters) {
        moved.add(self.moved * BALLOON_PAGE_SIZE);
        if self.repeated > 0 {
            counters.refuse(repeated);
        }
        if self.outside > 0 {
            counters.refuse(Refusal::OutsideMemory);
        }
    }
}

// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! Messages that name pages by their page frame numbers: little-endian numbers of 32 bits, in units of
//! balloon pages (specification, clause 5.5.6).

use vm_memory::GuestMemoryMmap;

use crate::balloon::Tally;
use crate::counters::{Counter, Counters, Refusal};
use crate::queue::{Chain, read};

/// How many pages a message may name, and how many may be named before the device acts on them.
const MAX_PFNS: usize = 64 << 10;

/// The size of a page frame number in bytes.
const PFN: usize = size_of::<u32>();

/// The page frame numbers of a batch of messages. The space stays from one batch to the next.
#[derive(Debug, Default)]
pub struct Pfns {
    pfns: Vec<u32>,
    bytes: Vec<u8>,
}

impl Pfns {
    /// Adds those of a message, and says whether there is room for another one.
    pub fn read(
        &mut self,
        memory: &GuestMemoryMmap,
        chain: Chain<'_>,
        counters: &Counters,
    ) -> bool {
        self.bytes.clear();
        match read(memory, chain, MAX_PFNS * PFN, &mut self.bytes) {
            Ok(()) if self.bytes.is_empty() || self.bytes.len() % PFN != 0 => {
                counters.refuse(Refusal::Truncated);
            }
            Ok(()) => {
                let numbers = self.bytes.chunks_exact(PFN);
                self.pfns
                    .extend(numbers.filter_map(|pfn| pfn.try_into().ok().map(u32::from_le_bytes)));
            }
            Err(reason) => counters.refuse(reason),
        }
        self.pfns.len() < MAX_PFNS
    }

    /// All of them in order.
    pub fn sorted(&mut self) -> &[u32] {
        self.pfns.sort_unstable();
        &self.pfns
    }

    /// Removes all.
    pub fn clear(&mut self) {
        self.pfns.clear();
    }
}

impl Tally {
    /// Counts the bytes that were moved, and a refusal if some pages were where they should be, or are not
    /// in the guest's memory.
    pub fn count(self, moved: &Counter, repeated: Refusal, counters: &Counters) {
        moved.add(self.moved * balloon_wire::BALLOON_PAGE_SIZE);
        if self.repeated > 0 {
            counters.refuse(repeated);
        }
        if self.outside > 0 {
            counters.refuse(Refusal::OutsideMemory);
        }
    }
}

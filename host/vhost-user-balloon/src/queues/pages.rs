// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! Messages that list pages, in either of two formats. All later code uses ranges of pages.

use std::ops::Range;

use balloon_wire::page_set::{self, Command, Encoding, PageSet};
use balloon_wire::status::Status;
use balloon_wire::{BALLOON_PAGE_SIZE, VIRTIO_BALLOON_PFN_SHIFT};
use log::debug;
use vm_memory::GuestMemoryMmap;

use super::virtqueue::{Chain, read};
use crate::counters::{Counter, Counters, Refusal};
use crate::memory::balloon::{Tally, merge};
use crate::virtio::features::Feature;
use crate::virtio::kind::Kind;

/// The maximum number of page frame numbers in a message.
const MAX_PFNS: usize = 64 << 10;

/// The number of ranges after which the device acts on them. One message can have many more.
const MAX_RANGES: usize = 8 << 10;

/// The number of bytes of messages after which the device acts on them. Each turn reads them again.
const MAX_READ: usize = 1 << 20;

/// The number of balloon pages in one step, which takes a small part of a queue's time. Ranges are cut at
/// multiples of it.
const CHUNK: u64 = 8 << 10;

/// The size of a page frame number in bytes.
const PFN: usize = size_of::<u32>();

/// The format of the messages of the inflate and the deflate queue.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Format {
    /// Arrays of page frame numbers: little-endian numbers of 32 bits, in units of balloon pages
    /// (specification, clause 5.5.6).
    Pfns,
    /// Page sets (docs/protocol.md, section 4).
    PageSets {
        /// Whether the inflate queue also has the balloon's status.
        has_status: bool,
    },
}

impl Format {
    /// The format of a driver with these features.
    pub fn of(features: u64) -> Self {
        if Feature::PageSets.is_in(features) {
            Self::PageSets {
                has_status: Feature::Status.is_in(features),
            }
        } else {
            Self::Pfns
        }
    }

    /// How long a message may be, in bytes.
    const fn limit(self) -> usize {
        match self {
            Self::Pfns => MAX_PFNS * PFN,
            Self::PageSets { .. } => page_set::MAX_SIZE,
        }
    }
}

/// What a message is.
enum Content {
    /// An array of page frame numbers.
    Pfns,
    /// A page set.
    PageSet(Encoding),
    /// The balloon's status.
    Status,
}

/// The pages of a batch of messages. Batches reuse the space.
#[derive(Debug, Default)]
pub struct Pages {
    /// In balloon pages. None is empty; those of several messages may overlap.
    ranges: Vec<Range<u64>>,
    /// Space for the parts of them that are in memory.
    parts: Vec<Range<u64>>,
    bytes: Vec<u8>,
    /// How many bytes were read for this batch.
    read: usize,
    /// The last status in this batch.
    status: Option<Status>,
}

impl Pages {
    /// Adds the pages of a message of a queue, and returns whether there is room for another message.
    /// Nothing is added from an invalid message.
    pub fn read(
        &mut self,
        format: Format,
        queue: Kind,
        memory: &GuestMemoryMmap,
        chain: Chain<'_>,
        counters: &Counters,
        again: bool,
    ) -> bool {
        self.bytes.clear();
        let read = read(memory, chain, format.limit(), &mut self.bytes);
        let content = read.and_then(|()| match format {
            Format::Pfns => self.add_pfns(),
            Format::PageSets { has_status: true }
                if queue == Kind::Inflate && Status::is_in(&self.bytes) =>
            {
                self.add_status()
            }
            Format::PageSets { .. } => self.add_page_set(queue),
        });
        if !again {
            if let Some(received) = counters.received.get(queue as usize) {
                received.add(self.bytes.len() as u64);
            }
            match content {
                Ok(Content::Pfns) => counters.pfns.add(1),
                Ok(Content::PageSet(encoding)) => counters.page_set(encoding),
                Ok(Content::Status) => {}
                Err(reason) => counters.refuse(reason),
            }
        }
        self.read = self.read.saturating_add(self.bytes.len());
        self.ranges.len() < MAX_RANGES && self.read < MAX_READ
    }

    /// Adds the pages of an array of page frame numbers.
    fn add_pfns(&mut self) -> Result<Content, Refusal> {
        let pfns = self.bytes.chunks_exact(PFN);
        if self.bytes.is_empty() || !pfns.remainder().is_empty() {
            return Err(Refusal::Truncated);
        }
        for pfn in pfns.filter_map(<[u8]>::first_chunk) {
            let page = u64::from(u32::from_le_bytes(*pfn));
            // Drivers list adjacent pages one after the other, upwards or downwards.
            match self.ranges.last_mut() {
                Some(last) if last.end == page => last.end = page + 1,
                Some(last) if last.start == page + 1 => last.start = page,
                _ => self.ranges.push(page..page + 1),
            }
        }
        Ok(Content::Pfns)
    }

    fn add_status(&mut self) -> Result<Content, Refusal> {
        let status = Status::parse(&self.bytes).map_err(|error| {
            debug!("a status is malformed: {error}");
            Refusal::Malformed
        })?;
        self.status = Some(status);
        Ok(Content::Status)
    }

    /// Adds the pages of a page set.
    fn add_page_set(&mut self, queue: Kind) -> Result<Content, Refusal> {
        let set = PageSet::parse(&self.bytes).map_err(|error| {
            debug!("a page set is malformed: {error}");
            Refusal::Malformed
        })?;
        match (queue, set.command) {
            (Kind::Inflate, Command::Inflate) | (Kind::Deflate, Command::Deflate) => {}
            _ => return Err(Refusal::Malformed),
        }
        let encoding = set.encoding;
        // No page is smaller than a balloon page, and none ends beyond 2^64 bytes: no bit is shifted out.
        let shift = u32::from(set.page_shift).saturating_sub(VIRTIO_BALLOON_PFN_SHIFT);
        let ranges = set.ranges();
        self.ranges
            .extend(ranges.map(|range| range.start << shift..range.end << shift));
        Ok(Content::PageSet(encoding))
    }

    /// Sorts them, merges adjacent ones, and removes pages outside of these sorted ranges of memory. Returns
    /// how many pages were listed more than once, or are outside of memory.
    pub fn sort(&mut self, memory: &[Range<u64>]) -> Tally {
        let repeated = merge(&mut self.ranges);
        let mut outside = 0_u64;
        self.parts.clear();
        for range in &self.ranges {
            let mut rest = range.end.saturating_sub(range.start);
            let first = memory.partition_point(|region| region.end <= range.start);
            for region in memory.get(first..).unwrap_or_default() {
                let part = range.start.max(region.start)..range.end.min(region.end);
                if part.is_empty() {
                    break;
                }
                rest -= part.end - part.start;
                self.parts.push(part);
            }
            outside = outside.saturating_add(rest);
        }
        std::mem::swap(&mut self.ranges, &mut self.parts);
        Tally {
            moved: 0,
            repeated,
            outside,
        }
    }

    /// All of them. They are sorted.
    pub fn ranges(&self) -> &[Range<u64>] {
        &self.ranges
    }

    /// All of them from the page `done` on, in pieces of a bounded size. They are sorted.
    pub fn chunks(&self, done: u64) -> impl Iterator<Item = Range<u64>> {
        self.ranges.iter().flat_map(move |range| {
            let mut rest = range.start.max(done)..range.end;
            std::iter::from_fn(move || {
                let end = (rest.start / CHUNK + 1).saturating_mul(CHUNK).min(rest.end);
                let chunk = rest.start..end;
                rest.start = end;
                (chunk.start < chunk.end).then_some(chunk)
            })
        })
    }

    /// The last status in this batch.
    pub fn status(&self) -> Option<Status> {
        self.status
    }

    /// Removes all, for another batch.
    pub fn clear(&mut self) {
        self.status = None;
        self.ranges.clear();
        self.read = 0;
    }
}

impl Tally {
    /// Adds another one.
    pub fn add(&mut self, other: Self) {
        self.moved = self.moved.saturating_add(other.moved);
        self.repeated = self.repeated.saturating_add(other.repeated);
        self.outside = self.outside.saturating_add(other.outside);
    }

    /// Counts the moved bytes, and a refusal if some pages were already there, or are outside of the
    /// guest's memory.
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

#[cfg(test)]
mod tests;

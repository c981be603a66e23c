// SPDX-License-Identifier: GPL-2.0

//! Answers about unused pages.

#![forbid(unsafe_code)]

use crate::{
    features::requests::{
        counters::Counters,
        queue::Inner,
        work::{
            range_pages,
            Allocation,
            AnswerProgress,
            Discard,
            ALLOCATING,
            MAX_RANGES, //
        }, //
    },
    free_pages::{
        Unused,
        Walk, //
    },
    messages::{
        page_sets,
        ranges::Ranges, //
    },
    rust::{
        mm::{
            contig::contig_pages::ContigPages,
            hotplug::memory_block::MemoryBlock,
            memory::{
                self,
                ReserveGuard, //
            },
            pages::page::pageblock_order,
            pfn_range::PfnRange, //
        },
        right::RightGuard,
        virtio_balloon::request, //
    }, //
};

use kernel::{
    page::PAGE_SHIFT,
    prelude::*,
    sync::atomic::Relaxed, //
};

/// How many times a zone's lock is taken for one message.
const HOLDS_PER_MESSAGE: usize = 16;

/// The number of messages with memory blocks that the device has at a time.
const MAX_BLOCKS: usize = 2;

impl Inner {
    /// Sends a message about unused pages. Returns none if it waits for the device.
    pub(super) fn skip(
        &mut self,
        id: u64,
        walk: &mut Walk,
        counters: &Counters,
    ) -> Option<AnswerProgress> {
        let mut message = self.message()?;
        let mut unused = Unused::new(walk, HOLDS_PER_MESSAGE, |scan| counters.record_scan(scan));

        if unused.first().is_some() {
            let command = request::UNUSED_SKIP;
            let written = page_sets::write(&mut message, command, id, self.encodings, &mut unused);

            let over = unused.is_over();
            let pages = written.ok()?;
            self.send(message, None)?;
            self.record_sent(id, pages, counters);
            Some(progress(over))
        } else {
            let over = unused.is_over();
            self.spare.get_or_insert(message);
            Some(progress(over))
        }
    }

    /// Returns how many other requests have a range that is allocated, or being allocated.
    fn allocations(&self) -> usize {
        let others = self.open.iter();

        others.filter(|open| open.has_allocation()).count()
    }

    /// Finds the next free pages, and begins to allocate them by `allocate`. Returns none if the
    /// answer waits for the device or an allocation.
    pub(super) fn discard(
        &mut self,
        discard: &mut Discard,
        floor: usize,
        counters: &Counters,
        allocate: impl FnOnce((usize, PfnRange), &ReserveGuard, RightGuard) -> Result<Allocation>,
    ) -> Option<AnswerProgress> {
        let ranges = self.ranges + self.allocations();
        if ranges >= MAX_RANGES {
            return None;
        }
        let right = ALLOCATING.take()?;
        let walk = &mut discard.walk;
        // The guest's reserve comes first.
        let taking = ReserveGuard::begin();
        let spare = (memory::free_above_reserve(floor) as u64).min(range_pages());
        if spare < 1 << pageblock_order() {
            // The other ranges may have as much memory as is allowed.
            return (ranges == 0).then_some(AnswerProgress::End(request::ABORTED));
        }
        let mut unused = Unused::new(walk, HOLDS_PER_MESSAGE, |scan| counters.record_scan(scan));

        // Adjacent blocks are allocated together, since each allocation is expensive.
        let Some((zone, range)) = unused.next_adjacent(spare) else {
            return Some(progress(unused.is_over()));
        };
        let block = MemoryBlock::of(range.first(), MemoryBlock::pages());
        if let Some(block) = block.filter(|block| discard.listed.contains(block)) {
            walk.resume_at(zone, block.pfns().end());
            return Some(AnswerProgress::More);
        }
        match allocate((zone, range), &taking, right) {
            Ok(allocation) => {
                discard.allocation = Some(allocation);
                None
            }
            Err(_) => Some(AnswerProgress::End(request::ABORTED)),
        }
    }

    /// Sends a message about allocated pages, which are freed when the device has used it. Returns
    /// none if it waits for the device or the allocation.
    pub(super) fn send_allocated(
        &mut self,
        id: u64,
        discard: &mut Discard,
        counters: &Counters,
    ) -> Option<AnswerProgress> {
        if discard.allocation.as_ref()?.outcome()? == Err(ETIMEDOUT) {
            // Memory that is free would be missing from the answer.
            return Some(AnswerProgress::End(request::ABORTED));
        }
        let mut message = self.message()?;

        match discard.allocation.take()?.finish(&mut discard.walk) {
            Some((range, memory)) => {
                let command = request::UNUSED_DISCARD;
                let mut range = Some(range);
                let written =
                    page_sets::write(&mut message, command, id, self.encodings, &mut range);

                let pages = written.ok()?;
                self.send(message, Some(memory))?;
                self.record_sent(id, pages, counters);
            }
            None => {
                self.spare.get_or_insert(message);
            }
        }
        Some(AnswerProgress::More)
    }

    /// Sends a message about a part of a memory block, which the kernel has not zeroed, and which
    /// is freed when the device has used the message. Removes `blocks` from `discard` if there are
    /// no more. Returns none if it waits for the device or the offliner.
    pub(super) fn discard_block(
        &mut self,
        id: u64,
        discard: &mut Discard,
        counters: &Counters,
    ) -> Option<AnswerProgress> {
        let Some(blocks) = &mut discard.blocks else {
            return Some(AnswerProgress::More);
        };
        if self.ranges >= MAX_BLOCKS {
            return None;
        }
        let offliner = &blocks.offliner;
        if !blocks.is_begun {
            blocks.is_begun = true;
            offliner.begin(usize::MAX);
        }
        // In this order: the end of the task makes the last pages ready.
        let is_busy = offliner.is_busy();
        if offliner.ready() == 0 {
            if is_busy {
                return None;
            }
            discard.blocks = None;
            return Some(AnswerProgress::More);
        }

        let mut message = self.message()?;
        let (first, pages) = offliner.take_adjacent()?;
        let memory = ContigPages::of(pages);
        let mut range = PfnRange::new(first, memory.len());
        let command = request::UNUSED_DISCARD;
        let written = page_sets::write(&mut message, command, id, self.encodings, &mut range);
        let pages = written.ok()?;

        self.send(message, Some(memory))?;
        self.record_sent(id, pages, counters);
        counters.blocks.add(pages << PAGE_SHIFT, Relaxed);
        if let Some(block) = MemoryBlock::of(first, MemoryBlock::pages()) {
            // Otherwise it would be listed again.
            let _ = discard.listed.push(block, GFP_KERNEL);
        }
        Some(AnswerProgress::More)
    }
}

/// Returns the progress of an answer whose walk `is_over` or not.
fn progress(is_over: bool) -> AnswerProgress {
    match is_over {
        true => AnswerProgress::End(request::COMPLETE),
        false => AnswerProgress::More,
    }
}

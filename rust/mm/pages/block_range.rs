// SPDX-License-Identifier: GPL-2.0

//! Ranges of adjacent blocks, and sorted sets of them.
//!
//! C header: [`include/linux/gfp.h`](srctree/include/linux/gfp.h)

use crate::rust::{
    mm::{
        node::Node,
        pages::{
            gfp::Gfp,
            owned::Allocated,
            page::Page,
            page_list::PageList, //
        },
        pfn_range::PfnRange, //
    },
    virtio::{
        Access,
        Buffer, //
    }, //
};

use core::{
    mem,
    ptr::NonNull, //
};
use kernel::{
    alloc::kvec::InsertError,
    page::{
        PAGE_SHIFT,
        PAGE_SIZE, //
    },
    prelude::*,
    task::might_sleep, //
};

/// The longest range in kernel pages: its length in bytes has to fit into 32 bits.
const MAX_PAGES: usize = u32::MAX as usize >> PAGE_SHIFT;

/// Adjacent blocks from the page allocator. Their content has no meaning. Dropping it frees them.
///
/// # Invariants
///
/// The pages are blocks that this owns, in the linear mapping: [`MAX_PAGES`] at most. The first
/// page of each block stores the block's order.
pub(crate) struct BlockRange(PfnRange);

impl BlockRange {
    /// Allocates a free block of 2^`order` pages from `node`, or from any node, without reclaim,
    /// and without using reserves. Does not sleep.
    pub(crate) fn alloc(node: Option<Node>, order: u32) -> Option<Self> {
        Allocated::new(node, Gfp::HINT_BLOCK, order).and_then(Self::of)
    }

    /// Takes the first block off a list.
    pub(crate) fn from_block(list: &mut PageList) -> Option<Self> {
        list.pop_block().and_then(|block| Self::of(block.unmark()))
    }

    /// Makes a range of a block.
    fn of(block: Allocated) -> Option<Self> {
        let pfns = PfnRange::new(block.page().pfn() as u64, block.len() as u64)?;
        let (page, order) = block.into_parts();

        // INVARIANT: This owns the block, and stores its order. The largest order is far below the
        // longest range.
        //
        // SAFETY: The block is ours.
        unsafe { page.set_order(order) };
        Some(Self(pfns))
    }

    /// Returns the page frame number of the first page, in kernel pages.
    #[cfg(CONFIG_VIRTIO_BALLOON_RS_KUNIT_TEST)]
    pub(crate) fn first(&self) -> usize {
        self.0.first() as usize
    }

    /// Returns the length in kernel pages.
    pub(crate) fn len(&self) -> usize {
        self.0.len() as usize
    }

    /// Merges this with `next`, if `next` follows directly and the result is not too long.
    fn join(&mut self, next: Self) -> Result<(), Self> {
        let pages = self.len() + next.len();
        let joined = PfnRange::new(self.0.first(), pages as u64);

        match joined.filter(|_| self.0.end() == next.0.first() && pages <= MAX_PAGES) {
            Some(joined) => {
                // INVARIANT: The blocks of `next` follow the others, and this range owns them from
                // now on.
                self.0 = joined;
                mem::forget(next);
                Ok(())
            }
            None => Err(next),
        }
    }

    /// Splits off the first block, and returns it with the rest.
    fn split_first(self) -> (Allocated, Option<Self>) {
        let pfns = self.0;

        mem::forget(self);
        // SAFETY: By the type invariants the range begins with a block, whose order is stored in
        // its first page.
        let block = unsafe {
            let page = Page::from_pfn(pfns.first() as usize);

            Allocated::from_parts(page, page.order())
        };
        let len = block.len() as u64;

        // INVARIANT: These are the other blocks.
        (
            block,
            PfnRange::between(pfns.first() + len, pfns.end()).map(Self),
        )
    }
}

impl Drop for BlockRange {
    /// Takes long if the kernel zeroes memory that is freed, so it must not be done under a
    /// spinlock.
    fn drop(&mut self) {
        might_sleep();
        // INVARIANT: The blocks are owned by this one from now on.
        let mut rest = Some(Self(self.0));

        while let Some(range) = rest {
            (_, rest) = range.split_first();
        }
    }
}

// SAFETY: The memory is in the linear mapping, and the range owns it as long as the range exists.
// No code accesses it through a shared reference, and any content is valid.
unsafe impl Buffer for BlockRange {
    fn memory(&self) -> (NonNull<u8>, usize, Access) {
        // SAFETY: By the type invariants there is such a page.
        let address = unsafe { Page::from_pfn(self.0.first() as usize) }.address();

        (address, self.len() * PAGE_SIZE, Access::Write)
    }
}

/// A set of ranges, sorted by address, with adjacent ranges merged. Never allocates after it was
/// made.
pub(crate) struct BlockRangeSet {
    /// Never grows beyond its capacity.
    ranges: KVec<BlockRange>,
    pages: usize,
}

impl BlockRangeSet {
    /// Makes an empty set with room for `capacity` ranges.
    ///
    /// # Errors
    ///
    /// `ENOMEM`.
    pub(crate) fn new(capacity: usize) -> Result<Self> {
        Ok(Self {
            ranges: KVec::with_capacity(capacity, GFP_KERNEL)?,
            pages: 0,
        })
    }

    /// Returns how many kernel pages there are in all ranges.
    pub(crate) fn pages(&self) -> usize {
        self.pages
    }

    /// Adds `range`.
    ///
    /// # Errors
    ///
    /// Returns the range, if it is not adjacent to another one and there is no room for it.
    pub(crate) fn insert(&mut self, range: BlockRange) -> Result<(), BlockRange> {
        let pages = range.len();
        let after = self
            .ranges
            .partition_point(|this| this.0.first() < range.0.first());
        let before = after.checked_sub(1);

        // Append it to the previous range, or add it as a new one, and then merge the next range.
        let place = match self.join_before(before, range) {
            Ok(place) => place,
            Err(range) => {
                self.insert_at(after, range)?;
                after
            }
        };
        self.join_after(place);

        self.pages += pages;
        Ok(())
    }

    fn join_before(
        &mut self,
        before: Option<usize>,
        range: BlockRange,
    ) -> Result<usize, BlockRange> {
        match before.and_then(|place| Some((place, self.ranges.get_mut(place)?))) {
            Some((place, this)) => this.join(range).map(|()| place),
            None => Err(range),
        }
    }

    fn insert_at(&mut self, place: usize, range: BlockRange) -> Result<(), BlockRange> {
        self.ranges
            .insert_within_capacity(place, range)
            .map_err(|error| match error {
                InsertError::IndexOutOfBounds(range) | InsertError::OutOfCapacity(range) => range,
            })
    }

    fn join_after(&mut self, place: usize) {
        if place + 1 >= self.ranges.len() {
            return;
        }
        let Ok(next) = self.ranges.remove(place + 1) else {
            return;
        };
        let result = match self.ranges.get_mut(place) {
            Some(this) => this.join(next),
            None => Err(next),
        };

        if let Err(next) = result {
            // There is room, since it was in the set before.
            let _ = self.insert_at(place + 1, next);
        }
    }

    /// Takes the longest range out.
    pub(crate) fn take_longest(&mut self) -> Option<BlockRange> {
        let (place, _) = self
            .ranges
            .iter()
            .enumerate()
            .max_by_key(|(_, range)| range.len())?;
        let range = self.ranges.remove(place).ok()?;

        self.pages -= range.len();
        Some(range)
    }

    /// Takes a block out. The caller may free it without the lock of the set.
    pub(crate) fn pop_block(&mut self) -> Option<BlockRange> {
        let (block, rest) = self.ranges.pop()?.split_first();

        self.pages -= block.len();
        if let Some(rest) = rest {
            // There is room, since the range was in the set before.
            let _ = self.ranges.push_within_capacity(rest);
        }
        BlockRange::of(block)
    }
}

// SPDX-License-Identifier: GPL-2.0

//! Lists of pages that belong to the driver.

use crate::rust::mm::pages::{
    owned::{
        BasePage,
        Block,
        PageRange, //
    },
    page::Page,
    ring::Ring, //
};

use core::mem;
use kernel::task::might_sleep;

/// Memory that is owned by the list: order-0 pages, and unsplit blocks.
///
/// The list can be moved; it never allocates. Dropping it frees the memory.
pub(crate) struct PageList {
    pub(in crate::rust::mm) base_pages: Ring<BasePage>,
    pub(in crate::rust::mm) blocks: Ring<Block>,
    /// The length of all blocks.
    block_pages: usize,
}

impl PageList {
    /// Returns an empty list.
    pub(crate) const fn new() -> Self {
        Self {
            base_pages: Ring::new(),
            blocks: Ring::new(),
            block_pages: 0,
        }
    }

    /// Returns how many pages (kernel pages) are on the list.
    pub(crate) fn len(&self) -> usize {
        self.base_pages.len() + self.block_pages
    }

    /// Returns how many order-0 pages are on the list.
    pub(in crate::rust) fn base_pages(&self) -> usize {
        self.base_pages.len()
    }

    /// Returns whether no page is on the list.
    pub(crate) fn is_empty(&self) -> bool {
        self.len() == 0
    }

    /// Puts `page` at the end of the order-0 pages.
    pub(in crate::rust) fn push(&mut self, page: BasePage) {
        self.base_pages.push(page);
    }

    /// Puts `page` before the first order-0 page.
    pub(in crate::rust) fn push_first(&mut self, page: BasePage) {
        self.base_pages.push_first(page);
    }

    /// Takes the first order-0 page off.
    pub(in crate::rust) fn pop(&mut self) -> Option<BasePage> {
        self.base_pages.pop()
    }

    /// Takes the last order-0 page off.
    pub(in crate::rust) fn pop_last(&mut self) -> Option<BasePage> {
        self.base_pages.pop_last()
    }

    /// Puts `block` at the end of the blocks.
    pub(in crate::rust) fn push_block(&mut self, block: Block) {
        self.block_pages += block.len();
        self.blocks.push(block);
    }

    /// Takes the first block off.
    pub(in crate::rust) fn pop_block(&mut self) -> Option<Block> {
        let block = self.blocks.pop()?;

        self.block_pages -= block.len();
        Some(block)
    }

    /// Takes off the first pages that are on one node: blocks, if there are any, otherwise order-0
    /// pages. Returns the node's number with them.
    pub(in crate::rust) fn take_node(&mut self) -> Option<(usize, Self)> {
        let mut taken = Self::new();
        let mut node = None;

        while let Some(page) = self.blocks.first().or(self.base_pages.first()) {
            let this = page.nid();
            if *node.get_or_insert(this) != this {
                break;
            }

            match self.pop_block() {
                Some(block) => taken.push_block(block),
                None => self.pop().into_iter().for_each(|page| taken.push(page)),
            }
        }

        node.map(|node| (node, taken))
    }

    /// Returns the length of the first block in kernel pages.
    pub(in crate::rust) fn first_block_len(&self) -> Option<usize> {
        self.blocks.first().map(|page| 1 << page.order())
    }

    /// Calls `each` for each run of order-0 pages of the same zone on the list: with one of them,
    /// and their number.
    pub(in crate::rust) fn zones(&self, mut each: impl FnMut(Page, usize)) {
        let Some(mut first) = self.base_pages.first() else {
            return;
        };
        let mut zone = first.zone();
        let mut count = 0;

        for page in self.base_pages.cycle().take(self.base_pages.len()) {
            let this = page.zone();

            if this != zone {
                each(first, mem::take(&mut count));
                (first, zone) = (page, this);
            }
            count += 1;
        }
        each(first, count);
    }

    /// Splits all blocks into order-0 pages.
    pub(crate) fn split_blocks(&mut self) {
        while let Some(block) = self.pop_block() {
            block.unmark().split(|page| self.push(page));
        }
    }

    /// Appends `other`, which takes the same time for any number of pages.
    pub(crate) fn append(&mut self, mut other: Self) {
        self.base_pages.append(&mut other.base_pages);
        self.blocks.append(&mut other.blocks);
        self.block_pages += mem::take(&mut other.block_pages);
    }

    /// Takes off the first blocks that are adjacent. Returns them with the page frame number (of a
    /// kernel page) of their first page.
    pub(crate) fn take_adjacent(&mut self) -> Option<(u64, Self)> {
        // It takes time for each block.
        might_sleep();
        let first = self.blocks.first()?.pfn();
        let mut taken = Self::new();

        while self.blocks.first().map(Page::pfn) == Some(first + taken.len()) {
            let Some(block) = self.pop_block() else { break };
            taken.push_block(block);
        }
        Some((first as u64, taken))
    }

    /// Takes off all but `len` pages, or none if there are not more. Splits a block for that, if
    /// necessary.
    pub(crate) fn split_off(&mut self, len: usize) -> Self {
        // It takes time for each block.
        might_sleep();
        let mut rest = mem::replace(self, Self::new());

        while rest
            .first_block_len()
            .is_some_and(|block| self.len() + block <= len)
        {
            let Some(block) = rest.pop_block() else { break };
            self.push_block(block);
        }
        if self.len() < len && rest.base_pages() < len - self.len() {
            if let Some(block) = rest.pop_block() {
                block.unmark().split(|page| rest.push(page));
            }
        }
        while self.len() < len {
            let Some(page) = rest.pop() else { break };
            self.push(page);
        }
        rest
    }

    /// Takes the first `max` order-0 pages off, or all if there are fewer.
    pub(in crate::rust) fn take_base_pages(&mut self, max: usize) -> Self {
        let mut taken = Self::new();

        for _ in 0..max {
            let Some(page) = self.pop() else { break };
            taken.push(page);
        }
        taken
    }

    /// Takes the last `max` order-0 pages off, or all if there are fewer.
    pub(crate) fn take_last(&mut self, max: usize) -> Self {
        let mut taken = Self::new();

        for _ in 0..max {
            let Some(page) = self.pop_last() else { break };
            taken.push_first(page);
        }
        taken
    }

    /// Moves the order-0 pages to `other` if `is_wanted` returns true for their page frame number
    /// (of a kernel page).
    pub(crate) fn move_base_pages(&mut self, other: &mut Self, is_wanted: impl Fn(u64) -> bool) {
        for _ in 0..self.base_pages() {
            let Some(page) = self.pop() else { break };

            match is_wanted(page.page().pfn() as u64) {
                true => other.push(page),
                false => self.push(page),
            }
        }
    }
}

impl Drop for PageList {
    /// Takes time for each page, so it must not be done under a spinlock.
    fn drop(&mut self) {
        if !self.is_empty() {
            might_sleep();
        }
        while self.pop_block().is_some() {}

        while let Some(Ok(mut range)) = self.pop().map(PageRange::of) {
            while let Some(page) = self.pop() {
                if let Err(page) = range.push(page) {
                    self.push_first(page);
                    break;
                }
            }
        }
    }
}

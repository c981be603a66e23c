// SPDX-License-Identifier: GPL-2.0

//! Pages that come online, and that the driver keeps.

use crate::rust::mm::{
    pages::{
        owned::Block,
        page_list::PageList, //
    },
    pfn_range::PfnRange, //
};

use core::mem;

/// The pages to keep from the page allocator when they come online, and those that have come
/// online.
pub(in crate::rust::mm) struct Kept {
    pfns: Option<PfnRange>,
    pages: PageList,
}

impl Kept {
    /// Returns an empty one.
    pub(in crate::rust::mm) const fn new() -> Self {
        Self {
            pfns: None,
            pages: PageList::new(),
        }
    }

    /// Keeps the pages in `pfns` from now on.
    pub(in crate::rust::mm) fn keep(&mut self, pfns: PfnRange) {
        self.pfns = Some(pfns);
    }

    /// Returns whether the page `pfn` is kept.
    pub(in crate::rust::mm) fn keeps(&self, pfn: usize) -> bool {
        self.pfns.is_some_and(|pfns| pfns.contains(pfn as u64))
    }

    /// Adds a block that has come online.
    pub(in crate::rust::mm) fn push(&mut self, block: Block) {
        self.pages.push_block(block);
    }

    /// Returns the blocks that have come online.
    pub(in crate::rust::mm) fn take(&mut self) -> PageList {
        mem::replace(&mut self.pages, PageList::new())
    }
}

// SPDX-License-Identifier: GPL-2.0

//! Pages that come online, and that the driver keeps.

use crate::rust::mm::pages::{
    owned::Block,
    page_list::PageList, //
};

use core::{
    mem,
    ops::Range, //
};

/// The pages to keep from the page allocator when they come online, and those that have come
/// online.
pub(in crate::rust::mm) struct Kept {
    pfns: Range<usize>,
    pages: PageList,
}

impl Kept {
    /// Returns an empty one.
    pub(in crate::rust::mm) const fn new() -> Self {
        Self {
            pfns: 0..0,
            pages: PageList::new(),
        }
    }

    /// Keeps the pages in `pfns` from now on.
    pub(in crate::rust::mm) fn keep(&mut self, pfns: Range<usize>) {
        self.pfns = pfns;
    }

    /// Returns whether the page `pfn` is kept.
    pub(in crate::rust::mm) fn keeps(&self, pfn: usize) -> bool {
        self.pfns.contains(&pfn)
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

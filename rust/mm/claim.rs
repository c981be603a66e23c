// SPDX-License-Identifier: GPL-2.0

//! Memory that is taken from the page allocator where it lies.
//!
//! C header: [`include/linux/gfp.h`](srctree/include/linux/gfp.h)

use crate::rust::{
    bindings,
    mm::page_list::PageList, //
};

/// Adjacent pages that belong to the driver. Dropping it frees them.
pub(crate) struct Claim(Pages);

enum Pages {
    Range(Range),
    Blocks(PageList),
}

/// # Invariants
///
/// The `len` pages from the page frame number `first` on are of order 0, and a reference to each is
/// owned by this.
struct Range {
    first: usize,
    len: usize,
}

impl Claim {
    /// Takes up to `len` pages from the page frame number `first` on (kernel pages): whole page
    /// blocks, none of which was in use when they were looked at. Returns none if that is the first
    /// of all, or if the kernel cannot do it. May sleep: what others take of the pages meanwhile is
    /// moved away again.
    pub(crate) fn new(first: u64, len: u64) -> Option<Self> {
        let first = usize::try_from(first).ok()?;

        // SAFETY: The function looks at the pages before it takes them.
        let len = unsafe { bindings::balloon_rs_claim_range(first, len as usize) };

        // INVARIANT: The pages were just allocated.
        (len > 0).then_some(Self(Pages::Range(Range { first, len })))
    }

    /// Claims what is on a list of adjacent pages.
    pub(crate) fn of(pages: PageList) -> Self {
        Self(Pages::Blocks(pages))
    }

    /// Returns the number of pages.
    pub(crate) fn len(&self) -> u64 {
        match &self.0 {
            Pages::Range(range) => range.len as u64,
            Pages::Blocks(pages) => pages.len() as u64,
        }
    }
}

impl Drop for Range {
    fn drop(&mut self) {
        // SAFETY: By the type invariants the pages are ours.
        unsafe { bindings::balloon_rs_free_range(self.first, self.len) };
    }
}

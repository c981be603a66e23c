// SPDX-License-Identifier: GPL-2.0

//! Ranges of memory that are allocated where they lie.
//!
//! C header: [`include/linux/gfp.h`](srctree/include/linux/gfp.h)

use crate::rust::{
    bindings,
    mm::{
        locks::{
            CONTIG,
            HOTPLUG, //
        },
        memory,
        owned::free_range,
        page::Page,
        page_list::PageList,
        zone::Zone, //
    }, //
};

use kernel::prelude::*;

/// Allocates the `len` pages from the page frame number `first` on, which are moved elsewhere if they
/// are in use. Each is a page of order 0 then.
///
/// One caller at a time: of two in the same pageblock the one that fails ends the isolation of the
/// other, too, which is a `BUG()` with `CONFIG_DEBUG_VM` and a failure without. The other one may also
/// be one that takes memory offline: free pages that are isolated for that look like others, and to
/// wait for them would have no end.
///
/// # Errors
///
/// `EBUSY`, `EOPNOTSUPP` without `CONFIG_CONTIG_ALLOC`, or what the kernel says.
///
/// # Safety
///
/// There must be such pages, which are of one zone.
pub(super) unsafe fn alloc_range(first: usize, len: usize) -> Result {
    #[cfg(CONFIG_CONTIG_ALLOC)]
    {
        let _one = CONTIG.lock();
        // The zone's lock is not taken: what the counter would say may be over just as soon.
        if Page::online(first).is_none_or(|page| Zone::of(page).is_isolating()) {
            return Err(EBUSY);
        }
        // Not waited for: the thread that takes a memory block may wait for locks of the caller.
        let _isolating = HOTPLUG.try_lock().ok_or(EBUSY)?;

        // SAFETY: By the requirements of this function.
        kernel::error::to_result(unsafe {
            bindings::alloc_contig_range_noprof(first, first + len, 0, bindings::__GFP_NOWARN)
        })
    }
    #[cfg(not(CONFIG_CONTIG_ALLOC))]
    {
        let _ = (first, len, &CONTIG, &HOTPLUG);
        Err(EOPNOTSUPP)
    }
}

/// Returns how many pages from `first` on, but at most `max`, are in pageblocks that are unused now,
/// and in one zone. Looks once at each pageblock.
fn unused_at(first: usize, max: usize) -> usize {
    let Some(zone) = Page::online(first).map(Zone::of) else {
        return 0;
    };
    let locked = zone.lock();
    let mut found = 0;

    while found < max {
        match locked.free_order(first + found) {
            Ok(Some(order)) if order >= memory::page_block_order() => found += 1 << order,
            _ => break,
        }
    }
    found.min(max)
}

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
    /// Allocates up to `len` pages from the page frame number `first` on (kernel pages): whole
    /// pageblocks, none of which was in use when they were looked at. Returns none if that is the
    /// first of all, or if the kernel cannot do it. May sleep: what others take of the pages
    /// meanwhile is moved away again.
    ///
    /// The pages are marked as offline: their memory is not taken offline, and dumps leave out
    /// their content.
    pub(crate) fn new(first: u64, len: u64) -> Option<Self> {
        let first = usize::try_from(first).ok()?;
        let block = 1 << memory::page_block_order();
        let mut len = unused_at(first, len as usize) / block * block;

        // One block that cannot be allocated, as those of CMA, fails the whole range.
        //
        // SAFETY: The pages were online and free, in one zone. Memory that goes offline keeps its
        // `struct page`s until it is removed. A removal between the look and this call is a race that
        // `alloc_contig_range()` leaves to all of its callers.
        while len > 0 && unsafe { alloc_range(first, len) }.is_err() {
            len = len / 2 / block * block;
        }
        if len == 0 {
            return None;
        }

        for first in (first..first + len).step_by(block) {
            // SAFETY: The pages were just allocated. Freeing them takes the marks off.
            unsafe {
                bindings::set_pages_offline(
                    Page::from_pfn(first).as_ptr(),
                    memory::page_block_order(),
                )
            };
        }
        // INVARIANT: The pages were just allocated.
        Some(Self(Pages::Range(Range { first, len })))
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
        unsafe { free_range(self.first, self.len) };
    }
}

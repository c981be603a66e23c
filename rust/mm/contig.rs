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
        pages::{
            owned::PageRange,
            page::{
                pageblock_order,
                Page, //
            },
            page_list::PageList, //
        },
        pfn_range::PfnRange,
        zone::Zone, //
    }, //
};

use kernel::prelude::*;

/// Allocates the pages in `pfns`, which are moved elsewhere if they are in use.
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
pub(super) unsafe fn alloc_range(pfns: PfnRange) -> Result<PageRange> {
    #[cfg(CONFIG_CONTIG_ALLOC)]
    {
        let _one = CONTIG.lock();
        // The zone's lock is not taken: what the counter would say may be over just as soon.
        let (first, end) = (pfns.first() as usize, pfns.end() as usize);
        if Page::online(first).is_none_or(|page| Zone::of(page).is_isolating()) {
            return Err(EBUSY);
        }
        // Not waited for: the thread that takes a memory block may wait for locks of the caller.
        let _isolating = HOTPLUG.try_lock().ok_or(EBUSY)?;

        // SAFETY: By the requirements of this function. The pages were allocated, each as one of order
        // 0, if the call succeeds.
        unsafe {
            let error = bindings::alloc_contig_range_noprof(first, end, 0, bindings::__GFP_NOWARN);

            kernel::error::to_result(error)?;
            Ok(PageRange::new(pfns))
        }
    }
    #[cfg(not(CONFIG_CONTIG_ALLOC))]
    {
        let _ = (pfns, &CONTIG, &HOTPLUG);
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
            Ok(Some(order)) if order >= pageblock_order() => found += 1 << order,
            _ => break,
        }
    }
    found.min(max)
}

/// Adjacent pages that belong to the driver. Dropping it frees them.
pub(crate) struct ContigPages(Pages);

enum Pages {
    Range(PageRange),
    Blocks(PageList),
}

impl ContigPages {
    /// Allocates up to `len` pages from the page frame number `first` on (kernel pages): whole
    /// pageblocks, none of which was in use when they were looked at. Returns none if that is the
    /// first of all, or if the kernel cannot do it. May sleep: what others take of the pages
    /// meanwhile is moved away again.
    ///
    /// The pages are marked as offline: their memory is not taken offline, and dumps leave out
    /// their content.
    pub(crate) fn new(first: u64, len: u64) -> Option<Self> {
        let order = pageblock_order();
        let mut blocks = unused_at(usize::try_from(first).ok()?, len as usize) >> order;

        // One block that cannot be allocated, as those of CMA, fails the whole range.
        loop {
            let pfns = PfnRange::new(first, (blocks << order) as u64)?;

            // SAFETY: The pages were online and free, in one zone. Memory that goes offline keeps its
            // `struct page`s until it is removed. A removal between the look and this call is a race
            // that `alloc_contig_range()` leaves to all of its callers.
            if let Ok(pages) = unsafe { alloc_range(pfns) } {
                pages.mark_blocks(order);
                return Some(Self(Pages::Range(pages)));
            }
            blocks /= 2;
        }
    }

    /// Claims what is on a list of adjacent pages.
    pub(crate) fn of(pages: PageList) -> Self {
        Self(Pages::Blocks(pages))
    }

    /// Returns the number of pages.
    pub(crate) fn len(&self) -> u64 {
        match &self.0 {
            Pages::Range(pages) => pages.pfns().len(),
            Pages::Blocks(pages) => pages.len() as u64,
        }
    }
}

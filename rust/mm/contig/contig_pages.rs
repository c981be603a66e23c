// SPDX-License-Identifier: GPL-2.0

//! Contiguous ranges of memory, allocated in place.
//!
//! C header: [`include/linux/gfp.h`](srctree/include/linux/gfp.h)

#[cfg(CONFIG_VIRTIO_BALLOON_RS_KUNIT_TEST)]
use crate::rust::mm::memory;
use crate::rust::{
    bindings,
    mm::{
        locks::{
            CONTIG,
            HOTPLUG, //
        },
        pages::{
            gfp::Gfp,
            owned::PageRange,
            page::{
                pageblock_order,
                Page, //
            },
            page_list::PageList, //
        },
        pfn_range::PfnRange,
        zone::Zone, //
    },
    work::poll::poll_timeout, //
};

use kernel::{
    prelude::*,
    time::Delta, //
};
#[cfg(CONFIG_VIRTIO_BALLOON_RS_KUNIT_TEST)]
use kernel::{
    sync::atomic::{
        Atomic,
        Relaxed, //
    },
    time::delay::fsleep, //
};

/// How long to wait for another caller. The kernel may wait for the disk, without a limit.
const PATIENCE: Delta = Delta::from_millis(100);

/// How many times page migration has waited, as a test pretends.
#[cfg(CONFIG_VIRTIO_BALLOON_RS_KUNIT_TEST)]
pub(crate) static WAITING: Atomic<usize> = Atomic::new(0);

/// Allocates the pages in `pfns`, and migrates those that are in use.
///
/// One caller at a time: if two allocate in the same pageblock and one fails, it also ends the
/// isolation of the other. That is a `BUG()` with `CONFIG_DEBUG_VM`, and a failure without. The
/// other caller may also be memory offlining: free pages that are isolated for it look like other
/// free pages, and a wait for them would never end.
///
/// # Errors
///
/// `ETIMEDOUT` after [`PATIENCE`], `EBUSY`, `EOPNOTSUPP` without `CONFIG_CONTIG_ALLOC`, or the
/// kernel's error.
///
/// # Safety
///
/// The pages must exist, in one zone.
pub(super) unsafe fn alloc_range(pfns: PfnRange) -> Result<PageRange> {
    let _one = poll_timeout(PATIENCE, || CONTIG.try_lock()).ok_or(ETIMEDOUT)?;
    #[cfg(CONFIG_CONTIG_ALLOC)]
    {
        // The zone's lock is not taken: the counter could change right after the unlock.
        let (first, end) = (pfns.first() as usize, pfns.end() as usize);
        if Page::online(first).is_none_or(|page| Zone::of(page).is_isolating()) {
            return Err(EBUSY);
        }
        // Do not wait: the thread that takes a memory block may wait for locks of the caller.
        let _isolating = HOTPLUG.try_lock().ok_or(EBUSY)?;

        // SAFETY: By the requirements of this function. The pages were allocated, each as one of
        // order 0, if the call succeeds.
        unsafe {
            let flags = Gfp::CONTIG_RANGE.flags();
            let error = bindings::alloc_contig_range_noprof(first, end, 0, flags);

            kernel::error::to_result(error)?;
            Ok(PageRange::new(pfns))
        }
    }
    #[cfg(not(CONFIG_CONTIG_ALLOC))]
    {
        let _ = (pfns, Gfp::CONTIG_RANGE.flags(), &HOTPLUG);
        Err(EOPNOTSUPP)
    }
}

/// Waits with both locks as if the kernel migrated a page that waits for the disk, for as long as a
/// test pretends that. A test that fails ends as well.
#[cfg(CONFIG_VIRTIO_BALLOON_RS_KUNIT_TEST)]
fn wait_as_pretended() {
    if !memory::migration_waits() {
        return;
    }
    let (_one, _isolating) = (CONTIG.lock(), HOTPLUG.lock());

    WAITING.add(1, Relaxed);
    for _ in 0..300 {
        if !memory::migration_waits() {
            return;
        }
        fsleep(PATIENCE);
    }
}

/// Returns how many of the first pages of `pfns` are in currently unused pageblocks of one zone.
/// Checks each pageblock once.
fn unused_in(pfns: PfnRange) -> usize {
    let (first, max) = (pfns.first() as usize, pfns.len() as usize);
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
    /// Allocates the first of the pages `pfns`: whole pageblocks that were not in use at the check.
    /// May sleep: the kernel migrates pages that other callers have allocated meanwhile.
    ///
    /// The pages are marked as offline: their memory is not taken offline, and dumps leave out
    /// their content.
    ///
    /// # Errors
    ///
    /// `EBUSY` if the first one was in use, or if the kernel fails. `ETIMEDOUT` if another caller
    /// needs too long.
    pub(crate) fn new(pfns: PfnRange) -> Result<Self> {
        #[cfg(CONFIG_VIRTIO_BALLOON_RS_KUNIT_TEST)]
        wait_as_pretended();
        let order = pageblock_order();
        let mut blocks = unused_in(pfns) >> order;

        // A single block that cannot be allocated, such as one of CMA, fails the whole range.
        loop {
            let pfns = PfnRange::new(pfns.first(), (blocks << order) as u64).ok_or(EBUSY)?;

            // SAFETY: The pages were online and free, in one zone. Memory that goes offline keeps
            // its `struct page`s until it is removed. A removal between the check and this call is
            // a race that `alloc_contig_range()` leaves to all of its callers.
            match unsafe { alloc_range(pfns) } {
                Ok(pages) => {
                    pages.mark_blocks(order);
                    return Ok(Self(Pages::Range(pages)));
                }
                Err(ETIMEDOUT) => return Err(ETIMEDOUT),
                Err(_) => blocks /= 2,
            }
        }
    }

    /// Makes one of a list of adjacent pages.
    pub(crate) fn of(pages: PageList) -> Self {
        Self(Pages::Blocks(pages))
    }

    /// Returns the page frame number of the first page, for tests.
    #[cfg(CONFIG_VIRTIO_BALLOON_RS_KUNIT_TEST)]
    pub(super) fn first(&self) -> Option<u64> {
        match &self.0 {
            Pages::Range(pages) => Some(pages.pfns().first()),
            Pages::Blocks(_) => None,
        }
    }

    /// Returns the number of pages.
    pub(crate) fn len(&self) -> u64 {
        match &self.0 {
            Pages::Range(pages) => pages.pfns().len(),
            Pages::Blocks(pages) => pages.len() as u64,
        }
    }
}

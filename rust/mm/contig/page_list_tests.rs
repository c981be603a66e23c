// SPDX-License-Identifier: GPL-2.0

//! Operations on lists and ranges of pages, for tests only.

use crate::rust::{
    bindings,
    mm::{
        contig::{
            contig_pages::ContigPages,
            drain, //
        },
        pages::{
            block_range::BlockRange,
            owned::BasePage,
            page::Page,
            page_list::PageList,
            ring::Linked, //
        }, //
    }, //
};

use kernel::{
    error::to_result,
    prelude::*, //
};

impl PageList {
    /// Allocates the `len` pages from the page frame number `first` on, and migrates their
    /// contents.
    ///
    /// # Errors
    ///
    /// `EBUSY` if a page cannot be migrated, `EINVAL` if that is not memory of one zone.
    pub(crate) fn alloc_range(first: usize, len: usize) -> Result<Self> {
        let mut pages = Self::new();
        let end = first.checked_add(len).ok_or(EINVAL)?;
        let zone = |pfn| Page::online(pfn).map(Page::zone);

        if len == 0 || zone(first).is_none() || (first..end).any(|pfn| zone(pfn) != zone(first)) {
            return Err(EINVAL);
        }
        // SAFETY: The check above found such memory, and tests do not unplug it.
        to_result(unsafe {
            bindings::alloc_contig_range_noprof(first, end, 0, bindings::GFP_KERNEL)
        })?;

        for pfn in first..end {
            // SAFETY: The pages were just allocated, each as one of order 0.
            pages.push(unsafe { BasePage::from_page(Page::from_pfn(pfn)) });
        }
        Ok(pages)
    }

    /// Moves every second order-0 page to `other`.
    pub(crate) fn split_alternating(&mut self, other: &mut Self) {
        for n in 0..self.base_pages() {
            let Some(page) = self.pop() else { break };

            match n % 2 {
                0 => self.push(page),
                _ => other.push(page),
            }
        }
    }

    /// Frees the pages, after a memory error in page `n` of the first block, or in the first
    /// order-0 page. Returns whether the page allocator has set that page aside.
    pub(crate) fn free_with_error(self, n: usize) -> Option<bool> {
        let page = self.blocks.first().or(self.base_pages.first())?;
        let len = self.first_block_len().unwrap_or(1);

        // SAFETY: The page is one of the list's.
        unsafe { drop_with_error(self, page.pfn() + n % len) }
    }

    /// Moves all but the first `len` order-0 pages to `other`.
    pub(crate) fn split_at(&mut self, len: usize, other: &mut Self) {
        while self.base_pages() > len {
            let Some(page) = self.pop_last() else { break };
            other.push_first(page);
        }
    }

    /// Returns the page frame numbers of the order-0 pages, in kernel pages.
    pub(crate) fn pfns(&self) -> impl Iterator<Item = u64> + use<'_> {
        self.base_pages
            .cycle()
            .take(self.base_pages())
            .map(|page| page.pfn() as u64)
    }
}

impl BlockRange {
    /// Frees the range, after a memory error in its page `n`. Returns whether the page allocator
    /// has set that page aside.
    pub(crate) fn free_with_error(self, n: usize) -> Option<bool> {
        let pfn = self.first() + n % self.len();

        // SAFETY: The page is one of the range.
        unsafe { drop_with_error(self, pfn) }
    }
}

impl ContigPages {
    /// Frees the pages, which were allocated in place, after a memory error in the page `n` of
    /// them. Returns whether the page allocator has set that page aside.
    pub(crate) fn free_with_error(self, n: usize) -> Option<bool> {
        let pfn = self.first()? as usize + n % self.len() as usize;

        // SAFETY: The page is one of these.
        unsafe { drop_with_error(self, pfn) }
    }
}

/// A memory error of a page, for as long as this exists.
///
/// # Invariants
///
/// The page exists, and has a memory error if the kernel supports that.
pub(crate) struct MemoryError(Page);

impl MemoryError {
    /// Gives the last order-0 page on `pages` an error. Returns none if there is no page, or if
    /// this kernel does not support memory errors.
    pub(crate) fn of_last(pages: &PageList) -> Option<Self> {
        let pfn = pages.pfns().last()?;

        // SAFETY: The list owns the page.
        cfg!(CONFIG_MEMORY_FAILURE).then(|| Self::new(unsafe { Page::from_pfn(pfn as usize) }))
    }

    /// Returns the page frame number.
    pub(crate) fn pfn(&self) -> u64 {
        self.0.pfn() as u64
    }

    fn new(page: Page) -> Self {
        let this = Self(page);

        // INVARIANT: The page gets the error.
        this.set(true);
        this
    }

    fn set(&self, has_error: bool) {
        #[cfg(CONFIG_MEMORY_FAILURE)]
        {
            use core::sync::atomic::{
                AtomicU64,
                Ordering, //
            };

            // SAFETY: By the type invariants. Other code accesses the flags by atomic operations.
            let flags = unsafe { AtomicU64::from_ptr(self.0.flags().cast()) };
            let error = 1 << bindings::pageflags_PG_hwpoison;

            match has_error {
                true => flags.fetch_or(error, Ordering::Relaxed),
                false => flags.fetch_and(!error, Ordering::Relaxed),
            };
        }
        #[cfg(not(CONFIG_MEMORY_FAILURE))]
        let _ = has_error;
    }
}

impl Drop for MemoryError {
    fn drop(&mut self) {
        self.set(false);
    }
}

/// Drops `owner` while its page `pfn` has a memory error. Returns whether the page allocator has
/// set that page aside; `None` if this kernel does not support memory errors. Clears the error
/// after that.
///
/// # Safety
///
/// The page must be one that dropping `owner` frees.
unsafe fn drop_with_error<T>(owner: T, pfn: usize) -> Option<bool> {
    // SAFETY: By the requirements of this function the page is ours.
    let page = unsafe { Page::from_pfn(pfn) };
    let error = MemoryError::new(page);

    drop(owner);
    drain::drain_free_lists();
    // SAFETY: It is a page.
    let is_aside = page.count() == 0 && !unsafe { bindings::is_free_buddy_page(page.as_ptr()) };
    drop(error);

    if !cfg!(CONFIG_MEMORY_FAILURE) {
        return None;
    }
    if is_aside {
        // SAFETY: The page allocator has set the page aside: it has no references, and no other
        // code uses it.
        unsafe {
            page.set_count(1);
            bindings::__free_pages(page.as_ptr(), 0);
        }
    }
    Some(is_aside)
}

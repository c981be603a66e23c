// SPDX-License-Identifier: GPL-2.0

//! Operations on lists and ranges of pages, for tests only.

use crate::rust::{
    bindings,
    mm::pages::{
        block_range::BlockRange,
        owned::BasePage,
        page::Page,
        page_list::PageList,
        ring::Linked, //
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

/// Drops `owner` while its page `pfn` has a memory error. Returns whether the page allocator has
/// set that page aside; `None` if this kernel does not support memory errors. Clears the error
/// after that.
///
/// # Safety
///
/// The page must be one that dropping `owner` frees.
unsafe fn drop_with_error<T>(owner: T, pfn: usize) -> Option<bool> {
    #[cfg(CONFIG_MEMORY_FAILURE)]
    // SAFETY: By the requirements of this function the page is ours. After it was freed, the page
    // allocator has it, or has set it aside: then it has no references, and is no free block.
    return unsafe {
        use core::sync::atomic::{
            AtomicU64,
            Ordering, //
        };

        let page = Page::from_pfn(pfn);
        let flags = AtomicU64::from_ptr(page.flags().cast());
        let error = 1 << bindings::pageflags_PG_hwpoison;

        flags.fetch_or(error, Ordering::Relaxed);
        drop(owner);
        crate::rust::mm::contig::drain::drain_free_lists();

        let is_aside = page.count() == 0 && !bindings::is_free_buddy_page(page.as_ptr());
        flags.fetch_and(!error, Ordering::Relaxed);
        if is_aside {
            page.set_count(1);
            bindings::__free_pages(page.as_ptr(), 0);
        }
        Some(is_aside)
    };
    #[cfg(not(CONFIG_MEMORY_FAILURE))]
    {
        let _ = pfn;
        drop(owner);
        None
    }
}

// SPDX-License-Identifier: GPL-2.0

//! Pages that the driver owns.
//!
//! C header: [`include/linux/gfp.h`](srctree/include/linux/gfp.h)

use crate::rust::{
    bindings,
    mm::{
        node::Node,
        pages::{
            gfp::Gfp,
            page::Page,
            ring::Linked, //
        },
        pfn_range::PfnRange, //
    }, //
};

use core::mem;
use kernel::prelude::*;

/// A block that was just allocated. No page of it is marked, except perhaps the first, and none
/// stores its order. Dropping it frees it.
///
/// # Invariants
///
/// `page` begins a block of 2^`order` pages that this owns. It is no compound page.
pub(in crate::rust) struct Allocated {
    page: Page,
    order: u32,
}

impl Allocated {
    /// Allocates a block of 2^`order` pages from `node`, or from any node, nodes near this CPU
    /// first. The latter equals `alloc_pages()` in a task without a memory policy, such as all
    /// tasks of this driver. A cpuset applies in both cases.
    pub(in crate::rust) fn new(node: Option<Node>, gfp: Gfp, order: u32) -> Option<Self> {
        let (nid, gfp) = gfp.on(node);
        // SAFETY: It is a node or none. An order that is too large makes the call fail. The
        // function returns a page or null.
        let page = unsafe { Page::from_raw(bindings::alloc_pages_node(nid, gfp, order)) }?;

        // INVARIANT: The block was just allocated with this order, and is no compound page.
        Some(Self { page, order })
    }

    /// Returns the first page.
    pub(in crate::rust) fn page(&self) -> Page {
        self.page
    }

    /// Returns the length in kernel pages.
    pub(in crate::rust) fn len(&self) -> usize {
        1 << self.order
    }

    /// Returns the first page and the order. The caller owns the block from now on.
    pub(in crate::rust) fn into_parts(self) -> (Page, u32) {
        let parts = (self.page, self.order);

        mem::forget(self);
        parts
    }

    /// Takes [`into_parts`](Self::into_parts) back.
    ///
    /// # Safety
    ///
    /// The page must begin an unmarked block of this order, which is no compound page. The caller
    /// passes on its ownership.
    pub(in crate::rust) unsafe fn from_parts(page: Page, order: u32) -> Self {
        // INVARIANT: By the requirements of this function.
        Self { page, order }
    }

    /// Marks the block, which stays unsplit.
    pub(in crate::rust) fn mark(self) -> Block {
        let (page, order) = self.into_parts();

        // INVARIANT: The pages are marked, and the order is stored.
        //
        // SAFETY: By the type invariants of `Allocated` the block is ours.
        unsafe {
            page.set_order(order);
            bindings::set_pages_offline(page.as_ptr(), order);
        }
        Block(page)
    }

    /// Frees it. If a page of it has a memory error, the pages are freed one by one: the page
    /// allocator sets such a page aside only if it is freed alone.
    fn free(self, has_error: bool) {
        if has_error {
            return self.split(drop);
        }
        let (page, order) = self.into_parts();

        // SAFETY: By the type invariants the block is ours.
        unsafe { bindings::__free_pages(page.as_ptr(), order) };
    }

    /// Splits it into order-0 pages, and calls `each` with each of them.
    pub(in crate::rust) fn split(self, mut each: impl FnMut(BasePage)) {
        let (page, order) = self.into_parts();

        // SAFETY: By the type invariants the block is ours, and is no compound page. Its pages are
        // of order 0 from now on, and no other code has a pointer to them.
        unsafe {
            bindings::split_page(page.as_ptr(), order);
            for n in 0..1 << order {
                each(BasePage::from_page(page.add(n)));
            }
        }
    }
}

impl Drop for Allocated {
    fn drop(&mut self) {
        let (page, order) = (self.page, self.order);
        // SAFETY: All pages are of the block.
        let mut pages = (0..1 << order).map(|n| unsafe { page.add(n) });
        let has_error = order > 0 && pages.any(Page::has_error);

        // INVARIANT: The block is owned by this one from now on.
        Self { page, order }.free(has_error);
    }
}

/// A page of order 0. Dropping it frees it.
///
/// # Invariants
///
/// The page is of order 0, and stores that. This owns one of its references.
#[repr(transparent)]
pub(in crate::rust) struct BasePage(Page);

impl BasePage {
    /// Returns the page.
    pub(in crate::rust) fn page(&self) -> Page {
        self.0
    }
}

// SAFETY: An allocated page of order 0 is on no other list.
unsafe impl Linked for BasePage {
    /// Returns the page. The caller owns its reference from now on.
    fn into_page(self) -> Page {
        let page = self.0;

        mem::forget(self);
        page
    }

    /// Makes one of `page`.
    ///
    /// # Safety
    ///
    /// The page must be of order 0. The caller passes on a reference to it.
    unsafe fn from_page(page: Page) -> Self {
        // INVARIANT: The order is stored.
        //
        // SAFETY: By the requirements of this function.
        unsafe { page.set_order(0) };
        Self(page)
    }
}

impl Drop for BasePage {
    fn drop(&mut self) {
        // INVARIANT: The page is owned by this one from now on, as a block of order 0.
        drop(Allocated {
            page: self.0,
            order: 0,
        });
    }
}

/// A block that stays unsplit. Dropping it frees it.
///
/// # Invariants
///
/// The page begins a block that this owns, and stores its order. All pages of the block are marked
/// as offline.
#[repr(transparent)]
pub(in crate::rust) struct Block(Page);

impl Block {
    /// Returns the first page.
    pub(in crate::rust) fn page(&self) -> Page {
        self.0
    }

    /// Returns the order.
    pub(in crate::rust) fn order(&self) -> u32 {
        self.0.order()
    }

    /// Returns the length in kernel pages.
    pub(in crate::rust) fn len(&self) -> usize {
        1 << self.order()
    }

    /// Clears the marks, which is required before the block is freed or split. The page allocator
    /// clears that of the first page: page migration may just look at a page that was in a balloon.
    pub(in crate::rust) fn unmark(self) -> Allocated {
        self.unmark_and_check().0
    }

    /// The same. Also returns whether a page has a memory error, so that freeing the block needs no
    /// other look at all of its pages.
    fn unmark_and_check(self) -> (Allocated, bool) {
        let order = self.order();
        let page = self.into_page();

        // SAFETY: By the type invariants the block is ours, and marked.
        let has_error = unsafe { bindings::clear_pages_offline(page.as_ptr(), order) };
        // INVARIANT: The block is owned by this one from now on.
        (Allocated { page, order }, has_error)
    }
}

// SAFETY: An allocated block is on no other list.
unsafe impl Linked for Block {
    /// Returns the first page, which stands for the block from now on.
    fn into_page(self) -> Page {
        let page = self.0;

        mem::forget(self);
        page
    }

    /// Makes one of `page`.
    ///
    /// # Safety
    ///
    /// By the type invariants. The caller passes on the block.
    unsafe fn from_page(page: Page) -> Self {
        // INVARIANT: By the requirements of this function.
        Self(page)
    }
}

impl Drop for Block {
    fn drop(&mut self) {
        // INVARIANT: The block is owned by this one from now on.
        let (block, has_error) = Self(self.0).unmark_and_check();

        block.free(has_error);
    }
}

/// Adjacent pages of order 0. Dropping it frees them together: they return to the page allocator as
/// blocks, which it need not merge from order-0 pages.
///
/// # Invariants
///
/// The pages are of order 0, and this owns one reference to each.
pub(in crate::rust) struct PageRange(PfnRange);

impl PageRange {
    /// Makes one of the pages in `pfns`.
    ///
    /// # Safety
    ///
    /// The pages must be of order 0. The caller passes on a reference to each.
    pub(in crate::rust::mm) unsafe fn new(pfns: PfnRange) -> Self {
        // INVARIANT: By the requirements of this function.
        Self(pfns)
    }

    /// Makes one of `page`. Returns it if its number is out of range, which cannot happen.
    pub(in crate::rust::mm) fn of(page: BasePage) -> Result<Self, BasePage> {
        match PfnRange::new(page.page().pfn() as u64, 1) {
            Some(pfns) => {
                page.into_page();
                // INVARIANT: This owns the page from now on.
                Ok(Self(pfns))
            }
            None => Err(page),
        }
    }

    /// Adds `page`, or returns it if it is not adjacent to the others.
    pub(in crate::rust::mm) fn push(&mut self, page: BasePage) -> Result<(), BasePage> {
        match self.0.extended(page.page().pfn() as u64) {
            Some(pfns) => {
                page.into_page();
                // INVARIANT: This owns the page from now on.
                self.0 = pfns;
                Ok(())
            }
            None => Err(page),
        }
    }

    /// Returns the page frame numbers.
    pub(in crate::rust::mm) fn pfns(&self) -> PfnRange {
        self.0
    }

    /// Marks all whole blocks of 2^`order` pages, from the first page on, as offline. Freeing the
    /// pages clears the marks.
    pub(in crate::rust::mm) fn mark_blocks(&self, order: u32) {
        for block in 0..self.0.len() >> order {
            let pfn = self.0.first() + (block << order);
            // SAFETY: By the type invariants this owns these pages, up to the end of the block.
            unsafe { bindings::set_pages_offline(Page::from_pfn(pfn as usize).as_ptr(), order) };
        }
    }

    /// Returns whether the pages are in one zone.
    #[cfg(CONFIG_CONTIG_ALLOC)]
    fn is_in_one_zone(&self) -> bool {
        let ends = [self.0.first(), self.0.end() - 1];
        // SAFETY: By the type invariants these are pages.
        let [first, last] = ends.map(|pfn| unsafe { Page::from_pfn(pfn as usize) }.zone());

        first == last
    }
}

impl Drop for PageRange {
    fn drop(&mut self) {
        #[cfg(CONFIG_CONTIG_ALLOC)]
        if self.0.len() > 1 && self.is_in_one_zone() {
            // SAFETY: By the type invariants the pages are ours. They are in one zone.
            return unsafe {
                bindings::free_contig_range(self.0.first() as usize, self.0.len() as usize)
            };
        }
        for pfn in self.0.first()..self.0.end() {
            // SAFETY: By the type invariants the page is of order 0, and ours.
            drop(unsafe { BasePage::from_page(Page::from_pfn(pfn as usize)) });
        }
    }
}

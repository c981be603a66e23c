// SPDX-License-Identifier: GPL-2.0

//! A list of page frame numbers that is stored in the listed pages themselves.
//!
//! When the driver deflates because the guest is out of memory, it still has to report the pages to
//! the device. It stores their list in some of these pages. Adjacent pages share an entry, so that
//! usually one page is enough for a hundred thousand others.
//!
//! C header: [`include/linux/mm.h`](srctree/include/linux/mm.h)

use crate::rust::mm::{
    pages::{
        owned::BasePage,
        page::Page,
        page_list::PageList,
        ring::Linked, //
    },
    pfn_range::PfnRange, //
};

use core::{
    mem,
    ptr::NonNull, //
};
use kernel::{
    page::PAGE_SIZE,
    task::might_sleep, //
};

/// The content of a backlog page.
#[repr(C)]
struct Backlog {
    /// The backlog page below this one.
    below: Option<Page>,
    /// How many ranges are on the page.
    len: usize,
    /// The first page frame number, and the number of pages, of each range. Unused entries are 0.
    ranges: [(u64, u64); CAPACITY],
}

/// How many ranges fit on a backlog page.
const CAPACITY: usize = (PAGE_SIZE - 2 * size_of::<usize>()) / size_of::<(u64, u64)>();

const _: () = assert!(size_of::<Backlog>() <= PAGE_SIZE);

impl Backlog {
    /// Returns the range that was added last.
    fn last(&self) -> Option<PfnRange> {
        let &(first, len) = self.ranges.get(self.len.checked_sub(1)?)?;

        PfnRange::new(first, len)
    }

    /// Replaces the range that was added last.
    fn set_last(&mut self, range: PfnRange) {
        if let Some(last) = self.ranges.get_mut(self.len.wrapping_sub(1)) {
            *last = (range.first(), range.len());
        }
    }

    /// Adds the page `pfn` to the last range, or as a new one. Returns false if there is no room.
    fn add(&mut self, pfn: u64) -> bool {
        if let Some(longer) = self.last().and_then(|last| last.extended(pfn)) {
            self.set_last(longer);
            return true;
        }
        let Some(range) = PfnRange::new(pfn, 1).filter(|_| self.len < CAPACITY) else {
            return false;
        };

        self.len += 1;
        self.set_last(range);
        true
    }
}

/// A stack of ranges of page frame numbers.
///
/// # Invariants
///
/// - The stack owns a reference to `top`, and to each page below, which the contents link.
/// - Each of these pages is of order 0 and in the kernel's linear mapping, and no other code uses
///   its content, which is a `Backlog` with 1 to [`CAPACITY`] ranges. The content does not survive
///   hibernation: the pages are still marked as offline, and such pages are left out of the image.
///   So a stack must be emptied before.
pub(crate) struct RangeStack {
    top: Option<Page>,
}

impl RangeStack {
    /// Returns an empty stack.
    pub(crate) const fn new() -> Self {
        // INVARIANT: There are no pages.
        Self { top: None }
    }

    /// Returns whether there are no ranges on the stack.
    pub(crate) fn is_empty(&self) -> bool {
        self.top.is_none()
    }

    /// Returns the content of the page on top.
    fn backlog(&self) -> Option<NonNull<Backlog>> {
        self.top.map(|page| page.address().cast())
    }

    /// Returns the content of the page on top, mutable.
    fn backlog_mut(&mut self) -> Option<&mut Backlog> {
        let mut backlog = self.backlog()?;

        // SAFETY: By the type invariants the stack owns the page, whose content is a `Backlog`.
        Some(unsafe { backlog.as_mut() })
    }

    /// Adds all order-0 pages on `pages` to the stack. Some of the pages become backlog pages, and
    /// leave the list. They are freed when their ranges have been taken.
    ///
    /// A page with a memory error stores no ranges, and is not recorded if there is no other page
    /// to store it. The device need not know then: the kernel never uses the page again.
    pub(crate) fn record(&mut self, pages: &mut PageList) {
        let mut rest = PageList::new();
        // How many pages with an error wait for another page.
        let mut waiting = 0;

        // The stack returns the last range first. So add ascending pages from the end, and they
        // ascend when they are taken.
        while let Some(page) = pages.pop_last() {
            let pfn = page.page().pfn() as u64;

            if self.backlog_mut().is_some_and(|backlog| backlog.add(pfn)) {
                rest.push_first(page);
            } else if !page.page().has_error() {
                self.push_page(page);
                waiting = 0;
            } else if waiting < pages.base_pages() {
                pages.push_first(page);
                waiting += 1;
            } else {
                rest.push_first(page);
            }
        }

        // The list has no more order-0 pages.
        *pages = rest;
    }

    /// Makes a backlog page of `page`, which lists itself.
    fn push_page(&mut self, page: BasePage) {
        let page = page.into_page();
        let backlog: NonNull<Backlog> = page.address().cast();

        // SAFETY: The page is ours, and is in the linear mapping. Zeroes are a `Backlog` without
        // ranges.
        //
        // INVARIANT: It gets a range.
        unsafe {
            backlog.write_bytes(0, 1);
            (*backlog.as_ptr()).below = self.top;
            (*backlog.as_ptr()).add(page.pfn() as u64);
        }
        self.top = Some(page);
    }

    /// Returns the range on top, if there is one.
    pub(crate) fn top(&self) -> Option<PfnRange> {
        // SAFETY: By the type invariants the stack owns the page, whose content is a `Backlog`.
        unsafe { self.backlog()?.as_ref() }.last()
    }

    /// Takes up to `max` pages from the range on top; `None` if there are none, or if `max` is 0.
    pub(crate) fn take(&mut self, max: u64) -> Option<PfnRange> {
        let backlog = self.backlog_mut()?;
        let range = backlog.last()?;
        let taken = PfnRange::new(range.first(), range.len().min(max))?;

        if let Some(rest) = PfnRange::between(taken.end(), range.end()) {
            backlog.set_last(rest);
            return Some(taken);
        }
        backlog.len -= 1;
        if backlog.len == 0 {
            let below = backlog.below;
            let top = mem::replace(&mut self.top, below);

            // INVARIANT: A page without ranges leaves the stack.
            //
            // SAFETY: By the type invariants the page is of order 0, and ours.
            drop(top.map(|page| unsafe { BasePage::from_page(page) }));
        }
        Some(taken)
    }
}

impl Drop for RangeStack {
    /// Takes time for each range, so it must not be done under a spinlock.
    fn drop(&mut self) {
        if !self.is_empty() {
            might_sleep();
        }
        while self.take(u64::MAX).is_some() {}
    }
}

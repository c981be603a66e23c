// SPDX-License-Identifier: GPL-2.0

//! A list of page frame numbers that needs no memory but the pages that are on it.
//!
//! When memory is given back because there is none left, the driver still has to name to the device which
//! pages it was. The list of them is kept in some of these pages themselves. Neighbours share an
//! entry, so that most of the time one page is enough for a hundred thousand others.
//!
//! C header: [`include/linux/mm.h`](srctree/include/linux/mm.h)

use crate::rust::mm::{
    owned::Single,
    page::Page,
    page_list::PageList,
    pfn_range::PfnRange, //
};

use core::mem::size_of;
use kernel::page::PAGE_SIZE;

/// What a backlog page begins with.
#[repr(C)]
struct Header {
    /// The backlog page below this one.
    below: Option<Page>,
    /// How many ranges are on the page.
    len: usize,
}

/// How many ranges fit on a backlog page.
const CAPACITY: usize = (PAGE_SIZE - size_of::<Header>()) / size_of::<PfnRange>();

/// A stack of ranges of page frame numbers.
///
/// # Invariants
///
/// - The stack owns a reference to `top`, and to each page below, as their headers tell.
/// - Each of these pages is of order 0 and in the kernel's linear mapping, and no other code uses its
///   content. The content does not survive hibernation: the pages are still marked as offline, and
///   such pages are left out of the image. So a stack must be emptied before. It begins with a
///   `Header`, followed by `len` initialised ranges, 1 to [`CAPACITY`] of them.
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

    /// Returns the header of a backlog page, and its first range.
    fn content(page: Page) -> (*mut Header, *mut PfnRange) {
        let header: *mut Header = page.address().as_ptr().cast();

        (header, header.wrapping_add(1).cast())
    }

    /// Returns the header of the page on top, and its last range.
    fn last(&self) -> Option<(*mut Header, *mut PfnRange)> {
        let (header, ranges) = Self::content(self.top?);

        // SAFETY: By the type invariants the stack owns the page, of which the first `len` ranges,
        // at least one, are initialised.
        unsafe { Some((header, ranges.add((*header).len - 1))) }
    }

    /// Adds the page `pfn` to the range on top, or in a new range. Returns false if there is no
    /// room.
    fn add(&mut self, pfn: u64) -> bool {
        let Some((header, last)) = self.last() else {
            return false;
        };

        // SAFETY: By the type invariants the stack owns the page, and the last range is initialised.
        // There is room for one more if `len` is below the capacity.
        //
        // INVARIANT: A range that is added is initialised before it is counted.
        unsafe {
            if let Some(longer) = (*last).extended(pfn) {
                *last = longer;
                return true;
            }
            let Some(range) = PfnRange::new(pfn, 1).filter(|_| (*header).len < CAPACITY) else {
                return false;
            };

            last.add(1).write(range);
            (*header).len += 1;
        }

        true
    }

    /// Adds all order-0 pages on `pages` to the stack. Some of the pages become backlog pages, and
    /// leave the list; they are freed when the ranges on them have been taken.
    pub(crate) fn record(&mut self, pages: &mut PageList) {
        let mut rest = PageList::new();

        // What was added last is taken first: from the end, so that pages that ascend do so when
        // they are taken.
        while let Some(page) = pages.pop_last() {
            let pfn = page.page().pfn() as u64;

            if self.add(pfn) {
                rest.push_first(page);
            } else if let Some(range) = PfnRange::new(pfn, 1) {
                self.push_page(page, range);
            }
        }

        // The list has no more order-0 pages.
        *pages = rest;
    }

    /// Makes a backlog page of `page`, with one range on it.
    fn push_page(&mut self, page: Single, range: PfnRange) {
        let page = page.into_page();
        let (header, ranges) = Self::content(page);

        // SAFETY: The page is ours, and is in the linear mapping.
        //
        // INVARIANT: It has one range.
        unsafe {
            header.write(Header {
                below: self.top,
                len: 1,
            });
            ranges.write(range);
        }
        self.top = Some(page);
    }

    /// Returns the range on top, if there is one.
    pub(crate) fn top(&self) -> Option<PfnRange> {
        // SAFETY: By the type invariants the last range is initialised.
        self.last().map(|(_, last)| unsafe { *last })
    }

    /// Takes up to `max` pages off the range on top; `None` if there are none, or if `max` is 0.
    pub(crate) fn take(&mut self, max: u64) -> Option<PfnRange> {
        let whole = self.top()?;
        let taken = PfnRange::new(whole.first(), whole.len().min(max))?;
        let (header, last) = self.last()?;

        // SAFETY: By the type invariants the stack owns the page on top.
        //
        // INVARIANT: When the last range of a page is taken, the page leaves the stack.
        unsafe {
            if let Some(rest) = PfnRange::new(taken.end(), whole.len() - taken.len()) {
                *last = rest;
                return Some(taken);
            }

            (*header).len -= 1;
            if (*header).len == 0 {
                let below = (*header).below;
                let top = core::mem::replace(&mut self.top, below);

                drop(top.map(|page| Single::new(page)));
            }
        }
        Some(taken)
    }
}

impl Drop for RangeStack {
    fn drop(&mut self) {
        while self.take(u64::MAX).is_some() {}
    }
}

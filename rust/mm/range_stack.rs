// SPDX-License-Identifier: GPL-2.0

//! A list of page frame numbers that needs no memory but the pages that are on it.
//!
//! When memory is given back because there is none left, the device still has to be told which
//! pages it was. The list of them is kept in some of these pages themselves. Neighbours share an
//! entry, so that most of the time one page is enough for a hundred thousand others.
//!
//! C header: [`include/linux/mm.h`](srctree/include/linux/mm.h)

use crate::rust::{
    bindings,
    mm::page_list::PageList, //
};

use core::{
    mem::size_of,
    ptr::NonNull, //
};
use kernel::page::PAGE_SIZE;

/// Pages with consecutive page frame numbers, in kernel pages.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(C)]
pub(crate) struct PfnRange {
    /// The first page frame number.
    pub(crate) first: u64,
    /// The number of pages, at least 1.
    pub(crate) len: u64,
}

impl PfnRange {
    /// Makes the range longer by the page `pfn`, if that is next to it. Returns whether it is.
    fn extend(&mut self, pfn: u64) -> bool {
        if pfn.checked_add(1) == Some(self.first) {
            self.first = pfn;
        } else if self.first.checked_add(self.len) != Some(pfn) {
            return false;
        }

        self.len += 1;
        true
    }
}

/// What a carrier page begins with.
#[repr(C)]
struct Header {
    /// The carrier below this one.
    below: Option<NonNull<bindings::page>>,
    /// How many ranges are on the page.
    len: usize,
}

/// How many ranges fit on a carrier page.
const CAPACITY: usize = (PAGE_SIZE - size_of::<Header>()) / size_of::<PfnRange>();

/// A stack of ranges of page frame numbers.
///
/// # Invariants
///
/// - The stack owns a reference to `top`, and to each page below, as their headers tell.
/// - Each of these pages is of order 0 and in the kernel's linear mapping, and nobody else uses its
///   content. The content does not survive hibernation: the pages are still marked as offline, and
///   such pages are left out of the image. So a stack must be emptied before. It begins with a
///   `Header`, followed by `len` initialised ranges, 1 to [`CAPACITY`] of them.
pub(crate) struct RangeStack {
    top: Option<NonNull<bindings::page>>,
}

// SAFETY: Pages are not tied to a thread, and the stack owns its pages.
unsafe impl Send for RangeStack {}

// SAFETY: A shared reference gives read access only.
unsafe impl Sync for RangeStack {}

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

    /// Returns the header of the carrier `page`, and its first range.
    ///
    /// # Safety
    ///
    /// `page` must be a page of order 0 in the kernel's linear mapping, which the caller owns.
    unsafe fn content(page: NonNull<bindings::page>) -> (*mut Header, *mut PfnRange) {
        // SAFETY: The page is mapped by the requirements of this function, and larger than a
        // header.
        unsafe {
            let header: *mut Header = bindings::balloon_rs_page_address(page.as_ptr()).cast();

            (header, header.add(1).cast())
        }
    }

    /// Adds the page `pfn` to the range on top, or in a new range. Returns false if there is no
    /// room.
    fn add(&mut self, pfn: u64) -> bool {
        let Some(top) = self.top else {
            return false;
        };

        // SAFETY: By the type invariants the stack owns the page, of which the first `len` ranges,
        // at least one, are initialised. There is room for one more if `len` is below the capacity.
        //
        // INVARIANT: A range that is added is initialised before it is counted.
        unsafe {
            let (header, ranges) = Self::content(top);
            let len = (*header).len;

            if (*ranges.add(len - 1)).extend(pfn) {
                return true;
            }
            if len == CAPACITY {
                return false;
            }

            ranges.add(len).write(PfnRange { first: pfn, len: 1 });
            (*header).len = len + 1;
        }

        true
    }

    /// Adds all single pages on `pages` to the stack. Some of the pages become carriers, and leave
    /// the list; they are freed when the ranges on them have been taken.
    pub(crate) fn record(&mut self, pages: &mut PageList) {
        let mut rest = PageList::new();

        // What was added last is taken first: from the end, so that pages that ascend do so when
        // they are taken.
        while let Some(page) = pages.pop_last() {
            // SAFETY: The page was on the list, which owned it.
            let pfn = unsafe { bindings::balloon_rs_page_to_pfn(page.as_ptr()) } as u64;

            if self.add(pfn) {
                // SAFETY: The page is of order 0 and was popped, so that it is the caller's to
                // push.
                unsafe { rest.push_first(page) };
                continue;
            }

            // SAFETY: The page was popped, so that it is ours; there is no high memory.
            //
            // INVARIANT: The page becomes a carrier, with one range, which is itself.
            unsafe {
                let (header, ranges) = Self::content(page);

                header.write(Header {
                    below: self.top,
                    len: 1,
                });
                ranges.write(PfnRange { first: pfn, len: 1 });
            }
            self.top = Some(page);
        }

        // The list has no more single pages.
        *pages = rest;
    }

    /// Returns the range on top, if there is one.
    pub(crate) fn top(&self) -> Option<PfnRange> {
        let top = self.top?;

        // SAFETY: By the type invariants the stack owns the page, of which the first `len` ranges,
        // at least one, are initialised.
        unsafe {
            let (header, ranges) = Self::content(top);

            Some(*ranges.add((*header).len - 1))
        }
    }

    /// Takes up to `max` pages off the range on top; `None` if there are none, or if `max` is 0.
    pub(crate) fn take(&mut self, max: u64) -> Option<PfnRange> {
        if max == 0 {
            return None;
        }
        let top = self.top?;

        // SAFETY: By the type invariants the stack owns the page, of which the first `len` ranges,
        // at least one, are initialised.
        //
        // INVARIANT: When the last range of a page is taken, the page leaves the stack.
        unsafe {
            let (header, ranges) = Self::content(top);
            let last = ranges.add((*header).len - 1);
            let whole = *last;

            if whole.len > max {
                *last = PfnRange {
                    first: whole.first + max,
                    len: whole.len - max,
                };
                return Some(PfnRange {
                    first: whole.first,
                    len: max,
                });
            }

            (*header).len -= 1;
            if (*header).len == 0 {
                self.top = (*header).below;
                bindings::balloon_rs_put_page(top.as_ptr());
            }

            Some(whole)
        }
    }
}

impl Drop for RangeStack {
    fn drop(&mut self) {
        while self.take(u64::MAX).is_some() {}
    }
}

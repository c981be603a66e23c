// SPDX-License-Identifier: GPL-2.0

//! Lists of pages that belong to the driver.
//!
//! C headers: [`include/linux/gfp.h`](srctree/include/linux/gfp.h),
//! [`include/linux/mm_types.h`](srctree/include/linux/mm_types.h)

use super::bindings;

use core::{
    marker::PhantomData,
    ptr::{
        self,
        NonNull, //
    },
};

/// The largest order of a block that the page allocator hands out.
pub(crate) const MAX_ORDER: u32 = bindings::BALLOON_MAX_PAGE_ORDER;

/// Returns the list head in `page`.
///
/// # Safety
///
/// `page` must point to a `struct page`.
unsafe fn lru(page: NonNull<bindings::page>) -> *mut bindings::list_head {
    // SAFETY: The list head lies that far into the `struct page` that the caller vouches for.
    unsafe { page.as_ptr().byte_add(bindings::PAGE_LRU_OFFSET) }.cast()
}

/// Returns the page that the list head `lru` lies in.
///
/// # Safety
///
/// `lru` must point to the list head of a `struct page`.
unsafe fn page_of(lru: *mut bindings::list_head) -> NonNull<bindings::page> {
    // SAFETY: The caller vouches for the page around `lru`, which makes the result valid and not null.
    unsafe { NonNull::new_unchecked(lru.byte_sub(bindings::PAGE_LRU_OFFSET).cast()) }
}

/// Makes `next` the successor of `prev`.
///
/// # Safety
///
/// Both must be valid list heads that nobody else uses.
unsafe fn link(prev: *mut bindings::list_head, next: *mut bindings::list_head) {
    // SAFETY: By the requirements of this function.
    unsafe {
        (*prev).next = next;
        (*next).prev = prev;
    }
}

/// Pages of order 0 that are owned by the list and linked through the `lru` field of `struct page`.
///
/// The list can be moved, because it is a ring of pages without a head; it never allocates. Dropping it
/// frees the pages.
///
/// # Invariants
///
/// - `first` is `None` if and only if `len` is 0.
/// - Else the `lru` fields of exactly `len` pages, among them `first`, form one ring. All are of order 0,
///   and the list owns one reference to each and the use of its `lru` field.
pub(crate) struct PageList {
    first: Option<NonNull<bindings::page>>,
    len: usize,
}

// SAFETY: Pages are not tied to a thread, and the list owns its pages.
unsafe impl Send for PageList {}

// SAFETY: A shared reference gives read access only.
unsafe impl Sync for PageList {}

impl PageList {
    /// Returns an empty list.
    pub(crate) const fn new() -> Self {
        // INVARIANT: An empty list has no first page.
        Self {
            first: None,
            len: 0,
        }
    }

    /// Returns how many pages (kernel pages) are on the list.
    pub(crate) fn len(&self) -> usize {
        self.len
    }

    /// Returns whether no page is on the list.
    pub(crate) fn is_empty(&self) -> bool {
        self.len == 0
    }

    /// Puts `page` at the end of the list.
    ///
    /// # Safety
    ///
    /// `page` must be of order 0; the caller gives a reference to it and the use of its `lru` field away.
    pub(super) unsafe fn push(&mut self, page: NonNull<bindings::page>) {
        // SAFETY: The caller owns `page`, and by the type invariants the list owns `first` and the page
        // before it, so that their list heads are valid and used by nobody else.
        unsafe {
            let new = lru(page);
            let first = self.first.map_or(new, |first| lru(first));
            let last = if first == new { new } else { (*first).prev };

            link(last, new);
            link(new, first);
        }

        // INVARIANT: The ring has got one more page, which the list owns from now on.
        self.first.get_or_insert(page);
        self.len += 1;
    }

    /// Takes the first page off the list. The caller owns it.
    pub(super) fn pop(&mut self) -> Option<NonNull<bindings::page>> {
        let page = self.first?;

        // INVARIANT: The page leaves the ring; if it was the last one, the list is empty.
        self.len -= 1;
        self.first = if self.len == 0 {
            None
        } else {
            // SAFETY: By the type invariants the neighbours are pages of the list.
            unsafe {
                let this = lru(page);
                let next = (*this).next;

                link((*this).prev, next);
                Some(page_of(next))
            }
        };

        Some(page)
    }

    /// Allocates a block of 2^`order` pages, splits it and puts its pages at the end of the list in the
    /// order of their addresses. Returns whether it succeeded.
    ///
    /// The memory is not initialised. Only for a single page is memory reclaimed, and lightly: no block
    /// is worth pushing the guest into reclaim or compaction. Sleeps only if `order` is 0.
    pub(crate) fn alloc_block(&mut self, order: u32) -> bool {
        let gfp = if order == 0 {
            bindings::GFP_BALLOON_PAGE
        } else {
            bindings::GFP_BALLOON_BLOCK
        };

        // SAFETY: The flags are valid ones, and an order that is too large makes the call fail.
        let Some(block) = NonNull::new(unsafe { bindings::alloc_pages(gfp, order) }) else {
            return false;
        };

        if order > 0 {
            // SAFETY: The block was allocated with this order and without `__GFP_COMP`.
            unsafe { bindings::split_page(block.as_ptr(), order) };
        }

        for n in 0..1usize << order {
            // SAFETY: A block's `struct page`s are contiguous; `split_page` made each an order 0 page with
            // a reference of its own, and nobody else knows them.
            unsafe { self.push(block.add(n)) };
        }

        true
    }

    /// Allocates the `len` pages from the page frame number `first` on, wherever their contents have to go for that.
    ///
    /// # Errors
    ///
    /// `EBUSY` if something is in the way.
    #[cfg(CONFIG_VIRTIO_BALLOON_RS_KUNIT_TEST)]
    pub(crate) fn alloc_range(first: usize, len: usize) -> kernel::error::Result<Self> {
        let mut pages = Self::new();

        // SAFETY: The function checks the range.
        kernel::error::to_result(unsafe {
            bindings::alloc_contig_range_noprof(first, first + len, 0, bindings::GFP_KERNEL)
        })?;

        for pfn in first..first + len {
            // SAFETY: The pages were just allocated, each as one of order 0.
            unsafe {
                let page = bindings::balloon_rs_pfn_to_page(pfn);

                pages.push(NonNull::new_unchecked(page));
            }
        }

        Ok(pages)
    }

    /// Returns the first page.
    #[cfg(CONFIG_VIRTIO_BALLOON_RS_KUNIT_TEST)]
    pub(super) fn first(&self) -> Option<NonNull<bindings::page>> {
        self.first
    }

    /// Moves every second page to `other`.
    #[cfg(CONFIG_VIRTIO_BALLOON_RS_KUNIT_TEST)]
    pub(crate) fn split_alternating(&mut self, other: &mut Self) {
        for n in 0..self.len() {
            let Some(page) = self.pop() else { break };

            // SAFETY: The page is of order 0 and was popped, so that it is the caller's to push.
            unsafe {
                match n % 2 {
                    0 => self.push(page),
                    _ => other.push(page),
                }
            }
        }
    }

    /// Returns the page frame numbers of the pages.
    pub(crate) fn pfns(&self) -> Pfns<'_> {
        Pfns {
            next: self.first,
            left: self.len,
            _list: PhantomData,
        }
    }

    /// Calls `f` with a list head before the first page, as C code expects it. What is on the list when
    /// `f` returns is what is on it from then on.
    ///
    /// # Safety
    ///
    /// `f` must leave a valid list of order 0 pages behind and return their number; pages that it takes
    /// off are its own, and it gives pages that it puts on away.
    pub(super) unsafe fn with_head(&mut self, f: impl FnOnce(*mut bindings::list_head) -> usize) {
        let mut head = bindings::list_head {
            next: ptr::null_mut(),
            prev: ptr::null_mut(),
        };
        let head = &raw mut head;

        // SAFETY: `head` is a local; by the type invariants the list owns its pages.
        unsafe {
            match self.first {
                None => link(head, head),
                Some(first) => {
                    let first = lru(first);
                    let last = (*first).prev;

                    link(last, head);
                    link(head, first);
                }
            }
        }

        self.len = f(head);

        // SAFETY: `f` left a valid list behind, from which `head` is taken off here.
        //
        // INVARIANT: The caller's promise about `f` is the invariant.
        unsafe {
            let first = (*head).next;

            self.first = if first == head {
                None
            } else {
                link((*head).prev, first);
                Some(page_of(first))
            };
        }
    }
}

impl Drop for PageList {
    fn drop(&mut self) {
        // Neighbours are freed together: they go back to the page allocator as blocks, which need not be
        // put together again from single pages.
        let mut start = 0;
        let mut len = 0;

        while let Some(page) = self.pop() {
            // SAFETY: The page was on the list, which owned it.
            let pfn = unsafe { bindings::balloon_rs_page_to_pfn(page.as_ptr()) };

            if pfn != start + len {
                // SAFETY: These pages were on the list, which owned a reference to each.
                unsafe { bindings::balloon_rs_free_range(start, len) };
                start = pfn;
                len = 0;
            }
            len += 1;
        }

        // SAFETY: As above.
        unsafe { bindings::balloon_rs_free_range(start, len) };
    }
}

/// The page frame numbers of the pages on a [`PageList`], in kernel pages.
pub(crate) struct Pfns<'a> {
    next: Option<NonNull<bindings::page>>,
    left: usize,
    _list: PhantomData<&'a PageList>,
}

impl Iterator for Pfns<'_> {
    type Item = u64;

    fn next(&mut self) -> Option<u64> {
        self.left = self.left.checked_sub(1)?;
        let page = self.next?;

        // SAFETY: The page is on the list, which is borrowed, and so is its successor.
        unsafe {
            self.next = Some(page_of((*lru(page)).next));
            Some(bindings::balloon_rs_page_to_pfn(page.as_ptr()) as u64)
        }
    }
}

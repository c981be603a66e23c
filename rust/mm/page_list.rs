// SPDX-License-Identifier: GPL-2.0

//! Lists of pages that belong to the driver.
//!
//! C headers: [`include/linux/gfp.h`](srctree/include/linux/gfp.h),
//! [`include/linux/mm_types.h`](srctree/include/linux/mm_types.h)

use crate::rust::bindings;
#[cfg(CONFIG_VIRTIO_BALLOON_RS_KUNIT_TEST)]
use crate::rust::mm::memory;

use core::{
    mem,
    ptr::{
        self,
        NonNull, //
    }, //
};
use kernel::prelude::*;

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
    // SAFETY: The caller vouches for the page around `lru`, which makes the result valid and not
    // null.
    unsafe { NonNull::new_unchecked(lru.byte_sub(bindings::PAGE_LRU_OFFSET).cast()) }
}

/// The bits of a page's `private` field that have the order. The others have the owner, if there is
/// one.
pub(in crate::rust) const ORDER_MASK: usize = 63;

/// Returns the `private` field of `page`.
///
/// # Safety
///
/// `page` must point to a `struct page`.
unsafe fn private(page: NonNull<bindings::page>) -> *mut c_ulong {
    // SAFETY: The field lies that far into the `struct page` that the caller vouches for.
    unsafe { page.as_ptr().byte_add(bindings::PAGE_PRIVATE_OFFSET) }.cast()
}

/// Returns the order that is noted in `page`: 0 for a page that stands for itself.
///
/// # Safety
///
/// `page` must point to a `struct page` that the caller owns, in whose `private` field nothing but
/// the order and the owner was noted.
pub(in crate::rust) unsafe fn order(page: NonNull<bindings::page>) -> u32 {
    // SAFETY: By the requirements of this function.
    unsafe { (private(page).read() as usize & ORDER_MASK) as u32 }
}

/// Notes the owner of the block that begins with `page`, or that there is none (0).
///
/// # Safety
///
/// As for [`order`]. `owner` must have no bits of [`ORDER_MASK`].
pub(in crate::rust) unsafe fn set_owner(page: NonNull<bindings::page>, owner: usize) {
    // Others may read the field of a page that is marked.
    //
    // SAFETY: By the requirements of this function.
    unsafe { private(page).write_volatile(owner as c_ulong | order(page) as c_ulong) };
}

/// Marks all pages of a block as offline, so that nobody looks at what is in them, and notes the
/// block's order.
///
/// # Safety
///
/// `page` must begin a block of this order that the caller owns.
pub(in crate::rust) unsafe fn mark_block(page: NonNull<bindings::page>, order: u32) {
    // SAFETY: By the requirements of this function.
    unsafe { bindings::balloon_rs_mark_block(page.as_ptr(), order) };
}

/// Takes the marks off a block's pages, as they have to be before it is freed, and returns the
/// block's order.
///
/// # Safety
///
/// `page` must begin a block that was marked, and that the caller owns.
pub(in crate::rust) unsafe fn unmark_block(page: NonNull<bindings::page>) -> u32 {
    // SAFETY: By the requirements of this function.
    unsafe { bindings::balloon_rs_unmark_block(page.as_ptr()) }
}

/// Makes `next` the successor of `prev`.
///
/// # Safety
///
/// Both must be valid list heads that nobody else uses.
unsafe fn link(prev: *mut bindings::list_head, next: *mut bindings::list_head) {
    // Compaction looks at the pages of others, too, where `next` is what tells a tail page from a
    // head: it has to see the old value or the new one.
    //
    // SAFETY: By the requirements of this function.
    unsafe {
        ptr::write_volatile(&raw mut (*prev).next, next);
        (*next).prev = prev;
    }
}

/// Pages that are linked through the `lru` field of `struct page`, without a head, so that a ring
/// can be moved.
///
/// # Invariants
///
/// - `first` is `None` if and only if `len` is 0.
/// - Else the `lru` fields of exactly `len` pages, among them `first`, form one ring, and are the
///   ring's to use.
struct Ring {
    first: Option<NonNull<bindings::page>>,
    len: usize,
}

impl Ring {
    const fn new() -> Self {
        // INVARIANT: An empty ring has no first page.
        Self {
            first: None,
            len: 0,
        }
    }

    /// Puts `page` at the end.
    ///
    /// # Safety
    ///
    /// `page` must point to a `struct page`; the caller gives the use of its `lru` field away.
    unsafe fn push(&mut self, page: NonNull<bindings::page>) {
        // SAFETY: The caller owns the field of `page`, and by the type invariants the ring owns
        // those of `first` and of the page before it.
        unsafe {
            let new = lru(page);
            let first = self.first.map_or(new, |first| lru(first));
            let last = if first == new { new } else { (*first).prev };

            link(last, new);
            link(new, first);
        }

        // INVARIANT: The ring has got one more page.
        self.first.get_or_insert(page);
        self.len += 1;
    }

    /// Takes the first page out.
    fn pop(&mut self) -> Option<NonNull<bindings::page>> {
        let page = self.first?;

        // INVARIANT: The page leaves the ring; if it was the last one, the ring is empty.
        self.len -= 1;
        self.first = if self.len == 0 {
            None
        } else {
            // SAFETY: By the type invariants the neighbours are pages of the ring.
            unsafe {
                let this = lru(page);
                let next = (*this).next;

                link((*this).prev, next);
                Some(page_of(next))
            }
        };

        Some(page)
    }

    /// Takes `page` out.
    ///
    /// # Safety
    ///
    /// It must be in the ring.
    unsafe fn remove(&mut self, page: NonNull<bindings::page>) {
        // The ring begins with any of its pages, for a moment.
        //
        // INVARIANT: The page is one of the ring, and so is the first one, if there is another one.
        let first = self.first.replace(page);
        self.pop();
        if first != Some(page) {
            self.first = first;
        }
    }

    /// Takes the last page out.
    fn pop_last(&mut self) -> Option<NonNull<bindings::page>> {
        // The ring begins with its last page, if one says so.
        //
        // INVARIANT: The page is one of the ring.
        self.first = self.first.map(|first| {
            // SAFETY: By the type invariants the page before the first one is a page of the ring.
            unsafe { page_of((*lru(first)).prev) }
        });
        self.pop()
    }
}

/// Memory that is owned by the list: single pages, and blocks that are kept whole.
///
/// The list can be moved; it never allocates. Dropping it frees the memory.
///
/// # Invariants
///
/// - The pages of `singles` are of order 0, their `private` fields are 0, and the list owns a
///   reference to each.
/// - The pages of `blocks` are the first ones of blocks of `block_pages` pages in all, which the
///   list owns. Each has the block's order in its `private` field, and all pages of the block are
///   marked as offline.
pub(crate) struct PageList {
    singles: Ring,
    blocks: Ring,
    block_pages: usize,
}

// SAFETY: Pages are not tied to a thread, and the list owns its pages.
unsafe impl Send for PageList {}

// SAFETY: A shared reference gives read access only.
unsafe impl Sync for PageList {}

impl PageList {
    /// Returns an empty list.
    pub(crate) const fn new() -> Self {
        // INVARIANT: There are no pages.
        Self {
            singles: Ring::new(),
            blocks: Ring::new(),
            block_pages: 0,
        }
    }

    /// Returns how many pages (kernel pages) are on the list.
    pub(crate) fn len(&self) -> usize {
        self.singles.len + self.block_pages
    }

    /// Returns how many single pages are on the list.
    pub(in crate::rust) fn singles(&self) -> usize {
        self.singles.len
    }

    /// Returns whether no page is on the list.
    pub(crate) fn is_empty(&self) -> bool {
        self.len() == 0
    }

    /// Puts `page` at the end of the single pages.
    ///
    /// # Safety
    ///
    /// `page` must be of order 0, with a `private` field of 0; the caller gives a reference to it
    /// and the use of its `lru` field away.
    pub(in crate::rust) unsafe fn push(&mut self, page: NonNull<bindings::page>) {
        // SAFETY: By the requirements of this function.
        //
        // INVARIANT: The page is the list's from now on.
        unsafe { self.singles.push(page) };
    }

    /// Puts `page` before the first single page.
    ///
    /// # Safety
    ///
    /// As for [`push`](Self::push).
    pub(in crate::rust) unsafe fn push_first(&mut self, page: NonNull<bindings::page>) {
        // SAFETY: By the requirements of this function.
        //
        // INVARIANT: The page is the list's from now on, and one of the ring.
        unsafe { self.singles.push(page) };
        self.singles.first = Some(page);
    }

    /// Takes the first single page off the list. The caller owns it.
    pub(in crate::rust) fn pop(&mut self) -> Option<NonNull<bindings::page>> {
        self.singles.pop()
    }

    /// Takes the last single page off the list. The caller owns it.
    pub(in crate::rust) fn pop_last(&mut self) -> Option<NonNull<bindings::page>> {
        self.singles.pop_last()
    }

    /// Puts the block that begins with `page` at the end of the blocks.
    ///
    /// # Safety
    ///
    /// `page` must begin a block that [`mark_block`] has marked; the caller gives the block away.
    pub(in crate::rust) unsafe fn push_block(&mut self, page: NonNull<bindings::page>) {
        // SAFETY: By the requirements of this function.
        //
        // INVARIANT: The block is the list's from now on.
        unsafe {
            self.blocks.push(page);
            self.block_pages += 1 << order(page);
        }
    }

    /// Takes the first block off the list, which the caller owns, and which stays marked.
    pub(in crate::rust) fn pop_block(&mut self) -> Option<NonNull<bindings::page>> {
        let page = self.blocks.pop()?;

        // SAFETY: The page was on the list. By the type invariants its order is where it is read.
        //
        // INVARIANT: The block's pages are off the list.
        self.block_pages -= 1 << unsafe { order(page) };
        Some(page)
    }

    /// Takes the block that begins with `page` off the list. The caller owns it, and it stays
    /// marked.
    ///
    /// # Safety
    ///
    /// It must be on the list.
    pub(in crate::rust) unsafe fn remove_block(&mut self, page: NonNull<bindings::page>) {
        // SAFETY: By the requirements of this function. By the type invariants the order is where
        // it is read.
        //
        // INVARIANT: The block's pages are off the list.
        unsafe {
            self.blocks.remove(page);
            self.block_pages -= 1 << order(page);
        }
    }

    /// Takes the first pages off that are all on one node: blocks, if there are any, or else single
    /// pages. Returns the node's number with them.
    pub(in crate::rust) fn take_node(&mut self) -> Option<(usize, Self)> {
        let mut taken = Self::new();
        let mut node = None;

        while let Some(page) = self.blocks.first.or(self.singles.first) {
            // SAFETY: By the type invariants the page is valid.
            let this = unsafe { bindings::balloon_rs_page_to_nid(page.as_ptr()) } as usize;
            if *node.get_or_insert(this) != this {
                break;
            }

            // SAFETY: What is popped is the caller's to push.
            unsafe {
                match self.pop_block() {
                    Some(page) => taken.push_block(page),
                    None => {
                        self.pop();
                        taken.push(page);
                    }
                }
            }
        }

        node.map(|node| (node, taken))
    }

    /// Returns the length of the first block in kernel pages.
    pub(in crate::rust) fn first_block_len(&self) -> Option<usize> {
        // SAFETY: By the type invariants the page begins a block of the list.
        self.blocks.first.map(|page| 1 << unsafe { order(page) })
    }

    /// Calls `each` for all single pages that follow each other and are in the same zone: with one
    /// of them, and how many there are.
    pub(in crate::rust) fn zones(&self, mut each: impl FnMut(NonNull<bindings::page>, usize)) {
        let Some(mut page) = self.singles.first else {
            return;
        };
        let mut count = 0;

        for _ in 0..self.singles.len {
            // SAFETY: By the type invariants these are pages of the ring.
            unsafe {
                let next = page_of((*lru(page)).next);

                count += 1;
                if !bindings::balloon_rs_same_zone(page.as_ptr(), next.as_ptr()) {
                    each(page, mem::take(&mut count));
                }
                page = next;
            }
        }

        // The ring ends in the zone where it begins.
        if count > 0 {
            each(page, count);
        }
    }

    /// Makes single pages of all blocks.
    pub(crate) fn split_blocks(&mut self) {
        while let Some(page) = self.pop_block() {
            // SAFETY: The block was on the list, and is split into pages of order 0 that nobody
            // else knows.
            unsafe {
                let order = unmark_block(page);

                bindings::balloon_rs_split_block(page.as_ptr(), order);
                for n in 0..1usize << order {
                    self.push(page.add(n));
                }
            }
        }
    }

    /// Puts what is on `other` at the end.
    pub(crate) fn append(&mut self, mut other: Self) {
        // SAFETY: What is popped is the caller's, in the form in which it is pushed.
        unsafe {
            while let Some(page) = other.pop_block() {
                self.push_block(page);
            }
            while let Some(page) = other.pop() {
                self.push(page);
            }
        }
    }

    /// Takes those of the first blocks off that are adjacent. Returns them with the page frame
    /// number (of a kernel page) of their first page.
    pub(crate) fn take_adjacent(&mut self) -> Option<(u64, Self)> {
        // SAFETY: By the type invariants the pages on the list are valid.
        let pfn = |page: NonNull<bindings::page>| unsafe {
            bindings::balloon_rs_page_to_pfn(page.as_ptr()) as u64
        };
        let first = pfn(self.blocks.first?);
        let mut taken = Self::new();

        while self.blocks.first.map(pfn) == Some(first + taken.len() as u64) {
            let Some(page) = self.pop_block() else { break };

            // SAFETY: The block was on the list, and is marked.
            unsafe { taken.push_block(page) };
        }
        Some((first, taken))
    }

    /// Takes all but `len` pages off, or none if there are not more. Splits a block for that, if
    /// need be.
    pub(crate) fn split_off(&mut self, len: usize) -> Self {
        let mut rest = mem::replace(self, Self::new());

        // SAFETY: What is popped is the caller's, in the form in which it is pushed.
        unsafe {
            while rest
                .first_block_len()
                .is_some_and(|block| self.len() + block <= len)
            {
                if let Some(page) = rest.pop_block() {
                    self.push_block(page);
                }
            }
            if self.len() < len && rest.singles.len < len - self.len() {
                let mut split = Self::new();

                if let Some(page) = rest.pop_block() {
                    split.push_block(page);
                }
                split.split_blocks();
                rest.append(split);
            }
            while self.len() < len {
                let Some(page) = rest.pop() else { break };
                self.push(page);
            }
        }
        rest
    }

    /// Allocates the `len` pages from the page frame number `first` on, wherever their contents
    /// have to go for that.
    ///
    /// # Errors
    ///
    /// `EBUSY` if something is in the way, `EINVAL` if that is not memory of one zone.
    #[cfg(CONFIG_VIRTIO_BALLOON_RS_KUNIT_TEST)]
    pub(crate) fn alloc_range(first: usize, len: usize) -> kernel::error::Result<Self> {
        let mut pages = Self::new();

        let end = first.checked_add(len).ok_or(EINVAL)?;

        // SAFETY: The function has no preconditions.
        if !unsafe { bindings::balloon_rs_is_in_one_zone(first, len) } {
            return Err(EINVAL);
        }
        // SAFETY: It was just checked that there is such memory, which tests do not take away.
        kernel::error::to_result(unsafe {
            bindings::alloc_contig_range_noprof(first, end, 0, bindings::GFP_KERNEL)
        })?;

        for pfn in first..end {
            // SAFETY: The pages were just allocated, each as one of order 0.
            unsafe {
                let page = bindings::balloon_rs_pfn_to_page(pfn);

                pages.push(NonNull::new_unchecked(page));
            }
        }

        Ok(pages)
    }

    /// Takes the first `max` single pages off, or all if there are fewer.
    pub(in crate::rust) fn take_singles(&mut self, max: usize) -> Self {
        let mut taken = Self::new();

        for _ in 0..max {
            let Some(page) = self.pop() else { break };

            // SAFETY: The page is of order 0 and was popped, so that it is the caller's to push.
            unsafe { taken.push(page) };
        }
        taken
    }

    /// Moves those single pages to `other` for whose page frame number (of a kernel page)
    /// `is_wanted` returns true.
    pub(crate) fn move_singles(&mut self, other: &mut Self, is_wanted: impl Fn(u64) -> bool) {
        for _ in 0..self.singles.len {
            let Some(page) = self.pop() else { break };

            // SAFETY: The page is of order 0 and was popped, so that it is the caller's to push.
            unsafe {
                match is_wanted(bindings::balloon_rs_page_to_pfn(page.as_ptr()) as u64) {
                    true => other.push(page),
                    false => self.push(page),
                }
            }
        }
    }

    /// Returns the first single page.
    #[cfg(CONFIG_VIRTIO_BALLOON_RS_KUNIT_TEST)]
    pub(in crate::rust) fn first(&self) -> Option<NonNull<bindings::page>> {
        self.singles.first
    }

    /// Moves every second single page to `other`.
    #[cfg(CONFIG_VIRTIO_BALLOON_RS_KUNIT_TEST)]
    pub(crate) fn split_alternating(&mut self, other: &mut Self) {
        for n in 0..self.singles.len {
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

    /// Frees the pages, of which page `n` of the first block, or the first single page, has a memory
    /// error. Returns whether that page was kept aside.
    #[cfg(CONFIG_VIRTIO_BALLOON_RS_KUNIT_TEST)]
    pub(crate) fn free_with_error(self, n: usize) -> Option<bool> {
        let page = self.blocks.first.or(self.singles.first)?;
        let len = self.first_block_len().unwrap_or(1);

        // SAFETY: By the type invariants the page is one of the list's.
        unsafe {
            let pfn = bindings::balloon_rs_page_to_pfn(page.as_ptr()) as usize;

            memory::drop_with_error(self, pfn + n % len)
        }
    }

    /// Moves all but the first `len` single pages to `other`.
    #[cfg(CONFIG_VIRTIO_BALLOON_RS_KUNIT_TEST)]
    pub(crate) fn split_at(&mut self, len: usize, other: &mut Self) {
        while self.singles.len > len {
            let Some(page) = self.pop_last() else { break };

            // SAFETY: The page is of order 0 and was popped, so that it is the caller's to push.
            unsafe { other.push_first(page) };
        }
    }

    /// Returns the page frame numbers of the single pages.
    #[cfg(CONFIG_VIRTIO_BALLOON_RS_KUNIT_TEST)]
    pub(crate) fn pfns(&self) -> Pfns<'_> {
        Pfns {
            next: self.singles.first,
            left: self.singles.len,
            _list: core::marker::PhantomData,
        }
    }

    /// Calls `f` with a list head before the first single page, as C code expects it. What is on
    /// the list when `f` returns is what is on it from then on.
    ///
    /// # Safety
    ///
    /// `f` must leave a valid list of order 0 pages behind and return their number; pages that it
    /// takes off are its own, and it gives pages that it puts on away.
    pub(in crate::rust) unsafe fn with_head(
        &mut self,
        f: impl FnOnce(*mut bindings::list_head) -> usize,
    ) {
        let mut head = bindings::list_head {
            next: ptr::null_mut(),
            prev: ptr::null_mut(),
        };
        let head = &raw mut head;

        // SAFETY: `head` is a local; by the type invariants the list owns its pages.
        unsafe {
            match self.singles.first {
                None => link(head, head),
                Some(first) => {
                    let first = lru(first);
                    let last = (*first).prev;

                    link(last, head);
                    link(head, first);
                }
            }
        }

        self.singles.len = f(head);

        // SAFETY: `f` left a valid list behind, from which `head` is taken off here.
        //
        // INVARIANT: The caller's promise about `f` is the invariant.
        unsafe {
            let first = (*head).next;

            self.singles.first = if first == head {
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
        while let Some(page) = self.pop_block() {
            // SAFETY: The block was on the list, which owned it.
            unsafe { bindings::balloon_rs_free_block(page.as_ptr(), unmark_block(page)) };
        }

        // Neighbours are freed together: they go back to the page allocator as blocks, which need
        // not be put together again from single pages.
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

/// The page frame numbers of the single pages on a [`PageList`], in kernel pages.
#[cfg(CONFIG_VIRTIO_BALLOON_RS_KUNIT_TEST)]
pub(crate) struct Pfns<'a> {
    next: Option<NonNull<bindings::page>>,
    left: usize,
    _list: core::marker::PhantomData<&'a PageList>,
}

#[cfg(CONFIG_VIRTIO_BALLOON_RS_KUNIT_TEST)]
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

// SPDX-License-Identifier: GPL-2.0

//! Lists of pages that are linked through the pages themselves.
//!
//! C header: [`include/linux/list.h`](srctree/include/linux/list.h)

use crate::rust::{
    bindings,
    mm::pages::page::Page, //
};

use core::{
    marker::PhantomData,
    mem,
    ptr, //
};

/// An element of a [`Ring`], which owns a page.
///
/// # Safety
///
/// The owner of the page may use its `lru` field, and `from_page` reverses `into_page`.
pub(in crate::rust) unsafe trait Linked {
    /// Returns the page that stands for this.
    fn into_page(self) -> Page;

    /// Takes [`into_page`](Self::into_page) back.
    ///
    /// # Safety
    ///
    /// The page must come from there, and the result is the only one.
    unsafe fn from_page(page: Page) -> Self;
}

/// Makes `next` the successor of `prev`.
///
/// # Safety
///
/// Both must be valid list heads that no other thread uses.
unsafe fn link(prev: *mut bindings::list_head, next: *mut bindings::list_head) {
    // Compaction also reads pages that it does not own, where `next` distinguishes a tail page from
    // a head: it must see the old value or the new one.
    //
    // SAFETY: By the requirements of this function.
    unsafe {
        ptr::write_volatile(&raw mut (*prev).next, next);
        (*next).prev = prev;
    }
}

/// A list that can be moved, since it has no head.
///
/// # Invariants
///
/// - `first` is `None` if and only if `len` is 0.
/// - Otherwise the `lru` fields of exactly `len` pages, among them `first`, form one ring. Each
///   page comes from a `T` that the ring owns.
pub(in crate::rust) struct Ring<T: Linked> {
    first: Option<Page>,
    len: usize,
    _owned: PhantomData<T>,
}

impl<T: Linked> Ring<T> {
    /// Returns an empty ring.
    pub(in crate::rust) const fn new() -> Self {
        // INVARIANT: An empty ring has no first page.
        Self {
            first: None,
            len: 0,
            _owned: PhantomData,
        }
    }

    /// Returns how many there are.
    pub(in crate::rust) fn len(&self) -> usize {
        self.len
    }

    /// Returns the page of the first one.
    pub(in crate::rust) fn first(&self) -> Option<Page> {
        self.first
    }

    /// Returns the pages from the first one on, repeatedly.
    pub(in crate::rust) fn cycle(&self) -> impl Iterator<Item = Page> + use<'_, T> {
        core::iter::successors(self.first, |page| {
            // SAFETY: By the type invariants the neighbours of a page of the ring are pages of the
            // ring, which is borrowed.
            Some(unsafe { Page::of_lru((*page.lru()).next) })
        })
    }

    /// Puts `new` at the end.
    pub(in crate::rust) fn push(&mut self, new: T) {
        let page = new.into_page();
        let new = page.lru();
        let first = self.first.map_or(new, Page::lru);

        // SAFETY: By the type invariants the ring may use the fields of `first` and of the page
        // before it, and that of `page` from now on.
        unsafe {
            let last = if first == new { new } else { (*first).prev };

            link(last, new);
            link(new, first);
        }

        // INVARIANT: The ring has one more page.
        self.first.get_or_insert(page);
        self.len += 1;
    }

    /// Puts `new` before the first one.
    pub(in crate::rust) fn push_first(&mut self, new: T) {
        self.push(new);
        // INVARIANT: The ring begins with its last page.
        self.first = self.last();
    }

    fn last(&self) -> Option<Page> {
        let first = self.first?;

        // SAFETY: By the type invariants the page before the first one is a page of the ring.
        Some(unsafe { Page::of_lru((*first.lru()).prev) })
    }

    /// Takes the first one out.
    pub(in crate::rust) fn pop(&mut self) -> Option<T> {
        let page = self.first?;

        // INVARIANT: The page leaves the ring; a ring without pages is empty.
        self.len -= 1;
        // SAFETY: By the type invariants the neighbours are pages of the ring, and the page comes
        // from a `T`.
        unsafe {
            self.first = if self.len == 0 {
                None
            } else {
                let this = page.lru();

                link((*this).prev, (*this).next);
                Some(Page::of_lru((*this).next))
            };
            Some(T::from_page(page))
        }
    }

    /// Takes the final page out.
    pub(in crate::rust) fn pop_last(&mut self) -> Option<T> {
        // INVARIANT: The ring begins with its last page.
        self.first = self.last();
        self.pop()
    }

    /// Moves all of `other` to the end.
    pub(in crate::rust) fn append(&mut self, other: &mut Self) {
        let len = mem::take(&mut other.len);
        let Some(next) = other.first.take() else {
            return;
        };

        if let Some(first) = self.first {
            // SAFETY: By the type invariants the rings may use the fields of their pages.
            unsafe {
                let last = (*first.lru()).prev;
                let next_last = (*next.lru()).prev;

                link(last, next.lru());
                link(next_last, first.lru());
            }
        }
        // INVARIANT: The pages of both rings form one. The other ring is empty.
        self.first.get_or_insert(next);
        self.len += len;
    }

    /// Calls `f` with a list head before the first page, as C code expects it. The ring then has
    /// the pages that are on the list when `f` returns.
    ///
    /// # Safety
    ///
    /// `f` must leave a valid list of pages that stand for a `T` each, and return their number. It
    /// owns the pages that it takes off, and passes on those that it adds.
    pub(in crate::rust) unsafe fn with_head(
        &mut self,
        f: impl FnOnce(*mut bindings::list_head) -> usize,
    ) {
        let mut head = bindings::list_head {
            next: ptr::null_mut(),
            prev: ptr::null_mut(),
        };
        let head = &raw mut head;

        // SAFETY: `head` is a local; by the type invariants the ring may use the fields of its
        // pages.
        unsafe {
            match self.first.map(Page::lru) {
                None => link(head, head),
                Some(first) => {
                    let last = (*first).prev;

                    link(last, head);
                    link(head, first);
                }
            }
        }

        self.len = f(head);

        // SAFETY: `f` has left a valid list, from which `head` is removed here.
        //
        // INVARIANT: The caller's promise about `f` is the invariant.
        unsafe {
            let first = (*head).next;

            self.first = if first == head {
                None
            } else {
                link((*head).prev, first);
                Some(Page::of_lru(first))
            };
        }
    }
}

impl<T: Linked> Drop for Ring<T> {
    fn drop(&mut self) {
        while self.pop().is_some() {}
    }
}

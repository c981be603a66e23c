// SPDX-License-Identifier: GPL-2.0

//! Page migration, as the owner of a balloon sees it.

#[cfg(CONFIG_VIRTIO_BALLOON_RS_KUNIT_TEST)]
use crate::rust::mm::pages::page_list::PageList;
use crate::rust::{
    bindings,
    mm::{
        pages::page::{
            pageblock_order,
            Page, //
        },
        zone::Zone, //
    }, //
};

use core::marker::PhantomData;
use kernel::{
    prelude::*,
    time::Delta, //
};

/// What follows compaction when it moves pages of a balloon.
pub(crate) trait MigratePage: Send + Sync + 'static {
    /// How long dropping a balloon waits for pages that are isolated for page migration.
    const END_TIMEOUT: Delta;

    /// The page `old` is to leave the balloon, and the page with the number `new` (of a kernel
    /// page) to take its place. The old page goes back to the page allocator when this returns and
    /// all its references are gone.
    ///
    /// Called in process context, with the page locked. It must not wait for the device, and must
    /// not sleep at all unless `may_sleep` is set.
    ///
    /// # Errors
    ///
    /// `EAGAIN` if the pages should not be moved now. The balloon stays as it is then, and
    /// compaction tries some more times.
    fn replace(&self, old: &OldPage<'_>, new: u64, may_sleep: bool) -> Result;
}

/// A page of a balloon that compaction wants to have somewhere else.
///
/// # Invariants
///
/// `page` is valid, and isolated from the balloon's list, for `'a`.
pub(crate) struct OldPage<'a> {
    pub(in crate::rust::mm) page: Page,
    pub(in crate::rust::mm) _balloon: PhantomData<&'a ()>,
}

impl<'a> OldPage<'a> {
    /// Makes an old page of the first one on `pages`, if there is one.
    #[cfg(CONFIG_VIRTIO_BALLOON_RS_KUNIT_TEST)]
    pub(crate) fn first_of(pages: &'a PageList) -> Option<Self> {
        // INVARIANT: The page is on the list, and on no balloon's, for `'a`.
        Some(Self {
            page: pages.base_pages.first()?,
            _balloon: PhantomData,
        })
    }

    /// Returns the page's number, in kernel pages.
    pub(crate) fn pfn(&self) -> u64 {
        self.page.pfn() as u64
    }

    /// Returns whether the kernel may have isolated the page's pageblock, and there is no page of a balloon
    /// after it there: the caller then looks whether all pages are free that it has isolated.
    pub(crate) fn is_last_of_isolated(&self) -> bool {
        let next = self.page.pfn() + 1;
        let end = next.next_multiple_of(1 << pageblock_order());
        let is_offline = |pfn| Page::online(pfn).is_some_and(Page::is_offline);

        Zone::of(self.page).is_isolating() && !(next..end).any(is_offline)
    }

    /// Keeps the page from being freed for as long as the result exists.
    pub(crate) fn keep(&self) -> PageRef {
        // SAFETY: By the type invariants the page is valid, and the balloon has a reference to it.
        //
        // INVARIANT: The reference that is taken here is the result's.
        unsafe { bindings::get_page(self.page.as_ptr()) };
        PageRef(self.page)
    }
}

/// A reference to a page.
///
/// # Invariants
///
/// The page is valid, and one of its references is this one.
pub(crate) struct PageRef(Page);

impl Drop for PageRef {
    fn drop(&mut self) {
        // SAFETY: By the type invariants the reference is ours.
        unsafe { bindings::put_page(self.0.as_ptr()) };
    }
}

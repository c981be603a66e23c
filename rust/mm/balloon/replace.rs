// SPDX-License-Identifier: GPL-2.0

//! Page migration, for the owner of a balloon.

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

/// The owner's handler for page migration in a balloon.
pub(crate) trait MigratePage: Send + Sync + 'static {
    /// How long dropping a balloon waits for pages that are isolated for page migration.
    const END_TIMEOUT: Delta;

    /// The page with the number `new` (of a kernel page) will replace the page `old` in the
    /// balloon. The old page returns to the page allocator when this has returned and all of its
    /// references are gone.
    ///
    /// Called in process context, with the page locked. It must not wait for the device, and must
    /// not sleep at all unless `may_sleep` is set.
    ///
    /// # Errors
    ///
    /// `EAGAIN` to refuse the migration for now. The balloon does not change then, and the kernel
    /// retries a few times.
    fn replace(&self, old: &OldPage<'_>, new: u64, may_sleep: bool) -> Result;

    /// The balloon ends, and all migrations are refused from now on. Releases what others may need,
    /// since page migration may hold pages of the balloon, and this, for a long time.
    fn end(&self) {}
}

/// A page of a balloon that the kernel migrates.
///
/// # Invariants
///
/// `page` is valid, and isolated from the balloon's list, for `'a`.
pub(crate) struct OldPage<'a> {
    pub(in crate::rust::mm) page: Page,
    pub(in crate::rust::mm) _balloon: PhantomData<&'a ()>,
}

impl<'a> OldPage<'a> {
    /// Makes one of the first page on `pages`, if there is one.
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

    /// Returns whether the kernel may have isolated the page's pageblock, and no later page of it
    /// is in a balloon. The kernel's caller then checks whether all isolated pages are free.
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
        // INVARIANT: The result owns the reference that is taken here.
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

// SPDX-License-Identifier: GPL-2.0

//! Page migration, for the owner of a balloon.

#[cfg(CONFIG_VIRTIO_BALLOON_RS_KUNIT_TEST)]
use crate::rust::mm::pages::page_list::PageList;
use crate::rust::{
    bindings,
    mm::{
        pages::{
            owned::PageRange,
            page::{
                pageblock_order,
                Page, //
            }, //
        },
        pfn_range::PfnRange,
        zone::Zone, //
    }, //
};

use core::marker::PhantomData;
use kernel::{
    prelude::*,
    sync::atomic::{
        Atomic,
        Relaxed, //
    },
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

    /// The kernel needs the memory of a block. To agree, the owner [takes](OldBlock::take) the
    /// block, and waits until it is free. The block leaves the balloon without a replacement. If
    /// the owner does not take it, the balloon does not change, and the kernel retries a few times.
    ///
    /// Called in process context, with the first page locked. It may sleep, for a tenth of a second
    /// at most.
    fn vacate(&self, _block: &mut OldBlock<'_>) {}

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

    /// Returns the page, in kernel pages.
    pub(crate) fn pfns(&self) -> Option<PfnRange> {
        PfnRange::new(self.pfn(), 1)
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
        unsafe { PageRef::new(self.page) }
    }
}

/// A block of a balloon whose memory the kernel needs.
///
/// # Invariants
///
/// For `'a` the first page, `page`, is valid and isolated from the balloon's list. Unless
/// `is_taken` is set, it begins a marked block of 2^`order` pages, with 1 or more as `order`, that
/// is in the balloon.
pub(crate) struct OldBlock<'a> {
    pub(in crate::rust::mm) page: Page,
    pub(in crate::rust::mm) order: u32,
    pub(in crate::rust::mm) is_taken: bool,
    /// How many blocks of this order are in the balloon.
    pub(in crate::rust::mm) count: &'a Atomic<usize>,
}

impl OldBlock<'_> {
    /// Takes the block out of the balloon. Returns its pages, in kernel pages, with it; none if it
    /// was taken before.
    pub(crate) fn take(&mut self) -> Option<(PfnRange, TakenBlock)> {
        let pfns = PfnRange::new(self.page.pfn() as u64, 1 << self.order)?;
        let rest = PfnRange::between(pfns.first() + 1, pfns.end())?;
        if self.is_taken {
            return None;
        }

        // INVARIANT: The block is taken, and no longer counted.
        self.is_taken = true;
        self.count.fetch_sub(1, Relaxed);
        // SAFETY: By the type invariants the pages are a block of the balloon, and after the split
        // they are order-0 pages with a reference each. That to the first page stays with the
        // balloon, and those to the others are passed on.
        let block = unsafe {
            bindings::split_page(self.page.as_ptr(), self.order);
            self.page.set_order(0);
            TakenBlock {
                _first: PageRef::new(self.page),
                _rest: PageRange::new(rest),
            }
        };
        Some((pfns, block))
    }
}

/// The pages of a block that has left a balloon. Dropping it frees them, the first one when the
/// kernel has no more references to it.
pub(crate) struct TakenBlock {
    _first: PageRef,
    _rest: PageRange,
}

/// A reference to a page.
///
/// # Invariants
///
/// The page is valid, and one of its references is this one.
pub(crate) struct PageRef(Page);

impl PageRef {
    /// Takes another reference to `page`.
    ///
    /// # Safety
    ///
    /// The page must have one, which stays for the duration of the call.
    unsafe fn new(page: Page) -> Self {
        // SAFETY: By the requirements of this function.
        //
        // INVARIANT: The result owns the reference that is taken here.
        unsafe { bindings::get_page(page.as_ptr()) };
        Self(page)
    }
}

impl Drop for PageRef {
    fn drop(&mut self) {
        // SAFETY: By the type invariants the reference is ours.
        unsafe { bindings::put_page(self.0.as_ptr()) };
    }
}

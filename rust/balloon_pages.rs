// SPDX-License-Identifier: GPL-2.0

//! The pages in the balloon, as the kernel's balloon core keeps them.
//!
//! The core does the accounting (managed pages, `NR_BALLOON_PAGES`, the inflate and deflate events), marks
//! the pages offline, and lets compaction find them.
//!
//! C header: [`include/linux/balloon.h`](srctree/include/linux/balloon.h)

use super::{
    bindings,
    page_list::PageList, //
};

use core::{
    marker::PhantomData,
    ptr::NonNull, //
};
use kernel::{
    container_of,
    prelude::*,
    sync::atomic::{
        Atomic,
        Relaxed, //
    },
    time::{
        delay::fsleep,
        Delta, //
    },
    types::Opaque, //
};

/// What follows compaction when it moves pages of a balloon.
pub(crate) trait Replace: Send + Sync {
    /// The page `old` is to leave the balloon, and the page with the number `new` (of a kernel page) to take its
    /// place. The old page goes back to the page allocator when this returns and all its references are gone.
    ///
    /// Called in process context, with the page locked. It must not wait for the device, and must not sleep at all
    /// unless `may_sleep` is set.
    ///
    /// # Errors
    ///
    /// `EAGAIN` if the pages should not be moved now. The balloon stays as it is then, and compaction tries some
    /// more times.
    fn replace(&self, old: &OldPage<'_>, new: u64, may_sleep: bool) -> Result;
}

/// A page of a balloon that compaction wants to have somewhere else.
///
/// # Invariants
///
/// `page` is valid, and isolated from the balloon's list, for `'a`.
pub(crate) struct OldPage<'a> {
    page: NonNull<bindings::page>,
    _balloon: PhantomData<&'a ()>,
}

impl<'a> OldPage<'a> {
    /// Makes an old page of the first one on `pages`, if there is one.
    #[cfg(CONFIG_VIRTIO_BALLOON_RS_KUNIT_TEST)]
    pub(crate) fn first_of(pages: &'a PageList) -> Option<Self> {
        // INVARIANT: The page is on the list, and on no balloon's, for `'a`.
        Some(Self {
            page: pages.first()?,
            _balloon: PhantomData,
        })
    }

    /// Returns the page's number, in kernel pages.
    pub(crate) fn pfn(&self) -> u64 {
        // SAFETY: By the type invariants the page is valid.
        unsafe { bindings::balloon_rs_page_to_pfn(self.page.as_ptr()) as u64 }
    }

    /// Keeps the page from being freed for as long as the result exists.
    pub(crate) fn keep(&self) -> PageRef {
        // SAFETY: By the type invariants the page is valid, and the balloon has a reference to it.
        //
        // INVARIANT: The reference that is taken here is the result's.
        unsafe { bindings::balloon_rs_get_page(self.page.as_ptr()) };
        PageRef(self.page)
    }
}

/// A reference to a page.
///
/// # Invariants
///
/// The page is valid, and one of its references is this one.
pub(crate) struct PageRef(NonNull<bindings::page>);

// SAFETY: Pages are not tied to a thread.
unsafe impl Send for PageRef {}

// SAFETY: There is nothing that can be done with a shared reference.
unsafe impl Sync for PageRef {}

impl Drop for PageRef {
    fn drop(&mut self) {
        // SAFETY: By the type invariants the reference is ours.
        unsafe { bindings::balloon_rs_put_page(self.0.as_ptr()) };
    }
}

/// Pages in the balloon. Compaction may move them if `R` agrees.
///
/// Lock order: the core takes its `balloon_pages_lock`, a spinlock, inside of all of these functions;
/// under it only the zones' counters are touched.
///
/// # Invariants
///
/// `info` is initialised, and `len` pages are on its list or isolated from it by compaction.
#[pin_data(PinnedDrop)]
pub(crate) struct BalloonPages<R: Replace> {
    #[pin]
    info: Opaque<bindings::balloon_dev_info>,
    len: Atomic<usize>,
    #[pin]
    replace: R,
}

// SAFETY: The pages are not tied to a thread.
unsafe impl<R: Replace> Send for BalloonPages<R> {}

// SAFETY: The core guards `info` with its lock.
unsafe impl<R: Replace> Sync for BalloonPages<R> {}

impl<R: Replace> BalloonPages<R> {
    /// Returns an initialiser for an empty balloon.
    ///
    /// If `adjust_managed` is set, the guest's total memory shrinks by what is in the balloon.
    pub(crate) fn new(
        adjust_managed: bool,
        replace: impl PinInit<R, Error>,
    ) -> impl PinInit<Self, Error> {
        // INVARIANT: An empty list has no pages.
        try_pin_init!(Self {
            info <- Opaque::ffi_init(|slot: *mut bindings::balloon_dev_info| {
                // SAFETY: `slot` is valid for writes, and is initialised by the first call.
                unsafe {
                    bindings::balloon_rs_devinfo_init(slot);
                    (*slot).adjust_managed_page_count = adjust_managed;
                    (*slot).migratepage = Some(Self::migrate);
                }
            }),
            len: Atomic::new(0),
            replace <- replace,
        })
    }

    extern "C" fn migrate(
        info: *mut bindings::balloon_dev_info,
        new: *mut bindings::page,
        old: *mut bindings::page,
        mode: bindings::migrate_mode,
    ) -> c_int {
        // SAFETY: The core calls with the `info` of a balloon that has pages, and so has not been dropped.
        let this = unsafe { &*container_of!(Opaque::cast_from(info), Self, info) };
        let Some(page) = NonNull::new(old) else {
            return EINVAL.to_errno();
        };
        // INVARIANT: The core has isolated the page, and keeps it until this function returns.
        let old = OldPage {
            page,
            _balloon: PhantomData,
        };
        // SAFETY: The core calls with a valid page.
        let new = unsafe { bindings::balloon_rs_page_to_pfn(new) } as u64;

        let may_sleep = mode != bindings::migrate_mode_MIGRATE_ASYNC;

        match this.replace.replace(&old, new, may_sleep) {
            Ok(()) => 0,
            Err(error) => error.to_errno(),
        }
    }

    /// Returns what follows the moves.
    pub(crate) fn replacer(&self) -> &R {
        &self.replace
    }

    /// Returns how many pages (kernel pages) are in the balloon.
    pub(crate) fn len(&self) -> usize {
        self.len.load(Relaxed)
    }

    /// Puts `pages` into the balloon.
    pub(crate) fn insert(&self, mut pages: PageList) {
        let mut inserted = 0;

        // SAFETY: The function takes all pages off the list, each with its reference; the pages are
        // order 0 pages as the core wants them.
        unsafe {
            pages.with_head(|head| {
                inserted = bindings::balloon_page_list_enqueue(self.info.get(), head);
                0
            })
        };

        // INVARIANT: That many pages were added to the list.
        self.len.add(inserted, Relaxed);
    }

    /// Takes up to `max` pages (kernel pages) out of the balloon.
    ///
    /// Fewer are returned if the balloon holds fewer, or if compaction holds some just now.
    pub(crate) fn take(&self, max: usize) -> PageList {
        let mut pages = PageList::new();

        // SAFETY: The function puts pages that were on the core's list, with their references, on this one
        // and returns how many.
        unsafe {
            pages.with_head(|head| bindings::balloon_page_list_dequeue(self.info.get(), head, max))
        };

        // INVARIANT: That many pages were taken off the list.
        self.len.fetch_sub(pages.len(), Relaxed);
        pages
    }
}

#[pinned_drop]
impl<R: Replace> PinnedDrop for BalloonPages<R> {
    fn drop(self: Pin<&mut Self>) {
        // Pages that compaction has isolated refer to `info`. They, or those that take their places, come back
        // soon, whatever the host does.
        while self.len() > 0 {
            if self.take(RELEASE_CHUNK).is_empty() {
                fsleep(Delta::from_millis(1));
            }
        }
    }
}

/// How many pages are taken out under one hold of the core's lock.
const RELEASE_CHUNK: usize = 512;

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

use kernel::{
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

/// Pages in the balloon.
///
/// Lock order: the core takes its `balloon_pages_lock`, a spinlock, inside of all of these functions;
/// under it only the zones' counters are touched.
///
/// # Invariants
///
/// `info` is initialised, and `len` pages are on its list or isolated from it by compaction.
#[pin_data(PinnedDrop)]
pub(crate) struct BalloonPages {
    #[pin]
    info: Opaque<bindings::balloon_dev_info>,
    len: Atomic<usize>,
}

// SAFETY: The pages are not tied to a thread.
unsafe impl Send for BalloonPages {}

// SAFETY: The core guards `info` with its lock.
unsafe impl Sync for BalloonPages {}

impl BalloonPages {
    /// Returns an initialiser for an empty balloon.
    ///
    /// If `adjust_managed` is set, the guest's total memory shrinks by what is in the balloon.
    pub(crate) fn new(adjust_managed: bool) -> impl PinInit<Self> {
        // INVARIANT: An empty list has no pages.
        pin_init!(Self {
            info <- Opaque::ffi_init(|slot: *mut bindings::balloon_dev_info| {
                // SAFETY: `slot` is valid for writes, and is initialised by the first call.
                unsafe {
                    bindings::balloon_rs_devinfo_init(slot);
                    (*slot).adjust_managed_page_count = adjust_managed;
                    (*slot).migratepage = Some(Self::migrate);
                }
            }),
            len: Atomic::new(0),
        })
    }

    /// Answers compaction that this page cannot be moved.
    extern "C" fn migrate(
        _info: *mut bindings::balloon_dev_info,
        _new: *mut bindings::page,
        _old: *mut bindings::page,
        _mode: bindings::migrate_mode,
    ) -> c_int {
        EBUSY.to_errno()
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
impl PinnedDrop for BalloonPages {
    fn drop(self: Pin<&mut Self>) {
        // Pages that compaction has isolated refer to `info`. Since they cannot be moved, they come back
        // soon, and whatever the host does.
        while self.len() > 0 {
            if self.take(RELEASE_CHUNK).is_empty() {
                fsleep(Delta::from_millis(1));
            }
        }
    }
}

/// How many pages are taken out under one hold of the core's lock.
const RELEASE_CHUNK: usize = 512;

// SPDX-License-Identifier: GPL-2.0

//! The pages of one node that are in the balloon.
//!
//! The kernel's balloon core holds them: order-0 pages on one list, and the first pages of blocks
//! on another one. It marks the pages on its lists as offline, makes them movable, and does the
//! accounting (`NR_BALLOON_PAGES`, the inflate and deflate events). For the other pages of a block
//! the driver does the same. The core could also adjust the zones' numbers of managed pages. But it
//! would do so for each page, and the kernel computes its reserves again each time.
//!
//! The kernel looks at the first page of a block only, since the others have no reference. When it
//! migrates the first page out of an isolated pageblock, the whole block leaves the balloon.
//!
//! C header: [`include/linux/balloon.h`](srctree/include/linux/balloon.h)

use crate::rust::{
    bindings,
    mm::{
        balloon::replace::{
            MigratePage,
            OldBlock,
            OldPage, //
        },
        memory,
        pages::{
            owned::Block,
            page::{
                Page,
                MAX_ORDER, //
            },
            page_list::PageList,
            ring::{
                Linked,
                Ring, //
            }, //
        },
        zone::Zone, //
    },
    work::poll::poll_timeout, //
};

use core::marker::PhantomData;
use kernel::{
    container_of,
    prelude::*,
    sync::{
        atomic::{
            Atomic,
            Relaxed, //
        },
        Arc, //
    },
    types::Opaque, //
};

/// The maximum number of blocks, for each order from 0 on.
pub(crate) type ByOrder = [usize; MAX_ORDER as usize + 1];

/// How many order-0 pages are taken out under one hold of the core's lock.
const PAGES_PER_HOLD: usize = 512;

/// What the balloon core knows of a list of pages.
type Info = Opaque<bindings::balloon_rs_info>;

/// The kernel's handler of page migration for a list.
type Migrate = unsafe extern "C" fn(
    *mut bindings::balloon_rs_info,
    *mut bindings::page,
    *mut bindings::page,
    c_int,
) -> c_int;

/// Pages of one node that are in the balloon. The kernel may migrate them if `R` agrees: pages that
/// it migrates to other nodes stay here.
///
/// Lock order: the core takes its `balloon_pages_lock`, a spinlock, inside all of these functions.
/// It only changes the zones' counters under it.
///
/// # Invariants
///
/// Both lists are initialised. There are as many blocks of each order as `by_order` says: order-0
/// pages on the list of `base`, and the first pages of blocks on that of `blocks`, or isolated from
/// these for migration. Each of these pages stores the order. All pages of a block are marked.
#[pin_data(PinnedDrop)]
pub(in crate::rust::mm) struct NodePages<R: MigratePage> {
    #[pin]
    base: Info,
    #[pin]
    blocks: Info,
    by_order: [Atomic<usize>; MAX_ORDER as usize + 1],
    adjust_managed: bool,
    replace: Arc<R>,
}

// SAFETY: The pages are not tied to a thread.
unsafe impl<R: MigratePage> Send for NodePages<R> {}

// SAFETY: The core guards its lists with its lock.
unsafe impl<R: MigratePage> Sync for NodePages<R> {}

/// Returns an initialiser for an empty list, whose pages `migrate` migrates.
fn empty(migrate: Migrate) -> impl PinInit<Info, Error> {
    Opaque::try_ffi_init(move |slot: *mut bindings::balloon_rs_info| {
        // SAFETY: `slot` is valid for writes, and stays where it is.
        unsafe {
            let pages = &raw mut (*slot).core.pages;

            slot.write(bindings::balloon_rs_info {
                core: bindings::balloon_dev_info {
                    isolated_pages: 0,
                    pages: bindings::list_head {
                        next: pages,
                        prev: pages,
                    },
                    migratepage: Some(bindings::migrate_balloon_page),
                    adjust_managed_page_count: false,
                },
                migrate: Some(migrate),
            });
        }
        Ok(())
    })
}

/// Returns a pointer to the core's part of `info`.
fn core(info: &Info) -> *mut bindings::balloon_dev_info {
    // SAFETY: This only computes an address within `info`.
    unsafe { &raw mut (*info.get()).core }
}

/// Puts all of `ring` on a list, under the core's lock, with interrupts disabled.
fn enqueue<T: Linked>(info: &Info, ring: &mut Ring<T>) {
    // SAFETY: The function takes all pages off the ring, each with its reference, as the core
    // requires.
    unsafe {
        ring.with_head(|head| {
            bindings::balloon_page_list_enqueue(core(info), head);
            0
        })
    };
}

/// Takes up to `max` pages off a list, and puts them on `ring`, which must be empty.
///
/// # Safety
///
/// The pages on the list must come from a `T`.
unsafe fn dequeue<T: Linked>(info: &Info, ring: &mut Ring<T>, max: usize) {
    // SAFETY: The function puts pages that were on the core's list, with their references, on this
    // one and returns how many.
    unsafe { ring.with_head(|head| bindings::balloon_page_list_dequeue(core(info), head, max)) };
}

impl<R: MigratePage> NodePages<R> {
    /// Makes an empty one.
    ///
    /// # Errors
    ///
    /// `ENOMEM`.
    pub(in crate::rust::mm) fn new(
        adjust_managed: bool,
        replace: Arc<R>,
    ) -> Result<Pin<KBox<Self>>> {
        // INVARIANT: Empty lists have no pages.
        let init = try_pin_init!(Self {
            base <- empty(Self::migrate_page),
            blocks <- empty(Self::migrate_block),
            by_order: [const { Atomic::new(0) }; MAX_ORDER as usize + 1],
            adjust_managed,
            replace,
        });

        KBox::pin_init(init, GFP_KERNEL)
    }

    /// The number of blocks of an order.
    fn count(&self, order: u32) -> &Atomic<usize> {
        // The order of a block is not larger than the largest.
        &self.by_order[order.min(MAX_ORDER) as usize]
    }

    /// # Safety
    ///
    /// Only for `migrate_balloon_page`, which the balloon core calls with the `base` of a balloon
    /// that has pages, a page that it has isolated from there, and the page that is to replace it.
    unsafe extern "C" fn migrate_page(
        info: *mut bindings::balloon_rs_info,
        new: *mut bindings::page,
        old: *mut bindings::page,
        mode: c_int,
    ) -> c_int {
        // SAFETY: By the requirements of this function. A balloon that has pages has not been
        // dropped.
        let (this, old, new) = unsafe {
            (
                &*container_of!(Info::cast_from(info), Self, base),
                Page::from_raw(old),
                Page::from_raw(new),
            )
        };
        let (Some(page), Some(new)) = (old, new) else {
            return EINVAL.to_errno();
        };
        // INVARIANT: The core has isolated the page, and keeps it until this function returns.
        let old = OldPage {
            page,
            _balloon: PhantomData,
        };
        let may_sleep = mode != bindings::migrate_mode_MIGRATE_ASYNC as c_int;

        match this.replace.replace(&old, new.pfn() as u64, may_sleep) {
            Ok(()) => {
                // INVARIANT: The core puts this page on the list.
                //
                // SAFETY: The core's caller owns the page until then.
                unsafe { new.set_order(0) };
                if this.adjust_managed && page.zone() != new.zone() {
                    memory::adjust_managed(page, 1);
                    memory::adjust_managed(new, -1);
                }
                0
            }
            Err(error) => error.to_errno(),
        }
    }

    /// # Safety
    ///
    /// Only for `migrate_balloon_page`, which the balloon core calls with the `blocks` of a balloon
    /// that has pages, and a page that it has isolated from there.
    unsafe extern "C" fn migrate_block(
        info: *mut bindings::balloon_rs_info,
        _new: *mut bindings::page,
        old: *mut bindings::page,
        mode: c_int,
    ) -> c_int {
        // SAFETY: By the requirements of this function. A balloon that has pages has not been
        // dropped.
        let (this, old) = unsafe {
            (
                &*container_of!(Info::cast_from(info), Self, blocks),
                Page::from_raw(old),
            )
        };
        // Compaction gains nothing: it tries to make such blocks.
        let (Some(page), true) = (old, mode == bindings::migrate_mode_MIGRATE_SYNC as c_int) else {
            return EAGAIN.to_errno();
        };
        if !Zone::of(page).is_isolating() {
            return EAGAIN.to_errno();
        }
        // INVARIANT: The core has isolated the page, and keeps it until this function returns. It
        // begins a block, which is in the balloon.
        let mut block = OldBlock {
            page,
            order: page.order(),
            is_taken: false,
            count: this.count(page.order()),
        };

        this.replace.vacate(&mut block);
        if !block.is_taken {
            return EAGAIN.to_errno();
        }
        let pages = 1 << block.order;
        if this.adjust_managed {
            memory::adjust_managed(page, pages);
        }
        memory::count_ballooned(page, pages - 1, false);
        // The core counts the event for this page, and leaves it in NR_BALLOON_PAGES.
        memory::forget_ballooned(page);
        ENOENT.to_errno()
    }

    /// Adds the numbers of blocks of each order to `sums`, order-0 pages included.
    pub(in crate::rust::mm) fn add_by_order(&self, sums: &mut ByOrder) {
        for (sum, blocks) in sums.iter_mut().zip(&self.by_order) {
            *sum += blocks.load(Relaxed);
        }
    }

    /// Returns how many pages (kernel pages) there are.
    pub(in crate::rust::mm) fn len(&self) -> usize {
        let orders = self.by_order.iter().enumerate();

        orders
            .map(|(order, blocks)| blocks.load(Relaxed) << order)
            .sum()
    }

    /// Puts `pages` into the balloon.
    pub(in crate::rust::mm) fn insert(&self, mut pages: PageList) {
        // INVARIANT: That many pages are added to the list. Counted before, since they may be taken
        // at once.
        self.count(0).add(pages.base_pages(), Relaxed);

        self.account_base_pages(&pages, true);
        while pages.base_pages() > PAGES_PER_HOLD {
            enqueue(
                &self.base,
                &mut pages.take_base_pages(PAGES_PER_HOLD).base_pages,
            );
        }
        enqueue(&self.base, &mut pages.base_pages);

        while let Some(block) = pages.pop_block() {
            self.insert_block(block);
        }
    }

    fn insert_block(&self, block: Block) {
        let mut ring = Ring::new();

        // INVARIANT: A block is added.
        self.count(block.order()).add(1, Relaxed);
        self.account(&block, true);
        ring.push(block);
        enqueue(&self.blocks, &mut ring);
    }

    /// Accounts for a block, except that the core counts its first page.
    fn account(&self, block: &Block, inflated: bool) {
        let pages = block.len() as c_long;

        if self.adjust_managed {
            memory::adjust_managed(block.page(), if inflated { -pages } else { pages });
        }
        memory::count_ballooned(block.page(), pages - 1, inflated);
    }

    /// Adjusts the zones' numbers of managed pages for all order-0 pages in `pages`.
    fn account_base_pages(&self, pages: &PageList, inflated: bool) {
        if self.adjust_managed {
            pages.zones(|page, count| {
                let count = count as c_long;

                memory::adjust_managed(page, if inflated { -count } else { count });
            });
        }
    }

    /// Takes up to `max` pages (kernel pages) out: up to `max_blocks` blocks that fit, otherwise up
    /// to the same number of order-0 pages.
    ///
    /// Returns none if there are none, or if all of the rest is isolated for migration.
    pub(in crate::rust::mm) fn take(&self, max: usize, max_blocks: usize) -> PageList {
        let mut pages = PageList::new();

        for _ in 0..max_blocks {
            let Some(block) = self.pop_block(max - pages.len()) else {
                break;
            };
            pages.push_block(block);
        }
        let max = max.min(max_blocks);

        if pages.is_empty() {
            pages = self.take_base_pages(max);
        }
        if pages.is_empty() && max > 0 && self.split_block() {
            pages = self.take_base_pages(max);
        }
        pages
    }

    /// Takes the first block out, if it has up to `max` pages.
    fn pop_block(&self, max: usize) -> Option<Block> {
        let mut ring = Ring::<Block>::new();
        let mut orders = 1..=MAX_ORDER.min(max.checked_ilog2()?);

        if !orders.any(|order| self.count(order).load(Relaxed) > 0) {
            return None;
        }
        // SAFETY: By the type invariants these are the first pages of blocks.
        unsafe { dequeue(&self.blocks, &mut ring, 1) };
        let block = ring.pop()?;
        if block.len() > max {
            ring.push(block);
            enqueue(&self.blocks, &mut ring);
            return None;
        }
        // INVARIANT: A block has left.
        self.count(block.order()).fetch_sub(1, Relaxed);
        self.account(&block, false);
        Some(block)
    }

    /// Takes up to `max` order-0 pages out, limited by the time for which the core's lock may be
    /// held.
    fn take_base_pages(&self, max: usize) -> PageList {
        let mut pages = PageList::new();
        let max = max.min(PAGES_PER_HOLD);

        // SAFETY: By the type invariants these are order-0 pages.
        unsafe { dequeue(&self.base, &mut pages.base_pages, max) };

        // INVARIANT: That many pages were taken off the list.
        self.count(0).fetch_sub(pages.len(), Relaxed);
        self.account_base_pages(&pages, false);
        pages
    }

    /// Frees all pages, except those that are isolated for page migration. Returns whether there
    /// are none of these.
    pub(in crate::rust::mm) fn free(&self) -> bool {
        while !self.take(usize::MAX, usize::MAX).is_empty() {}

        self.len() == 0
    }

    /// Splits a block into order-0 pages, if there is one. They stay in the balloon.
    fn split_block(&self) -> bool {
        let Some(block) = self.pop_block(usize::MAX) else {
            return false;
        };
        let mut pages = PageList::new();

        block.unmark().split(|page| pages.push(page));
        self.insert(pages);
        true
    }
}

#[pinned_drop]
impl<R: MigratePage> PinnedDrop for NodePages<R> {
    /// Waits for the pages that are isolated for page migration, which refer to this. There is no
    /// limit, since the kernel would put them back into freed memory. It does put them back: it
    /// tries to migrate an isolated page ten times at most.
    fn drop(self: Pin<&mut Self>) {
        while poll_timeout(R::END_TIMEOUT, || self.free().then_some(())).is_none() {}
    }
}

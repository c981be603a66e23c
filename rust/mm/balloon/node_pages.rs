// SPDX-License-Identifier: GPL-2.0

//! The pages of one node that are in the balloon.
//!
//! The kernel's balloon core holds order-0 pages. It does the accounting (`NR_BALLOON_PAGES`, the
//! inflate and deflate events), marks the pages offline, and makes them movable. Blocks need not be
//! movable, and are held here, with the same accounting. The core could also adjust the zones'
//! numbers of managed pages. But it would do so for each page, and the kernel computes its reserves
//! again each time.
//!
//! C header: [`include/linux/balloon.h`](srctree/include/linux/balloon.h)

use crate::rust::{
    bindings,
    mm::{
        balloon::replace::{
            MigratePage,
            OldPage, //
        },
        memory,
        pages::{
            owned::Block,
            page::{
                pageblock_order,
                Page,
                MAX_ORDER,
                ORDER_MASK, //
            },
            page_list::PageList, //
        },
        pfn_range::PfnRange, //
    },
    work::poll::poll_timeout, //
};

use core::{
    marker::PhantomData,
    ptr, //
};
use kernel::{
    container_of,
    new_spinlock,
    prelude::*,
    sync::{
        atomic::{
            Atomic,
            Relaxed, //
        },
        Arc,
        SpinLock, //
    },
    types::Opaque, //
};

/// The maximum number of blocks, for each order from 0 on.
pub(crate) type ByOrder = [usize; MAX_ORDER as usize + 1];

/// How many order-0 pages are taken out under one hold of the core's lock.
const PAGES_PER_HOLD: usize = 512;

/// Blocks of pages.
///
/// # Invariants
///
/// There are no order-0 pages in `list`, and as many blocks of each order as `by_order` says. Each
/// has `owner` noted in its first page, and no other page has.
struct Blocks {
    list: PageList,
    by_order: ByOrder,
    owner: usize,
}

impl Blocks {
    fn new() -> Self {
        // INVARIANT: There are none.
        Self {
            list: PageList::new(),
            by_order: [0; MAX_ORDER as usize + 1],
            owner: 0,
        }
    }

    /// Adds `block`.
    fn push(&mut self, mut block: Block) {
        // INVARIANT: One more.
        block.set_owner(self.owner);
        if let Some(blocks) = self.by_order.get_mut(block.order() as usize) {
            *blocks += 1;
        }
        self.list.push_block(block);
    }

    /// Takes the first block.
    fn pop(&mut self) -> Option<Block> {
        let block = self.list.pop_block()?;

        Some(self.disown(block))
    }

    /// Takes the block that begins at the page frame number `pfn`, if there is one.
    fn take_at(&mut self, pfn: usize) -> Option<Block> {
        // Other drivers' pages may be marked as well: the value is meaningless then.
        let page = Page::online(pfn).filter(|page| page.is_offline())?;
        let private = page.private();
        if private & !ORDER_MASK != self.owner || private & ORDER_MASK == 0 {
            return None;
        }

        // SAFETY: By the type invariants the page begins one of these blocks.
        let block = unsafe { self.list.remove_block(page) }?;
        Some(self.disown(block))
    }

    /// `block` has left the list.
    fn disown(&mut self, mut block: Block) -> Block {
        // INVARIANT: One less.
        block.set_owner(0);
        if let Some(blocks) = self.by_order.get_mut(block.order() as usize) {
            *blocks -= 1;
        }
        block
    }
}

/// Pages of one node that are in the balloon. The kernel may migrate them if `R` agrees: pages that
/// it migrates to other nodes stay here.
///
/// Lock order: the core takes its `balloon_pages_lock`, a spinlock, inside all of these functions.
/// It only changes the zones' counters under it. The same holds for the lock of `blocks`.
///
/// # Invariants
///
/// `info` is initialised, and `base_pages` pages are on its list or isolated from it for migration.
/// The owner of `blocks` is the address of this.
//
// The alignment leaves room for an order in the address. The core stores the address of `info` in
// order-0 pages: at the start of the struct this is an owner with an order of 0, which no block
// has.
#[repr(C, align(64))]
#[pin_data(PinnedDrop)]
pub(in crate::rust::mm) struct NodePages<R: MigratePage> {
    #[pin]
    info: Opaque<bindings::balloon_rs_info>,
    base_pages: Atomic<usize>,
    #[pin]
    blocks: SpinLock<Blocks>,
    adjust_managed: bool,
    replace: Arc<R>,
}

// SAFETY: The pages are not tied to a thread.
unsafe impl<R: MigratePage> Send for NodePages<R> {}

// SAFETY: The core guards `info` with its lock.
unsafe impl<R: MigratePage> Sync for NodePages<R> {}

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
        let this = KBox::pin_init(Self::init(adjust_managed, replace), GFP_KERNEL)?;

        // INVARIANT: There are no blocks.
        this.blocks.lock().owner = ptr::from_ref(&*this).addr();
        Ok(this)
    }

    fn init(adjust_managed: bool, replace: Arc<R>) -> impl PinInit<Self, Error> {
        // INVARIANT: An empty list has no pages.
        try_pin_init!(Self {
            info <- Opaque::ffi_init(|slot: *mut bindings::balloon_rs_info| {
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
                        migrate: Some(Self::migrate),
                    });
                }
            }),
            base_pages: Atomic::new(0),
            blocks <- new_spinlock!(Blocks::new(), "NodePages::blocks"),
            adjust_managed,
            replace,
        })
    }

    /// What the balloon core knows of these pages.
    fn core(&self) -> *mut bindings::balloon_dev_info {
        // SAFETY: This only computes an address within `info`.
        unsafe { &raw mut (*self.info.get()).core }
    }

    /// # Safety
    ///
    /// Only for `migrate_balloon_page`, which the balloon core calls with the `info` of a balloon
    /// that has pages, a page that it has isolated from there, and the page that is to replace it.
    unsafe extern "C" fn migrate(
        info: *mut bindings::balloon_rs_info,
        new: *mut bindings::page,
        old: *mut bindings::page,
        may_sleep: bool,
    ) -> c_int {
        // SAFETY: By the requirements of this function. A balloon that has pages has not been
        // dropped.
        let (this, old, new) = unsafe {
            (
                &*container_of!(Opaque::cast_from(info), Self, info),
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

        match this.replace.replace(&old, new.pfn() as u64, may_sleep) {
            Ok(()) => {
                if this.adjust_managed && page.zone() != new.zone() {
                    memory::adjust_managed(page, 1);
                    memory::adjust_managed(new, -1);
                }
                0
            }
            Err(error) => error.to_errno(),
        }
    }

    /// Adds the numbers of blocks of each order to `sums`, order-0 pages included.
    pub(in crate::rust::mm) fn add_by_order(&self, sums: &mut ByOrder) {
        sums[0] += self.base_pages.load(Relaxed);
        for (sum, blocks) in sums.iter_mut().zip(self.blocks.lock().by_order) {
            *sum += blocks;
        }
    }

    /// Returns how many pages (kernel pages) there are.
    pub(in crate::rust::mm) fn len(&self) -> usize {
        self.base_pages.load(Relaxed) + self.blocks.lock().list.len()
    }

    /// Puts `pages` into the balloon.
    pub(in crate::rust::mm) fn insert(&self, mut pages: PageList) {
        // INVARIANT: That many pages are added to the list. Counted before, since they may be taken
        // at once.
        self.base_pages.add(pages.base_pages(), Relaxed);

        self.account_base_pages(&pages, true);
        while pages.base_pages() > PAGES_PER_HOLD {
            self.enqueue(&mut pages.take_base_pages(PAGES_PER_HOLD));
        }
        self.enqueue(&mut pages);

        while let Some(block) = pages.pop_block() {
            self.account(&block, true);
            self.blocks.lock().push(block);
        }
    }

    /// Puts all order-0 pages of `pages` on the core's list, under its lock, with interrupts
    /// disabled.
    fn enqueue(&self, pages: &mut PageList) {
        // SAFETY: The function takes all order-0 pages off the list, each with its reference, as
        // the core requires.
        unsafe {
            pages.base_pages.with_head(|head| {
                bindings::balloon_page_list_enqueue(self.core(), head);
                0
            })
        };
    }

    /// Accounts for a block as the core does for its pages.
    fn account(&self, block: &Block, inflated: bool) {
        let pages = block.len() as c_long;

        if self.adjust_managed {
            memory::adjust_managed(block.page(), if inflated { -pages } else { pages });
        }
        memory::count_ballooned(block.page(), pages, inflated);
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

            self.account(&block, false);
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

    /// Takes the first block off the list, if it has up to `max` pages.
    fn pop_block(&self, max: usize) -> Option<Block> {
        let mut blocks = self.blocks.lock();

        match blocks.list.first_block_len() {
            Some(len) if len <= max => blocks.pop(),
            _ => None,
        }
    }

    /// Takes up to `max` order-0 pages out, limited by the time for which the core's lock may be
    /// held.
    fn take_base_pages(&self, max: usize) -> PageList {
        let mut pages = PageList::new();
        let max = max.min(PAGES_PER_HOLD);

        // SAFETY: The function puts pages that were on the core's list, with their references, on
        // this one and returns how many.
        unsafe {
            pages
                .base_pages
                .with_head(|head| bindings::balloon_page_list_dequeue(self.core(), head, max))
        };

        // INVARIANT: That many pages were taken off the list.
        self.base_pages.fetch_sub(pages.len(), Relaxed);
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
    pub(in crate::rust::mm) fn split_block(&self) -> bool {
        let Some(block) = self.pop_block(usize::MAX) else {
            return false;
        };
        let mut pages = PageList::new();

        self.account(&block, false);
        block.unmark().split(|page| pages.push(page));
        self.insert(pages);
        true
    }

    /// Takes out all blocks that begin in `pfns`, and puts them on `taken`. Checks each pageblock
    /// there, and no others.
    pub(in crate::rust::mm) fn take_blocks(&self, pfns: PfnRange, taken: &mut PageList) {
        let step = 1 << pageblock_order();

        for pfn in (pfns.first().next_multiple_of(step)..pfns.end()).step_by(step as usize) {
            let Some(block) = self.blocks.lock().take_at(pfn as usize) else {
                continue;
            };

            self.account(&block, false);
            taken.push_block(block);
        }
    }
}

#[pinned_drop]
impl<R: MigratePage> PinnedDrop for NodePages<R> {
    /// Waits for the pages that are isolated for page migration, which refer to `info`. There is no
    /// limit, since the kernel would put them back into freed memory. It does put them back: it
    /// tries to migrate an isolated page ten times at most.
    fn drop(self: Pin<&mut Self>) {
        while poll_timeout(R::END_TIMEOUT, || self.free().then_some(())).is_none() {}
    }
}

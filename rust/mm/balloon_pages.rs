// SPDX-License-Identifier: GPL-2.0

//! The pages in the balloon.
//!
//! Single pages are kept by the kernel's balloon core. It does the accounting (`NR_BALLOON_PAGES`,
//! the inflate and deflate events), marks the pages offline, and lets compaction find them. Blocks
//! that are whole need not be moved for larger ones, and are kept here, with the same accounting.
//! What the core could do as well, but would do for each page alone, is to adjust the zones'
//! numbers of managed pages, which has the kernel compute its reserves anew each time.
//!
//! C header: [`include/linux/balloon.h`](srctree/include/linux/balloon.h)

use crate::rust::{
    bindings,
    mm::{
        memory::{
            self,
            Node, //
        },
        page_list::{
            self,
            PageList, //
            MAX_ORDER,
            ORDER_MASK,
        }, //
    }, //
};

use core::{
    marker::PhantomData,
    ops::Range,
    ptr::{
        self,
        NonNull, //
    },
};
use kernel::{
    container_of,
    new_spinlock,
    page::PAGE_SHIFT,
    prelude::*,
    sync::{
        atomic::{
            Atomic,
            Relaxed, //
        },
        Arc,
        SpinLock, //
    },
    time::{
        delay::fsleep,
        Delta, //
    },
    types::Opaque, //
};

/// What follows compaction when it moves pages of a balloon.
pub(crate) trait Replace: Send + Sync {
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

/// How many blocks there may be, for each order from that of single pages on.
pub(crate) type ByOrder = [usize; MAX_ORDER as usize + 1];

/// Blocks of pages.
///
/// # Invariants
///
/// There are no single pages in `list`, and as many blocks of each order as `by_order` says. Each
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

    /// Adds the block that begins with `page`.
    ///
    /// # Safety
    ///
    /// As for [`PageList::push_block`].
    unsafe fn push(&mut self, page: NonNull<bindings::page>) {
        // SAFETY: By the requirements of this function, which are those of `push_block()`, `page`
        // begins a block that is nobody else's; it stays one in the list, where its order can be
        // read.
        let order = unsafe {
            page_list::set_owner(page, self.owner);
            self.list.push_block(page);
            page_list::order(page)
        };

        // INVARIANT: One more.
        if let Some(blocks) = self.by_order.get_mut(order as usize) {
            *blocks += 1;
        }
    }

    /// Takes the first block.
    fn pop(&mut self) -> Option<NonNull<bindings::page>> {
        let page = self.list.pop_block()?;

        // SAFETY: The block was on the list.
        unsafe { self.let_go(page) };
        Some(page)
    }

    /// Takes the block that begins at the page frame number `pfn`, if there is one.
    fn take_at(&mut self, pfn: u64) -> Option<NonNull<bindings::page>> {
        // SAFETY: The function has no preconditions.
        let private = unsafe { bindings::balloon_rs_offline_private(pfn as usize) } as usize;
        if private & !ORDER_MASK != self.owner || private & ORDER_MASK == 0 {
            return None;
        }

        // SAFETY: There is a page, and by the type invariants it begins one of these blocks.
        unsafe {
            let page = NonNull::new(bindings::balloon_rs_pfn_to_page(pfn as usize))?;

            self.list.remove_block(page);
            self.let_go(page);
            Some(page)
        }
    }

    /// The block that begins with `page` has left the list.
    ///
    /// # Safety
    ///
    /// It must be one.
    unsafe fn let_go(&mut self, page: NonNull<bindings::page>) {
        // SAFETY: The caller has the block, which is marked.
        let order = unsafe {
            page_list::set_owner(page, 0);
            page_list::order(page)
        };

        // INVARIANT: One less.
        if let Some(blocks) = self.by_order.get_mut(order as usize) {
            *blocks -= 1;
        }
    }
}

/// Pages of one node that are in the balloon. Compaction may move them if `R` agrees: those that it
/// moves to other nodes stay here.
///
/// Lock order: the core takes its `balloon_pages_lock`, a spinlock, inside of all of these
/// functions; under it only the zones' counters are touched. The same holds for the lock of
/// `blocks`.
///
/// # Invariants
///
/// `info` is initialised, and `singles` pages are on its list or isolated from it by compaction. The
/// owner of `blocks` is the address of this.
//
// So aligned that there is room for an order in the address. The core notes the address of `info` in
// single pages: at the beginning it is an owner with an order of 0, which no block has.
#[repr(C, align(64))]
#[pin_data(PinnedDrop)]
struct NodePages<R: Replace> {
    #[pin]
    info: Opaque<bindings::balloon_dev_info>,
    singles: Atomic<usize>,
    #[pin]
    blocks: SpinLock<Blocks>,
    adjust_managed: bool,
    replace: Arc<R>,
}

// SAFETY: The pages are not tied to a thread.
unsafe impl<R: Replace> Send for NodePages<R> {}

// SAFETY: The core guards `info` with its lock.
unsafe impl<R: Replace> Sync for NodePages<R> {}

impl<R: Replace> NodePages<R> {
    /// Makes an empty one.
    ///
    /// # Errors
    ///
    /// `ENOMEM`.
    fn new(adjust_managed: bool, replace: Arc<R>) -> Result<Pin<KBox<Self>>> {
        let this = KBox::pin_init(Self::init(adjust_managed, replace), GFP_KERNEL)?;

        // INVARIANT: There are no blocks.
        this.blocks.lock().owner = ptr::from_ref(&*this).addr();
        Ok(this)
    }

    fn init(adjust_managed: bool, replace: Arc<R>) -> impl PinInit<Self, Error> {
        // INVARIANT: An empty list has no pages.
        try_pin_init!(Self {
            info <- Opaque::ffi_init(|slot: *mut bindings::balloon_dev_info| {
                // SAFETY: `slot` is valid for writes, and is initialised by the first call.
                unsafe {
                    bindings::balloon_rs_devinfo_init(slot);
                    (*slot).migratepage = Some(Self::migrate);
                }
            }),
            singles: Atomic::new(0),
            blocks <- new_spinlock!(Blocks::new(), "NodePages::blocks"),
            adjust_managed,
            replace,
        })
    }

    extern "C" fn migrate(
        info: *mut bindings::balloon_dev_info,
        new: *mut bindings::page,
        old: *mut bindings::page,
        mode: bindings::migrate_mode,
    ) -> c_int {
        // SAFETY: The core calls with the `info` of a balloon that has pages, and so has not been
        // dropped.
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
        let new_pfn = unsafe { bindings::balloon_rs_page_to_pfn(new) } as u64;

        let may_sleep = mode != bindings::migrate_mode_MIGRATE_ASYNC;

        match this.replace.replace(&old, new_pfn, may_sleep) {
            Ok(()) => {
                // SAFETY: Both are valid, and the balloon's: the one until now, the other one from
                // now on.
                unsafe {
                    if this.adjust_managed && !bindings::balloon_rs_same_zone(page.as_ptr(), new) {
                        bindings::adjust_managed_page_count(page.as_ptr(), 1);
                        bindings::adjust_managed_page_count(new, -1);
                    }
                }
                0
            }
            Err(error) => error.to_errno(),
        }
    }

    /// Returns how many pages (kernel pages) there are.
    fn len(&self) -> usize {
        self.singles.load(Relaxed) + self.blocks.lock().list.len()
    }

    /// Puts `pages` into the balloon.
    fn insert(&self, mut pages: PageList) {
        // INVARIANT: That many pages are added to the list. Counted before, since they may be taken
        // at once.
        self.singles.add(pages.singles(), Relaxed);

        self.account_singles(&pages, true);
        while pages.singles() > PAGES_PER_HOLD {
            self.enqueue(&mut pages.take_singles(PAGES_PER_HOLD));
        }
        self.enqueue(&mut pages);

        while let Some(block) = pages.pop_block() {
            self.account(block, true);
            // SAFETY: The block was on a list, and is marked.
            unsafe { self.blocks.lock().push(block) };
        }
    }

    /// Puts all single pages of `pages` on the core's list, for which its lock is held, with
    /// interrupts disabled.
    fn enqueue(&self, pages: &mut PageList) {
        // SAFETY: The function takes all single pages off the list, each with its reference; they
        // are order 0 pages as the core wants them.
        unsafe {
            pages.with_head(|head| {
                bindings::balloon_page_list_enqueue(self.info.get(), head);
                0
            })
        };
    }

    /// Accounts for the block that begins with `page`.
    fn account(&self, page: NonNull<bindings::page>, inflated: bool) {
        // SAFETY: The callers have taken the block off a list, with its order.
        unsafe {
            bindings::balloon_rs_account_block(page.as_ptr(), inflated, self.adjust_managed);
        }
    }

    /// Adjusts the zones' numbers of managed pages for all single ones in `pages`.
    fn account_singles(&self, pages: &PageList, inflated: bool) {
        if self.adjust_managed {
            pages.zones(|page, count| {
                let count = if inflated {
                    -(count as c_long)
                } else {
                    count as c_long
                };

                // SAFETY: The page is on the list, whose pages are valid by its type invariants.
                unsafe { bindings::adjust_managed_page_count(page.as_ptr(), count) };
            });
        }
    }

    /// Takes up to `max` pages (kernel pages) out: up to `max_blocks` blocks that fit, or else
    /// single pages, up to the same number.
    ///
    /// None are returned if there are none, or if compaction holds all that are left just now.
    fn take(&self, max: usize, max_blocks: usize) -> PageList {
        let mut pages = PageList::new();

        for _ in 0..max_blocks {
            let Some(block) = self.pop_block(max - pages.len()) else {
                break;
            };

            self.account(block, false);
            // SAFETY: The block was on a list, and is marked.
            unsafe { pages.push_block(block) };
        }
        let max = max.min(max_blocks);

        if pages.is_empty() {
            pages = self.take_singles(max);
        }
        if pages.is_empty() && max > 0 && self.split_block() {
            pages = self.take_singles(max);
        }
        pages
    }

    /// Takes the first block off the list, if it has up to `max` pages.
    fn pop_block(&self, max: usize) -> Option<NonNull<bindings::page>> {
        let mut blocks = self.blocks.lock();

        match blocks.list.first_block_len() {
            Some(len) if len <= max => blocks.pop(),
            _ => None,
        }
    }

    /// Takes up to `max` single pages out, but not more than what the core's lock may be held for.
    fn take_singles(&self, max: usize) -> PageList {
        let mut pages = PageList::new();
        let max = max.min(PAGES_PER_HOLD);

        // SAFETY: The function puts pages that were on the core's list, with their references, on
        // this one and returns how many.
        unsafe {
            pages.with_head(|head| bindings::balloon_page_list_dequeue(self.info.get(), head, max))
        };

        // INVARIANT: That many pages were taken off the list.
        self.singles.fetch_sub(pages.len(), Relaxed);
        self.account_singles(&pages, false);
        pages
    }

    /// Makes single pages of a block, if there is one. They stay in the balloon.
    fn split_block(&self) -> bool {
        let Some(block) = self.pop_block(usize::MAX) else {
            return false;
        };
        let mut pages = PageList::new();

        self.account(block, false);
        // SAFETY: The block was on a list, and is marked.
        unsafe { pages.push_block(block) };
        pages.split_blocks();
        self.insert(pages);
        true
    }

    /// Takes all blocks out that begin in `pfns` (page frame numbers of kernel pages), and puts them
    /// on `taken`. Looks at each page block there, and at no others.
    fn take_blocks(&self, pfns: Range<u64>, taken: &mut PageList) {
        let step = 1 << memory::page_block_order();

        for pfn in (pfns.start.next_multiple_of(step)..pfns.end).step_by(step as usize) {
            let Some(block) = self.blocks.lock().take_at(pfn) else {
                continue;
            };

            self.account(block, false);
            // SAFETY: The block was on a list, and is marked.
            unsafe { taken.push_block(block) };
        }
    }
}

#[pinned_drop]
impl<R: Replace> PinnedDrop for NodePages<R> {
    fn drop(self: Pin<&mut Self>) {
        // Pages that compaction has isolated refer to `info`. They, or those that take their
        // places, come back soon, whatever the host does.
        while self.len() > 0 {
            if self.take(usize::MAX, usize::MAX).is_empty() {
                fsleep(Delta::from_millis(1));
            }
        }
    }
}

/// How many single pages are taken out under one hold of the core's lock.
const PAGES_PER_HOLD: usize = 512;

/// How many pages (kernel pages) leave a node before it is decided again which node is next: 64 MiB.
const PAGES_PER_NODE: usize = 1 << (26 - PAGE_SHIFT);

/// Pages in the balloon, by the nodes that they are on.
///
/// # Invariants
///
/// The pages of `nodes` are on the node with that number, unless compaction has moved them since.
pub(crate) struct BalloonPages<R: Replace> {
    nodes: KVec<Pin<KBox<NodePages<R>>>>,
    replace: Arc<R>,
}

impl<R: Replace> BalloonPages<R> {
    /// Makes an empty balloon.
    ///
    /// If `adjust_managed` is set, the guest's total memory shrinks by what is in the balloon.
    ///
    /// # Errors
    ///
    /// `ENOMEM`, or what `replace` says.
    pub(crate) fn new(adjust_managed: bool, replace: impl PinInit<R, Error>) -> Result<Self> {
        let replace = Arc::pin_init(replace, GFP_KERNEL)?;
        let mut nodes = KVec::new();

        for _ in 0..Node::count() {
            nodes.push(NodePages::new(adjust_managed, replace.clone())?, GFP_KERNEL)?;
        }
        Ok(Self { nodes, replace })
    }

    /// Returns what follows the moves.
    pub(crate) fn replacer(&self) -> &R {
        &self.replace
    }

    /// Returns how many pages (kernel pages) are in the balloon.
    pub(crate) fn len(&self) -> usize {
        self.nodes.iter().map(|node| node.len()).sum()
    }

    /// Returns how many pages (kernel pages) of nodes that are short of memory are in the balloon.
    pub(crate) fn len_where_needed(&self) -> usize {
        self.filled(true).map(|(_, node)| node.len()).sum()
    }

    /// Returns how many blocks of each order are in the balloon, single pages being those of order
    /// 0.
    pub(crate) fn by_order(&self) -> ByOrder {
        let mut by_order = [0; MAX_ORDER as usize + 1];

        for node in &self.nodes {
            by_order[0] += node.singles.load(Relaxed);
            for (sum, blocks) in by_order.iter_mut().zip(node.blocks.lock().by_order) {
                *sum += blocks;
            }
        }
        by_order
    }

    /// Returns what there is of nodes that have something in the balloon, or of those of them that
    /// are short of memory if `where_needed` is set.
    fn filled(&self, where_needed: bool) -> impl Iterator<Item = (Node, &NodePages<R>)> {
        self.nodes
            .iter()
            .enumerate()
            .filter(|(_, pages)| pages.len() > 0)
            .filter_map(|(number, pages)| Some((Node::new(number)?, &**pages)))
            .filter(move |(node, _)| !where_needed || node.is_short())
    }

    /// Puts `pages` into the balloon.
    pub(crate) fn insert(&self, mut pages: PageList) {
        // All that there are are on the only node.
        if let [node] = self.nodes.as_slice() {
            return node.insert(pages);
        }

        while let Some((number, some)) = pages.take_node() {
            if let Some(node) = self.nodes.get(number) {
                node.insert(some);
            }
        }
    }

    /// Takes up to `max` pages (kernel pages) out of the balloon: up to `max_blocks` blocks that
    /// fit, or else single pages, up to the same number. They are of one node: of those that are
    /// short of memory if `where_needed` is set, and in any case of the one with the largest share
    /// of its memory in the balloon.
    ///
    /// None are returned if there are none, or if compaction holds all that are left just now.
    pub(crate) fn take(&self, max: usize, max_blocks: usize, where_needed: bool) -> PageList {
        let max = match self.nodes.len() {
            1 => max,
            _ => max.min(PAGES_PER_NODE),
        };
        // A share in thousandths, and the node's number, of what was tried last.
        let mut tried = None;

        loop {
            let next = self
                .filled(where_needed)
                .map(|(node, pages)| {
                    let share = pages.len().saturating_mul(1_000) / node.present_pages().max(1);
                    ((share, node.number()), pages)
                })
                .filter(|(place, _)| tried.is_none_or(|tried| *place < tried))
                .max_by_key(|(place, _)| *place);
            let Some((place, pages)) = next else {
                return PageList::new();
            };

            let taken = pages.take(max, max_blocks);
            if !taken.is_empty() {
                return taken;
            }
            tried = Some(place);
        }
    }

    /// Takes all blocks out of the balloon that begin in `pfns` (page frame numbers of kernel
    /// pages).
    pub(crate) fn take_blocks(&self, pfns: &Range<u64>) -> PageList {
        let mut taken = PageList::new();

        for (node, pages) in self.filled(false) {
            let span = node.span();
            let there = span.start.max(pfns.start)..span.end.min(pfns.end);

            pages.take_blocks(there, &mut taken);
        }
        taken
    }
}

// SPDX-License-Identifier: GPL-2.0

//! Memory, sorted by address.
//!
//! The page allocator returns blocks in any order. In sorted order, adjacent blocks become one
//! range, which has a shorter description, and which the host handles at once. A bitmap sorts
//! without comparisons: a batch has one bit for each block. Each window is a page of bits, which
//! covers 128 MiB (with pages of 4 KiB). There are up to [`MAX_WINDOWS`] windows, allocated on
//! demand.
//!
//! C header: [`include/linux/gfp.h`](srctree/include/linux/gfp.h)

use crate::rust::{
    bindings,
    mm::{
        node::Node,
        pages::{
            gfp::Gfp,
            owned::{
                Allocated,
                BasePage,
                Block, //
            },
            page::{
                pageblock_order,
                Page, //
            },
            page_list::PageList,
            ring::Linked, //
        },
        pfn_range::PfnRange, //
    }, //
};

use core::ptr;
use kernel::{
    alloc::flags::__GFP_NOWARN,
    prelude::*, //
};

/// The maximum number of windows of a batch.
const MAX_WINDOWS: usize = 64;

/// The length of a window's bitmap.
const WORDS_PER_WINDOW: usize = 512;
const PAGES_PER_WORD: usize = u64::BITS as usize;

/// How many kernel pages a window covers.
const PAGES_PER_WINDOW: usize = WORDS_PER_WINDOW * PAGES_PER_WORD;

/// How many order-0 pages are allocated at once.
const MAX_BASE_PAGES: usize = 64;

type Bits = [u64; WORDS_PER_WINDOW];

/// A range of memory of [`PAGES_PER_WINDOW`] pages.
struct Window {
    /// The page frame number of the first bit.
    first: usize,
    /// The first word that may not be 0.
    next: usize,
    bits: KBox<Bits>,
}

impl Window {
    /// Returns the page frame number of the first block.
    fn first_block(&mut self) -> Option<usize> {
        while let Some(&word) = self.bits.get(self.next) {
            if word != 0 {
                let bit = word.trailing_zeros() as usize;
                return Some(self.first + self.next * PAGES_PER_WORD + bit);
            }
            self.next += 1;
        }

        None
    }

    /// Sets the `len` bits from that of the page `pfn` on, which is a multiple of `len`, a power of
    /// two.
    fn set(&mut self, pfn: usize, len: usize) {
        let word = (pfn - self.first) / PAGES_PER_WORD;

        self.next = self.next.min(word);
        if len < PAGES_PER_WORD {
            if let Some(word) = self.bits.get_mut(word) {
                *word |= ((1 << len) - 1) << (pfn % PAGES_PER_WORD);
            }
        } else if let Some(words) = self.bits.get_mut(word..word + len / PAGES_PER_WORD) {
            words.fill(u64::MAX);
        }
    }

    /// Clears the bit of the page `pfn`.
    fn clear(&mut self, pfn: usize) {
        if let Some(word) = self.bits.get_mut((pfn - self.first) / PAGES_PER_WORD) {
            *word &= !(1 << (pfn % PAGES_PER_WORD));
        }
    }
}

/// Why [`Batch::alloc`] failed.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum AllocError {
    /// The page allocator has no such block.
    NoBlock,
    /// There are no more windows.
    Full,
}

/// A batch of memory. Dropping it frees the memory.
///
/// # Invariants
///
/// - Each set bit stands for the first page of a block that the batch owns. The block's order is in
///   the `private` field of that page: 0 for a page with a reference of its own, otherwise the
///   order of an unsplit block, whose pages are all marked as offline.
/// - `pages` is the length of all blocks.
/// - The windows ascend. Those that are not in use have no bits set. There is room for
///   [`MAX_WINDOWS`] in both lists.
pub(crate) struct Batch {
    windows: KVec<Window>,
    unused: KVec<KBox<Bits>>,
    /// The index of the window that was used last.
    hint: usize,
    /// The node to allocate from; none for any node.
    node: Option<Node>,
    pages: usize,
    blocks: usize,
}

impl Batch {
    /// Returns an empty batch, with memory for one window. Other windows are allocated on demand,
    /// without sleeping, and freed by [`shrink`](Self::shrink).
    ///
    /// # Errors
    ///
    /// `ENOMEM`.
    pub(crate) fn new() -> Result<Self> {
        let mut unused = KVec::with_capacity(MAX_WINDOWS, GFP_KERNEL)?;
        unused.push(KBox::init(pin_init::init_zeroed(), GFP_KERNEL)?, GFP_KERNEL)?;

        // INVARIANT: There are no bits.
        Ok(Self {
            windows: KVec::with_capacity(MAX_WINDOWS, GFP_KERNEL)?,
            unused,
            hint: 0,
            node: None,
            pages: 0,
            blocks: 0,
        })
    }

    /// Returns how many kernel pages there are.
    pub(crate) fn pages(&self) -> usize {
        self.pages
    }

    /// Returns how many blocks there are: at most as many as pages.
    pub(crate) fn blocks(&self) -> usize {
        self.blocks
    }

    /// Makes [`alloc`](Self::alloc) allocate from `node` only.
    pub(crate) fn take_from(&mut self, node: Node) {
        self.node = Some(node);
    }

    /// Frees the memory of all windows but one.
    pub(crate) fn shrink(&mut self) {
        self.unused.truncate(1);
    }

    /// Returns the window in which the page `pfn` lies, or `None` if there is no memory for it.
    fn window(&mut self, pfn: usize) -> Option<&mut Window> {
        let first = pfn - pfn % PAGES_PER_WINDOW;
        let is_it = |window: &Window| window.first == first;

        if !self.windows.get(self.hint).is_some_and(is_it) {
            self.hint = self.windows.partition_point(|window| window.first < first);
        }
        if !self.windows.get(self.hint).is_some_and(is_it) {
            // Not GFP_NOWAIT: if blocks are rare, an allocation of one for a slab makes the kernel
            // start compaction.
            let flags = __GFP_NOWARN;
            let bits = match self.unused.pop() {
                Some(bits) => bits,
                None if self.windows.len() < MAX_WINDOWS => {
                    KBox::init(pin_init::init_zeroed(), flags).ok()?
                }
                None => return None,
            };
            let window = Window {
                first,
                next: WORDS_PER_WINDOW,
                bits,
            };

            self.windows
                .insert_within_capacity(self.hint, window)
                .ok()?;
        }

        self.windows.get_mut(self.hint)
    }

    /// Allocates a block of 2^`order` pages. The memory is not initialised.
    ///
    /// With `unsplit`, and from the size of a pageblock on, it stays a block, which cannot fragment
    /// memory. Such a block never comes from `ZONE_MOVABLE` or CMA, where the kernel relies on
    /// movable pages. Otherwise it is split into order-0 pages, which the kernel can migrate.
    ///
    /// With an `order` of 0 it allocates up to `wanted` order-0 pages, several at once, which is
    /// much cheaper for each of them. Only these allocations reclaim memory, and lightly: blocks do
    /// not justify reclaim or compaction. Sleeps only if `order` is 0.
    ///
    /// # Errors
    ///
    /// The reason of the failure.
    pub(crate) fn alloc(
        &mut self,
        order: u32,
        wanted: usize,
        unsplit: bool,
    ) -> Result<(), AllocError> {
        match order {
            0 => self.alloc_base_pages(wanted),
            _ => self.alloc_block(order, unsplit),
        }
    }

    /// [`alloc`](Self::alloc) for an `order` that is not 0.
    fn alloc_block(&mut self, order: u32, unsplit: bool) -> Result<(), AllocError> {
        let unsplit = unsplit && order >= pageblock_order();
        let flags = match unsplit {
            true => Gfp::UNSPLIT_BLOCK,
            false => Gfp::SPLIT_BLOCK,
        };

        let block = Allocated::new(self.node, flags, order).ok_or(AllocError::NoBlock)?;
        let pfn = block.page().pfn();
        let Some(window) = self.window(pfn) else {
            return Err(AllocError::Full);
        };

        // A block does not cross the end of a window: it is aligned to its length, and shorter.
        //
        // INVARIANT: The bits stand for the block, or for the pages that it is split into.
        let blocks = if unsplit {
            block.mark().into_page();
            window.set(pfn, 1);
            1
        } else {
            block.split(|page| {
                page.into_page();
            });
            window.set(pfn, 1 << order);
            1 << order
        };

        self.blocks += blocks;
        self.pages += 1 << order;
        Ok(())
    }

    /// [`alloc`](Self::alloc) for an order of 0.
    fn alloc_base_pages(&mut self, wanted: usize) -> Result<(), AllocError> {
        let mut pages = [ptr::null_mut(); MAX_BASE_PAGES];
        let wanted = wanted.min(MAX_BASE_PAGES);
        let mut result = Err(AllocError::NoBlock);

        let (nid, gfp) = Gfp::BALLOON_PAGE.on(self.node);
        // SAFETY: It is a node or none, and there is room for so many pages.
        unsafe { bindings::alloc_pages_bulk_node(gfp, nid, wanted, pages.as_mut_ptr()) };

        for page in pages {
            // SAFETY: The page was just allocated, and no other code has a pointer to it. It has an
            // order of 0.
            let Some(page) =
                (unsafe { Page::from_raw(page).map(|page| BasePage::from_page(page)) })
            else {
                break;
            };

            result = match self.add_base_page(page) {
                Ok(()) => Ok(()),
                Err(_) => Err(AllocError::Full),
            };
        }

        result
    }

    /// Takes the pages on `list`, or as many as there is room for: the rest stays on the list.
    pub(crate) fn add(&mut self, list: &mut PageList) {
        while let Some(block) = list.pop_block() {
            if let Err(block) = self.add_block(block) {
                return list.push_block(block);
            }
        }
        while let Some(page) = list.pop() {
            if let Err(page) = self.add_base_page(page) {
                return list.push(page);
            }
        }
    }

    /// Adds a block, or returns it if there is no room.
    fn add_block(&mut self, block: Block) -> Result<(), Block> {
        if !self.add_page(block.page(), block.len()) {
            return Err(block);
        }
        // INVARIANT: The bit that was set stands for it.
        block.into_page();
        Ok(())
    }

    /// Adds a page of order 0, or returns it if there is no room.
    fn add_base_page(&mut self, page: BasePage) -> Result<(), BasePage> {
        if !self.add_page(page.page(), 1) {
            return Err(page);
        }
        // INVARIANT: The bit that was set stands for it.
        page.into_page();
        Ok(())
    }

    /// Sets the bit for a block of `len` pages. Returns whether there was room.
    fn add_page(&mut self, page: Page, len: usize) -> bool {
        let pfn = page.pfn();
        let Some(window) = self.window(pfn) else {
            return false;
        };

        window.set(pfn, 1);
        self.blocks += 1;
        self.pages += len;
        true
    }

    /// Returns the first page of the first block. The first window is then the one with this block.
    fn first_page(&mut self) -> Option<Page> {
        loop {
            if let Some(pfn) = self.windows.first_mut()?.first_block() {
                // SAFETY: By the type invariants there is such a page.
                return Some(unsafe { Page::from_pfn(pfn) });
            }

            // INVARIANT: No bit of the window is set, and there is room for all windows.
            if let Ok(window) = self.windows.remove(0) {
                let _ = self.unused.push_within_capacity(window.bits);
            }
        }
    }

    /// Returns the first block.
    pub(crate) fn first(&mut self) -> Option<PfnRange> {
        let page = self.first_page()?;

        PfnRange::new(page.pfn() as u64, 1 << page.order())
    }

    /// Moves the first block to the end of `list`.
    pub(crate) fn take_first(&mut self, list: &mut PageList) {
        let Some(page) = self.first_page() else {
            return;
        };
        let order = page.order();

        // INVARIANT: The block's bit is cleared.
        if let Some(window) = self.windows.first_mut() {
            window.clear(page.pfn());
        }
        self.blocks -= 1;
        self.pages -= 1 << order;

        // SAFETY: By the type invariants the page begins a block of ours, in this form.
        unsafe {
            match order {
                0 => list.push(BasePage::from_page(page)),
                _ => list.push_block(Block::from_page(page)),
            }
        }
    }

    /// Returns all memory, in ascending order.
    pub(crate) fn take_all(&mut self) -> PageList {
        let mut list = PageList::new();

        // Until none is left, when all windows have been removed.
        while self.first_page().is_some() {
            self.take_first(&mut list);
        }
        list
    }
}

impl Drop for Batch {
    fn drop(&mut self) {
        drop(self.take_all());
    }
}

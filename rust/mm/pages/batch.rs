// SPDX-License-Identifier: GPL-2.0

//! Memory in the order of its addresses, whatever order it comes in.
//!
//! The page allocator hands out blocks as it finds them. In order, neighbours make one range, which
//! is shorter to name, and which the host handles in one go. A bitmap sorts without comparing
//! anything: a batch is one bit for each block, in windows of a page that cover 128 MiB each (with
//! pages of 4 KiB), as many as it takes but not more than [`MAX_WINDOWS`].
//!
//! C header: [`include/linux/gfp.h`](srctree/include/linux/gfp.h)

use crate::rust::{
    bindings,
    mm::{
        gfp::Gfp,
        node::Node,
        pages::{
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

/// How many windows a batch has at most.
const MAX_WINDOWS: usize = 64;

/// The length of a window's bitmap.
const WORDS_PER_WINDOW: usize = 512;
const PAGES_PER_WORD: usize = u64::BITS as usize;

/// How many kernel pages a window covers.
const PAGES_PER_WINDOW: usize = WORDS_PER_WINDOW * PAGES_PER_WORD;

/// How many order-0 pages are allocated at once.
const MAX_BASE_PAGES: usize = 64;

type Bits = [u64; WORDS_PER_WINDOW];

/// A stretch of memory of [`PAGES_PER_WINDOW`] pages.
struct Window {
    /// The page frame number that the first bit stands for.
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
    /// There is no such block.
    NoBlock,
    /// There are no more windows.
    Full,
}

/// A batch of memory. Dropping it frees the memory.
///
/// # Invariants
///
/// - Each bit that is set stands for the first page of a block that the batch owns. The block's
///   order is in the `private` field of that page: 0 for a page with a reference of its own, or
///   that of a block that is kept unsplit and whose pages are all marked as offline.
/// - `pages` is the length of all blocks.
/// - The windows ascend. Those that are not in use have no bits set. There is room for
///   [`MAX_WINDOWS`] in both lists.
pub(crate) struct Batch {
    windows: KVec<Window>,
    unused: KVec<KBox<Bits>>,
    /// Where the window lies that was used last.
    hint: usize,
    /// Where memory is allocated, unless it is everywhere.
    node: Option<Node>,
    pages: usize,
    blocks: usize,
}

impl Batch {
    /// Returns an empty batch, with memory for one window. All else is allocated as it is needed,
    /// without sleeping, and until [`shrink`](Self::shrink).
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

    /// Returns how many blocks there are: less than or as many as pages.
    pub(crate) fn blocks(&self) -> usize {
        self.blocks
    }

    /// Has [`alloc`](Self::alloc) take memory from `node` and no other one.
    pub(crate) fn take_from(&mut self, node: Node) {
        self.node = Some(node);
    }

    /// Frees the memory that was needed for windows, but for one.
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
            // Not GFP_NOWAIT: where blocks are rare, to want one for a slab has the kernel begin to
            // compact its memory.
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

    /// Takes a block of 2^`order` pages from the page allocator. The memory is not initialised.
    ///
    /// With `unsplit`, and from the size of a pageblock on, it stays a block, which cannot fragment
    /// the memory. It is not taken from where the kernel counts on pages that can be moved,
    /// `ZONE_MOVABLE` and CMA. Else its pages are single ones, which compaction can move.
    ///
    /// With an `order` of 0 it takes up to `wanted` order-0 pages: not all that there are, but
    /// several at once, which is much cheaper for each of them. Only for these is memory reclaimed,
    /// and lightly: no block is worth pushing the guest into reclaim or compaction. Sleeps only if
    /// `order` is 0.
    ///
    /// # Errors
    ///
    /// Says what was missing.
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

    /// Does what [`alloc`](Self::alloc) does for an `order` that is not 0.
    fn alloc_block(&mut self, order: u32, unsplit: bool) -> Result<(), AllocError> {
        let is_large = order >= pageblock_order();
        let unsplit = unsplit && is_large;
        let flags = match (unsplit, is_large) {
            (true, _) => Gfp::UNSPLIT_BLOCK,
            (false, true) => Gfp::SPLIT_BLOCK,
            (false, false) => Gfp::SPLIT_SMALL_BLOCK,
        };

        let block = Allocated::new(self.node, flags, order).ok_or(AllocError::NoBlock)?;
        let pfn = block.page().pfn();
        let Some(window) = self.window(pfn) else {
            return Err(AllocError::Full);
        };

        // A block does not cross the end of a window: it is aligned to its length, and shorter.
        //
        // INVARIANT: The bits stand for the block, or for the pages it is split into.
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

    /// Does what [`alloc`](Self::alloc) does for an order of 0.
    fn alloc_base_pages(&mut self, wanted: usize) -> Result<(), AllocError> {
        let mut pages = [ptr::null_mut(); MAX_BASE_PAGES];
        let wanted = wanted.min(MAX_BASE_PAGES);
        let mut result = Err(AllocError::NoBlock);

        let (nid, gfp) = Gfp::BALLOON_PAGE.on(self.node);
        // SAFETY: It is a node or none, and there is room for so many pages.
        unsafe { bindings::alloc_pages_bulk_node(gfp, nid, wanted, pages.as_mut_ptr()) };

        for page in pages {
            // SAFETY: The page was just allocated, and nobody else knows it. It has an order of 0.
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

    /// Takes what is on `list`, or as much as there is room for: the rest stays on the list.
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

    /// Returns the first page of the first block, and its window is the first one then.
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

        // SAFETY: By the type invariants the page begins a block that was ours, in this form.
        unsafe {
            match order {
                0 => list.push(BasePage::from_page(page)),
                _ => list.push_block(Block::from_page(page)),
            }
        }
    }

    /// Returns all memory, in order.
    pub(crate) fn take_all(&mut self) -> PageList {
        let mut list = PageList::new();

        // Until none is found: then all windows have been put aside.
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

// SPDX-License-Identifier: GPL-2.0

//! The memory blocks to take: free or nearly free ones.

#![forbid(unsafe_code)]

use crate::{
    free_pages::{
        Unused,
        Walk, //
    },
    messages::ranges::Ranges,
    rust::mm::{
        hotplug::memory_block::MemoryBlock,
        node::Node,
        pfn_range::PfnRange,
        zone::PFNS_PER_HOLD, //
    }, //
};

use core::cmp::Reverse;
use kernel::{
    page::PAGE_SHIFT,
    prelude::*, //
};

/// The part of a block that may be in use, as a divisor. The kernel must migrate these pages, into
/// memory that it zeroes first, and checks for a signal only after it has tried all of them.
const MOST_IN_USE: u64 = 32;

/// The order of the smallest free blocks that count: 256 KiB.
const MIN_ORDER: u32 = 18 - PAGE_SHIFT as u32;

/// A candidate block.
struct Candidate {
    block: MemoryBlock,
    /// The number of its zone.
    zone: usize,
    /// The number of its free pages.
    free: u64,
}

/// The candidate blocks of a node.
struct OfNode {
    found: KVVec<Candidate>,
    /// The next candidates: the first from this index on whose number of pages in use has so many
    /// bits, or more.
    next: usize,
    bits: u32,
}

/// The candidate blocks. The search has steps, since a large guest has hundreds of thousands of
/// blocks.
pub(crate) struct Candidates {
    /// `None` at the end of the search.
    walk: Option<Walk>,
    /// By the numbers of the nodes.
    nodes: KVec<OfNode>,
}

/// Returns how many bits a number has.
fn bits(number: u64) -> u32 {
    u64::BITS - number.leading_zeros()
}

impl OfNode {
    fn new() -> Self {
        Self {
            found: KVVec::new(),
            next: 0,
            bits: 0,
        }
    }

    /// Adds `free` free pages of `block`, which is in the zone with this number. The blocks ascend.
    fn add(&mut self, block: MemoryBlock, zone: usize, free: u64) -> Result {
        match self.found.last_mut() {
            Some(last) if last.block == block => last.free += free,
            _ => self
                .found
                .push(Candidate { block, zone, free }, GFP_KERNEL)?,
        }
        Ok(())
    }

    /// Keeps the blocks that are free, or nearly, and sorts them as the page allocator hands out
    /// memory: the last zone first. What the guest has used is there, so the host has to provide
    /// it, and devices may need the memory of the first zones.
    fn finish(&mut self) {
        let pages = MemoryBlock::pages();

        self.found
            .retain(|this| this.free >= pages - pages / MOST_IN_USE);
        self.found
            .sort_unstable_by_key(|this| (Reverse(this.zone), this.block.pfns().first()));
    }

    /// Returns the next candidate: free blocks first, and then the others by the number of pages in
    /// use, to a power of two.
    fn pop(&mut self) -> Option<MemoryBlock> {
        let pages = MemoryBlock::pages();

        while self.bits <= bits(pages / MOST_IN_USE) {
            while let Some(this) = self.found.get(self.next) {
                self.next += 1;
                if bits(pages.saturating_sub(this.free)) == self.bits {
                    return Some(this.block);
                }
            }
            self.bits += 1;
            self.next = 0;
        }
        self.found.clear();
        None
    }
}

impl Candidates {
    /// Begins to search for blocks below the page frame number `end` (of a kernel page).
    ///
    /// # Errors
    ///
    /// `ENOMEM`.
    pub(crate) fn new(end: u64) -> Result<Self> {
        let range = PfnRange::between(0, end.min(PfnRange::ALL.end()));
        let mut nodes = KVec::new();

        for _ in 0..Node::count() {
            nodes.push(OfNode::new(), GFP_KERNEL)?;
        }
        Ok(Self {
            walk: Some(Walk::new(range, MIN_ORDER, PFNS_PER_HOLD)?),
            nodes,
        })
    }

    /// Searches for more, with up to `holds` holds of a zone's lock. Returns whether there may be
    /// more after that.
    ///
    /// # Errors
    ///
    /// `ENOMEM`.
    pub(crate) fn search(&mut self, holds: usize) -> Result<bool> {
        let Some(walk) = &mut self.walk else {
            return Ok(false);
        };
        let pages = MemoryBlock::pages();
        let mut unused = Unused::new(walk, holds, |_| ());

        while let Some(range) = unused.first() {
            let block = MemoryBlock::of(range.first(), pages).ok_or(EINVAL)?;
            let free = range.intersection(block.pfns()).ok_or(EINVAL)?.len();
            let node = block
                .node()
                .and_then(|node| self.nodes.get_mut(node.index()));

            if let Some(node) = node {
                node.add(block, unused.found_in(), free)?;
            }
            unused.advance(free);
        }
        if !unused.is_over() {
            return Ok(true);
        }

        self.walk = None;
        self.nodes.iter_mut().for_each(OfNode::finish);
        Ok(false)
    }

    /// Returns the next candidate of the node with the highest `precedence`, none of nodes without
    /// one.
    pub(crate) fn pop(
        &mut self,
        precedence: impl Fn(Node) -> Option<usize>,
    ) -> Option<MemoryBlock> {
        loop {
            let next = self
                .nodes
                .iter_mut()
                .enumerate()
                .filter(|(_, node)| !node.found.is_empty())
                .filter_map(|(index, node)| Some((precedence(Node::new(index)?)?, node)))
                .max_by_key(|(precedence, _)| *precedence);
            let (_, node) = next?;

            // A node without any is not asked again.
            if let Some(block) = node.pop() {
                return Some(block);
            }
        }
    }
}

// SPDX-License-Identifier: GPL-2.0

//! Unused pages: the walk over the zones' free memory.
//!
//! A page of the walk was on a free list of the page allocator while the zone's lock was held. The
//! driver releases the lock before it reports the page, and another caller may allocate and write
//! to the page meanwhile. So a page of the walk is "unused, unless it was written since", and never
//! "free".
//!
//! The lock is held for a number of PFNs scanned that does not depend on the guest's size. The walk
//! follows addresses. Free lists change between two holds of the lock, so a walk along a list could
//! not continue there. A block at an address is found whatever has happened to the lists. Ascending
//! addresses also make answers short.

#![forbid(unsafe_code)]

use crate::{
    messages::ranges::Ranges,
    rust::mm::{
        contig::drain,
        pages::page::MAX_ORDER,
        pfn_range::PfnRange,
        zone::{
            Scan,
            Zone, //
        }, //
    }, //
};

use kernel::prelude::*;

/// A walk over the unused memory of all zones, in some range.
pub(crate) struct Walk {
    /// The kernel pages of the walk, if there are any.
    range: Option<PfnRange>,
    /// The order of the smallest blocks to find.
    min_order: u32,
    /// The current zone, and the position in it.
    zone: usize,
    next: u64,
    /// The blocks that were found under one hold of a lock. Never grows beyond its capacity.
    found: KVec<PfnRange>,
    /// How many of these blocks were reported, and how many pages of the next one.
    reported: usize,
    pages: u64,
    /// The zone of these blocks.
    found_in: usize,
}

impl Walk {
    /// Begins a walk for blocks of 2^`min_order` pages or more in `range`, which may be empty. Up
    /// to `blocks` of them are found under one hold of a lock.
    ///
    /// # Errors
    ///
    /// `ENOMEM`.
    pub(crate) fn new(range: Option<PfnRange>, min_order: u32, blocks: usize) -> Result<Self> {
        Ok(Self {
            range,
            min_order,
            zone: 0,
            next: 0,
            found: KVec::with_capacity(blocks, GFP_KERNEL)?,
            reported: 0,
            pages: 0,
            found_in: 0,
        })
    }

    /// Scans for more under one hold of a zone's lock. Returns the cost, or none at the end of the
    /// walk.
    fn scan(&mut self) -> Option<Scan> {
        // No block is larger than the largest.
        let range = self.range.filter(|_| self.min_order <= MAX_ORDER)?;
        if self.zone == 0 && self.next == 0 {
            // Pages on per-CPU page lists are unused, too, and prevent other pages from merging
            // into blocks.
            drain::drain_long_lists();
        }
        let (zone, there) = loop {
            let zone = Zone::nth(self.zone)?;
            match zone.span().and_then(|span| span.intersection(range)) {
                Some(there) => break (zone, there),
                None => self.zone += 1,
            }
        };

        // A block may begin before the range, and extend into it.
        let first = (there.first() >> MAX_ORDER) << MAX_ORDER;
        self.next = self.next.max(first);
        self.found.clear();
        self.reported = 0;
        self.found_in = self.zone;

        let scan = zone.find_free(&mut self.next, there.end(), self.min_order, &mut self.found);
        if self.next >= there.end() {
            self.zone += 1;
            self.next = 0;
        }
        Some(scan)
    }

    /// Discards unreported blocks, and continues in a zone, at the first possible start of a block
    /// from the page `pfn` on.
    pub(crate) fn resume_at(&mut self, zone: usize, pfn: u64) {
        self.found.clear();
        self.reported = 0;
        self.pages = 0;
        self.zone = zone;
        self.next = pfn.div_ceil(1 << self.min_order) << self.min_order;
    }

    /// Returns the next range of the found blocks.
    fn first(&mut self) -> Option<PfnRange> {
        while let Some(block) = self.found.get(self.reported) {
            let rest = PfnRange::between(block.first() + self.pages, block.end());

            if let Some(range) = rest.and_then(|rest| rest.intersection(self.range?)) {
                self.pages = range.first() - block.first();
                return Some(range);
            }
            self.reported += 1;
            self.pages = 0;
        }

        None
    }
}

/// A walk with a limited number of holds, so that it can be cancelled in between even if it finds
/// little.
pub(crate) struct Unused<'a, F> {
    walk: &'a mut Walk,
    held: F,
    /// How many more times it takes a lock.
    holds: usize,
    over: bool,
}

impl<'a, F: FnMut(Scan)> Unused<'a, F> {
    /// Continues `walk` for up to `holds` holds of a lock. Calls `held` for each.
    pub(crate) fn new(walk: &'a mut Walk, holds: usize, held: F) -> Self {
        Self {
            walk,
            held,
            holds,
            over: false,
        }
    }

    /// Takes the next range, merged with adjacent ranges of the same zone, up to `max` pages.
    /// Returns the zone with it.
    pub(crate) fn next_adjacent(&mut self, max: u64) -> Option<(usize, PfnRange)> {
        let first = self.first()?.first();
        let zone = self.walk.found_in;
        let mut len = 0;

        while len < max {
            let Some(range) = self.first() else { break };
            if range.first() != first + len || self.walk.found_in != zone {
                break;
            }

            let some = range.len().min(max - len);
            self.advance(some);
            len += some;
        }
        Some((zone, PfnRange::new(first, len)?))
    }

    /// Returns the number of the zone of the range that comes next.
    pub(crate) fn found_in(&self) -> usize {
        self.walk.found_in
    }

    /// Returns whether the walk has ended, and all blocks were reported.
    pub(crate) fn is_over(&self) -> bool {
        self.over
    }
}

impl<F: FnMut(Scan)> Ranges for Unused<'_, F> {
    fn first(&mut self) -> Option<PfnRange> {
        loop {
            if let Some(range) = self.walk.first() {
                return Some(range);
            }
            if self.over || self.holds == 0 {
                return None;
            }

            self.holds -= 1;
            match self.walk.scan() {
                Some(scan) => (self.held)(scan),
                None => self.over = true,
            }
        }
    }

    fn advance(&mut self, pages: u64) {
        self.walk.pages += pages;
    }
}

// SPDX-License-Identifier: GPL-2.0

//! Unused pages: the walk over the zones' free memory.
//!
//! A page that is found was on a free list of the page allocator at a moment when the zone's lock
//! was held, and that is all that is known of it: the lock is given up again before anything is
//! said about the page, and whoever gets the page in the meantime may write to it. So what is found
//! is "unused, unless it was written since", and never "free".
//!
//! The lock is held for a number of looks that does not depend on the guest's size, and the walk
//! goes by addresses. Free lists change between two looks, so that one does not know where to go on
//! in them; what lies at an address is found whatever has happened to the lists. It also comes in
//! the order that makes answers short.

#![forbid(unsafe_code)]

use crate::{
    messages::runs::Runs,
    rust::mm::{
        drain,
        pages::page::MAX_ORDER,
        pfn_range::PfnRange,
        zone::{
            Hold,
            Zone, //
        }, //
    }, //
};

use core::ops::Range;
use kernel::prelude::*;

/// A walk over the unused memory of all zones, in some range.
pub(crate) struct Walk {
    /// What is asked for, in page frame numbers of kernel pages.
    range: Range<u64>,
    /// The order of the smallest blocks that are worth being found.
    min_order: u32,
    /// The zone that the walk has come to, and where in it.
    zone: usize,
    next: u64,
    /// What was found under one hold of a lock. Never grows beyond its capacity.
    found: KVec<PfnRange>,
    /// How many blocks of that have been named, and how many pages of the next one.
    named: usize,
    pages: u64,
    /// The zone that it was found in.
    found_in: usize,
}

impl Walk {
    /// Begins a walk for blocks of 2^`min_order` pages or more in `range` (page frame numbers of
    /// kernel pages), of which up to `blocks` are found under one hold of a lock.
    ///
    /// # Errors
    ///
    /// `ENOMEM`.
    pub(crate) fn new(range: Range<u64>, min_order: u32, blocks: usize) -> Result<Self> {
        Ok(Self {
            range,
            min_order,
            zone: 0,
            next: 0,
            found: KVec::with_capacity(blocks, GFP_KERNEL)?,
            named: 0,
            pages: 0,
            found_in: 0,
        })
    }

    /// Looks for more under one hold of a zone's lock. Returns what that has cost, or none if there
    /// is no more memory to be looked at.
    fn look(&mut self) -> Option<Hold> {
        // No block is larger than the largest.
        let zone = Zone::nth(self.zone).filter(|_| self.min_order <= MAX_ORDER)?;
        if self.zone == 0 && self.next == 0 {
            // Pages on the processors' own lists are unused, too, and keep others from being
            // blocks.
            drain::drain_free_lists();
        }
        let span = zone.span();
        let end = span.end.min(self.range.end);

        // A block may begin before the range, and reach into it.
        let first = (span.start.max(self.range.start) >> MAX_ORDER) << MAX_ORDER;
        self.next = self.next.max(first);
        self.found.clear();
        self.named = 0;
        self.found_in = self.zone;

        let hold = zone.find_free(&mut self.next, end, self.min_order, &mut self.found);
        if self.next >= end {
            self.zone += 1;
            self.next = 0;
        }
        Some(hold)
    }

    /// Forgets what was found and not named, and goes on in a zone, at the first place from the
    /// page `pfn` on where a block may begin.
    pub(crate) fn go_on_at(&mut self, zone: usize, pfn: u64) {
        self.found.clear();
        self.named = 0;
        self.pages = 0;
        self.zone = zone;
        self.next = pfn.div_ceil(1 << self.min_order) << self.min_order;
    }

    /// Returns the next run of what was found.
    fn first(&mut self) -> Option<PfnRange> {
        while let Some(block) = self.found.get(self.named) {
            let first = (block.first() + self.pages).max(self.range.start);
            let end = (block.end()).min(self.range.end);

            if let Some(run) = PfnRange::new(first, end.saturating_sub(first)) {
                self.pages = first - block.first();
                return Some(run);
            }
            self.named += 1;
            self.pages = 0;
        }

        None
    }
}

/// What a walk finds with a number of looks, so that it can be called off in between however little
/// it finds.
pub(crate) struct Unused<'a, F> {
    walk: &'a mut Walk,
    held: F,
    /// How many more times a lock is taken.
    holds: usize,
    over: bool,
}

impl<'a, F: FnMut(Hold)> Unused<'a, F> {
    /// Goes on with `walk` for up to `holds` holds of a lock. `held` is told of each.
    pub(crate) fn new(walk: &'a mut Walk, holds: usize, held: F) -> Self {
        Self {
            walk,
            held,
            holds,
            over: false,
        }
    }

    /// Takes the next run, with those after it that lie side by side in the same zone, up to `max`
    /// pages. Returns the zone with it.
    pub(crate) fn side_by_side(&mut self, max: u64) -> Option<(usize, PfnRange)> {
        let first = self.first()?.first();
        let zone = self.walk.found_in;
        let mut len = 0;

        while len < max {
            let Some(run) = self.first() else { break };
            if run.first() != first + len || self.walk.found_in != zone {
                break;
            }

            let some = run.len().min(max - len);
            self.advance(some);
            len += some;
        }
        Some((zone, PfnRange::new(first, len)?))
    }

    /// Returns whether there is no more to be found, and nothing left to be named.
    pub(crate) fn is_over(&self) -> bool {
        self.over
    }
}

impl<F: FnMut(Hold)> Runs for Unused<'_, F> {
    fn first(&mut self) -> Option<PfnRange> {
        loop {
            if let Some(run) = self.walk.first() {
                return Some(run);
            }
            if self.over || self.holds == 0 {
                return None;
            }

            self.holds -= 1;
            match self.walk.look() {
                Some(hold) => (self.held)(hold),
                None => self.over = true,
            }
        }
    }

    fn advance(&mut self, pages: u64) {
        self.walk.pages += pages;
    }
}

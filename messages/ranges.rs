// SPDX-License-Identifier: GPL-2.0

//! Ranges of pages for a message, from any source.

#![forbid(unsafe_code)]

use crate::rust::mm::{
    pages::range_stack::RangeStack,
    pfn_range::PfnRange, //
};

/// Ranges of pages for a message. In ascending order the message is shortest.
pub(crate) trait Ranges {
    /// Returns the first range, if there is one left.
    fn first(&mut self) -> Option<PfnRange>;

    /// Removes `pages` pages from the beginning of the first range.
    fn advance(&mut self, pages: u64);

    /// Returns whether one message must list all of them, in any encoding.
    fn are_one_message(&self) -> bool {
        false
    }
}

impl Ranges for RangeStack {
    fn first(&mut self) -> Option<PfnRange> {
        self.top()
    }

    fn advance(&mut self, pages: u64) {
        self.take(pages);
    }
}

/// A single range.
impl Ranges for Option<PfnRange> {
    fn first(&mut self) -> Option<PfnRange> {
        *self
    }

    fn advance(&mut self, pages: u64) {
        *self = self
            .and_then(|range| PfnRange::between(range.first().saturating_add(pages), range.end()));
    }
}

/// Ranges that are in order.
pub(crate) struct Sorted<'a> {
    first: Option<PfnRange>,
    rest: &'a [PfnRange],
}

impl<'a> Sorted<'a> {
    /// Makes one of `ranges`, which must be in order.
    pub(crate) fn new(ranges: &'a [PfnRange]) -> Self {
        Self {
            first: ranges.first().copied(),
            rest: ranges.get(1..).unwrap_or_default(),
        }
    }
}

impl Ranges for Sorted<'_> {
    fn first(&mut self) -> Option<PfnRange> {
        self.first
    }

    fn advance(&mut self, pages: u64) {
        self.first.advance(pages);
        if self.first.is_none() {
            *self = Self::new(self.rest);
        }
    }

    fn are_one_message(&self) -> bool {
        true
    }
}

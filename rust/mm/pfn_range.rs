// SPDX-License-Identifier: GPL-2.0

//! Ranges of page frame numbers.
//!
//! Nothing here depends on the kernel: `host/wire` compiles this file, too.

/// The end of all page frame numbers: memory ends below 2^64 bytes.
const PFN_END: u64 = 1 << 52;

/// Pages with consecutive page frame numbers: one at least, and none beyond 2^52 - 1.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(C)]
pub(crate) struct PfnRange {
    first: u64,
    len: u64,
}

impl PfnRange {
    /// Returns the range of `len` pages from the page frame number `first` on, if there is one.
    pub(crate) fn new(first: u64, len: u64) -> Option<Self> {
        let end = first.checked_add(len)?;

        (len > 0 && end <= PFN_END).then_some(Self { first, len })
    }

    /// Returns the range from the page frame number `first` up to `end`, which is not part of it,
    /// if there is one.
    pub(crate) fn between(first: u64, end: u64) -> Option<Self> {
        Self::new(first, end.checked_sub(first)?)
    }

    /// Returns the first page frame number.
    pub(crate) fn first(self) -> u64 {
        self.first
    }

    /// Returns the number of pages.
    pub(crate) fn len(self) -> u64 {
        self.len
    }

    /// Returns the page frame number after the last page.
    pub(crate) fn end(self) -> u64 {
        self.first.saturating_add(self.len)
    }
}

#[cfg_attr(test, allow(dead_code, reason = "the host does not need this"))]
impl PfnRange {
    /// All page frame numbers.
    pub(crate) const ALL: Self = Self {
        first: 0,
        len: PFN_END,
    };

    /// Returns whether the page `pfn` is in the range.
    pub(crate) fn contains(self, pfn: u64) -> bool {
        self.first <= pfn && pfn < self.end()
    }

    /// Returns the range of the pages that are in both, if there are any.
    pub(crate) fn intersection(self, other: Self) -> Option<Self> {
        Self::between(self.first.max(other.first), self.end().min(other.end()))
    }

    /// Returns the range extended by the page `pfn`, if that is adjacent.
    pub(crate) fn extended(self, pfn: u64) -> Option<Self> {
        if pfn.checked_add(1) == Some(self.first) {
            Self::new(pfn, self.len + 1)
        } else if self.end() == pfn {
            Self::new(self.first, self.len + 1)
        } else {
            None
        }
    }
}

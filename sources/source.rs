// SPDX-License-Identifier: GPL-2.0

//! The sources of the balloon's pages.

#![forbid(unsafe_code)]

use crate::rust::mm::pages::batch::Batch;

/// A source of pages.
pub(crate) trait Source {
    /// Returns how many kernel pages are taken at a time, and the limit of unacknowledged kernel
    /// pages.
    fn limits(&self) -> (usize, usize) {
        (usize::MAX, usize::MAX)
    }

    /// Returns how many kernel pages the guest can do without now.
    fn spare(&self) -> usize {
        usize::MAX
    }

    /// Puts up to `wanted` pages into `batch`, at most about `blocks` blocks. They stay unsplit if
    /// possible and `unsplit` is set.
    fn gather(&mut self, batch: &mut Batch, wanted: usize, blocks: usize, unsplit: bool);
}

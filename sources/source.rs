// SPDX-License-Identifier: GPL-2.0

//! Where pages for the balloon come from.

#![forbid(unsafe_code)]

use crate::rust::mm::pages::batch::Batch;

/// A source of pages.
pub(crate) trait Source {
    /// Returns how many kernel pages are taken at a time, and from how many on that the device has
    /// not answered for no more are taken.
    fn limits(&self) -> (usize, usize) {
        (usize::MAX, usize::MAX)
    }

    /// Puts up to `wanted` pages into `batch`, in blocks that stay unsplit if they may and `unsplit` is
    /// set, until there might be more than `blocks` of them.
    fn gather(&mut self, batch: &mut Batch, wanted: usize, blocks: usize, unsplit: bool);
}

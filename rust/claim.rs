// SPDX-License-Identifier: GPL-2.0

//! Memory that is taken from the page allocator where it lies.
//!
//! C header: [`include/linux/gfp.h`](srctree/include/linux/gfp.h)

use super::bindings;

use kernel::{
    error::to_result,
    prelude::*, //
};

/// Pages that lie side by side, and belong to nobody else. Dropping it frees them.
///
/// # Invariants
///
/// The `len` pages from the page frame number `first` on are of order 0, and a reference to each is owned by this.
pub(crate) struct Claim {
    first: usize,
    len: usize,
}

impl Claim {
    /// Takes the `len` pages from the page frame number `first` on (kernel pages), if all are unused and in one zone.
    /// May sleep.
    ///
    /// # Errors
    ///
    /// `EBUSY` if something is in the way, `EOPNOTSUPP` if the kernel cannot do it.
    pub(crate) fn new(first: u64, len: u64) -> Result<Self> {
        let (first, len) = (usize::try_from(first)?, usize::try_from(len)?);

        // SAFETY: The function checks the range.
        to_result(unsafe { bindings::balloon_rs_claim_range(first, len) })?;

        // INVARIANT: The pages were just allocated.
        Ok(Self { first, len })
    }
}

impl Drop for Claim {
    fn drop(&mut self) {
        // SAFETY: By the type invariants the pages are ours.
        unsafe { bindings::balloon_rs_free_range(self.first, self.len) };
    }
}

// SPDX-License-Identifier: GPL-2.0

//! Rights that one owner has at a time.

use kernel::sync::atomic::{
    Acquire,
    Atomic,
    Release, //
};

/// A right that one owner has at a time. A mutex cannot serve here: one thread takes the right, and
/// another one releases it.
pub(crate) struct Right(Atomic<bool>);

/// The ownership of a [`Right`]. Dropping it releases the right.
#[must_use]
pub(crate) struct RightGuard(&'static Right);

impl Right {
    /// Makes a right that has no owner.
    pub(crate) const fn new() -> Self {
        Self(Atomic::new(false))
    }

    /// Takes it, or returns none while another caller has it.
    pub(crate) fn take(&'static self) -> Option<RightGuard> {
        // Not `then_some()`: a guard that is made in vain releases the right.
        (!self.0.xchg(true, Acquire)).then(|| RightGuard(self))
    }
}

impl Drop for RightGuard {
    fn drop(&mut self) {
        self.0 .0.store(false, Release);
    }
}

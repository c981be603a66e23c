// SPDX-License-Identifier: GPL-2.0

//! The steps towards the target. All numbers are kernel pages.

#![forbid(unsafe_code)]

/// What to do next.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Step {
    /// Inflate by that many pages.
    Inflate(usize),
    /// Deflate by that many pages.
    Deflate(usize),
    /// Wait: the target is reached, or will be when the device has used all messages.
    Rest,
}

impl Step {
    /// Returns the step towards `target`, when `held` pages are in the balloon and `inflating` more
    /// are in flight.
    ///
    /// Pages in flight cannot be taken back. If they are too many, pages that are already in the
    /// balloon are deflated instead.
    pub(crate) fn towards(target: usize, held: usize, inflating: usize) -> Self {
        let expected = held.saturating_add(inflating);

        if target > expected {
            Self::Inflate(target - expected)
        } else if target < expected && held > 0 {
            Self::Deflate((expected - target).min(held))
        } else {
            Self::Rest
        }
    }
}

// SPDX-License-Identifier: GPL-2.0

//! The way to the target. All numbers are kernel pages.

#![forbid(unsafe_code)]

/// Returns the part of `whole` that `some` is of `all`, or up to a thousandth of `whole` less.
pub(crate) fn part(whole: usize, some: usize, all: usize) -> usize {
    // Dividing first leaves room for the product.
    let in_1024 = (some.min(all) << 10) / all.max(1);

    whole / 1024 * in_1024 + whole % 1024 * in_1024 / 1024
}

/// What to do next.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Step {
    /// Put that many more pages into the balloon.
    Inflate(usize),
    /// Take that many pages out of the balloon.
    Deflate(usize),
    /// Wait: the target is reached, or will be when the device has answered.
    Rest,
}

impl Step {
    /// Returns the way to `target`, when `held` pages are in the balloon and `inflating` more are
    /// on their way into it.
    ///
    /// Pages on their way cannot be called back. If they are too many, some of those that are in
    /// the balloon already are taken out for them.
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

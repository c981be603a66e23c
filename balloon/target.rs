// SPDX-License-Identifier: GPL-2.0

//! The arithmetic of the balloon's size.
//!
//! Two units meet here: the device counts in balloon pages, which are 4 KiB everywhere; the guest
//! counts in kernel pages, which may be larger. One kernel page is a whole number of balloon pages.

#![forbid(unsafe_code)]

use crate::rust::virtio_balloon::PFN_SHIFT;

use core::ops::RangeInclusive;
use kernel::{
    page::PAGE_SHIFT,
    prelude::*, //
};

/// How many balloon pages there are in a kernel page.
pub(crate) const BALLOON_PAGES_PER_PAGE: usize = 1 << (PAGE_SHIFT - PFN_SHIFT as usize);

/// Returns how many kernel pages it takes to have `balloon_pages` in the balloon.
///
/// Rounded up: rounding down would leave the device's target out of reach for ever.
pub(crate) fn pages(balloon_pages: u32) -> usize {
    (balloon_pages as usize).div_ceil(BALLOON_PAGES_PER_PAGE)
}

/// Returns the number of balloon pages in `pages` kernel pages, or the largest number that the
/// device's field can hold.
pub(crate) fn balloon_pages(pages: usize) -> u32 {
    u32::try_from(pages.saturating_mul(BALLOON_PAGES_PER_PAGE)).unwrap_or(u32::MAX)
}

/// Returns how many kernel pages a guest needs for itself that has `present` in all: 8 MiB, and a
/// part of its memory that becomes smaller with its size. There is room in it for the kernel's notes
/// (`struct page`) of 14 times as much memory that may be plugged into a guest of 1 GiB.
pub(crate) fn floor(present: usize) -> usize {
    const MIB: usize = 1 << (20 - PAGE_SHIFT);
    /// Up to how many MiB the guest needs one part in how many.
    const PARTS: [(usize, usize); 5] = [
        (128, 2),
        (512, 4),
        (2_048, 8),
        (8_192, 16),
        (usize::MAX, 32),
    ];
    let mut floor = 8 * MIB;
    let mut start = 0;

    for (end, parts) in PARTS {
        let end = end.saturating_mul(MIB).min(present);
        floor += end.saturating_sub(start) / parts;
        start = end;
    }

    floor
}

/// The page frame number of the first kernel page that has no name in the base protocol: that is at 16
/// TiB.
pub(crate) const END: u64 = (1 << u32::BITS) / BALLOON_PAGES_PER_PAGE as u64;

/// Returns the device's names of the balloon pages in the kernel page `pfn`.
///
/// The base protocol has 32 bits for the number of a balloon page: it cannot name memory beyond 16
/// TiB.
///
/// # Errors
///
/// `EOVERFLOW` if the page is beyond that.
pub(crate) fn balloon_pfns(pfn: u64) -> Result<RangeInclusive<u32>> {
    let per_page = BALLOON_PAGES_PER_PAGE as u64;
    let first = pfn.checked_mul(per_page).ok_or(EOVERFLOW)?;
    let last = first.checked_add(per_page - 1).ok_or(EOVERFLOW)?;

    Ok(first.try_into().map_err(|_| EOVERFLOW)?..=last.try_into().map_err(|_| EOVERFLOW)?)
}

/// Returns the part of `whole` that `some` is of `all`, or up to a thousandth of `whole` less.
pub(crate) fn part(whole: usize, some: usize, all: usize) -> usize {
    // Dividing first leaves room for the product.
    let in_1024 = (some.min(all) << 10) / all.max(1);

    whole / 1024 * in_1024 + whole % 1024 * in_1024 / 1024
}

/// What to do next. All numbers are kernel pages.
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

// SPDX-License-Identifier: GPL-2.0

//! Balloon pages, the device's unit, and kernel pages.
//!
//! Balloon pages are 4 KiB everywhere; kernel pages may be larger. One kernel page is a whole
//! number of balloon pages.

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
/// Rounded up: otherwise the balloon could never reach the device's target.
pub(crate) fn pages(balloon_pages: u32) -> usize {
    (balloon_pages as usize).div_ceil(BALLOON_PAGES_PER_PAGE)
}

/// Returns the number of balloon pages in `pages` kernel pages, or the largest number that the
/// device's field can hold.
pub(crate) fn balloon_pages(pages: usize) -> u32 {
    u32::try_from(pages.saturating_mul(BALLOON_PAGES_PER_PAGE)).unwrap_or(u32::MAX)
}

/// The page frame number of the first kernel page without a number in the base protocol: at 16 TiB.
pub(crate) const END: u64 = (1 << u32::BITS) / BALLOON_PAGES_PER_PAGE as u64;

/// Returns the numbers of the balloon pages in the kernel page `pfn`.
///
/// The base protocol has 32 bits for the number of a balloon page, up to 16 TiB.
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

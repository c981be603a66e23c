// SPDX-License-Identifier: GPL-2.0

//! The base protocol's messages: arrays of page frame numbers of balloon pages.
//!
//! Specification: clause 5.5.6, Device Operation.

#![forbid(unsafe_code)]

use crate::{
    messages::{
        balloon_page::{
            balloon_pfns,
            BALLOON_PAGES_PER_PAGE, //
        },
        ranges::Ranges, //
    },
    rust::virtio::ByteOrder, //
};

use kernel::prelude::*;

/// The maximum number of page frame numbers in a message.
///
/// The specification has no limit, but devices have: Firecracker never returns longer messages, and
/// Cloud Hypervisor returns them unread, so that the memory is lost for both sides. Longer messages
/// would save round trips; sending many with one notification saves as many.
pub(crate) const PFNS_PER_MESSAGE: usize = 256;

/// The maximum number of messages in flight. QEMU handles all available ones, 0.14 ms for each,
/// under a lock that the guest's CPUs need for their timers. It takes longer if the host takes the
/// processor away meanwhile.
pub(crate) const MESSAGES_IN_FLIGHT: usize = 12;

/// How many messages share one notification: so few that the device begins while the driver writes
/// the others. With the ring's event index, the driver notifies only a device that has read all
/// earlier messages.
pub(crate) const MESSAGES_PER_NOTIFICATION: usize = 2;

/// Writes as many of `ranges` to `array`, which is empty and never grows, as there is room for.
///
/// # Errors
///
/// `EOVERFLOW` if a page has no number in the base protocol. Pages before it were removed from
/// `ranges`.
pub(crate) fn write(array: &mut KVec<u32>, order: ByteOrder, ranges: &mut impl Ranges) -> Result {
    while let Some(range) = ranges.first() {
        let room = PFNS_PER_MESSAGE.saturating_sub(array.len()) / BALLOON_PAGES_PER_PAGE;
        let pages = range.len().min(room as u64);
        if pages == 0 {
            break;
        }

        for pfn in range.first()..range.first() + pages {
            for balloon_pfn in balloon_pfns(pfn)? {
                array
                    .push_within_capacity(order.to_device32(balloon_pfn))
                    .map_err(|_| ENOSPC)?;
            }
        }
        ranges.advance(pages);
    }

    Ok(())
}

// SPDX-License-Identifier: GPL-2.0

//! The zones of memory, and what is unused in them.
//!
//! C header: [`include/linux/mmzone.h`](srctree/include/linux/mmzone.h)

use crate::rust::{
    bindings,
    mm::batch::Block, //
};

use core::{
    ops::Range,
    ptr::NonNull, //
};
use kernel::{
    prelude::*,
    time::{
        Delta,
        Instant,
        Monotonic, //
    }, //
};

/// How many places are looked at under one hold of a zone's lock, whatever the guest's size.
pub(crate) const PLACES_PER_HOLD: usize = 1024;

/// A zone.
///
/// # Invariants
///
/// The pointer is that of a zone: these exist as long as the kernel runs.
#[derive(Clone, Copy)]
pub(crate) struct Zone(NonNull<bindings::zone>);

// SAFETY: Zones may be looked at from any thread.
unsafe impl Send for Zone {}

// SAFETY: All that can be done with a zone is done under its lock.
unsafe impl Sync for Zone {}

/// What a look at a zone has cost.
#[derive(Clone, Copy)]
pub(crate) struct Hold {
    /// How many places were looked at.
    pub(crate) places: usize,
    /// For how long the zone's lock was held.
    pub(crate) time: Delta,
}

impl Zone {
    /// Returns zone number `n` of those that have memory, of all nodes.
    pub(crate) fn nth(n: usize) -> Option<Self> {
        // SAFETY: The function has no preconditions.
        //
        // INVARIANT: It returns a zone or null.
        NonNull::new(unsafe { bindings::balloon_rs_nth_zone(n) }).map(Self)
    }

    /// Returns where the zone lies (page frame numbers of kernel pages). Parts of that may belong
    /// to other zones, or to none.
    pub(crate) fn span(self) -> Range<u64> {
        // SAFETY: By the type invariants it is a zone. A span that is changing is no worse than an
        // old one.
        let (first, len) = unsafe {
            let zone = self.0.as_ptr();

            (
                (&raw const (*zone).zone_start_pfn).read_volatile() as u64,
                (&raw const (*zone).spanned_pages).read_volatile() as u64,
            )
        };

        first..first.saturating_add(len)
    }

    /// Looks from `*next` on, up to `end`, for blocks of 2^`min_order` pages or more that are on
    /// the zone's free lists, and puts them on `found`: all of them are there at the same moment.
    /// Goes on until `found` is full, or until it has looked at [`PLACES_PER_HOLD`] places; `*next`
    /// is where to go on.
    ///
    /// Blocks are found in the order of their addresses, and not of the lists: lists change between
    /// one look and the next, addresses do not. `*next` must be a multiple of 2^`min_order`.
    pub(crate) fn find_free(
        self,
        next: &mut u64,
        end: u64,
        min_order: u32,
        found: &mut KVec<Block>,
    ) -> Hold {
        let zone = self.0.as_ptr();
        let mut places = 0;

        // SAFETY: By the type invariants it is a zone. Nothing in between sleeps or takes a lock.
        let flags = unsafe { bindings::balloon_rs_lock_zone(zone) };
        let start = Instant::<Monotonic>::now();

        while *next < end && places < PLACES_PER_HOLD {
            // SAFETY: The zone's lock is held.
            let order = unsafe { bindings::balloon_rs_free_order(zone, *next as usize) };
            places += 1;

            match u32::try_from(order) {
                Ok(order) if order >= min_order => {
                    let block = Block {
                        pfn: *next,
                        len: 1 << order,
                    };
                    if found.push_within_capacity(block).is_err() {
                        break;
                    }
                    *next += 1 << order;
                }
                Err(_) if order == bindings::BALLOON_NOT_HERE => {
                    *next = next_multiple(*next, bindings::BALLOON_SECTION_ORDER);
                }
                _ => *next = next_multiple(*next, min_order),
            }
        }

        let time = start.elapsed();
        // SAFETY: The lock was taken above.
        unsafe { bindings::balloon_rs_unlock_zone(zone, flags) };

        Hold { places, time }
    }

    /// Has the zone look as if `more` page blocks in it were isolated, or so many fewer.
    #[cfg(all(CONFIG_VIRTIO_BALLOON_RS_KUNIT_TEST, CONFIG_CONTIG_ALLOC))]
    pub(crate) fn isolate(self, more: isize) {
        let zone = self.0.as_ptr();

        // SAFETY: By the type invariants it is a zone. The number is changed under its lock, and no
        // reference to it is made.
        unsafe {
            let flags = bindings::balloon_rs_lock_zone(zone);
            let blocks = &raw mut (*zone).nr_isolate_pageblock;

            blocks.write_volatile(blocks.read_volatile().wrapping_add_signed(more));
            bindings::balloon_rs_unlock_zone(zone, flags);
        }
    }
}

/// Returns the first multiple of 2^`order` after `pfn`.
fn next_multiple(pfn: u64, order: u32) -> u64 {
    ((pfn >> order) + 1) << order
}

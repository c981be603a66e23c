// SPDX-License-Identifier: GPL-2.0

//! Memory zones, and the walk over their free memory.
//!
//! C header: [`include/linux/mmzone.h`](srctree/include/linux/mmzone.h)

use crate::rust::{
    bindings,
    mm::{
        node::{
            count,
            online_cpus,
            Node, //
        },
        pages::page::Page,
        pfn_range::PfnRange, //
    }, //
};

use core::mem::offset_of;
use kernel::{
    prelude::*,
    time::{
        Delta,
        Instant,
        Monotonic, //
    },
    types::NotThreadSafe, //
};

/// How many PFNs are scanned under one hold of a zone's lock, for guests of any size.
pub(crate) const PFNS_PER_HOLD: usize = 1024;

/// A zone.
///
/// # Invariants
///
/// The pointer is that of a zone: these exist as long as the kernel runs.
#[derive(Clone, Copy, PartialEq, Eq)]
pub(crate) struct Zone(*mut bindings::zone);

// SAFETY: Zones may be read from any thread.
unsafe impl Send for Zone {}

// SAFETY: Fields are read by volatile accesses. All other accesses hold the zone's lock. No
// reference to the zone is made.
unsafe impl Sync for Zone {}

/// Reads a field of a zone that may be changing. A torn value is no worse than an old one.
macro_rules! read {
    ($zone:expr, $($field:tt)+) => {{
        let zone: Zone = $zone;

        // SAFETY: By the type invariants it is a zone. A volatile access stands for READ_ONCE().
        unsafe { (&raw const (*zone.0).$($field)+).read_volatile() }
    }};
}

/// The cost of a scan.
#[derive(Clone, Copy)]
pub(crate) struct Scan {
    /// How many PFNs were scanned.
    pub(crate) pfns: usize,
    /// For how long the zone's lock was held.
    pub(crate) time: Delta,
}

/// Returns a pointer to the zones of a node.
fn zones_of(node: *mut bindings::pglist_data) -> *mut bindings::zone {
    node.wrapping_byte_add(offset_of!(bindings::pglist_data, node_zones))
        .cast()
}

impl Node {
    /// Returns its zones, also those that have no memory.
    pub(super) fn zones(self) -> impl Iterator<Item = Zone> + Clone {
        let zones = zones_of(self.data());

        // INVARIANT: A node has that many zones.
        (0..bindings::MAX_NR_ZONES as usize).map(move |n| Zone(zones.wrapping_add(n)))
    }
}

impl Zone {
    /// Returns the zone of a page.
    pub(in crate::rust) fn of(page: Page) -> Self {
        // INVARIANT: That is a zone.
        Self(page.zone())
    }

    /// Sets the zone's watermark boost to `pages` kernel pages.
    #[cfg(CONFIG_VIRTIO_BALLOON_RS_KUNIT_TEST)]
    pub(super) fn set_boost(self, pages: usize) {
        // SAFETY: By the type invariants it is a zone. Other code writes the field as well, and no
        // reference to it is made.
        unsafe { (&raw mut (*self.0).watermark_boost).write_volatile(pages) };
    }

    /// Returns the zones of all nodes that have memory.
    pub(crate) fn all() -> impl Iterator<Item = Self> {
        Node::online()
            .flat_map(Node::zones)
            .filter(|zone| zone.present_pages() > 0)
    }

    /// Returns the `n`th zone with memory, of all nodes.
    pub(crate) fn nth(n: usize) -> Option<Self> {
        Self::all().nth(n)
    }

    /// Returns how many kernel pages there are.
    pub(super) fn present_pages(self) -> usize {
        read!(self, present_pages)
    }

    /// Returns how many kernel pages the watermark boost reserves, after memory of one migrate type
    /// was used for another.
    pub(super) fn boost(self) -> usize {
        read!(self, watermark_boost)
    }

    /// Returns the low watermark in kernel pages, with the [`boost`](Self::boost).
    pub(super) fn low_watermark(self) -> usize {
        read!(
            self,
            _watermark[bindings::zone_watermarks_WMARK_LOW as usize]
        ) + self.boost()
    }

    fn high_watermark(self) -> usize {
        read!(
            self,
            _watermark[bindings::zone_watermarks_WMARK_HIGH as usize]
        ) + self.boost()
    }

    /// Returns whether pageblocks of the zone are isolated.
    pub(super) fn is_isolating(self) -> bool {
        #[cfg(CONFIG_MEMORY_ISOLATION)]
        return read!(self, nr_isolate_pageblock) != 0;
        #[cfg(not(CONFIG_MEMORY_ISOLATION))]
        false
    }

    /// Returns a counter of the zone.
    fn counter(self, item: bindings::zone_stat_item) -> usize {
        count(read!(self, vm_stat[item as usize]))
    }

    /// Returns how many kernel pages are free.
    pub(super) fn free_pages(self) -> usize {
        self.counter(bindings::zone_stat_item_NR_FREE_PAGES)
    }

    /// Returns how many free kernel pages belong to CMA.
    pub(super) fn free_cma_pages(self) -> usize {
        self.counter(bindings::zone_stat_item_NR_FREE_CMA_PAGES)
    }

    /// Returns how many kernel pages are page cache.
    pub(super) fn file_pages(self) -> usize {
        self.counter(bindings::zone_stat_item_NR_ZONE_ACTIVE_FILE)
            + self.counter(bindings::zone_stat_item_NR_ZONE_INACTIVE_FILE)
    }

    /// Returns the zone's index among those of its node.
    pub(super) fn kind(self) -> bindings::zone_type {
        let zones = zones_of(read!(self, zone_pgdat));
        let index = (self.0.addr() - zones.addr()) / size_of::<bindings::zone>();

        index as bindings::zone_type
    }

    /// Returns whether all of its pages must be movable.
    pub(in crate::rust) fn is_movable(self) -> bool {
        self.kind() == bindings::zone_type_ZONE_MOVABLE
    }

    /// Returns whether an allocation with all retries may have failed in the zone. The limit is the
    /// high watermark, since some memory may have become free meanwhile.
    pub(super) fn is_short(self) -> bool {
        let reserve = read!(self, lowmem_reserve[bindings::MAX_NR_ZONES as usize - 1]);
        let kept = 2 * self.high_watermark()
            + reserve as usize
            + read!(self, nr_free_highatomic)
            + self.free_cma_pages();

        if self.free_pages() <= kept {
            return true;
        }
        let first = bindings::PAGE_ALLOC_COSTLY_ORDER as usize;
        (first..bindings::NR_PAGE_ORDERS as usize)
            .all(|order| read!(self, free_area[order].nr_free) == 0)
    }

    /// Returns how many free kernel pages are on the per-CPU page lists. Reads the counters without
    /// their locks, so the result is an estimate.
    pub(super) fn pcp_pages(self) -> usize {
        let lists = read!(self, per_cpu_pageset);
        // SAFETY: The zone has such lists for each CPU.
        let listed = |cpu| unsafe {
            let lists: *mut bindings::per_cpu_pages =
                bindings::per_cpu_ptr(lists.cast(), cpu).cast();

            (&raw const (*lists).count).read_volatile()
        };

        online_cpus().map(|cpu| listed(cpu).max(0) as usize).sum()
    }

    /// Returns the zone's range of kernel pages, none if it has no memory. Parts of it may belong
    /// to other zones, or to none.
    pub(crate) fn span(self) -> Option<PfnRange> {
        let first = read!(self, zone_start_pfn) as u64;

        PfnRange::new(first, read!(self, spanned_pages) as u64)
    }

    /// Takes the zone's lock. The caller must not sleep, or take another lock, until the result is
    /// dropped.
    pub(super) fn lock(self) -> LockedZone {
        // SAFETY: By the type invariants it is a zone.
        unsafe { bindings::spin_lock_irq_disable(&raw mut (*self.0).lock) };

        // INVARIANT: The lock was just taken.
        LockedZone {
            zone: self,
            _same_cpu: NotThreadSafe,
        }
    }

    /// Scans from `*next` up to `end` for blocks of 2^`min_order` pages or more on the zone's free
    /// lists, and adds them to `found`: all of them are free at the same moment. Stops when `found`
    /// is full, or after [`PFNS_PER_HOLD`] PFNs; `*next` is the place to continue.
    ///
    /// The scan follows addresses, and not the lists: lists change between two holds of the lock,
    /// addresses do not. `*next` must be a multiple of 2^`min_order`.
    pub(crate) fn find_free(
        self,
        next: &mut u64,
        end: u64,
        min_order: u32,
        found: &mut KVec<PfnRange>,
    ) -> Scan {
        let mut pfns = 0;
        let zone = self.lock();
        let start = Instant::<Monotonic>::now();

        while *next < end && pfns < PFNS_PER_HOLD {
            let order = zone.free_order(*next as usize);
            pfns += 1;

            match order {
                Ok(Some(order)) if order >= min_order => {
                    let full = PfnRange::new(*next, 1 << order)
                        .map(|block| found.push_within_capacity(block).is_err());
                    if full != Some(false) {
                        break;
                    }
                    *next += 1 << order;
                }
                Ok(_) => *next = next_multiple(*next, min_order),
                Err(NotHere) => *next = next_multiple(*next, bindings::BALLOON_SECTION_ORDER),
            }
        }

        let time = start.elapsed();
        drop(zone);
        Scan { pfns, time }
    }

    /// Changes the zone's number of isolated pageblocks by `more`, for tests.
    #[cfg(all(CONFIG_VIRTIO_BALLOON_RS_KUNIT_TEST, CONFIG_CONTIG_ALLOC))]
    pub(crate) fn isolate(self, more: isize) {
        let _locked = self.lock();

        // SAFETY: By the type invariants it is a zone. The number is changed under its lock, and no
        // reference to it is made.
        unsafe {
            let blocks = &raw mut (*self.0).nr_isolate_pageblock;

            blocks.write_volatile(blocks.read_volatile().wrapping_add_signed(more));
        }
    }
}

/// Returns the first multiple of 2^`order` after `pfn`.
fn next_multiple(pfn: u64, order: u32) -> u64 {
    ((pfn >> order) + 1) << order
}

/// The memory section around the page does not belong to the zone.
pub(super) struct NotHere;

/// A zone whose lock is held.
///
/// # Invariants
///
/// The zone's lock was taken, and interrupts are disabled.
pub(super) struct LockedZone {
    zone: Zone,
    _same_cpu: NotThreadSafe,
}

impl LockedZone {
    /// Returns the order of the block that begins at `pfn` and is on one of the zone's free lists,
    /// or none if there is no such block.
    pub(super) fn free_order(&self, pfn: usize) -> Result<Option<u32>, NotHere> {
        let page = Page::online(pfn).ok_or(NotHere)?;
        let order = page.free_order();

        Ok(order.filter(|_| page.zone() == self.zone.0))
    }
}

impl Drop for LockedZone {
    fn drop(&mut self) {
        // SAFETY: By the type invariants.
        unsafe { bindings::spin_unlock_irq_enable(&raw mut (*self.zone.0).lock) };
    }
}

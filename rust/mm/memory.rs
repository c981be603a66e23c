// SPDX-License-Identifier: GPL-2.0

//! The guest's available memory.
//!
//! C headers: [`include/linux/mm.h`](srctree/include/linux/mm.h),
//! [`include/linux/vmstat.h`](srctree/include/linux/vmstat.h)

use crate::rust::{
    bindings,
    mm::{
        locks::RESERVE,
        node::{
            count,
            read_global,
            Node, //
        },
        pages::{
            gfp::Gfp,
            page::Page, //
        },
        zone::Zone, //
    }, //
};

use kernel::{
    page::PAGE_SHIFT,
    prelude::*,
    sync::{
        atomic::{
            Atomic,
            Relaxed, //
        },
        lock::GlobalGuard, //
    }, //
};

/// Returns the kernel pages that are available without swapping: `MemAvailable` of /proc/meminfo,
/// less some amounts. The watermark boost may be more than 100 MiB, and an allocation that needs
/// some of it kills a process. Mapped page cache is in use, such as the text of running programs:
/// without it they would wait for the disk with each step. [Reservations](Reservation) do not count
/// either.
pub(crate) fn available_pages() -> usize {
    #[cfg(CONFIG_VIRTIO_BALLOON_RS_KUNIT_TEST)]
    if IS_FULL.load(Relaxed) {
        return 0;
    }
    let pages = bindings::si_mem_available();
    let mapped = Node::all().map(Node::mapped_file_pages).sum();

    usize::try_from(pages)
        .unwrap_or(0)
        .saturating_sub(mapped)
        .saturating_sub(boosted_pages())
        .saturating_sub(RESERVED.load(Relaxed))
}

/// Returns all kernel pages of the guest, balloons included.
pub(crate) fn present_pages() -> usize {
    Zone::all().map(Zone::present_pages).sum()
}

/// Returns the kernel pages that watermark boosts reserve for a while.
pub(crate) fn boosted_pages() -> usize {
    Zone::all().map(Zone::boost).sum()
}

impl Node {
    /// Returns the kernel pages of the node that are available without swapping;
    /// [`available_pages`] is the same for all nodes, less reservations.
    pub(crate) fn available_pages(self) -> usize {
        let low: usize = self.zones().map(Zone::low_watermark).sum();
        let free: usize = self.zones().map(Zone::free_pages).sum();
        let boost: usize = self.zones().map(Zone::boost).sum();
        let cache = |pages: usize| pages - (pages / 2).min(low);

        (free + cache(self.file_pages()) + cache(self.reclaimable_pages()))
            .saturating_sub(self.reserved_pages() + self.mapped_file_pages() + boost)
    }

    /// Returns the node's free kernel pages that the kernel can use for itself.
    pub(crate) fn kernel_free_pages(self) -> usize {
        self.zones()
            .filter(|zone| !zone.is_movable())
            .map(|zone| zone.free_pages().saturating_sub(zone.free_cma_pages()))
            .sum()
    }

    /// Returns whether an allocation on the node may just have failed for lack of memory: whether
    /// its zones have none.
    pub(crate) fn is_short(self) -> bool {
        #[cfg(CONFIG_VIRTIO_BALLOON_RS_KUNIT_TEST)]
        if IS_SHORT.load(Relaxed) {
            return true;
        }
        let zones = self.zones().filter(|zone| zone.present_pages() > 0);

        are_short(zones.map(|zone| (zone.is_movable(), zone.is_short())))
    }
}

/// Returns whether a node is short of memory whose zones are `zones`: whether each is movable, and
/// whether it is short. Not every allocation may use `ZONE_MOVABLE`, so that counts only if the
/// node has no other zone.
pub(crate) fn are_short(zones: impl Iterator<Item = (bool, bool)> + Clone) -> bool {
    let has_others = zones.clone().any(|(is_movable, _)| !is_movable);

    zones
        .filter(|&(is_movable, _)| !is_movable || !has_others)
        .all(|(_, is_short)| is_short)
}

/// Returns the kernel pages that are free.
pub(crate) fn free_pages() -> usize {
    count(read_global!(
        vm_zone_stat[bindings::zone_stat_item_NR_FREE_PAGES as usize]
    ))
}

/// The part of the free memory that is always left to the guest, as a divisor.
const LEFT_FREE: usize = 8;

/// Returns the kernel pages that can be allocated for a while: free ones, less an eighth of them,
/// less 16 MiB and 1/512 of all memory, which is more than the page allocator's watermarks. And no
/// more than leave `floor` available.
///
/// Memory that the kernel cannot use for itself does not count.
pub(crate) fn free_above_reserve(floor: usize) -> usize {
    let movable = Movable::now();
    let free = free_pages().saturating_sub(movable.free + RESERVED.load(Relaxed));
    let always_free = (16 << (20 - PAGE_SHIFT)) + total_pages() / 512;

    free.saturating_sub((free / LEFT_FREE).max(always_free))
        .min(movable.others_available().saturating_sub(floor))
}

/// The memory for movable pages only, `ZONE_MOVABLE` and CMA, in kernel pages.
struct Movable {
    free: usize,
    /// Some of the files may be in CMA memory.
    caches: usize,
}

impl Movable {
    fn now() -> Self {
        let mut this = Self { free: 0, caches: 0 };

        for zone in Zone::all() {
            if zone.is_movable() {
                this.free += zone.free_pages();
                this.caches += zone.file_pages();
            } else {
                this.free += zone.free_cma_pages();
            }
        }
        this
    }

    /// Returns the kernel pages that are available there without swapping.
    fn others_available(&self) -> usize {
        available_pages().saturating_sub(self.free + self.caches)
    }
}

/// Returns the kernel pages that the kernel can use for itself without swapping.
pub(crate) fn kernel_available_pages() -> usize {
    Movable::now().others_available()
}

/// The right to allocate memory above the reserve, held from the check until the allocation.
/// Otherwise two callers that check at the same time would allocate the same memory. One caller of
/// all devices has it at a time.
#[must_use]
pub(crate) struct ReserveGuard {
    _lock: GlobalGuard<RESERVE>,
}

impl ReserveGuard {
    /// Waits for it.
    pub(crate) fn begin() -> Self {
        Self {
            _lock: RESERVE.lock(),
        }
    }
}

/// How many kernel pages [reservations](Reservation) have.
static RESERVED: Atomic<usize> = Atomic::new(0);

/// Kernel pages above the reserve that another thread allocates, which has no [`ReserveGuard`].
pub(crate) struct Reservation(usize);

impl Reservation {
    /// Reserves `pages` kernel pages, which are above the reserve.
    pub(crate) fn new(_taking: &ReserveGuard, pages: usize) -> Self {
        RESERVED.add(pages, Relaxed);
        Self(pages)
    }
}

impl Drop for Reservation {
    fn drop(&mut self) {
        RESERVED.fetch_sub(self.0, Relaxed);
    }
}

/// Returns the free kernel pages on the per-CPU page lists, which [`available_pages`] does not
/// count.
pub(crate) fn pcp_pages() -> usize {
    Zone::all().map(Zone::pcp_pages).sum()
}

/// Returns whether the page `pfn` (of a kernel page) is marked as offline.
#[cfg(CONFIG_VIRTIO_BALLOON_RS_KUNIT_TEST)]
pub(crate) fn is_offline(pfn: usize) -> bool {
    Page::online(pfn).is_some_and(Page::is_offline)
}

/// Returns the value of each word of free pages; `None` if freeing does not write them.
pub(crate) fn free_page_value() -> Option<u32> {
    if bindings::want_init_on_free() {
        Some(0)
    } else if bindings::page_poisoning_enabled_static() {
        Some(u32::from_ne_bytes([bindings::PAGE_POISON as u8; 4]))
    } else {
        None
    }
}

/// Returns whether the kernel is a crash kernel, which saves the memory of a crashed kernel, has a
/// small part of the guest's memory, and needs all of that.
pub(crate) fn is_crash_kernel() -> bool {
    bindings::is_kdump_kernel()
}

/// Returns whether the kernel zeroes memory that it allocates for the balloon and for hints
/// (`init_on_alloc=1`): the host has to provide all of it first, and it takes much longer.
pub(crate) fn is_zeroed_on_allocation() -> bool {
    #[cfg(CONFIG_VIRTIO_BALLOON_RS_KUNIT_TEST)]
    if ZEROES_ON_ALLOCATION.load(Relaxed) {
        return true;
    }
    // Flags may request zeroing, too.
    bindings::want_init_on_alloc(Gfp::ALL)
}

/// Returns whether page migration waits for the disk.
#[cfg(CONFIG_VIRTIO_BALLOON_RS_KUNIT_TEST)]
pub(super) fn migration_waits() -> bool {
    MIGRATION_WAITS.load(Relaxed)
}

/// Returns whether memory that is offline stays so.
#[cfg(CONFIG_VIRTIO_BALLOON_RS_KUNIT_TEST)]
pub(super) fn stays_offline() -> bool {
    STAYS_OFFLINE.load(Relaxed)
}

/// A property that the driver sees in the kernel while this exists, for tests.
#[cfg(CONFIG_VIRTIO_BALLOON_RS_KUNIT_TEST)]
pub(crate) struct Pretence(&'static Atomic<bool>);

#[cfg(CONFIG_VIRTIO_BALLOON_RS_KUNIT_TEST)]
static ZEROES_ON_ALLOCATION: Atomic<bool> = Atomic::new(false);

#[cfg(CONFIG_VIRTIO_BALLOON_RS_KUNIT_TEST)]
static IS_SHORT: Atomic<bool> = Atomic::new(false);

#[cfg(CONFIG_VIRTIO_BALLOON_RS_KUNIT_TEST)]
static IS_FULL: Atomic<bool> = Atomic::new(false);

#[cfg(CONFIG_VIRTIO_BALLOON_RS_KUNIT_TEST)]
static MIGRATION_WAITS: Atomic<bool> = Atomic::new(false);

#[cfg(CONFIG_VIRTIO_BALLOON_RS_KUNIT_TEST)]
static STAYS_OFFLINE: Atomic<bool> = Atomic::new(false);

#[cfg(CONFIG_VIRTIO_BALLOON_RS_KUNIT_TEST)]
impl Pretence {
    fn begin(what: &'static Atomic<bool>) -> Self {
        what.store(true, Relaxed);
        Self(what)
    }

    /// It zeroes memory that it allocates.
    pub(crate) fn zeroes_on_allocation() -> Self {
        Self::begin(&ZEROES_ON_ALLOCATION)
    }

    /// All of its nodes are short of memory.
    pub(crate) fn is_short() -> Self {
        Self::begin(&IS_SHORT)
    }

    /// None of its memory is available.
    pub(crate) fn is_full() -> Self {
        Self::begin(&IS_FULL)
    }

    /// It waits for the disk while it allocates a contiguous range.
    pub(crate) fn migration_waits() -> Self {
        Self::begin(&MIGRATION_WAITS)
    }

    /// Memory that is offline stays so.
    pub(crate) fn stays_offline() -> Self {
        Self::begin(&STAYS_OFFLINE)
    }
}

#[cfg(CONFIG_VIRTIO_BALLOON_RS_KUNIT_TEST)]
impl Drop for Pretence {
    fn drop(&mut self) {
        self.0.store(false, Relaxed);
    }
}

/// Returns all kernel pages of the guest: `MemTotal` of /proc/meminfo.
pub(crate) fn total_pages() -> usize {
    count(read_global!(_totalram_pages))
}

/// Adds `pages` to the number of managed pages of the zone of `page`.
pub(super) fn adjust_managed(page: Page, pages: c_long) {
    // SAFETY: It is a page.
    unsafe { bindings::adjust_managed_page_count(page.as_ptr(), pages) };
}

/// Counts `pages` kernel pages from `page` on as inflated or deflated.
pub(super) fn count_ballooned(page: Page, pages: c_long, inflated: bool) {
    let item = bindings::node_stat_item_NR_BALLOON_PAGES;
    let (event, change) = match inflated {
        true => (bindings::vm_event_item_BALLOON_INFLATE, pages),
        false => (bindings::vm_event_item_BALLOON_DEFLATE, -pages),
    };

    // SAFETY: The event exists, and the page is on a node.
    unsafe {
        bindings::count_vm_events(event, pages);
        bindings::mod_node_page_state(bindings::NODE_DATA(page.nid() as c_int), item, change);
    }
}

/// No longer counts the page as being in a balloon, without an event.
pub(super) fn forget_ballooned(page: Page) {
    let item = bindings::node_stat_item_NR_BALLOON_PAGES;

    // SAFETY: The page is on a node.
    unsafe { bindings::mod_node_page_state(bindings::NODE_DATA(page.nid() as c_int), item, -1) };
}

/// Sets a watermark boost of `pages` kernel pages in each zone.
#[cfg(CONFIG_VIRTIO_BALLOON_RS_KUNIT_TEST)]
pub(crate) fn boost(pages: usize) {
    Zone::all().for_each(|zone| zone.set_boost(pages));
}

/// Returns the kernel pages in all balloons: `nr_balloon_pages` of /proc/vmstat.
#[cfg(CONFIG_VIRTIO_BALLOON_RS_KUNIT_TEST)]
pub(crate) fn ballooned_pages() -> usize {
    let on_cpus: isize = Node::online().map(Node::ballooned_on_cpus).sum();
    let counter = read_global!(vm_node_stat[bindings::node_stat_item_NR_BALLOON_PAGES as usize]);

    // Both parts may be negative.
    (counter.counter as isize + on_cpus).max(0) as usize
}

// SPDX-License-Identifier: GPL-2.0

//! How much memory the guest has left.
//!
//! C headers: [`include/linux/mm.h`](srctree/include/linux/mm.h),
//! [`include/linux/vmstat.h`](srctree/include/linux/vmstat.h)

use crate::rust::{
    bindings,
    mm::{
        gfp::Gfp,
        locks::RESERVE,
        node::{
            count,
            read_global,
            Node, //
        },
        pages::page::Page,
        zone::Zone, //
    }, //
};

#[cfg(CONFIG_VIRTIO_BALLOON_RS_KUNIT_TEST)]
use kernel::sync::atomic::{
    Atomic,
    Relaxed, //
};
use kernel::{
    page::PAGE_SHIFT,
    prelude::*,
    sync::lock::GlobalGuard, //
};

/// Returns the kernel pages that are available without swapping: `MemAvailable` of /proc/meminfo,
/// with two exceptions. What the kernel keeps back at the moment may be more than 100 MiB, and an
/// allocation that wants some of it kills a process. What processes have mapped of files is in use,
/// such as the programs that run: they would wait for the disk with each step.
pub(crate) fn available_pages() -> usize {
    let pages = bindings::si_mem_available();
    let mapped = Node::all().map(Node::mapped_file_pages).sum();

    usize::try_from(pages)
        .unwrap_or(0)
        .saturating_sub(mapped)
        .saturating_sub(boosted_pages())
}

/// Returns the kernel pages that the guest has in all, in balloons or not.
pub(crate) fn present_pages() -> usize {
    Zone::all().map(Zone::present_pages).sum()
}

/// Returns the kernel pages that watermark boosts reserve for a while.
pub(crate) fn boosted_pages() -> usize {
    Zone::all().map(Zone::boost).sum()
}

impl Node {
    /// Returns the kernel pages that are available there without swapping: what [`available_pages`] is
    /// for all nodes.
    pub(crate) fn available_pages(self) -> usize {
        let low: usize = self.zones().map(Zone::low_watermark).sum();
        let free: usize = self.zones().map(Zone::free_pages).sum();
        let boost: usize = self.zones().map(Zone::boost).sum();
        let cache = |pages: usize| pages - (pages / 2).min(low);

        (free + cache(self.file_pages()) + cache(self.reclaimable_pages()))
            .saturating_sub(self.reserved_pages() + self.mapped_file_pages() + boost)
    }

    /// Returns whether an allocation may just have failed for lack of memory there: whether the kernel
    /// has nothing in any of the node's zones. Not every allocation may take from `ZONE_MOVABLE`.
    pub(crate) fn is_short(self) -> bool {
        #[cfg(CONFIG_VIRTIO_BALLOON_RS_KUNIT_TEST)]
        if IS_SHORT.load(Relaxed) {
            return true;
        }
        self.zones()
            .filter(|zone| zone.present_pages() > 0 && !zone.is_movable())
            .all(Zone::is_short)
    }
}

/// Returns the kernel pages that are free.
pub(crate) fn free_pages() -> usize {
    count(read_global!(
        vm_zone_stat[bindings::zone_stat_item_NR_FREE_PAGES as usize]
    ))
}

/// What part of the free memory is always left to the guest, as a divisor.
const LEFT_FREE: usize = 8;

/// Returns the kernel pages that the guest can do without for a while: free ones, except an eighth
/// of them, and except 16 MiB and 1/512 of all memory, which is more than what the page allocator
/// wants to have at hand; and no more than leave `floor` available.
///
/// What the kernel cannot use for itself does not count, however much there is of it.
pub(crate) fn free_above_reserve(floor: usize) -> usize {
    let movable = Movable::now();
    let free = free_pages().saturating_sub(movable.free);
    let always_free = (16 << (20 - PAGE_SHIFT)) + total_pages() / 512;

    free.saturating_sub((free / LEFT_FREE).max(always_free))
        .min(movable.others_available().saturating_sub(floor))
}

/// What lies where only pages may be that can be moved, `ZONE_MOVABLE` and CMA, in kernel pages.
struct Movable {
    free: usize,
    /// Not all files of CMA.
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

    /// Returns the kernel pages that are available elsewhere without swapping.
    fn others_available(&self) -> usize {
        available_pages().saturating_sub(self.free + self.caches)
    }
}

/// Returns the kernel pages that the kernel can have for itself without swapping.
pub(crate) fn kernel_available_pages() -> usize {
    Movable::now().others_available()
}

/// The right to take memory from the guest, from looking at how much it can spare until that is
/// taken: of two who looked at the same time both would take it. One at a time has it, of all
/// devices.
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

/// Returns the free kernel pages on the per-CPU page lists, which [`available_pages`] does not
/// count.
pub(crate) fn listed_pages() -> usize {
    Zone::all().map(Zone::listed_pages).sum()
}

/// Returns whether the page `pfn` (of a kernel page) is marked as offline.
#[cfg(CONFIG_VIRTIO_BALLOON_RS_KUNIT_TEST)]
pub(crate) fn is_offline(pfn: usize) -> bool {
    Page::online(pfn).is_some_and(Page::is_offline)
}

/// Returns what each word of free pages is set to when they are freed; `None` if they are left as
/// they are.
pub(crate) fn free_page_value() -> Option<u32> {
    if bindings::want_init_on_free() {
        Some(0)
    } else if bindings::page_poisoning_enabled_static() {
        Some(u32::from_ne_bytes([bindings::PAGE_POISON as u8; 4]))
    } else {
        None
    }
}

/// Returns whether the kernel is a crash kernel: it was started to save the memory of a kernel that
/// has panicked, has a small part of the guest's memory, and needs all of that.
pub(crate) fn is_crash_kernel() -> bool {
    bindings::is_kdump_kernel()
}

/// Returns whether the kernel zeroes what it allocates for the balloon and for hints
/// (`init_on_alloc=1`): the host has to have all of it first, and it takes much longer.
pub(crate) fn is_zeroed_on_allocation() -> bool {
    #[cfg(CONFIG_VIRTIO_BALLOON_RS_KUNIT_TEST)]
    if ZEROES_ON_ALLOCATION.load(Relaxed) {
        return true;
    }
    // Flags may ask for zeroes, too.
    bindings::want_init_on_alloc(Gfp::ALL)
}

/// What the driver takes a kernel for, for as long as this exists.
#[cfg(CONFIG_VIRTIO_BALLOON_RS_KUNIT_TEST)]
pub(crate) struct Pretence(&'static Atomic<bool>);

#[cfg(CONFIG_VIRTIO_BALLOON_RS_KUNIT_TEST)]
static ZEROES_ON_ALLOCATION: Atomic<bool> = Atomic::new(false);

#[cfg(CONFIG_VIRTIO_BALLOON_RS_KUNIT_TEST)]
static IS_SHORT: Atomic<bool> = Atomic::new(false);

#[cfg(CONFIG_VIRTIO_BALLOON_RS_KUNIT_TEST)]
impl Pretence {
    fn begin(what: &'static Atomic<bool>) -> Self {
        what.store(true, Relaxed);
        Self(what)
    }

    /// It zeroes what it allocates.
    pub(crate) fn zeroes_on_allocation() -> Self {
        Self::begin(&ZEROES_ON_ALLOCATION)
    }

    /// All of its nodes are short of memory.
    pub(crate) fn is_short() -> Self {
        Self::begin(&IS_SHORT)
    }
}

#[cfg(CONFIG_VIRTIO_BALLOON_RS_KUNIT_TEST)]
impl Drop for Pretence {
    fn drop(&mut self) {
        self.0.store(false, Relaxed);
    }
}

/// Returns the kernel pages that the guest has in all: `MemTotal` of /proc/meminfo.
pub(crate) fn total_pages() -> usize {
    count(read_global!(_totalram_pages))
}

/// Adds `pages` to the number of managed pages of the zone of `page`.
pub(super) fn adjust_managed(page: Page, pages: c_long) {
    // SAFETY: It is a page.
    unsafe { bindings::adjust_managed_page_count(page.as_ptr(), pages) };
}

/// Counts `pages` kernel pages, of which `page` is the first, as inflated (or as deflated).
pub(super) fn count_ballooned(page: Page, pages: c_long, inflated: bool) {
    let item = bindings::node_stat_item_NR_BALLOON_PAGES;
    let (event, change) = match inflated {
        true => (bindings::vm_event_item_BALLOON_INFLATE, pages),
        false => (bindings::vm_event_item_BALLOON_DEFLATE, -pages),
    };

    // SAFETY: There is such an event, and the page is on a node.
    unsafe {
        bindings::count_vm_events(event, pages);
        bindings::mod_node_page_state(bindings::NODE_DATA(page.nid() as c_int), item, change);
    }
}

/// Has the kernel keep back `pages` kernel pages of each zone for a while.
#[cfg(CONFIG_VIRTIO_BALLOON_RS_KUNIT_TEST)]
pub(crate) fn boost(pages: usize) {
    Zone::all().for_each(|zone| zone.set_boost(pages));
}

/// Returns the kernel pages in all balloons: `nr_balloon_pages` of /proc/vmstat.
#[cfg(CONFIG_VIRTIO_BALLOON_RS_KUNIT_TEST)]
pub(crate) fn ballooned_pages() -> usize {
    let on_cpus: isize = Node::online().map(Node::ballooned_on_cpus).sum();
    let counter = read_global!(vm_node_stat[bindings::node_stat_item_NR_BALLOON_PAGES as usize]);

    // Either part may be negative.
    (counter.counter as isize + on_cpus).max(0) as usize
}

// SPDX-License-Identifier: GPL-2.0

//! Numbers about the guest's memory, for statistics.
//!
//! C header: [`include/linux/vmstat.h`](srctree/include/linux/vmstat.h)

use crate::rust::{
    bindings,
    mm::node::counter as node_counter, //
};

use kernel::{
    ffi::c_ulong,
    page::PAGE_SHIFT, //
};

/// The guest's memory at some moment. Amounts of memory are in bytes; the rest are counts since it
/// booted. `None` stands for values that this kernel does not count.
#[derive(Clone, Copy)]
pub(crate) struct Info {
    pub(crate) free: u64,
    pub(crate) total: u64,
    pub(crate) available: u64,
    pub(crate) caches: u64,
    pub(crate) swapped_in: Option<u64>,
    pub(crate) swapped_out: Option<u64>,
    pub(crate) major_faults: Option<u64>,
    pub(crate) faults: Option<u64>,
    pub(crate) hugetlb_allocations: Option<u64>,
    pub(crate) hugetlb_failures: Option<u64>,
    pub(crate) oom_kills: Option<u64>,
    pub(crate) allocation_stalls: Option<u64>,
    pub(crate) async_scanned: u64,
    pub(crate) direct_scanned: u64,
    pub(crate) async_reclaimed: u64,
    pub(crate) direct_reclaimed: u64,
}

fn bytes(pages: usize) -> u64 {
    (pages as u64) << PAGE_SHIFT
}

/// The number of events.
const EVENTS: usize = bindings::vm_event_item_NR_VM_EVENT_ITEMS as usize;

/// Reads how often each event has occurred since the guest booted. Returns false if this kernel
/// does not count events.
#[cfg_attr(not(CONFIG_VM_EVENT_COUNTERS), expect(unused_variables))]
fn read_events(counts: &mut [c_ulong; EVENTS]) -> bool {
    // SAFETY: The array has room for all numbers that the function writes.
    #[cfg(CONFIG_VM_EVENT_COUNTERS)]
    unsafe {
        bindings::all_vm_events(counts.as_mut_ptr())
    };

    cfg!(CONFIG_VM_EVENT_COUNTERS)
}

/// Returns how many pages of balloons were migrated since the guest booted: `balloon_migrate` of
/// /proc/vmstat.
#[cfg(CONFIG_VIRTIO_BALLOON_RS_KUNIT_TEST)]
pub(crate) fn migrated_pages() -> u64 {
    let mut counts = [0; EVENTS];

    read_events(&mut counts);
    counts[bindings::vm_event_item_BALLOON_MIGRATE as usize] as u64
}

impl Info {
    /// Reads the values.
    pub(crate) fn now() -> Self {
        /// One event for each zone, and the zones depend on the configuration.
        const FIRST_STALL: usize =
            (bindings::vm_event_item_ALLOCSTALL_NORMAL - bindings::zone_type_ZONE_NORMAL) as usize;
        let mut info: bindings::sysinfo = Default::default();

        // SAFETY: The pointer is valid.
        unsafe { bindings::si_meminfo(&mut info) };
        let available = bindings::si_mem_available();

        let mut counts = [0; EVENTS];
        let are_counted = read_events(&mut counts);
        let events = |event: usize, some: usize| {
            let counts = counts.iter().skip(event).take(some);

            are_counted.then(|| counts.map(|&count| count as u64).sum::<u64>())
        };
        let event = |event: bindings::vm_event_item| events(event as usize, 1);

        Self {
            free: bytes(info.freeram),
            total: bytes(info.totalram),
            available: bytes(available.max(0) as usize),
            caches: bytes(node_counter(bindings::node_stat_item_NR_FILE_PAGES)),
            swapped_in: event(bindings::vm_event_item_PSWPIN).map(|pages| pages << PAGE_SHIFT),
            swapped_out: event(bindings::vm_event_item_PSWPOUT).map(|pages| pages << PAGE_SHIFT),
            major_faults: event(bindings::vm_event_item_PGMAJFAULT),
            faults: event(bindings::vm_event_item_PGFAULT),
            #[cfg(CONFIG_HUGETLB_PAGE)]
            hugetlb_allocations: event(bindings::vm_event_item_HTLB_BUDDY_PGALLOC),
            #[cfg(CONFIG_HUGETLB_PAGE)]
            hugetlb_failures: event(bindings::vm_event_item_HTLB_BUDDY_PGALLOC_FAIL),
            #[cfg(not(CONFIG_HUGETLB_PAGE))]
            hugetlb_allocations: None,
            #[cfg(not(CONFIG_HUGETLB_PAGE))]
            hugetlb_failures: None,
            oom_kills: event(bindings::vm_event_item_OOM_KILL),
            allocation_stalls: events(FIRST_STALL, bindings::MAX_NR_ZONES as usize),
            async_scanned: bytes(node_counter(bindings::node_stat_item_PGSCAN_KSWAPD)),
            direct_scanned: bytes(node_counter(bindings::node_stat_item_PGSCAN_DIRECT)),
            async_reclaimed: bytes(node_counter(bindings::node_stat_item_PGSTEAL_KSWAPD)),
            direct_reclaimed: bytes(node_counter(bindings::node_stat_item_PGSTEAL_DIRECT)),
        }
    }
}

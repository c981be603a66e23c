// SPDX-License-Identifier: GPL-2.0

//! Numbers about the guest's memory, for statistics.
//!
//! C header: [`include/linux/vmstat.h`](srctree/include/linux/vmstat.h)

use crate::rust::{
    bindings,
    mm::node::counter as node_counter, //
};

use kernel::page::PAGE_SHIFT;

/// The guest's memory at some moment. Amounts of memory are in bytes; the rest are counts since it
/// booted. `None` stands for values that this kernel does not count.
#[derive(Clone, Copy, Default)]
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

impl Info {
    /// Reads the values.
    pub(crate) fn now() -> Self {
        let mut info: bindings::sysinfo = Default::default();

        // SAFETY: The pointer is valid.
        unsafe { bindings::si_meminfo(&mut info) };
        let available = bindings::si_mem_available();

        Self {
            free: bytes(info.freeram),
            total: bytes(info.totalram),
            available: bytes(available.max(0) as usize),
            caches: bytes(node_counter(bindings::node_stat_item_NR_FILE_PAGES)),
            async_scanned: bytes(node_counter(bindings::node_stat_item_PGSCAN_KSWAPD)),
            direct_scanned: bytes(node_counter(bindings::node_stat_item_PGSCAN_DIRECT)),
            async_reclaimed: bytes(node_counter(bindings::node_stat_item_PGSTEAL_KSWAPD)),
            direct_reclaimed: bytes(node_counter(bindings::node_stat_item_PGSTEAL_DIRECT)),
            ..Self::events()
        }
    }

    #[cfg(not(CONFIG_VM_EVENT_COUNTERS))]
    fn events() -> Self {
        Self::default()
    }

    #[cfg(CONFIG_VM_EVENT_COUNTERS)]
    fn events() -> Self {
        const LEN: usize = bindings::vm_event_item_NR_VM_EVENT_ITEMS as usize;
        /// One event for each zone, and the zones depend on the configuration.
        const FIRST_STALL: usize =
            (bindings::vm_event_item_ALLOCSTALL_NORMAL - bindings::zone_type_ZONE_NORMAL) as usize;
        let mut counts: [kernel::ffi::c_ulong; LEN] = [0; LEN];

        // SAFETY: The array has room for all numbers that the function writes.
        unsafe { bindings::all_vm_events(counts.as_mut_ptr()) };

        let count = |event: bindings::vm_event_item| Some(*counts.get(event as usize)? as u64);
        let stalls = counts.iter().skip(FIRST_STALL);

        Self {
            swapped_in: count(bindings::vm_event_item_PSWPIN).map(|pages| pages << PAGE_SHIFT),
            swapped_out: count(bindings::vm_event_item_PSWPOUT).map(|pages| pages << PAGE_SHIFT),
            major_faults: count(bindings::vm_event_item_PGMAJFAULT),
            faults: count(bindings::vm_event_item_PGFAULT),
            oom_kills: count(bindings::vm_event_item_OOM_KILL),
            allocation_stalls: Some(
                stalls
                    .take(bindings::MAX_NR_ZONES as usize)
                    .map(|&count| count as u64)
                    .sum(),
            ),
            #[cfg(CONFIG_HUGETLB_PAGE)]
            hugetlb_allocations: count(bindings::vm_event_item_HTLB_BUDDY_PGALLOC),
            #[cfg(CONFIG_HUGETLB_PAGE)]
            hugetlb_failures: count(bindings::vm_event_item_HTLB_BUDDY_PGALLOC_FAIL),
            ..Self::default()
        }
    }
}

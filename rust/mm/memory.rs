// SPDX-License-Identifier: GPL-2.0

//! How much memory the guest has left.
//!
//! C header: [`include/linux/mm.h`](srctree/include/linux/mm.h)

use crate::rust::bindings;

use core::{
    mem::MaybeUninit,
    ops::Range, //
};
use kernel::{
    page::PAGE_SHIFT,
    prelude::*,
    types::NotThreadSafe, //
};

/// What is known of the guest's memory at some moment. The fields say what they are in the C
/// header.
pub(crate) use bindings::balloon_rs_memory as Info;

impl Info {
    /// Takes a look.
    pub(crate) fn now() -> Self {
        let mut info = MaybeUninit::zeroed();

        // SAFETY: The function fills the struct in, all fields of which are integers
        // or truth values.
        unsafe {
            bindings::balloon_rs_memory_info(info.as_mut_ptr());
            info.assume_init()
        }
    }
}

/// Returns the kernel pages that can be had without swapping: `MemAvailable` of /proc/meminfo, but
/// for two things. What the kernel keeps back at the moment may be more than 100 MiB, and an
/// allocation that wants some of it kills a process. What processes have mapped of files is in use,
/// such as the programs that run: they would wait for the disk with each step.
pub(crate) fn available_pages() -> usize {
    // SAFETY: The functions have no preconditions.
    let (pages, mapped) = unsafe {
        (
            bindings::si_mem_available(),
            bindings::balloon_rs_mapped_file_pages(),
        )
    };

    usize::try_from(pages)
        .unwrap_or(0)
        .saturating_sub(mapped)
        .saturating_sub(boosted_pages())
}

/// Returns the kernel pages that the guest has in all, in balloons or not.
pub(crate) fn present_pages() -> usize {
    // SAFETY: The function has no preconditions.
    unsafe { bindings::balloon_rs_present_pages() as usize }
}

/// Returns the kernel pages that are kept back for a while.
pub(crate) fn boosted_pages() -> usize {
    // SAFETY: The function has no preconditions.
    unsafe { bindings::balloon_rs_boosted_pages() as usize }
}

/// A node: memory that is equally far from all processors.
///
/// # Invariants
///
/// There is memory on it, or there was.
#[derive(Clone, Copy, PartialEq, Eq)]
pub(crate) struct Node(c_int);

impl Node {
    /// Returns all that have memory.
    pub(crate) fn all() -> impl Iterator<Item = Self> {
        (0..)
            // SAFETY: The function has no preconditions.
            .map(|n| unsafe { bindings::balloon_rs_nth_node(n) })
            .take_while(|&number| number >= 0)
            // INVARIANT: It has memory.
            .map(Self)
    }

    /// Returns the node `number`, which has memory or had some.
    pub(in crate::rust) fn new(number: usize) -> Option<Self> {
        // INVARIANT: That is what the caller says.
        c_int::try_from(number).ok().map(Self)
    }

    /// Returns a number that is larger than those of all nodes.
    pub(in crate::rust) fn count() -> usize {
        // SAFETY: The function has no preconditions.
        unsafe { bindings::balloon_rs_node_ids() as usize }
    }

    /// Returns its number.
    pub(in crate::rust) fn number(self) -> c_int {
        self.0
    }

    /// Returns its place (page frame numbers of kernel pages). Parts of that may belong to other
    /// nodes, or to none.
    pub(in crate::rust) fn span(self) -> Range<u64> {
        // SAFETY: By the type invariants it is a node.
        unsafe {
            let start = bindings::balloon_rs_node_start(self.0) as u64;

            start..bindings::balloon_rs_node_end(self.0) as u64
        }
    }

    /// Returns how many kernel pages there are.
    pub(crate) fn present_pages(self) -> usize {
        // SAFETY: By the type invariants it is a node.
        unsafe { bindings::balloon_rs_node_present(self.0) as usize }
    }

    /// Returns the kernel pages that are available there without swapping: what [`available_pages`] is
    /// for all nodes.
    pub(crate) fn available_pages(self) -> usize {
        // SAFETY: By the type invariants it is a node.
        unsafe { bindings::balloon_rs_node_available(self.0) as usize }
    }

    /// Returns whether an allocation may just have failed for lack of memory there.
    pub(crate) fn is_short(self) -> bool {
        // SAFETY: By the type invariants it is a node.
        unsafe { bindings::balloon_rs_node_is_short(self.0) }
    }
}

/// Returns the kernel pages that are free.
pub(crate) fn free_pages() -> usize {
    // SAFETY: The function has no preconditions.
    unsafe { bindings::balloon_rs_free_pages() as usize }
}

/// What part of the free memory is always left to the guest, as a divisor.
const LEFT_FREE: usize = 8;

/// Returns the kernel pages that the guest can do without for a while: free ones, but for an eighth
/// of them, and for 16 MiB and 1/512 of all memory, which is more than what the page allocator
/// wants to have at hand; and no more than leave `floor` available.
///
/// What the kernel cannot use for itself does not count, however much there is of it.
pub(crate) fn spare_pages(floor: usize) -> usize {
    let movable = Movable::now();
    let free = free_pages().saturating_sub(movable.free);
    let always_free = (16 << (20 - PAGE_SHIFT)) + total_pages() / 512;

    free.saturating_sub((free / LEFT_FREE).max(always_free))
        .min(movable.others_available().saturating_sub(floor))
}

/// What lies where only pages may be that can be moved, `ZONE_MOVABLE` and CMA, in kernel pages.
struct Movable {
    free: usize,
    caches: usize,
}

impl Movable {
    fn now() -> Self {
        let (mut free, mut caches) = (0, 0);

        // SAFETY: The function has no preconditions but valid pointers.
        unsafe { bindings::balloon_rs_movable_pages(&mut free, &mut caches) };
        Self { free, caches }
    }

    /// Returns the kernel pages that can be had elsewhere without swapping.
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
pub(crate) struct Taking(NotThreadSafe);

impl Taking {
    /// Waits for it.
    pub(crate) fn begin() -> Self {
        // SAFETY: The function has no preconditions but that it may sleep, as its callers may.
        unsafe { bindings::balloon_rs_lock_spare() };
        Self(NotThreadSafe)
    }
}

impl Drop for Taking {
    fn drop(&mut self) {
        // SAFETY: This thread has locked it when it made this value, which stays with it.
        unsafe { bindings::balloon_rs_unlock_spare() };
    }
}

/// Puts the free pages that the processors keep on lists of their own back to where blocks are made
/// of them. They may be an eighth of the memory when much has just been freed. May sleep.
pub(crate) fn drain_free_lists() {
    // SAFETY: The function has no preconditions but that it may sleep, as its callers may.
    unsafe { bindings::balloon_rs_drain_free_lists() };
}

/// Returns the free kernel pages on the per-CPU page lists, which [`available_pages`] does not
/// count.
pub(crate) fn listed_pages() -> usize {
    // SAFETY: The function has no preconditions.
    unsafe { bindings::balloon_rs_listed_pages() as usize }
}

/// Returns the order of a page block: what the kernel keeps together of one kind, to have memory in
/// large pieces.
pub(crate) fn page_block_order() -> u32 {
    // SAFETY: The function has no preconditions.
    unsafe { bindings::balloon_rs_page_block_order() }
}

/// Returns what each word of free pages is set to when they are freed; `None` if they are left as
/// they are.
pub(crate) fn free_page_value() -> Option<u32> {
    let mut value = 0;

    // SAFETY: The function has no preconditions but a valid pointer.
    unsafe { bindings::balloon_rs_free_page_value(&mut value) }.then_some(value)
}

/// Returns whether the kernel is a crash kernel: it was started to save the memory of a kernel that
/// has panicked, has a small part of the guest's memory, and needs all of that.
pub(crate) fn is_crash_kernel() -> bool {
    // SAFETY: The function has no preconditions.
    unsafe { bindings::balloon_rs_is_crash_kernel() }
}

/// Returns whether the kernel writes to all memory that it allocates (`init_on_alloc=1`): the host
/// has to have it all first, and it takes much longer.
pub(crate) fn is_zeroed_on_allocation() -> bool {
    // SAFETY: The function has no preconditions.
    unsafe { bindings::balloon_rs_zeroes_on_alloc() }
}

/// Returns the kernel pages that the guest has in all: `MemTotal` of /proc/meminfo.
pub(crate) fn total_pages() -> usize {
    // SAFETY: The function has no preconditions.
    unsafe { bindings::balloon_rs_total_pages() as usize }
}

/// Has the kernel keep back `pages` kernel pages of each zone for a while.
#[cfg(CONFIG_VIRTIO_BALLOON_RS_KUNIT_TEST)]
pub(crate) fn boost(pages: usize) {
    // SAFETY: The function has no preconditions.
    let zones = (0..).map(|n| unsafe { bindings::balloon_rs_nth_zone(n) });

    for zone in zones.take_while(|zone| !zone.is_null()) {
        // SAFETY: Zones exist as long as the kernel runs. Others write the field as well, and no
        // reference to it is made.
        unsafe { (&raw mut (*zone).watermark_boost).write_volatile(pages as c_ulong) };
    }
}

/// Returns the kernel pages in all balloons: `nr_balloon_pages` of /proc/vmstat.
#[cfg(CONFIG_VIRTIO_BALLOON_RS_KUNIT_TEST)]
pub(crate) fn ballooned_pages() -> usize {
    // SAFETY: The function has no preconditions.
    unsafe { bindings::balloon_rs_ballooned_pages() as usize }
}

/// Drops `owner` while its page `pfn` has a memory error. Returns whether the page allocator has
/// kept that page aside; `None` if this kernel knows of no errors. The page is mended after that.
///
/// # Safety
///
/// The page must be one that dropping `owner` frees.
#[cfg(CONFIG_VIRTIO_BALLOON_RS_KUNIT_TEST)]
pub(in crate::rust) unsafe fn drop_with_error<T>(owner: T, pfn: usize) -> Option<bool> {
    // SAFETY: By the requirements of this function the page is ours.
    let has_error = unsafe { bindings::balloon_rs_set_error(pfn) };

    drop(owner);
    drain_free_lists();
    // SAFETY: It was freed: the page allocator has it, or has kept it aside.
    has_error.then(|| unsafe { bindings::balloon_rs_mend(pfn) })
}

// SPDX-License-Identifier: GPL-2.0

//! Draining the per-CPU page lists.

use crate::rust::{
    bindings,
    mm::{
        contig::contig_pages::alloc_range,
        memory,
        node::Node,
        pages::{
            gfp::Gfp,
            owned::Allocated,
            page::pageblock_order, //
        },
        pfn_range::PfnRange,
        zone::Zone, //
    }, //
};

use kernel::page::PAGE_SHIFT;
#[cfg(CONFIG_VIRTIO_BALLOON_RS_KUNIT_TEST)]
use kernel::sync::atomic::{
    Atomic,
    Relaxed, //
};

/// The zones to drain: those from which the kernel allocates, and memory below 4 GiB. Each with the
/// flags for its memory, and for its movable memory.
const ZONES: &[(bindings::zone_type, Gfp, Gfp)] = &[
    (
        bindings::zone_type_ZONE_NORMAL,
        Gfp::DRAIN_NORMAL,
        Gfp::DRAIN_NORMAL_MOVABLE,
    ),
    #[cfg(CONFIG_ZONE_DMA32)]
    (
        bindings::zone_type_ZONE_DMA32,
        Gfp::DRAIN_DMA32,
        Gfp::DRAIN_DMA32_MOVABLE,
    ),
];

/// How many kernel pages on the lists make it worthwhile to drain them before the balloon stops:
/// 4 MiB.
pub(crate) const WORTHWHILE: usize = 1 << (22 - PAGE_SHIFT);

/// How many times the lists were drained.
#[cfg(CONFIG_VIRTIO_BALLOON_RS_KUNIT_TEST)]
pub(crate) static DRAINS: Atomic<usize> = Atomic::new(0);

/// From which part of the memory on the lists it is worthwhile to drain them before free memory is
/// listed, as a divisor. The kernel drains up to 2,016 pages of a list with interrupts disabled,
/// for up to 0.3 ms.
const LONG_LISTS: usize = 64;

/// Returns whether so much of the memory is on the lists that they are drained before free memory
/// is listed.
pub(crate) fn has_long_lists() -> bool {
    memory::pcp_pages() >= memory::total_pages() / LONG_LISTS
}

/// Drains the lists if they [hold enough](has_long_lists).
pub(crate) fn drain_long_lists() {
    if has_long_lists() {
        drain_free_lists();
    }
}

/// Drains the per-CPU page lists, so that their pages can merge into blocks. The lists may hold an
/// eighth of the memory after much was freed. May sleep.
///
/// `drain_all_pages()` is not exported. But allocating a contiguous range first drains the lists of
/// its zone. So this allocates a free pageblock of each zone, if possible not a movable one, since
/// most just freed ones are movable. If none is free, it allocates a movable page: a larger part of
/// a pageblock may be of another migrate type, and the kernel would raise a watermark. Without
/// `CONFIG_CONTIG_ALLOC` the lists are not drained.
pub(crate) fn drain_free_lists() {
    #[cfg(CONFIG_VIRTIO_BALLOON_RS_KUNIT_TEST)]
    DRAINS.add(1, Relaxed);
    if !cfg!(CONFIG_CONTIG_ALLOC) {
        return;
    }
    for node in Node::online() {
        for &(kind, gfp, movable) in ZONES {
            let block = pageblock_order();
            let _ = [(gfp, block), (movable, block), (movable, 0)]
                .into_iter()
                .any(|(gfp, order)| drain_zone(node, gfp, kind, order));
        }
    }
}

/// Drains the zone `kind` of a node by allocating a free block in it. Returns whether there was a
/// free block.
fn drain_zone(node: Node, gfp: Gfp, kind: bindings::zone_type, order: u32) -> bool {
    let Some(zone) = node.zones().nth(kind as usize) else {
        return false;
    };
    let Some(block) = Allocated::new(Some(node), gfp, order) else {
        return false;
    };
    let Some(pfns) = PfnRange::new(block.page().pfn() as u64, block.len() as u64) else {
        return false;
    };
    let is_it = Zone::of(block.page()) == zone || zone.present_pages() == 0;

    drop(block);
    // The block may have been reallocated meanwhile: the kernel drains the lists before it fails,
    // so that is fine.
    //
    // SAFETY: The block was just allocated, so its pages exist, in one zone.
    is_it && unsafe { alloc_range(pfns) }.is_ok()
}

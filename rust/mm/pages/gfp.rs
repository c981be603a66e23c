// SPDX-License-Identifier: GPL-2.0

//! The flags for pages that the driver allocates to send them to the device. Memory for its own use
//! has those of the kernel crate.
//!
//! C header: [`include/linux/gfp_types.h`](srctree/include/linux/gfp_types.h)

use crate::rust::{
    bindings::{
        self,
        gfp_t, //
    },
    mm::node::Node, //
};

use kernel::prelude::*;

const RECLAIM: gfp_t =
    1 << bindings::___GFP_DIRECT_RECLAIM_BIT | 1 << bindings::___GFP_KSWAPD_RECLAIM_BIT;
const MOVABLE: gfp_t = 1 << bindings::___GFP_MOVABLE_BIT;
const THISNODE: gfp_t = 1 << bindings::___GFP_THISNODE_BIT;
const DMA32: gfp_t = 1 << bindings::___GFP_DMA32_BIT;

/// The allocation fails without a warning, and does not use reserves.
const EASY: gfp_t = 1 << bindings::___GFP_NORETRY_BIT
    | 1 << bindings::___GFP_NOWARN_BIT
    | 1 << bindings::___GFP_NOMEMALLOC_BIT;

/// Order-0 pages of the balloon can be migrated, if the kernel supports that.
const BASE_PAGE: gfp_t = EASY
    | match cfg!(CONFIG_BALLOON_MIGRATION) {
        true => bindings::GFP_HIGHUSER_MOVABLE,
        false => bindings::GFP_HIGHUSER,
    };

/// Flags for the page allocator. Only these exist.
#[derive(Clone, Copy)]
pub(in crate::rust) struct Gfp(gfp_t);

/// Defines all [`Gfp`], and their common flags.
macro_rules! define {
    ($($(#[$attribute:meta])* $name:ident = $flags:expr;)*) => {
        impl Gfp {
            $($(#[$attribute])* pub(in crate::rust) const $name: Self = Self($flags);)*

            /// The flags of all allocations.
            pub(in crate::rust::mm) const ALL: gfp_t = 0 $(| $flags)*;
        }
    };
}

define! {
    /// A block of the balloon that stays unsplit.
    UNSPLIT_BLOCK = (bindings::GFP_HIGHUSER | EASY) & !RECLAIM;
    /// A block of the balloon that is split.
    SPLIT_BLOCK = BASE_PAGE & !RECLAIM;
    /// An order-0 page of the balloon.
    BALLOON_PAGE = BASE_PAGE;
    /// A block for hints: no reclaim, since OOM notifiers wait for it.
    HINT_BLOCK = EASY;
    /// A block that is freed at once: from `ZONE_NORMAL`.
    DRAIN_NORMAL = EASY;
    /// The same from its movable memory.
    DRAIN_NORMAL_MOVABLE = EASY | MOVABLE;
    /// The same from `ZONE_DMA32`.
    #[cfg_attr(not(CONFIG_ZONE_DMA32), allow(dead_code))]
    DRAIN_DMA32 = EASY | DMA32;
    /// The same from its movable memory.
    #[cfg_attr(not(CONFIG_ZONE_DMA32), allow(dead_code))]
    DRAIN_DMA32_MOVABLE = EASY | DMA32 | MOVABLE;
    /// The pages of a contiguous range.
    CONTIG_RANGE = 1 << bindings::___GFP_NOWARN_BIT;
}

const _: () = assert!(Gfp::HINT_BLOCK.0 & RECLAIM == 0);

impl Gfp {
    /// Returns the flags.
    pub(in crate::rust::mm) fn flags(self) -> gfp_t {
        self.0
    }

    /// Returns the number of `node`, and the flags for memory of that node only. For any node,
    /// returns `NUMA_NO_NODE`. The flags do not request a compound page.
    pub(super) fn on(self, node: Option<Node>) -> (c_int, gfp_t) {
        let gfp = self.0 & !(1 << bindings::___GFP_COMP_BIT);

        match node {
            None => (bindings::NUMA_NO_NODE, gfp),
            Some(node) => (node.number(), gfp | THISNODE),
        }
    }
}

// SPDX-License-Identifier: GPL-2.0

//! Memory: pages and blocks that the driver owns, zones, nodes and memory blocks.

pub(crate) mod balloon;
pub(crate) mod contig;
pub(crate) mod hotplug;
pub(crate) mod info;
pub(crate) mod locks;
pub(crate) mod memory;
pub(crate) mod node;
pub(crate) mod pages;
pub(crate) mod pfn_range;
pub(crate) mod zone;

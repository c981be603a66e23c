// SPDX-License-Identifier: GPL-2.0

//! Memory: pages and blocks that the driver owns, zones, nodes and memory blocks.

pub(crate) mod balloon_pages;
pub(crate) mod batch;
pub(crate) mod caches;
pub(crate) mod contig;
pub(crate) mod drain;
mod gfp;
// Without memory hotplug nothing comes online.
#[cfg_attr(
    not(CONFIG_MEMORY_HOTREMOVE),
    allow(dead_code, unused_imports, unused_variables)
)]
pub(crate) mod hotplug;
pub(crate) mod info;
#[cfg_attr(not(CONFIG_MEMORY_HOTREMOVE), allow(dead_code))]
mod kept;
pub(crate) mod locks;
pub(crate) mod memory;
pub(crate) mod memory_block;
pub(crate) mod node;
pub(crate) mod node_pages;
mod owned;
pub(crate) mod page;
pub(crate) mod page_list;
#[cfg(CONFIG_VIRTIO_BALLOON_RS_KUNIT_TEST)]
mod page_list_tests;
pub(crate) mod page_reporting;
pub(crate) mod page_run;
pub(crate) mod pfn_range;
pub(crate) mod range_stack;
pub(crate) mod replace;
mod ring;
pub(crate) mod zone;

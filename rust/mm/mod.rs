// SPDX-License-Identifier: GPL-2.0

//! Memory: pages, zones, nodes and memory blocks.

pub(crate) mod balloon_pages;
pub(crate) mod batch;
pub(crate) mod caches;
pub(crate) mod claim;
pub(crate) mod memory;
pub(crate) mod memory_blocks;
pub(crate) mod page_list;
pub(crate) mod page_reporting;
pub(crate) mod page_run;
pub(crate) mod range_stack;
pub(crate) mod zone;

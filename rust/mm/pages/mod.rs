// SPDX-License-Identifier: GPL-2.0

//! Pages that the driver owns: single pages, blocks, and lists, ranges and batches of these.

pub(crate) mod batch;
pub(crate) mod block_range;
pub(super) mod gfp;
#[cfg_attr(not(CONFIG_MEMORY_HOTREMOVE), allow(dead_code))]
pub(super) mod kept;
pub(super) mod owned;
pub(crate) mod page;
pub(crate) mod page_list;
pub(crate) mod range_stack;
pub(super) mod ring;

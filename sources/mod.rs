// SPDX-License-Identifier: GPL-2.0

//! Where the pages for the balloon, for hints and for the host's requests come from.

pub(crate) mod candidates;
pub(crate) mod memory_blocks;
pub(crate) mod page_allocator;
pub(crate) mod source;

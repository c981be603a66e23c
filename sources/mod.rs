// SPDX-License-Identifier: GPL-2.0

//! The sources of pages for the balloon, for hints and for host requests.

#![forbid(unsafe_code)]

mod attempts;
pub(crate) mod candidates;
pub(crate) mod memory_blocks;
pub(crate) mod nodes;
mod offline_blocks;
pub(crate) mod page_allocator;
pub(crate) mod source;

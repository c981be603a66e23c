// SPDX-License-Identifier: GPL-2.0

//! Where the pages for the balloon, hints and requests come from.

pub(crate) mod memory_blocks;

// SPDX-License-Identifier: GPL-2.0

//! Memory that goes offline and comes online.

// Without memory hotplug nothing comes online.
#![cfg_attr(
    not(CONFIG_MEMORY_HOTREMOVE),
    allow(dead_code, unused_imports, unused_variables)
)]

pub(crate) mod memory_block;
pub(crate) mod online;

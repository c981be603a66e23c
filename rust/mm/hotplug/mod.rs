// SPDX-License-Identifier: GPL-2.0

//! Memory hotplug.

// Without memory hotplug no memory comes online.
#![cfg_attr(
    not(CONFIG_MEMORY_HOTREMOVE),
    allow(dead_code, unused_imports, unused_variables)
)]

pub(crate) mod exclusion;
pub(crate) mod memory_block;
pub(crate) mod online;

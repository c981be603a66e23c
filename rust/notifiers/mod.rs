// SPDX-License-Identifier: GPL-2.0

//! Callbacks for events of the kernel: out of memory, memory offlining, suspend, shrinkers, reports
//! of free pages.

pub(crate) mod memory_hotplug;
mod notifier;
pub(crate) mod oom;
pub(crate) mod page_reporting;
pub(crate) mod shrinker;
pub(crate) mod suspend;

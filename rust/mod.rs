// SPDX-License-Identifier: GPL-2.0

//! The layer between the driver and the kernel's C: the only place with `unsafe`.
//!
//! What stands here is what the `kernel` crate lacks, written as if it were a part of it. The layer
//! has a safe interface; the driver's own modules forbid `unsafe`.

#![allow(unsafe_code)]

// Only this module may look into the generated bindings.
mod bindings;

pub(crate) mod balloon_pages;
pub(crate) mod batch;
pub(crate) mod caches;
pub(crate) mod claim;
pub(crate) mod debugfs;
#[cfg(CONFIG_VIRTIO_BALLOON_RS_KUNIT_TEST)]
pub(crate) mod fake_device;
pub(crate) mod memory;
pub(crate) mod memory_blocks;
pub(crate) mod memory_hotplug;
mod notifier;
pub(crate) mod oom;
pub(crate) mod page_list;
pub(crate) mod page_reporting;
pub(crate) mod page_run;
pub(crate) mod range_stack;
pub(crate) mod shrinker;
pub(crate) mod sleep;
pub(crate) mod sysfs;
pub(crate) mod task;
pub(crate) mod thread;
pub(crate) mod trace;
pub(crate) mod virtio;
pub(crate) mod virtio_balloon;
pub(crate) mod virtqueue;
pub(crate) mod wait;
pub(crate) mod wakeup;
pub(crate) mod zone;

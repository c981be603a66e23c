// SPDX-License-Identifier: GPL-2.0

//! Files of a device in debugfs and sysfs, and files of the kernel that the driver writes.

pub(crate) mod caches;
#[cfg_attr(not(CONFIG_DEBUG_FS), allow(dead_code))]
pub(crate) mod debugfs;
pub(crate) mod file;
pub(crate) mod sysfs;

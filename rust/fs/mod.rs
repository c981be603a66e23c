// SPDX-License-Identifier: GPL-2.0

//! Files of a device in debugfs and sysfs.

pub(crate) mod debugfs;
pub(crate) mod sysfs;

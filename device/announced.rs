// SPDX-License-Identifier: GPL-2.0

//! The attributes of a device that can be polled for changes.

#![forbid(unsafe_code)]

use crate::rust::virtio;

use kernel::prelude::*;

/// The place of an attribute in sysfs.
pub(crate) struct Announced {
    /// The directory of all attributes.
    pub(crate) directory: &'static CStr,
    pub(crate) name: &'static CStr,
}

/// Why the balloon is smaller than the target.
pub(crate) const STOP_REASON: Announced = Announced {
    directory: c"balloon",
    name: c"stop_reason",
};

impl Announced {
    /// Announces that the attribute of `dev` has changed, unless the device is gone. May sleep.
    pub(crate) fn announce(&self, dev: &virtio::Handle) {
        dev.with(|dev| dev.announce_attribute(self.directory, self.name));
    }
}

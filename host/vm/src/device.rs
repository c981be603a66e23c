// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! The balloon devices that a guest can have.

use std::fmt;

use serde_json::{Value, json};

/// The guest's balloon device.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Device {
    /// QEMU's own.
    Qemu,
    /// This repository's, in a process of its own. The guest's memory is a shared file then.
    VhostUser,
    /// The same with the extended protocol.
    Extended,
}

impl Device {
    /// Its name on a command line.
    pub fn name(self) -> &'static str {
        match self {
            Self::Qemu => "qemu",
            Self::VhostUser => "vhost-user",
            Self::Extended => "extended",
        }
    }

    /// QEMU's options for a device in another process.
    pub(crate) fn properties(self) -> Value {
        // A test of the daemon compares these lines with its queues.
        match self {
            Self::Extended => json!({ "num_vqs": 6, "vq_size": 256, "config_size": 24 }),
            Self::Qemu | Self::VhostUser => {
                json!({ "num_vqs": 5, "vq_size": 256, "config_size": 16 })
            }
        }
    }
}

/// The QEMU option for a balloon device in another process: `balloon0` on the transport `pci` or `device`, which is
/// virtio-mmio, with its `properties`. `chardev` connects QEMU with the process.
pub(crate) fn vhost_user_balloon(transport: &str, chardev: &str, properties: &Value) -> Value {
    let mut device = json!({
        "driver": format!("vhost-user-test-device-{transport}"),
        "id": "balloon0",
        "chardev": chardev,
        "virtio-id": 5,
    });
    if let (Some(device), Some(properties)) = (device.as_object_mut(), properties.as_object()) {
        device.extend(properties.clone());
    }
    device
}

impl fmt::Display for Device {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Qemu => "QEMU's device",
            Self::VhostUser => "vhost-user device",
            Self::Extended => "vhost-user device with extensions",
        })
    }
}

/// The optional features of a balloon device, in addition to statistics.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Offer {
    /// Deflate on OOM.
    DeflateOnOom,
    /// Free page hinting.
    FreePageHint,
    /// Free page reporting.
    FreePageReporting,
    /// Page poison: the value of free pages.
    PagePoison,
}

impl Offer {
    /// The property of QEMU's device.
    pub(crate) fn property(self) -> &'static str {
        match self {
            Self::DeflateOnOom => "deflate-on-oom=on",
            Self::FreePageHint => "free-page-hint=on",
            Self::FreePageReporting => "free-page-reporting=on",
            Self::PagePoison => "page-poison=on",
        }
    }

    /// The daemon's name of the feature.
    pub(crate) fn feature(self) -> &'static str {
        match self {
            Self::DeflateOnOom => "deflate-on-oom",
            Self::FreePageHint => "free-page-hinting",
            Self::FreePageReporting => "free-page-reporting",
            Self::PagePoison => "page-poison",
        }
    }
}

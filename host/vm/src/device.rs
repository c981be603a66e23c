// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! The guest's balloon device: what there is to choose from.

use std::fmt;

/// Whose balloon device the guest has.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Device {
    /// QEMU's own.
    Qemu,
    /// This repository's, in a process of its own. The guest's memory is a shared file then.
    VhostUser,
    /// The same with the extended protocol.
    Extended,
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

/// What a balloon device may offer beside statistics and the balloon itself.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Offer {
    /// The guest takes memory back before it kills a process.
    DeflateOnOom,
    /// The guest says for a migration which memory is free.
    FreePageHint,
    /// The guest says all the time which memory is free.
    FreePageReporting,
    /// The guest says what free memory is filled with.
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

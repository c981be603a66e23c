// SPDX-License-Identifier: GPL-2.0

//! Why the balloon is below its target: for the log, and for the device.
//!
//! Without it the host only sees a balloon that does not grow, and not the reason.

#![forbid(unsafe_code)]

use crate::rust::virtio_balloon::stop_reason;

/// What keeps the balloon from growing.
#[derive(Clone, Copy, PartialEq, Eq)]
pub(crate) enum StopReason {
    /// The available memory would fall below the reserve.
    Floor,
    /// No memory could be allocated.
    NoMemory,
    /// The guest has just run out of memory.
    AfterOom,
    /// The guest's administrator has turned ballooning off.
    Excluded,
}

impl StopReason {
    /// Returns the text for the log.
    pub(crate) fn words(self) -> &'static str {
        match self {
            Self::Floor => "available memory is down to the reserve (floor_mib)",
            Self::NoMemory => "no memory can be allocated",
            Self::AfterOom => "the guest has run out of memory",
            Self::Excluded => "inflate=0",
        }
    }

    /// Returns the word for programs for what [`value`](Self::value) has returned.
    pub(crate) fn name(value: u32) -> &'static str {
        match value {
            stop_reason::FLOOR => "floor",
            stop_reason::NO_MEMORY => "no-memory",
            stop_reason::AFTER_OOM => "after-oom",
            stop_reason::EXCLUDED => "excluded",
            _ => "none",
        }
    }

    /// Returns the number of the protocol.
    pub(crate) fn value(reason: Option<Self>) -> u32 {
        match reason {
            None => stop_reason::NONE,
            Some(Self::Floor) => stop_reason::FLOOR,
            Some(Self::NoMemory) => stop_reason::NO_MEMORY,
            Some(Self::AfterOom) => stop_reason::AFTER_OOM,
            Some(Self::Excluded) => stop_reason::EXCLUDED,
        }
    }
}

// SPDX-License-Identifier: GPL-2.0

//! Why the balloon is smaller than the host wants it to be: for the log, and for a host that wants
//! to know.
//!
//! Without it a host sees a balloon that does not move, and can only guess.

#![forbid(unsafe_code)]

use crate::rust::{
    virtio,
    virtio_balloon::{
        stop_reason,
        STOP_REASON, //
    }, //
};

use kernel::prelude::*;

/// What keeps the balloon from growing.
#[derive(Clone, Copy, PartialEq, Eq)]
pub(crate) enum StopReason {
    /// The guest would have too little left.
    Floor,
    /// There is no memory to be had.
    NoMemory,
    /// The guest has just run out of memory.
    AfterOom,
    /// The guest's administrator does not want it.
    Excluded,
}

impl StopReason {
    /// Returns the words for the log.
    pub(crate) fn words(self) -> &'static str {
        match self {
            Self::Floor => "the available memory has come down to floor_mib",
            Self::NoMemory => "the guest has no more memory to give",
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

/// Tells a device that wants to know.
pub(crate) struct StopReasonReporter {
    /// Whether it wants to.
    wanted: bool,
    /// What it was told last.
    told: u32,
}

impl StopReasonReporter {
    /// Begins with a device that was reset, which knows of no reason (docs/protocol.md, SR-V1).
    pub(crate) fn new(wanted: bool) -> Self {
        Self {
            wanted,
            told: stop_reason::NONE,
        }
    }

    /// Tells the device `reason`, unless it knows that already.
    ///
    /// # Errors
    ///
    /// `ENODEV` if it is gone.
    pub(crate) fn tell(&mut self, config: &virtio::Config, reason: Option<StopReason>) -> Result {
        let value = StopReason::value(reason);

        if self.wanted && self.told != value {
            config.write_le32(STOP_REASON, value)?;
            self.told = value;
        }

        Ok(())
    }
}
